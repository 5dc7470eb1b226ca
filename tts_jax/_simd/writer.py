"""Writing a function for LLVM in Python: values with operators, arrays, loops and branches.

A `Writer` holds one function under construction. Its values are double-precision numbers, one or
a vector of one per lane, masks of the same forms, and 64-bit indices; arithmetic on them emits
instructions. Control flow is written with context managers, and what changes in it is a `Variable`:

    with writer.range(0, rows) as row:
        total.set(total.get() + values[row] * values[row])

A product that is added to something is rounded together with the sum where the processor can, so
results depend on the processor, but not on the number of lanes.

The same functions can be written for the threads of a GPU (`Target`): a thread has one lane, and
the arrays of vectors of the 32 threads of a warp are interleaved, so that what they load
together lies together.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from tts_jax._simd.cuda import WARP
from tts_jax._simd.machine import has_fma


DOUBLE, WHOLE, BIT = ir.DoubleType(), ir.IntType(64), ir.IntType(1)
ADDRESS = ir.PointerType()
TOGETHER = 4  # passes of a loop that a thread of a GPU makes at a time


class Target(NamedTuple):
    """What functions are written for.

    Attributes:
        lanes: the number of lanes of a vector.
        fused: whether a product and a sum are rounded together.
        cuda: whether it is for threads of a GPU, with one lane each.
    """

    lanes: int
    fused: bool
    cuda: bool = False

    @classmethod
    def cpu(cls, lanes: int) -> "Target":
        """This processor, with vectors of `lanes`."""
        return cls(lanes, has_fma())

    @property
    def stride(self) -> int:
        """From one vector of an array to the next, in vectors."""
        return WARP if self.cuda else 1


def _shaped(kind: Any, element: Any) -> Any:
    """`element` in the form of `kind`: one or one per lane."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _constant(kind: Any, value: float) -> Any:
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [value] * kind.count)
    return ir.Constant(kind, value)


class Value:
    """What all values share."""

    def __init__(self, writer: "Writer", ir_value: Any) -> None:
        self.writer = writer
        self.ir = ir_value

    @property
    def builder(self) -> Any:
        return self.writer.builder


class Mask(Value):
    """True or false, one or one per lane."""

    def __and__(self, other: "Mask") -> "Mask":
        return Mask(self.writer, self.builder.and_(self.ir, other.ir))

    def __or__(self, other: "Mask") -> "Mask":
        return Mask(self.writer, self.builder.or_(self.ir, other.ir))

    def __invert__(self) -> "Mask":
        return Mask(self.writer, self.builder.not_(self.ir))


class Index(Value):
    """A 64-bit integer."""

    def _lift(self, other: Any) -> Any:
        return ir.Constant(WHOLE, other) if isinstance(other, int) else other.ir

    def __add__(self, other: Any) -> "Index":
        return Index(self.writer, self.builder.add(self.ir, self._lift(other)))

    def __sub__(self, other: Any) -> "Index":
        return Index(self.writer, self.builder.sub(self.ir, self._lift(other)))

    def __mul__(self, other: Any) -> "Index":
        return Index(self.writer, self.builder.mul(self.ir, self._lift(other)))

    __radd__, __rmul__ = __add__, __mul__

    def divided(self, by: int) -> "Index":
        """The quotient, towards 0."""
        return Index(self.writer, self.builder.sdiv(self.ir, self._lift(by)))

    def _compare(self, symbol: str, other: Any) -> Mask:
        return Mask(self.writer, self.builder.icmp_signed(symbol, self.ir, self._lift(other)))

    def __lt__(self, other: Any) -> Mask:
        return self._compare("<", other)

    def __le__(self, other: Any) -> Mask:
        return self._compare("<=", other)

    def __gt__(self, other: Any) -> Mask:
        return self._compare(">", other)

    def __ge__(self, other: Any) -> Mask:
        return self._compare(">=", other)

    def equals(self, other: Any) -> Mask:
        return self._compare("==", other)


class Real(Value):
    """A double, one or one per lane; remembers the factors of a product."""

    def __init__(
        self, writer: "Writer", ir_value: Any, factors: "tuple[Real, Real] | None" = None
    ) -> None:
        super().__init__(writer, ir_value)
        self.factors = factors

    def _lift(self, other: Any) -> "Real":
        if isinstance(other, (int, float)):
            return Real(self.writer, _constant(self.ir.type, float(other)))
        if other.ir.type != self.ir.type:
            return self.writer.splat(other)
        return other

    def _pair(self, other: Any) -> "tuple[Real, Real]":
        if isinstance(other, Real) and isinstance(other.ir.type, ir.VectorType):
            first = self if self.ir.type == other.ir.type else self.writer.splat(self)
            return first, other
        return self, self._lift(other)

    def __add__(self, other: Any) -> "Real":
        first, second = self._pair(other)
        for product, rest in ((second, first), (first, second)):
            if product.factors is not None:
                x, y = product.factors
                return self.writer.fma(x, y, rest)
        return Real(self.writer, self.builder.fadd(first.ir, second.ir))

    def __sub__(self, other: Any) -> "Real":
        first, second = self._pair(other)
        if second.factors is not None:
            x, y = second.factors
            return self.writer.fma(-x, y, first)
        if first.factors is not None:
            x, y = first.factors
            return self.writer.fma(x, y, -second)
        return Real(self.writer, self.builder.fsub(first.ir, second.ir))

    def __mul__(self, other: Any) -> "Real":
        first, second = self._pair(other)
        factors = (first, second) if self.writer.target.fused else None
        return Real(self.writer, self.builder.fmul(first.ir, second.ir), factors)

    def __truediv__(self, other: Any) -> "Real":
        first, second = self._pair(other)
        return Real(self.writer, self.builder.fdiv(first.ir, second.ir))

    def __neg__(self) -> "Real":
        return Real(self.writer, self.builder.fneg(self.ir))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> "Real":
        return self._lift(other) - self

    def __rtruediv__(self, other: Any) -> "Real":
        return self._lift(other) / self

    def _compare(self, symbol: str, other: Any) -> Mask:
        first, second = self._pair(other)
        return Mask(self.writer, self.builder.fcmp_ordered(symbol, first.ir, second.ir))

    def __lt__(self, other: Any) -> Mask:
        return self._compare("<", other)

    def __le__(self, other: Any) -> Mask:
        return self._compare("<=", other)

    def __gt__(self, other: Any) -> Mask:
        return self._compare(">", other)

    def __ge__(self, other: Any) -> Mask:
        return self._compare(">=", other)

    def equals(self, other: Any) -> Mask:
        """Whether the numbers are equal; false for NaN."""
        return self._compare("==", other)


class Variable:
    """A value that changes in loops and branches."""

    def __init__(self, writer: "Writer", start: Value) -> None:
        self.writer, self.kind = writer, type(start)
        self.form = start.ir.type
        self.place = writer.room(self.form)
        self.set(start)

    def get(self) -> Any:
        return self.kind(self.writer, self.writer.builder.load(self.place, typ=self.form))

    def set(self, value: Value) -> None:
        self.writer.builder.store(value.ir, self.place)


class Array:
    """Memory of values of one kind, from `base` on: `array[i]` loads, `array[i] = x` stores.

    Consecutive values are `stride` places apart.
    """

    def __init__(self, writer: "Writer", base: Any, kind: Any, stride: int = 1) -> None:
        self.writer, self.base, self.kind, self.stride = writer, base, kind, stride

    def _place(self, index: Any) -> Any:
        if isinstance(index, int):
            place = ir.Constant(WHOLE, index * self.stride)
        else:
            place = (index * self.stride if self.stride > 1 else index).ir
        return self.writer.builder.gep(self.base, [place], source_etype=self.kind)

    def __getitem__(self, index: Any) -> Any:
        pointer = self._place(index)
        loaded = self.writer.builder.load(pointer, align=8, typ=self.kind)
        element = self.kind.element if isinstance(self.kind, ir.VectorType) else self.kind
        return (Index if isinstance(element, ir.IntType) else Real)(self.writer, loaded)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, (int, float)):
            number = _constant(self.kind, value)
        else:
            value = self.writer.splat(value) if value.ir.type != self.kind else value
            number = value.ir
        self.writer.store(number, self._place(index))

    def offset(self, index: Any) -> "Array":
        """The array that begins at `index`."""
        return Array(self.writer, self._place(index), self.kind, self.stride)

    def numbers(self) -> "Array":
        """The same memory number by number: vector i holds numbers `lanes * i` on."""
        kind = self.kind.element if isinstance(self.kind, ir.VectorType) else self.kind
        return Array(self.writer, self.base, kind, self.stride)


class Writer:
    """One function under construction.

    Attributes:
        target: what it is for.
        lanes: the number of lanes of a vector.
        arguments: the function's arguments as LLVM sees them.
    """

    def __init__(
        self, module: Any, name: str, kinds: Sequence[Any], target: Target, result: Any = None
    ) -> None:
        self.module, self.target, self.lanes = module, target, target.lanes
        form = ir.FunctionType(ir.VoidType() if result is None else result, kinds)
        self.function = ir.Function(module, form, name)
        self.function.attributes.add("noinline")
        if target.cuda:
            self.function.attributes.add("convergent")
        self.arguments = self.function.args
        entry = self.function.append_basic_block("entry")
        start = self.function.append_basic_block("start")
        self.entry = ir.IRBuilder(entry)
        self.entry.position_before(self.entry.branch(start))
        self.builder = ir.IRBuilder(start)
        self.vector = ir.VectorType(DOUBLE, self.lanes)
        self._waiting: list[tuple[Any, Any]] | None = None

    # --- values ---

    def room(self, kind: Any) -> Any:
        """Memory for one value, reserved when the function starts."""
        return self.entry.alloca(kind)

    def real(self, value: float) -> Real:
        """A number of every lane."""
        return Real(self, _constant(self.vector, value))

    def number(self, value: float) -> Real:
        """One number."""
        return Real(self, ir.Constant(DOUBLE, value))

    def index(self, value: Any) -> Index:
        return Index(self, ir.Constant(WHOLE, value) if isinstance(value, int) else value)

    def variable(self, start: Value) -> Variable:
        return Variable(self, start)

    def vectors(self, base: Any) -> Array:
        return Array(self, base, self.vector, self.target.stride)

    def numbers(self, base: Any) -> Array:
        return Array(self, base, DOUBLE)

    def indices(self, base: Any) -> Array:
        return Array(self, base, WHOLE)

    def splat(self, value: Real) -> Real:
        """One number as that of every lane."""
        if isinstance(value.ir.type, ir.VectorType):
            return value
        blank = ir.Constant(self.vector, ir.Undefined)
        first = self.builder.insert_element(blank, value.ir, ir.Constant(ir.IntType(32), 0))
        picks = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return Real(self, self.builder.shuffle_vector(first, blank, picks))

    def _call(self, name: str, *values: Real) -> Real:
        kind = values[0].ir.type
        suffix = f"v{kind.count}f64" if isinstance(kind, ir.VectorType) else "f64"
        form = ir.FunctionType(kind, [kind] * len(values))
        function = self._intrinsic(f"llvm.{name}.{suffix}", form)
        return Real(self, self.builder.call(function, [value.ir for value in values]))

    def _intrinsic(self, name: str, kind: Any) -> Any:
        known = self.module.globals.get(name)
        return ir.Function(self.module, kind, name) if known is None else known

    def fma(self, x: Real, y: Real, rest: Real) -> Real:
        """x y + rest, rounded once."""
        return self._call("fma", x, y, rest)

    def abs(self, value: Real) -> Real:
        return self._call("fabs", value)

    def sqrt(self, value: Real) -> Real:
        return self._call("sqrt", value)

    def inverse_root(self, value: Real, degree: int) -> Real:
        """value^(−1/degree) of positive normal numbers, by Newton's method."""
        vector = ir.VectorType(WHOLE, self.lanes)

        def whole(number: int) -> Any:
            return ir.Constant(vector, [number] * self.lanes)

        # the bits of a double are about its logarithm, shifted: a guess within 12 percent
        bits = self.builder.bitcast(value.ir, vector)
        high = self.builder.lshr(bits, whole(32))
        share = self.builder.mul(high, whole((1 << 32) // degree))
        one = 1023 << 52
        guess = self.builder.sub(whole(one + one // degree), share)
        root = Real(self, self.builder.bitcast(guess, self.vector))
        for _ in range(6):
            power = root
            for _ in range(degree - 1):
                power = Real(self, (power * root).ir)
            root = root + root * ((1.0 - value * power) * (1 / degree))
        return root

    def where(self, mask: Mask, yes: Any, no: Any) -> Any:
        """`yes` where the mask is true, else `no`; one of them may be a plain number."""
        if isinstance(yes, Real) or isinstance(no, Real):
            first = yes if isinstance(yes, Real) else no._lift(yes)
            yes, no = first._pair(no)
        return type(yes)(self, self.builder.select(mask.ir, yes.ir, no.ir))

    def maximum(self, first: Real, second: Any) -> Real:
        """The larger one; the second where one is NaN."""
        first, second = first._pair(second)
        return self.where(first > second, first, second)

    def minimum(self, first: Real, second: Any) -> Real:
        """The smaller one; the second where one is NaN."""
        first, second = first._pair(second)
        return self.where(first < second, first, second)

    def any(self, mask: Mask) -> Mask:
        """Whether a mask of lanes is true anywhere, on a GPU in any thread of the warp.

        All threads of a warp must ask together.
        """
        if self.target.cuda:
            own = self.builder.bitcast(mask.ir, BIT)
            everyone = ir.Constant(ir.IntType(32), -1)
            kind = ir.FunctionType(BIT, [everyone.type, BIT])
            vote = self._intrinsic("llvm.nvvm.vote.any.sync", kind)
            return Mask(self, self.builder.call(vote, [everyone, own]))
        bits = ir.IntType(self.lanes)
        word = self.builder.bitcast(mask.ir, bits)
        return Mask(self, self.builder.icmp_unsigned("!=", word, ir.Constant(bits, 0)))

    def to_real(self, value: Index) -> Real:
        return Real(self, self.builder.sitofp(value.ir, DOUBLE))

    def to_index(self, value: Real) -> Index:
        return Index(self, self.builder.fptosi(value.ir, WHOLE))

    def spread(self, value: Mask) -> Mask:
        """A single truth value as that of every lane."""
        bits = ir.IntType(self.lanes)
        word = self.builder.sext(value.ir, bits) if self.lanes > 1 else value.ir
        return Mask(self, self.builder.bitcast(word, ir.VectorType(BIT, self.lanes)))

    @property
    def true(self) -> Mask:
        """A single true value."""
        return Mask(self, ir.Constant(BIT, 1))

    def thread(self) -> Index:
        """The number of this thread of a GPU."""
        block, size, place = (self._register(name) for name in ("ctaid.x", "ntid.x", "tid.x"))
        return block * size + place

    def threads(self) -> Index:
        """The number of all threads of a GPU."""
        return self._register("nctaid.x") * self._register("ntid.x")

    def _register(self, name: str) -> Index:
        kind = ir.FunctionType(ir.IntType(32), [])
        function = self._intrinsic(f"llvm.nvvm.read.ptx.sreg.{name}", kind)
        return Index(self, self.builder.zext(self.builder.call(function, []), WHOLE))

    def take_next(self, counter: Array) -> Index:
        """The value of a counter that threads share, which is then one larger."""
        one = ir.Constant(WHOLE, 1)
        return Index(self, self.builder.atomic_rmw("add", counter.base, one, "monotonic"))

    def call(self, other: "Writer | Any", *values: Any) -> Any:
        """Call a function that another writer has written."""
        function = other.function if isinstance(other, Writer) else other
        return self.builder.call(function, [getattr(value, "ir", value) for value in values])

    def store(self, value: Any, place: Any) -> None:
        """Store now, or at the end of `stores_last`."""
        if self._waiting is None:
            self.builder.store(value, place, align=8)
        else:
            self._waiting.append((value, place))

    # --- control flow ---

    @contextlib.contextmanager
    def stores_last(self) -> Iterator[None]:
        """On a GPU, arrays get what is stored in them when the block ends.

        A load cannot be moved before a store that might be to the same place, and a thread of a
        GPU waits for each load in turn. Nothing that is stored in the block may be loaded in it.
        """
        if not self.target.cuda or self._waiting is not None:
            yield
            return
        self._waiting = []
        yield
        waiting, self._waiting = self._waiting, None
        for value, place in waiting:
            self.store(value, place)

    def each(self, first: Any, last: Any, body: Callable[[Index], None], step: int = 1) -> None:
        """`for i in range(first, last, step): body(i)`, of which a GPU makes a few at a time.

        No pass may load what one shortly before it stores.
        """
        first, last = (self.index(x) if isinstance(x, int) else x for x in (first, last))
        if self.target.cuda:
            count = (last - first + (step - 1 if step > 0 else step + 1)).divided(step)
            middle = first + count.divided(TOGETHER) * (TOGETHER * step)
            with self.range(first, middle, TOGETHER * step) as i, self.stores_last():
                for k in range(TOGETHER):
                    body(i + k * step)
            first = middle
        with self.range(first, last, step) as i:
            body(i)

    @contextlib.contextmanager
    def maybe(self, condition: Mask) -> Iterator[None]:
        """`if condition` in some lane, of something that does no harm elsewhere.

        A GPU always does it: a branch would hold up the loads after it.
        """
        if self.target.cuda:
            yield
            return
        single = not isinstance(condition.ir.type, ir.VectorType)
        with self.when(condition if single else self.any(condition)):
            yield

    def block(self, name: str) -> Any:
        return self.function.append_basic_block(name)

    @contextlib.contextmanager
    def range(self, first: Any, last: Any, step: "int | Index" = 1) -> Iterator[Index]:
        """`for i in range(first, last, step)`; a negative step counts down to above `last`."""

        def lift(bound: Any) -> Any:
            return ir.Constant(WHOLE, bound) if isinstance(bound, int) else bound.ir

        head, body, after = self.block("head"), self.block("body"), self.block("after")
        before, last = self.builder.block, lift(last)
        self.builder.branch(head)
        self.builder.position_at_end(head)
        counter = self.builder.phi(WHOLE)
        counter.add_incoming(lift(first), before)
        down = isinstance(step, int) and step < 0
        more = self.builder.icmp_signed(">" if down else "<", counter, last)
        self.builder.cbranch(more, body, after)
        self.builder.position_at_end(body)
        yield Index(self, counter)
        following = self.builder.add(counter, lift(step))
        counter.add_incoming(following, self.builder.block)
        self.builder.branch(head)
        self.builder.position_at_end(after)

    @contextlib.contextmanager
    def when(self, condition: Mask) -> Iterator[None]:
        """`if condition`, a single truth value."""
        body, after = self.block("then"), self.block("endif")
        self.builder.cbranch(condition.ir, body, after)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(after)
        self.builder.position_at_end(after)

    @contextlib.contextmanager
    def repeat(self) -> Iterator["Repeat"]:
        """`while True`, left by `stop_if`."""
        head, after = self.block("repeat"), self.block("done")
        self.builder.branch(head)
        self.builder.position_at_end(head)
        yield Repeat(self, head, after)
        self.builder.branch(head)
        self.builder.position_at_end(after)

    def give(self, value: Value | None = None) -> None:
        """Return from the function."""
        if value is None:
            self.builder.ret_void()
        else:
            self.builder.ret(value.ir)


class Repeat:
    """The way out of `Writer.repeat`, and back to its start."""

    def __init__(self, writer: Writer, head: Any, after: Any) -> None:
        self.writer, self.head, self.after = writer, head, after

    def stop_if(self, condition: Mask) -> None:
        self._leave_if(condition, self.after)

    def again_if(self, condition: Mask) -> None:
        self._leave_if(condition, self.head)

    def _leave_if(self, condition: Mask, target: Any) -> None:
        following = self.writer.block("go")
        self.writer.builder.cbranch(condition.ir, target, following)
        self.writer.builder.position_at_end(following)
