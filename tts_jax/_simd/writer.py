"""Writing a function for LLVM in Python: values with operators, arrays, loops and branches.

A `Writer` holds one function under construction. Its values are double-precision numbers, one or
a vector of one per lane, masks of the same forms, and 64-bit indices; arithmetic on them emits
instructions. Control flow is written with context managers, and what changes in it is a `Variable`:

    with writer.range(0, rows) as row:
        total.set(total.get() + values[row] * values[row])

A product that is added to something is rounded together with the sum where the processor can, so
results depend on the processor, but not on the number of lanes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir

from tts_jax._simd.machine import has_fma


DOUBLE, WHOLE, BIT = ir.DoubleType(), ir.IntType(64), ir.IntType(1)
ADDRESS = ir.PointerType()


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
        factors = (first, second) if self.writer.fused else None
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
    """Memory of values of one kind, from `base` on: `array[i]` loads, `array[i] = x` stores."""

    def __init__(self, writer: "Writer", base: Any, kind: Any) -> None:
        self.writer, self.base, self.kind = writer, base, kind

    def _place(self, index: Any) -> Any:
        index = ir.Constant(WHOLE, index) if isinstance(index, int) else index.ir
        return self.writer.builder.gep(self.base, [index], source_etype=self.kind)

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
        self.writer.builder.store(number, self._place(index), align=8)

    def offset(self, index: Any) -> "Array":
        """The array that begins at `index`."""
        return Array(self.writer, self._place(index), self.kind)

    def numbers(self) -> "Array":
        """The same memory number by number: vector i holds numbers `lanes * i` on."""
        kind = self.kind.element if isinstance(self.kind, ir.VectorType) else self.kind
        return Array(self.writer, self.base, kind)


class Writer:
    """One function under construction.

    Attributes:
        lanes: the number of lanes of a vector.
        arguments: the function's arguments as LLVM sees them.
    """

    def __init__(
        self, module: Any, name: str, kinds: Sequence[Any], lanes: int, result: Any = None
    ) -> None:
        self.module, self.lanes, self.fused = module, lanes, has_fma()
        form = ir.FunctionType(ir.VoidType() if result is None else result, kinds)
        self.function = ir.Function(module, form, name)
        self.function.attributes.add("noinline")
        self.arguments = self.function.args
        entry = self.function.append_basic_block("entry")
        start = self.function.append_basic_block("start")
        self.entry = ir.IRBuilder(entry)
        self.entry.position_before(self.entry.branch(start))
        self.builder = ir.IRBuilder(start)
        self.vector = ir.VectorType(DOUBLE, lanes)

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
        return Array(self, base, self.vector)

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
        full = f"llvm.{name}.{suffix}"
        function = self.module.globals.get(full)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(kind, [kind] * len(values)), full)
        return Real(self, self.builder.call(function, [value.ir for value in values]))

    def fma(self, x: Real, y: Real, rest: Real) -> Real:
        """x y + rest, rounded once."""
        return self._call("fma", x, y, rest)

    def abs(self, value: Real) -> Real:
        return self._call("fabs", value)

    def sqrt(self, value: Real) -> Real:
        return self._call("sqrt", value)

    def power(self, base: Real, exponent: float) -> Real:
        return self._call("pow", base, base._lift(exponent))

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
        """Whether a mask of lanes is true anywhere."""
        bits = ir.IntType(self.lanes)
        word = self.builder.bitcast(mask.ir, bits)
        return Mask(self, self.builder.icmp_unsigned("!=", word, ir.Constant(bits, 0)))

    def to_real(self, value: Index) -> Real:
        return Real(self, self.builder.sitofp(value.ir, DOUBLE))

    def to_index(self, value: Real) -> Index:
        return Index(self, self.builder.fptosi(value.ir, WHOLE))

    @property
    def true(self) -> Mask:
        """A single true value."""
        return Mask(self, ir.Constant(BIT, 1))

    def take_next(self, counter: Array) -> Index:
        """The value of a counter that threads share, which is then one larger."""
        one = ir.Constant(WHOLE, 1)
        return Index(self, self.builder.atomic_rmw("add", counter.base, one, "monotonic"))

    def call(self, other: "Writer | Any", *values: Any) -> Any:
        """Call a function that another writer has written."""
        function = other.function if isinstance(other, Writer) else other
        return self.builder.call(function, [getattr(value, "ir", value) for value in values])

    # --- control flow ---

    def block(self, name: str) -> Any:
        return self.function.append_basic_block(name)

    @contextlib.contextmanager
    def range(self, first: Any, last: Any, step: int = 1) -> Iterator[Index]:
        """`for i in range(first, last, step)`; a negative step counts down to above `last`."""

        def lift(bound: Any) -> Any:
            return ir.Constant(WHOLE, bound) if isinstance(bound, int) else bound.ir

        head, body, after = self.block("head"), self.block("body"), self.block("after")
        before, last = self.builder.block, lift(last)
        self.builder.branch(head)
        self.builder.position_at_end(head)
        counter = self.builder.phi(WHOLE)
        counter.add_incoming(lift(first), before)
        more = self.builder.icmp_signed("<" if step > 0 else ">", counter, last)
        self.builder.cbranch(more, body, after)
        self.builder.position_at_end(body)
        yield Index(self, counter)
        following = self.builder.add(counter, ir.Constant(WHOLE, step))
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
