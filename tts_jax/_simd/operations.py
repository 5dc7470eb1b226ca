"""The operations in LLVM's instructions, on scalars and vectors alike."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir

from tts_jax._simd.graph import Node, Unsupported


def _real(node: Node) -> bool:
    return node.dtype.kind == "f"


def _binary(real: str | None, word: str | None) -> Callable:
    def emit(builder, node, values):
        name = real if _real(node) else word
        if name is None:
            raise Unsupported(f"{node.op} of {node.dtype}")
        return getattr(builder, name)(*values)

    return emit


def _compare(symbol: str) -> Callable:
    def emit(builder, node, values):
        if _real(node.inputs[0]):
            if symbol == "!=":
                return builder.fcmp_unordered(symbol, *values)
            return builder.fcmp_ordered(symbol, *values)
        if node.inputs[0].dtype.kind == "i":
            return builder.icmp_signed(symbol, *values)
        return builder.icmp_unsigned(symbol, *values)

    return emit


def _extreme(symbol: str) -> Callable:
    """The smaller or larger of two; a NaN wins."""

    def emit(builder, node, values):
        first, second = values
        kinds = [source.op == "constant" for source in node.inputs]
        if not _real(node):
            signed = node.dtype.kind == "i"
            compare = builder.icmp_signed if signed else builder.icmp_unsigned
            return builder.select(compare(symbol, first, second), first, second)
        if not any(kinds):
            kept = builder.select(builder.fcmp_unordered("uno", first, first), first, second)
            return builder.select(builder.fcmp_ordered(symbol, first, second), first, kept)
        if kinds[1]:  # a constant is no NaN: one instruction, which keeps the second if unordered
            first, second = second, first
        return builder.select(builder.fcmp_ordered(symbol, first, second), first, second)

    return emit


def _convert(builder, node, values):
    (value,) = values
    old, new = node.inputs[0].dtype, node.dtype
    kind = like(value.type, number_type(new))
    if old == new:
        return value
    if old.kind == "b":
        return builder.uitofp(value, kind) if new.kind == "f" else builder.zext(value, kind)
    if old.kind == "f" and new.kind == "f":
        return (builder.fpext if new.itemsize > old.itemsize else builder.fptrunc)(value, kind)
    if new.kind == "f":
        return (builder.sitofp if old.kind == "i" else builder.uitofp)(value, kind)
    if old.kind in "iu" and new.kind in "iu":
        if new.itemsize < old.itemsize:
            return builder.trunc(value, kind)
        if new.itemsize == old.itemsize:
            return value
        return (builder.sext if old.kind == "i" else builder.zext)(value, kind)
    raise Unsupported(f"conversion from {old} to {new}")


def _intrinsic(name: str) -> Callable:
    def emit(builder, node, values):
        if not _real(node):
            raise Unsupported(f"{node.op} of {node.dtype}")
        return call(builder, name, values)

    return emit


def call(builder: Any, name: str, values: Sequence[Any]) -> Any:
    """LLVM's intrinsic `name` on reals of one type."""
    kind = values[0].type
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    size = "f64" if isinstance(element, ir.DoubleType) else "f32"
    lanes = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
    module = builder.module
    full = f"{name}.{lanes}{size}"
    function = module.globals.get(full)
    if function is None:
        function = ir.Function(module, ir.FunctionType(kind, [kind] * len(values)), full)
    return builder.call(function, values)


def _square(builder, node, values):
    return EMITTERS["mul"](builder, node, [values[0], values[0]])


def _negative(builder, node, values):
    return builder.fneg(values[0]) if _real(node) else builder.neg(values[0])


def _sign(builder, node, values):
    """1, 0 or −1 as the sign; zeros and NaN as they are."""
    if not _real(node):
        raise Unsupported(f"{node.op} of {node.dtype}")
    (value,) = values
    one = splat(builder, ir.Constant(number_type(node.dtype), 1.0), value.type)
    signed = call(builder, "llvm.copysign", [one, value])
    zero = splat(builder, ir.Constant(number_type(node.dtype), 0.0), value.type)
    return builder.select(builder.fcmp_ordered("!=", value, zero), signed, value)


def _power(builder, node, values):
    count, (base,) = node.params["y"], values
    if not 1 <= count <= 16:
        raise Unsupported(f"the power {count}")
    result = None
    while count:
        if count & 1:
            result = base if result is None else builder.fmul(result, base)
        count >>= 1
        base = builder.fmul(base, base) if count else base
    return result


def _select(builder, node, values):
    if len(values) != 3:
        raise Unsupported("a select of more than two cases")
    which, no, yes = values
    return builder.select(which, yes, no)


def _shift(name: str) -> Callable:
    return lambda builder, node, values: getattr(builder, name)(*values)


EMITTERS: dict[str, Callable] = {
    "abs": _intrinsic("llvm.fabs"),
    "add": _binary("fadd", "add"),
    "add_any": _binary("fadd", "add"),
    "and": _binary(None, "and_"),
    "convert_element_type": _convert,
    "div": _binary("fdiv", None),
    "eq": _compare("=="),
    "ge": _compare(">="),
    "gt": _compare(">"),
    "integer_pow": _power,
    "le": _compare("<="),
    "lt": _compare("<"),
    "max": _extreme(">"),
    "min": _extreme("<"),
    "mul": _binary("fmul", "mul"),
    "ne": _compare("!="),
    "neg": _negative,
    "not": lambda builder, node, values: builder.not_(values[0]),
    "or": _binary(None, "or_"),
    "select_n": _select,
    "shift_left": _shift("shl"),
    "shift_right_arithmetic": _shift("ashr"),
    "shift_right_logical": _shift("lshr"),
    "sign": _sign,
    "sqrt": _intrinsic("llvm.sqrt"),
    "square": _square,
    "sub": _binary("fsub", "sub"),
    "xor": _binary(None, "xor"),
}


# --- types ----------------------------------------------------------------------------------


def number_type(dtype: np.dtype) -> Any:
    if dtype.kind == "f" and dtype.itemsize in (4, 8):
        return ir.FloatType() if dtype.itemsize == 4 else ir.DoubleType()
    if dtype.kind in "iub":
        return ir.IntType(1 if dtype.kind == "b" else 8 * dtype.itemsize)
    raise Unsupported(f"numbers of type {dtype}")


def like(model: Any, element: Any) -> Any:
    return ir.VectorType(element, model.count) if isinstance(model, ir.VectorType) else element


def splat(builder: Any, value: Any, kind: Any) -> Any:
    """`value` as a value of type `kind`: its number, or its first one, in every place."""
    if value.type == kind or not isinstance(kind, ir.VectorType):
        return value
    if isinstance(value, ir.Constant):
        return ir.Constant(kind, [value.constant] * kind.count)
    if not isinstance(value.type, ir.VectorType):
        blank = ir.Constant(ir.VectorType(value.type, 1), ir.Undefined)
        value = builder.insert_element(blank, value, ir.Constant(ir.IntType(32), 0))
    blank = ir.Constant(value.type, ir.Undefined)
    picks = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(value, blank, picks)
