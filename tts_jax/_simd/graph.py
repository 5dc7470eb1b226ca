"""The operations of a step, from JAX's jaxpr.

A value is a scalar, `[lanes]`, or `[rows, lanes]`, and an operation acts element by element;
only `sum_rows` looks across rows. Scalars and `[lanes]` widen where they meet more. The two words
of a random key are one array `[lanes, 2]` in JAX and a pair of values here.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex


CHUNK = 4  # interleaved partial sums of a sum over rows
TRACED_LANES = 8209  # stands for the number of lanes in traced shapes; no problem has so many rows
OPERATIONS = frozenset(
    """abs add add_any and convert_element_type div eq ge gt integer_pow le lt max min mul ne neg
    not or select_n shift_left shift_right_arithmetic shift_right_logical sign sqrt square sub
    xor""".split()
)
_PAIR = -2  # `rows` of a pair of `[lanes]`
_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")


class Unsupported(Exception):
    """Why a step cannot be compiled here."""


class Node:
    """One operation, or an input.

    `rows` is 0 for a scalar, 1 for `[lanes]`, and the number of rows for `[rows, lanes]`; negative
    for what must be taken apart first.
    """

    __slots__ = ("dtype", "inputs", "level", "number", "op", "params", "rows")

    def __init__(self, op: str, inputs: Sequence["Node"], rows: int, dtype: Any, **params: Any):
        self.op, self.inputs, self.rows = op, list(inputs), rows
        self.dtype, self.params = np.dtype(dtype), params
        self.level = self.number = 0


class Graph:
    """The nodes that `results` need, in order of their inputs.

    Arguments:
        fused: whether products are rounded together with the sum they feed.

    Attributes:
        levels: number of levels; a node is at the level of its inputs, the sum of values of a
            level at the next.
        fused: numbers of the products that are rounded together with the one sum they feed.
        crossing: row nodes that a later level reads.
        inputs, form: input nodes and the tree of results, where the graph was traced.
    """

    def __init__(self, results: Sequence[Node], fused: bool = True) -> None:
        self.results = list(results)
        self.inputs: list[Node] = []
        self.form: Any = None
        self.nodes: list[Node] = []
        seen: set[int] = set()
        stack = [(node, False) for node in reversed(self.results)]
        while stack:
            node, done = stack.pop()
            if done:
                node.number = len(self.nodes)
                self.nodes.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                stack += [(source, False) for source in reversed(node.inputs)]
        for node in self.nodes:
            node.level = max((source.level for source in node.inputs), default=0)
            node.level += node.op == "sum"
        uses = [0] * len(self.nodes)
        for source in itertools.chain(self.results, *(node.inputs for node in self.nodes)):
            uses[source.number] += 1
        self.levels = 1 + max((node.level for node in self.nodes), default=0)
        self._products = {
            node.number: source
            for node in self.nodes
            if node.op in ("add", "sub", "add_any", "sum") and fused
            for source in reversed(node.inputs)
            if source.op == "mul" and source.dtype.kind == "f" and uses[source.number] == 1
            if source.level == _read_level(node) and (node.op == "sum" or source.rows == node.rows)
        }
        self.fused = {source.number for source in self._products.values()}
        last = self.levels - 1
        self.crossing = [
            node
            for node in self.nodes
            if node.rows > 1 and node.op in OPERATIONS and node.level < self._last_read(node, last)
        ]

    def product(self, node: Node) -> Node | None:
        """The operand of `node` that is rounded together with it."""
        return self._products.get(node.number)

    def _last_read(self, node: Node, last: int) -> int:
        readers = [_read_level(other) for other in self.nodes if node in other.inputs]
        return max(readers + [last] * (node in self.results), default=0)


def _read_level(node: Node) -> int:
    """The level at which the inputs of `node` are read."""
    return node.level - (node.op == "sum")


def trace(function: Callable, *arguments: Any, fused: bool) -> Graph:
    """The graph of `function(*arguments)`, whose leaves have `shape` and `dtype`."""
    closed, form = jax.make_jaxpr(function, return_shape=True)(*arguments)
    inputs = [Node("input", (), rows_of(v.aval.shape), v.aval.dtype) for v in closed.jaxpr.invars]
    consts = [_constant(value) for value in closed.consts]
    graph = Graph(_interpret(closed.jaxpr, consts, inputs), fused)
    graph.inputs, graph.form = inputs, form
    return graph


def rows_of(shape: tuple[int, ...]) -> int:
    """Rows of a node of this shape, whose lanes may be any axis; -1 for an array without lanes,
    of which single numbers may be taken."""
    if shape == ():
        return 0
    if TRACED_LANES not in shape:
        return -1
    return int(np.prod(shape)) // TRACED_LANES


def _constant(value: Any) -> Node:
    value = np.asarray(value)
    return Node("constant", (), 0 if value.ndim == 0 else -1, value.dtype, value=value)


def _interpret(jaxpr: Any, consts: Sequence[Node], arguments: Sequence[Node]) -> list[Node]:
    known: dict[Any, Node] = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Node:
        return _constant(atom.val) if isinstance(atom, jex.Literal) else known[atom]

    for eqn in _needed(jaxpr):
        sources = [read(atom) for atom in eqn.invars]
        shapes = [atom.aval.shape for atom in eqn.invars]
        results = _apply(eqn, sources, shapes)
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _needed(jaxpr: Any) -> list[Any]:
    """The equations on which the results depend."""
    wanted = {atom for atom in jaxpr.outvars if not isinstance(atom, jex.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if not wanted.isdisjoint(eqn.outvars):
            kept.append(eqn)
            wanted.update(atom for atom in eqn.invars if not isinstance(atom, jex.Literal))
    return kept[::-1]


def _apply(eqn: Any, sources: list[Node], shapes: list[tuple[int, ...]]) -> list[Node]:
    name = eqn.primitive.name
    out = eqn.outvars[0].aval
    if name in _CALLS:
        if eqn.params.get("name") == "_row_sums":
            return [_sum(sources[0], out.dtype)]
        if eqn.params.get("name") == "fenced_scale":  # of `_compat`: no fence is needed here
            which, values, factor, _ = sources
            scaled = _elementwise("mul", [values, factor], shapes[1:3], out.dtype)
            zero = _constant(np.zeros((), out.dtype))
            return [_elementwise("select_n", [which, zero, scaled], shapes[:3], out.dtype)]
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if hasattr(inner, "consts"):
            return _interpret(inner.jaxpr, [_constant(c) for c in inner.consts], sources)
        return _interpret(inner, [], sources)
    if name in ("stack", "concatenate") and out.shape == (TRACED_LANES, 2) and len(sources) == 2:
        return [Node("pair", sources, _PAIR, out.dtype)]
    if sources and sources[0].rows == _PAIR:
        return [_of_pair(name, sources[0], eqn.params)]
    if name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "copy", "copy_p"):
        return [_reshaped(name, sources[0], shapes[0], out.shape)]
    if name == "slice" and sources[0].rows == -1:
        return [_sliced(sources[0], eqn.params, shapes[0])]
    if name == "transpose" and _rows_in_order(eqn.params["permutation"], shapes[0]):
        return [sources[0]]
    if name == "reduce_sum" and out.shape == (TRACED_LANES,):
        return [_sum(sources[0], out.dtype)]
    return [_elementwise(name, sources, shapes, out.dtype, **_kept(name, eqn.params))]


def _elementwise(
    name: str, sources: list[Node], shapes: list[tuple[int, ...]], dtype: Any, **params: Any
) -> Node:
    if name not in OPERATIONS:
        raise Unsupported(f"the operation {name} is not one of {', '.join(sorted(OPERATIONS))}")
    rows = {source.rows for source in sources} - {0, 1}
    if len(rows) > 1 or min(rows, default=0) < 0:
        raise Unsupported(f"the operation {name} mixes arrays of shapes {shapes}")
    count = rows.pop() if rows else max(source.rows for source in sources)
    return Node(name, sources, count, dtype, **params)


def _kept(name: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"y": params["y"]} if name == "integer_pow" else {}


def _sum(source: Node, dtype: Any) -> Node:
    if source.rows < 2:
        return source
    return Node("sum", [source], 1, dtype)


def _reshaped(name: str, source: Node, old: tuple[int, ...], new: tuple[int, ...]) -> Node:
    """The node itself: scalars and `[lanes]` widen where they are used."""
    if source.rows == -1:
        if np.prod(old, dtype=int) != 1 and old != new:
            raise Unsupported(f"{name} of an array without lanes, {old} to {new}")
        return source if new != () else Node("element", [source], 0, source.dtype, index=0)
    same = source.rows in (0, 1) or source.rows == rows_of(new)
    if not same or (new and TRACED_LANES not in new and source.rows != 0):
        raise Unsupported(f"{name} from {old} to {new}")
    return source


def _rows_in_order(permutation: Sequence[int], shape: tuple[int, ...]) -> bool:
    """Whether a transposition moves the axis of the lanes only."""
    others = [axis for axis in permutation if shape[axis] not in (1, TRACED_LANES)]
    return others == sorted(others)


def _of_pair(name: str, pair: Node, params: dict[str, Any]) -> Node:
    """What becomes of the two words of a key: a key, the words again, or one of them."""
    if name in ("random_wrap", "random_unwrap"):
        return pair
    if name == "slice" and params["limit_indices"][1] - params["start_indices"][1] == 1:
        return pair.inputs[params["start_indices"][1]]
    raise Unsupported(f"the operation {name} of a random key")


def _sliced(source: Node, params: dict[str, Any], old: tuple[int, ...]) -> Node:
    first, last = params["start_indices"], params["limit_indices"]
    if any(stop - start != 1 for start, stop in zip(first, last, strict=True)):
        raise Unsupported(f"a slice of several numbers of an array without lanes, {old}")
    index = int(np.ravel_multi_index(first, old))
    return Node("element", [source], 0, source.dtype, index=index)
