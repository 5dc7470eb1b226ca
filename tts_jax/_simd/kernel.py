"""The loop over the steps of lanes, written in LLVM's vector types and compiled."""

import ctypes
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from tts_jax._simd.graph import (
    CHUNK,
    OPERATIONS,
    TRACED_LANES,
    Graph,
    Node,
    Unsupported,
    rows_of,
    trace,
)
from tts_jax._simd.machine import compiled, has_fma
from tts_jax._simd.memory import aligned
from tts_jax._simd.operations import EMITTERS, call, like, number_type, splat


_ABREAST_DRAWN = CHUNK  # rows of samples that are emitted together
_ABREAST = 1
_IN_REGISTERS = 64  # rows of one lane that are kept out of memory
_COPIES = 4  # of the only number of `[lanes]`
_ROW_BLOCK = 32  # rows of one lane that are taken together, where they are more


# --- layouts --------------------------------------------------------------------------------


class Layout:
    """How `[lanes]` and `[rows, lanes]` become LLVM values.

    With several lanes per group a row is a vector of lanes, and rows are looped over. With one,
    a block of rows is a vector, and `[lanes]` is its only number `_COPIES` times, because
    processors compare and select faster in vectors; up to `_IN_REGISTERS` rows are one block,
    padded to a power of two, and more are looped over in blocks of `_ROW_BLOCK`.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.by_lane = width > 1

    def kind(self, dtype: np.dtype, size: int) -> Any:
        """The type of a value of a block of `size` rows (0: a scalar, 1: `[lanes]`)."""
        count = self.width if self.by_lane else _COPIES if size == 1 else size
        return ir.VectorType(number_type(dtype), count) if size else number_type(dtype)

    def stored(self, dtype: np.dtype, size: int) -> Any:
        """The type in memory."""
        return self.kind(dtype, size if size != 1 or self.by_lane else 0)

    def size(self, rows: int) -> int:
        """Rows of the block that holds all of `rows`, where one does."""
        return rows if self.by_lane or rows < 2 else max(CHUNK, 1 << (rows - 1).bit_length())

    def place(self, builder: Any, memory: "Memory", row: Any, size: int) -> Any:
        """Where the block of `size` rows of `memory` from `row` on lies."""
        number = memory.first
        if row is not None and memory.rows > 1:
            number = row if number is None else builder.add(number, row)
        pointer = memory.base
        if number is not None:
            pointer = builder.gep(pointer, [builder.mul(number, _i64(memory.stride))])
        return builder.bitcast(pointer, self.stored(memory.dtype, size).as_pointer())

    def align(self, dtype: np.dtype) -> int:
        """Bytes to whose multiples values are aligned."""
        size = dtype.itemsize * (self.width if self.by_lane else 1)
        return min(64, size & -size)


class Memory:
    """An array of one group, `[rows, width]`.

    `first` is the number of its first row, and rows are `stride` numbers apart.
    """

    def __init__(
        self, base: Any, dtype: np.dtype, rows: int, first: Any = None, stride: int = 1
    ) -> None:
        self.base, self.dtype, self.rows = base, dtype, rows
        self.first, self.stride = first, stride


def _i64(value: int) -> Any:
    return ir.Constant(ir.IntType(64), value)


class Pass:
    """The values of one graph at one step, as far as they have been emitted.

    Arguments:
        builder: where instructions go.
        layout: how values are laid out.
        graph: what to compute.
        inputs: for each input node a `Memory`, or a function of (builder, row) giving its value.
        scratch: a `Memory` for each row node that a later level reads.
    """

    def __init__(self, builder, layout, graph, inputs, scratch) -> None:
        self.builder, self.layout, self.graph = builder, layout, graph
        self.inputs, self.scratch = inputs, scratch
        self.values: dict[int, Any] = {}
        self.size = 1  # rows of the block that is being emitted

    def value(self, node: Node, row: Any, rows: int, known: dict[int, Any]) -> Any:
        """`node` at `row` as an operand of an operation on `rows` rows."""
        found = known.get(node.number, self.values.get(node.number))
        if found is None:
            found = self._fetched(node, row)
            (known if node.rows > 1 else self.values)[node.number] = found
        kind = self.layout.kind(node.dtype, self.size if rows > 1 else rows)
        return found if found.type == kind else splat(self.builder, found, kind)

    def _fetched(self, node: Node, row: Any) -> Any:
        if node.op == "constant":
            return ir.Constant(number_type(node.dtype), node.params["value"].item())
        if node.op == "element":
            (array,) = node.inputs
            return self._element(array, node.params["index"])
        source = self.inputs.get(node.number) or self.scratch.get(node.number)
        if isinstance(source, Memory):
            size = self.size if node.rows > 1 else node.rows
            place = self.layout.place(self.builder, source, row, size)
            found = self.builder.load(place, align=self.layout.align(source.dtype))
            return splat(self.builder, found, self.layout.kind(source.dtype, size))
        if source is None:
            raise AssertionError(f"{node.op} was not emitted before its use")
        return source(self.builder, row)

    def _element(self, array: Node, index: int) -> Any:
        if array.op == "constant":
            flat = array.params["value"].reshape(-1)
            return ir.Constant(number_type(array.dtype), flat[index].item())
        base = self.inputs[array.number].base
        return self.builder.load(self.builder.gep(base, [_i64(index)]))

    def emit(self, node: Node, row: Any, known: dict[int, Any]) -> None:
        """The operation of `node` at `row`."""
        if node.number in self.graph.fused:
            return
        product = self.graph.product(node)
        if product is None:
            values = [self.value(source, row, node.rows, known) for source in node.inputs]
            result = EMITTERS[node.op](self.builder, node, values)
        else:
            x, y = (self.value(source, row, node.rows, known) for source in product.inputs)
            first = node.inputs[0] is product
            rest = self.value(node.inputs[1 if first else 0], row, node.rows, known)
            if node.op == "sub":
                rest, x = (self.builder.fneg(rest), x) if first else (rest, self.builder.fneg(x))
            result = call(self.builder, "llvm.fma", [x, y, rest])
        (known if node.rows > 1 else self.values)[node.number] = result

    def lanes(self, level: int) -> None:
        """Scalars and `[lanes]` of `level`; level 0 reads the inputs."""
        for node in self.graph.nodes:
            if level == 0 and node.rows in (0, 1) and node.op in ("input", "element"):
                self.value(node, None, node.rows, self.values)
            if node.level == level and node.rows in (0, 1) and node.op in OPERATIONS:
                self.emit(node, None, self.values)


class Stage:
    """What one pass does at each row: the operations of a level, then stores."""

    def __init__(self, step: Pass, level: int, rows: int, results: Sequence[tuple[Node, Memory]]):
        self.step, self.rows = step, rows
        graph = step.graph
        self.nodes = [
            node
            for node in graph.nodes
            if node.rows == rows and node.level == level and node.op in OPERATIONS
        ]
        self.sums = [
            node
            for node in graph.nodes
            if node.op == "sum" and node.inputs[0].rows == rows and node.level == level + 1
        ]
        crossing = [node for node in self.nodes if node.number in step.scratch]
        self.stores = [(node, step.scratch[node.number]) for node in crossing]
        self.results = [(node, memory) for node, memory in results if memory.rows == rows]

    @property
    def empty(self) -> bool:
        return not (self.nodes or self.sums or self.results)

    def at(self, rows: Sequence[Any], size: int, count: int, sums: list[dict[int, Any]]) -> None:
        """Emit blocks of `size` rows, abreast, each from one of `rows` on, `count` of them real.

        `sums` are the running sums of each block by node number.
        """
        step, known = self.step, [{} for _ in rows]
        builder, layout = step.builder, step.layout
        step.size = size
        for node in self.nodes:
            for row, values in zip(rows, known, strict=True):
                step.emit(node, row, values)
        both = self.stores + self.results
        for row, values in zip(rows, known, strict=True):
            stored = [step.value(node, row, self.rows, values) for node, _ in both]
            for value, (_, memory) in zip(stored, both, strict=True):
                place = layout.place(builder, memory, row, size)
                builder.store(value, place, align=layout.align(memory.dtype))
        for node in self.sums:
            product = step.graph.product(node)
            terms = node.inputs if product is None else product.inputs
            for row, values, running in zip(rows, known, sums, strict=True):
                added = [step.value(source, row, self.rows, values) for source in terms]
                running[node.number] = self._added(running[node.number], added, count)

    def _added(self, total: Any, values: list[Any], count: int) -> Any:
        builder = self.step.builder
        if self.step.layout.by_lane:
            return _accumulate(builder, total, values)
        for first in range(0, count, CHUNK):
            real = min(CHUNK, count - first)
            parts = [_part(builder, value, first, real) for value in values]
            if real == CHUNK:
                total = _accumulate(builder, total, parts)
            else:
                changed = _accumulate(builder, _part(builder, total, 0, real), parts)
                total = _replaced(builder, total, changed)
        return total


def _accumulate(builder: Any, total: Any, values: list[Any]) -> Any:
    if len(values) == 2:
        return call(builder, "llvm.fma", [*values, total])
    return builder.fadd(total, values[0])


def _part(builder: Any, vector: Any, first: int, count: int) -> Any:
    """`vector[first : first + count]`."""
    picks = ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(first, first + count)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), picks)


def _replaced(builder: Any, vector: Any, start: Any) -> Any:
    """`vector` with its first numbers replaced by those of `start`."""
    for index in range(start.type.count):
        place = ir.Constant(ir.IntType(32), index)
        vector = builder.insert_element(vector, builder.extract_element(start, place), place)
    return vector


def _total(builder: Any, parts: list[Any]) -> Any:
    """The sum of the interleaved partial sums: (0 + 2) + (1 + 3) of four."""
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        added = [builder.fadd(a, b) for a, b in zip(parts, parts[half:], strict=False)]
        parts = added + parts[len(added) : half]
    return parts[0]


def row_pass(stages: Sequence[Stage], rows: int, abreast: int) -> dict[tuple[int, int], Any]:
    """Emit the rows of `stages`; returns the sums by (stage, node number).

    `abreast` rows, a divisor of `CHUNK`, are emitted operation by operation, which hides the
    time that an operation takes where each waits for the one before.
    """
    stages = [stage for stage in stages if stage.rows == rows and not stage.empty]
    if not stages:
        return {}
    builder, layout = stages[0].step.builder, stages[0].step.layout
    owners = [(stage, node) for stage in stages for node in stage.sums]
    parts = min(CHUNK, rows)
    # the running sums: one value for each of the interleaved parts, or one vector of them
    if layout.by_lane:
        block, size, left = CHUNK, 1, rows % CHUNK
        running = [_negative_zero(layout.kind(n.dtype, 1)) for _, n in owners for _ in range(parts)]
        per = parts
    else:
        block = size = layout.size(rows) if rows <= _IN_REGISTERS else _ROW_BLOCK
        left = rows % block
        while left == 1 and rows > block:  # a single row would be no vector
            block = size = block - CHUNK
            left = rows % block
        running = [_negative_zero(ir.VectorType(number_type(n.dtype), CHUNK)) for _, n in owners]
        per = 1

    def some(rows: Sequence[Any], size: int, count: int, running: list[Any], part: int):
        """Rows from `part` on of the running sums."""
        running = list(running)
        for stage in stages:
            places = [
                {
                    node.number: index * per + part + offset
                    for index, (owner, node) in enumerate(owners)
                    if owner is stage
                }
                for offset in range(len(rows))
            ]
            sums = [{number: running[place] for number, place in one.items()} for one in places]
            stage.at(rows, size, count, sums)
            for one, found in zip(places, sums, strict=True):
                for number, place in one.items():
                    running[place] = found[number]
        return running

    def whole(row: Any, running: list[Any]) -> list[Any]:
        if not layout.by_lane:
            return some([row], size, size, running, 0)
        for part in range(0, CHUNK, abreast):
            rows = [builder.add(row, _i64(part + offset)) for offset in range(abreast)]
            running = some(rows, 2, 1, running, part)
        return running

    last = rows - left
    if last > block:
        running = loop(builder, _i64(0), _i64(last), block, running, whole)
    elif last:
        running = whole(_i64(0), running)
    if layout.by_lane:
        for part in range(left):
            running = some([_i64(last + part)], 2, 1, running, part)
    elif last == 0:
        running = some([_i64(0)], size, left, running, 0)
    elif left:
        running = some([_i64(last)], left, left, running, 0)
    totals = {}
    for index, (stage, node) in enumerate(owners):
        if layout.by_lane:
            terms = running[index * per : (index + 1) * per]
        else:
            kind = layout.kind(node.dtype, 1)
            terms = [_copied(builder, running[index], part, kind) for part in range(parts)]
        totals[id(stage), node.number] = _total(builder, terms)
    return totals


def _copied(builder: Any, vector: Any, index: int, kind: Any) -> Any:
    """Number `index` of `vector`, in every place of a vector of type `kind`."""
    picks = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [index] * kind.count)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), picks)


def _negative_zero(kind: Any) -> Any:
    """The number that changes nothing it is added to."""
    return splat(None, ir.Constant(_element_of(kind), -0.0), kind)


def _element_of(kind: Any) -> Any:
    return kind.element if isinstance(kind, ir.VectorType) else kind


def loop(builder, first, last, step, values, body) -> list[Any]:
    """`for row in range(first, last, step): values = body(row, values)`."""
    before, function = builder.block, builder.function
    head, inside, after = (function.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    row = builder.phi(ir.IntType(64))
    phis = [builder.phi(value.type) for value in values]
    builder.cbranch(builder.icmp_signed("<", row, last), inside, after)
    builder.position_at_end(inside)
    results = body(row, phis)
    following = builder.add(row, _i64(step))
    row.add_incoming(first, before)
    row.add_incoming(following, builder.block)
    for phi, old, new in zip(phis, values, results, strict=True):
        phi.add_incoming(old, before)
        phi.add_incoming(new, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return phis


# --- the kernel -----------------------------------------------------------------------------


class Loop(NamedTuple):
    """What is written for every lane.

    Attributes:
        layout: how values are laid out.
        block: steps whose samples are drawn together.
        draw: the graph of a block's samples; its results are rows, one per step.
        step: the graph of a step; its results are the carry.
        drawn, stepped: what each graph's inputs are: ("leaf", k) the k-th array, ("high",) and
            ("low",) the words of the step number, ("sample", k) the given samples, ("point", k)
            the k-th result of `draw`.
        carry: numbers of the arrays that hold the carry.
    """

    layout: Layout
    block: int
    draw: Graph
    step: Graph
    drawn: list[tuple]
    stepped: list[tuple]
    carry: list[int]


class Turn:
    """The loop of one vector of lanes, step by step.

    Arguments:
        builder: where instructions go.
        loop: what to write.
        memory: the arrays of these lanes.
        scratch: takes a number of bytes, gives a pointer to as many.
    """

    def __init__(self, builder: Any, loop: Loop, memory: Sequence[Memory], scratch: Callable):
        self.builder, self.loop, self.layout = builder, loop, loop.layout
        self.home, self.memory, self.scratch = memory, list(memory), scratch
        self.points = [self._room(node.dtype, loop.block) for node in loop.draw.results]
        if self.layout.by_lane:
            self.crossing = self._side_by_side()
        else:
            self.memory = [self._local(one) for one in memory]
            self.crossing = {
                node.number: self._room(node.dtype, node.rows) for node in loop.step.crossing
            }
        self.sums = {
            node.number: builder.alloca(self.layout.kind(node.dtype, 1))
            for node in loop.step.nodes
            if node.op == "sum" and node.level == 1
        }

    # where things lie

    def _room(self, dtype: np.dtype, rows: int) -> Memory:
        """Scratch for `rows` rows."""
        builder, layout, kind = self.builder, self.layout, number_type(dtype).as_pointer()
        if not layout.by_lane:
            size = layout.size(rows) if rows <= _IN_REGISTERS else rows
            return Memory(
                builder.bitcast(builder.alloca(layout.kind(dtype, size)), kind), dtype, rows
            )
        base = self.scratch(rows * layout.width * dtype.itemsize)
        return Memory(builder.bitcast(base, kind), dtype, rows, stride=layout.width)

    def _side_by_side(self) -> dict[int, Memory]:
        """Copy all that belongs to a row into one place: a single stream through the cache."""
        used = {what[1] for what in self.loop.stepped if what[0] == "leaf"}
        kinds: dict[tuple[int, int], list[int | Node]] = {}
        for index, memory in enumerate(self.memory):
            if memory.rows > 1 and index in used:
                kinds.setdefault((memory.rows, memory.dtype.itemsize), []).append(index)
        for node in self.loop.step.crossing:
            kinds.setdefault((node.rows, node.dtype.itemsize), []).append(node)
        crossing, width = {}, self.layout.width
        for (rows, size), members in kinds.items():
            whole = self.scratch(rows * len(members) * width * size)
            for place, member in enumerate(members):
                dtype = member.dtype if isinstance(member, Node) else self.memory[member].dtype
                base = self.builder.gep(whole, [_i64(place * width * size)])
                base = self.builder.bitcast(base, number_type(dtype).as_pointer())
                room = Memory(base, dtype, rows, stride=width * len(members))
                if isinstance(member, Node):
                    crossing[member.number] = room
                else:
                    self._copy_rows(self.memory[member], room)
                    self.memory[member] = room
        return crossing

    def _copy_rows(self, old: Memory, new: Memory) -> None:
        builder, layout = self.builder, self.layout

        def one(row: Any, _: Any) -> list[Any]:
            places = (layout.place(builder, memory, row, 2) for memory in (old, new))
            align = layout.align(old.dtype)
            builder.store(builder.load(next(places), align=align), next(places), align=align)
            return []

        loop(builder, _i64(0), _i64(old.rows), 1, [], one)

    def _local(self, memory: Memory) -> Memory:
        """A copy that LLVM can keep in registers, of the rows of one lane."""
        if not 1 <= memory.rows <= _IN_REGISTERS:
            return memory
        copy = self._room(memory.dtype, memory.rows)
        self._copy(memory, memory.rows, copy, self.layout.size(memory.rows))
        return copy

    def _copy(self, old: Memory, old_size: int, new: Memory, new_size: int) -> None:
        builder, layout = self.builder, self.layout
        place = layout.place(builder, old, None, old_size)
        value = builder.load(place, align=layout.align(old.dtype))
        if old_size != new_size:
            picks = [*range(min(old_size, new_size)), *[old_size] * (new_size - old_size)]
            kind = ir.VectorType(ir.IntType(32), new_size)
            zeros = ir.Constant(value.type, [0] * old_size)
            value = builder.shuffle_vector(value, zeros, ir.Constant(kind, picks))
        place = layout.place(builder, new, None, new_size)
        builder.store(value, place, align=layout.align(new.dtype))

    def put_back(self) -> None:
        """Write the carry where it came from."""
        for index in self.loop.carry:
            local, home = self.memory[index], self.home[index]
            if local is home:
                continue
            if self.layout.by_lane:
                self._copy_rows(local, home)
            else:
                self._copy(local, self.layout.size(home.rows), home, home.rows)

    # what happens

    def draw(self, first: Any, done: Any) -> None:
        """The samples of the block that begins `done` steps after step `first`."""
        builder, layout, block = self.builder, self.layout, self.loop.block
        number = builder.add(first, done)

        def word(high: bool) -> Callable:
            def at(builder: Any, row: Any) -> Any:
                if layout.by_lane:
                    step = builder.add(number, row)
                else:  # a block of steps is one vector
                    kind = ir.VectorType(ir.IntType(64), block)
                    step = splat(builder, number, kind)
                    step = builder.add(step, ir.Constant(kind, list(range(block))))
                if high:
                    by = _i64(32) if layout.by_lane else ir.Constant(step.type, [32] * block)
                    step = builder.lshr(step, by)
                short = builder.trunc(step, like(step.type, ir.IntType(32)))
                if not layout.by_lane:
                    return short
                return splat(builder, short, layout.kind(np.dtype(np.uint32), 1))

            return at

        def bound(what: tuple) -> Any:
            if what[0] in ("high", "low"):
                return word(what[0] == "high")
            memory = self.memory[what[1]]
            if what[0] == "sample":
                return Memory(memory.base, memory.dtype, block, done, memory.stride)
            return memory

        step = self._pass(self.loop.draw, [bound(what) for what in self.loop.drawn], {})
        step.lanes(0)
        results = list(zip(self.loop.draw.results, self.points, strict=True))
        row_pass([Stage(step, 0, block, results)], block, _ABREAST_DRAWN)

    def _pass(self, graph: Graph, bound: Sequence[Any], scratch: dict[int, Memory]) -> Pass:
        inputs = {
            node.number: source
            for node, source in zip(graph.inputs, bound, strict=True)
            if node.number < len(graph.nodes) and graph.nodes[node.number] is node
        }
        return Pass(self.builder, self.layout, graph, inputs, scratch)

    def _step(self, index: Any) -> Pass:
        def bound(what: tuple) -> Any:
            if what[0] == "leaf":
                return self.memory[what[1]]
            points = self.points[what[1]]
            if self.layout.by_lane:
                return Memory(points.base, points.dtype, 1, index, points.stride)
            return Memory(self.builder.gep(points.base, [index]), points.dtype, 1)

        inputs = [bound(what) for what in self.loop.stepped]
        return self._pass(self.loop.step, inputs, self.crossing)

    def _stages(self, step: Pass, level: int, results: Sequence = ()) -> list[Stage]:
        sizes = {node.rows for node in step.graph.nodes} | {memory.rows for _, memory in results}
        return [Stage(step, level, rows, results) for rows in sorted(sizes) if rows > 1]

    def _emit(self, stages: Sequence[Stage]) -> dict[tuple[int, int], Any]:
        totals = {}
        for rows in sorted({stage.rows for stage in stages}):
            totals.update(row_pass(stages, rows, _ABREAST))
        return totals

    def early(self, index: Any, before: Sequence[Stage] = ()) -> None:
        """Level 0 of step `index`, in one pass with the last level of the step before."""
        step = self._step(index)
        step.lanes(0)
        stages = self._stages(step, 0)
        totals = self._emit([*before, *stages])
        for stage in stages:
            for node in stage.sums:
                self.builder.store(totals[id(stage), node.number], self.sums[node.number])

    def late(self, index: Any) -> list[Stage]:
        """The other levels of step `index`, but for the rows of the last one: its stages."""
        builder = self.builder
        step = self._step(index)
        for number, room in self.sums.items():
            step.values[number] = builder.load(room)
        step.lanes(0)
        last = step.graph.levels - 1
        for level in range(1, last):
            step.lanes(level)
            stages = self._stages(step, level)
            totals = self._emit(stages)
            for stage in stages:
                for node in stage.sums:
                    step.values[node.number] = totals[id(stage), node.number]
        if last:
            step.lanes(last)
        results = [
            (node, self.memory[index])
            for node, index in zip(step.graph.results, self.loop.carry, strict=True)
        ]
        lanes = [(node, memory) for node, memory in results if memory.rows == 1]
        values = [step.value(node, None, 1, step.values) for node, _ in lanes]
        for value, (_, memory) in zip(values, lanes, strict=True):
            place = self.layout.place(builder, memory, None, 1)
            if not self.layout.by_lane:
                value = builder.extract_element(value, ir.Constant(ir.IntType(32), 0))
            builder.store(value, place, align=self.layout.align(memory.dtype))
        return self._stages(step, last, results)

    def finish(self, index: Any) -> None:
        """The whole of step `index` but for its level 0."""
        self._emit(self.late(index))


def write_group(module: Any, plan: Loop, leaves: Sequence[tuple[np.dtype, int]], turns: int):
    """The function group(leaves..., scratch, step, count), and the bytes of its scratch.

    A group is `turns` vectors of lanes, which take their steps in turns: while one waits for its
    sum over rows, the other is at work.
    """
    layout, count_type = plan.layout, ir.IntType(64)
    pointers = [number_type(dtype).as_pointer() for dtype, _ in leaves]
    types = [*pointers, ir.IntType(8).as_pointer(), count_type, count_type]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), types), "group")
    function.linkage = "internal"
    for argument in function.args[: len(pointers) + 1]:
        argument.add_attribute("noalias")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    *bases, scratch, first, count = function.args
    used = 0

    def room(size: int) -> Any:
        nonlocal used
        place = builder.gep(scratch, [_i64(used)])
        used += -(-size // 64) * 64
        return place

    every = []
    for turn in range(turns):
        memory = []
        for base, (dtype, rows) in zip(bases, leaves, strict=True):
            own = builder.gep(base, [_i64(turn * layout.width)]) if rows > 0 else base
            memory.append(Memory(own, dtype, rows, stride=turns * layout.width))
        every.append(Turn(builder, plan, memory, room))

    def block(done: Any, _: Any) -> list[Any]:
        for turn in every:
            turn.draw(first, done)
        left = builder.sub(count, done)
        short = builder.icmp_signed("<", left, _i64(plan.block))
        left = builder.select(short, left, _i64(plan.block))
        single = plan.step.levels == 1
        if not single:
            for turn in every:
                turn.early(_i64(0))

        def one(index: Any, _: Any) -> list[Any]:
            for turn in every:
                if single:
                    turn.finish(index)
                else:
                    turn.early(index, turn.late(builder.sub(index, _i64(1))))
            return []

        loop(builder, _i64(0 if single else 1), left, 1, [], one)
        if not single:
            for turn in every:
                turn.finish(builder.sub(left, _i64(1)))
        return []

    loop(builder, _i64(0), count, plan.block, [], block)
    for turn in every:
        turn.put_back()
    builder.ret_void()
    return function, max(used, 64)


# --- a problem's kernel ---------------------------------------------------------------------


def lane_kernel(
    problem: Any,
    lanes: Any,
    sample: Any,
    *,
    steps: int,
    block: int,
    width: int,
    turns: int,
    gradient: str,
) -> "Kernel":
    """The kernel of a `LaneProblem`.

    Arguments:
        lanes: `Lanes` of any number of lanes, for the form of its arrays.
        sample: the dtypes of given samples, a tree; None where samples are drawn.
        steps: how many steps the arrays of given samples hold.
        block: steps whose samples are drawn together.
        width: lanes per vector.
        turns: vectors per group, which take turns.

    Returns:
        A kernel whose arrays, `[groups, ..., turns * width]`, are the leaves of `(shared, fixed,
        carry, source)`: the source is the given samples, else the two key words.

    Raises:
        Unsupported: the step cannot be compiled here.
    """
    replay = sample is not None
    shared = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lanes.shared)
    fixed, carry = jax.tree.map(_lanes_last, (lanes.fixed, lanes.carry))
    rows = jax.ShapeDtypeStruct((block, TRACED_LANES), np.uint32)
    word = jax.ShapeDtypeStruct((TRACED_LANES,), np.uint32)
    if replay:
        given = jax.tree.map(lambda dtype: jax.ShapeDtypeStruct(rows.shape, dtype), sample)
        draw = trace(problem.lane_label, shared, given, fused=has_fma())
        source = jax.tree.leaves(given)
    else:

        def drawn(shared, fixed, key, step):
            return problem.lane_label(shared, problem.lane_sample(shared, fixed, key, step))

        draw = trace(drawn, shared, fixed, (word, word), (rows, rows), fused=has_fma())
        source = [word, word]
    for leaf in jax.tree.leaves(draw.form):
        if leaf.shape != rows.shape:
            raise Unsupported(f"samples that are arrays, {leaf.shape} for {rows.shape}")
    if draw.levels > 1 or {node.rows for node in draw.nodes} - {-1, 0, 1, block}:
        raise Unsupported("samples that are made of arrays")
    for leaf in jax.tree.leaves((shared, fixed, carry, draw.form)):
        if leaf.dtype == bool:  # vectors of single bits are laid out in another way
            raise Unsupported("arrays of booleans")
    points = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((TRACED_LANES,), leaf.dtype), draw.form)
    stepped = functools.partial(problem.lane_step, gradient=gradient)
    step = trace(stepped, shared, fixed, carry, points, fused=has_fma())
    if jax.tree.structure(step.form) != jax.tree.structure(carry):
        raise Unsupported("`lane_step` must return the structure of its carry")

    numbers = itertools.count()
    leaf = {
        name: [("leaf", next(numbers)) for _ in jax.tree.leaves(tree)]
        for name, tree in (("shared", shared), ("fixed", fixed), ("carry", carry), ("key", source))
    }
    count = len(jax.tree.leaves(points))
    if replay:
        given = [("sample", index) for _, index in leaf["key"]]
        inputs = leaf["shared"] + given
    else:
        inputs = leaf["shared"] + leaf["fixed"] + leaf["key"] + [("high",), ("low",)]
    every = [*jax.tree.leaves((shared, fixed, carry)), *source]
    counts = [rows_of(leaf.shape) for leaf in every]
    if replay:
        counts[-len(source) :] = [steps] * len(source)
    places = [("point", index) for index in range(count)]
    plan = Loop(
        Layout(width),
        block,
        draw,
        step,
        drawn=inputs,
        stepped=leaf["shared"] + leaf["fixed"] + leaf["carry"] + places,
        carry=[index for _, index in leaf["carry"]],
    )
    form = [(leaf.dtype, size) for leaf, size in zip(every, counts, strict=True)]
    return Kernel(plan, form, turns)


def _lanes_last(leaf: Any) -> jax.ShapeDtypeStruct:
    """The traced form of an array whose last axis is the lanes."""
    return jax.ShapeDtypeStruct((*leaf.shape[:-1], TRACED_LANES), leaf.dtype)


class Kernel:
    """The compiled loop of a problem's steps.

    Call it with the arrays of `leaves`, each `[groups, ..., width]` and contiguous (the shared
    ones whole), a range of groups, the number of the first step and how many to take; those of
    the carry are overwritten. It holds no Python lock while it runs.
    """

    def __init__(self, plan: Loop, leaves: Sequence[tuple[np.dtype, int]], turns: int) -> None:
        module = ir.Module("lanes")
        module.triple = llvm.get_process_triple()
        group, self.scratch_bytes = write_group(module, plan, leaves, turns)
        # numbers from one group to the next; the shared arrays have no rows
        strides = [max(rows, 0) * turns * plan.layout.width for _, rows in leaves]
        self._groups(module, group, strides)
        self.text = str(module)
        self._engine = compiled(self.text)
        address = self._engine.get_function_address("groups")
        kinds = [ctypes.c_void_p] * (len(strides) + 1) + [ctypes.c_int64] * 4
        self._call = ctypes.CFUNCTYPE(None, *kinds)(address)

    def _groups(self, module: Any, group: Any, strides: Sequence[int]) -> None:
        """groups(leaves..., scratch, first, last, step, count): `group` on a range of groups."""
        whole = ir.IntType(64)
        types = [argument.type for argument in group.args[:-2]] + [whole] * 4
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), types), "groups")
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        *leaves, scratch, first, last, step, count = function.args

        def one(index: Any, _: Any) -> list[Any]:
            places = [
                builder.gep(leaf, [builder.mul(index, _i64(stride))])
                for leaf, stride in zip(leaves, strides, strict=True)
            ]
            builder.call(group, [*places, scratch, step, count])
            return []

        loop(builder, first, last, 1, [], one)
        builder.ret_void()

    def __call__(self, arrays, first: int, last: int, step: int, count: int) -> None:
        """Take `count` steps of groups `first` to `last`."""
        scratch = aligned((self.scratch_bytes,), np.dtype(np.uint8))
        pointers = [array.ctypes.data for array in arrays]
        # the step number wraps like the two words that it is
        step = step - (1 << 64) if step >= 1 << 63 else step
        self._call(*pointers, scratch.ctypes.data, first, last, step, count)
