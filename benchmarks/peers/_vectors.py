"""SIMD vectors as values inside Numba functions.

Numba leaves vectorisation to LLVM, which must prove that loops over lanes do not alias and gives
up where several of them follow each other. A `Vector` is an LLVM vector instead: arithmetic on
it is vector instructions by construction, and a running sum stays in a register. Reals carry the
`fast` flag, so products and sums contract to fused multiply-adds.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model


class Vector(types.Type):
    """`lanes` numbers of the Numba type `dtype`."""

    def __init__(self, dtype: Any, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vector({dtype}, {lanes})")

    @property
    def llvm(self) -> ir.VectorType:
        """The LLVM type."""
        reals = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
        element = reals.get(self.dtype) or ir.IntType(self.dtype.bitwidth)
        return ir.VectorType(element, self.lanes)

    def constant(self, value: Any) -> ir.Constant:
        """`value` in every lane."""
        return ir.Constant(self.llvm, [value] * self.lanes)


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


def _address(context, builder, kind, array, index, vector):
    data = cgutils.create_struct_proxy(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.llvm.as_pointer())


@intrinsic(prefer_literal=True)
def load(context, array, index, lanes):
    """`array[index : index + lanes]`; the address is a multiple of 64 bytes."""
    vector = Vector(array.dtype, lanes.literal_value)

    def generate(context, builder, signature, values):
        place = _address(context, builder, signature.args[0], values[0], values[1], vector)
        return builder.load(place, align=64)

    return vector(array, types.intp, lanes), generate


@intrinsic(prefer_literal=True)
def store(context, array, index, vector):
    """`array[index : index + lanes] = vector`; the address is a multiple of 64 bytes."""

    def generate(context, builder, signature, values):
        place = _address(context, builder, signature.args[0], values[0], values[1], vector)
        builder.store(values[2], place, align=64)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic(prefer_literal=True)
def splat(context, value, lanes):
    """`value` in every one of `lanes` lanes."""
    vector = Vector(value, lanes.literal_value)

    def generate(context, builder, signature, values):
        blank = ir.Constant(vector.llvm, ir.Undefined)
        first = ir.Constant(ir.IntType(32), 0)
        single = builder.insert_element(blank, values[0], first)
        pick = ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), [0] * vector.lanes)
        return builder.shuffle_vector(single, blank, pick)

    return vector(value, lanes), generate


@intrinsic(prefer_literal=True)
def rotate(context, words, turn):
    """Every word rotated left by the literal `turn`."""
    left = turn.literal_value

    def generate(context, builder, signature, values):
        high = builder.shl(values[0], words.constant(left))
        low = builder.lshr(values[0], words.constant(words.dtype.bitwidth - left))
        return builder.or_(high, low)

    return words(words, turn), generate


@intrinsic(prefer_literal=True)
def shift(context, words, left):
    """Every word shifted left by the literal `left`."""

    def generate(context, builder, signature, values):
        return builder.shl(values[0], words.constant(left.literal_value))

    return words(words, left), generate


@intrinsic
def to_real(context, words, dtype):
    """Unsigned words as numbers of `dtype`."""
    vector = Vector(dtype.dtype, words.lanes)

    def generate(context, builder, signature, values):
        return builder.uitofp(values[0], vector.llvm)

    return vector(words, dtype), generate


@intrinsic
def absolute(context, x):
    """|x|."""

    def generate(context, builder, signature, values):
        name = f"llvm.fabs.v{x.lanes}f{x.dtype.bitwidth}"
        kind = ir.FunctionType(x.llvm, [x.llvm])
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, values)

    return x(x), generate


@intrinsic
def minimum(context, x, y):
    """The smaller of x and y."""

    def generate(context, builder, signature, values):
        return builder.select(builder.fcmp_ordered("<", *values), *values)

    return x(x, y), generate


@intrinsic
def where_less(context, x, y, then, other):
    """`then` where x < y, else `other`."""

    def generate(context, builder, signature, values):
        x, y, then, other = values
        return builder.select(builder.fcmp_ordered("<", x, y), then, other)

    return then(x, y, then, other), generate


def _operator(function: Any, real: str, word: str) -> None:
    """Let `function` act on two vectors by the builder's method for reals or for words."""

    @intrinsic
    def apply(context, x, y):
        def generate(context, builder, signature, values):
            if isinstance(x.dtype, types.Float):
                return getattr(builder, real)(*values, flags=("fast",))
            return getattr(builder, word)(*values)

        return x(x, y), generate

    @overload(function)
    def choose(x, y):
        if isinstance(x, Vector) and isinstance(y, Vector):
            return lambda x, y: apply(x, y)


_operator(operator.add, "fadd", "add")
_operator(operator.sub, "fsub", "sub")
_operator(operator.mul, "fmul", "mul")
_operator(operator.xor, "", "xor")
