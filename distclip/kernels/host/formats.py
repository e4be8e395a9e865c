"""How numbers lie in memory, and how they become float64 and back, in LLVM's representation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir

from distclip.kernels.host.blocks import Kind

INT16, INT32, INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
POINTER = ir.PointerType()

Builder: TypeAlias = Any
Value: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Format:
    """How numbers of one kind lie in memory.

    Attributes:
        bits: the integer type of the same size.
        size: bytes.
        widen: from those bits to float64, for a number or for a vector of them.
        narrow: the reverse, rounded to nearest, ties to even.
        exact_squares: whether the square of every number is exact in float64, so that a fused
            multiplication and addition gives the same bits as two instructions.
    """

    bits: Any
    size: int
    widen: Callable[[Builder, Value], Value]
    narrow: Callable[[Builder, Value], Value]
    exact_squares: bool = True


def _like(kind: Any, value: Value) -> Any:
    """The scalar type ``kind``, or a vector of it where ``value`` is a vector."""
    is_vector = isinstance(value.type, ir.VectorType)
    return ir.VectorType(kind, value.type.count) if is_vector else kind


def constant(kind: Any, number: float, value: Value) -> Value:
    """The number as a constant of scalar type ``kind``, as often as ``value`` has elements."""
    of_kind = _like(kind, value)
    if isinstance(of_kind, ir.VectorType):
        return ir.Constant(of_kind, [number] * of_kind.count)
    return ir.Constant(of_kind, number)


def _widen_float(b: Builder, bits: Value) -> Value:
    return b.fpext(b.bitcast(bits, _like(FLOAT, bits)), _like(DOUBLE, bits))


def _narrow_float(b: Builder, value: Value) -> Value:
    return b.bitcast(b.fptrunc(value, _like(FLOAT, value)), _like(INT32, value))


def _widen_double(b: Builder, bits: Value) -> Value:
    return b.bitcast(bits, _like(DOUBLE, bits))


def _narrow_double(b: Builder, value: Value) -> Value:
    return b.bitcast(value, _like(INT64, value))


def _widen_half(b: Builder, bits: Value) -> Value:
    half = b.bitcast(bits, _like(HALF, bits))
    return b.fpext(b.fpext(half, _like(FLOAT, bits)), _like(DOUBLE, bits))


def _narrow_half(b: Builder, value: Value) -> Value:
    single = b.fptrunc(value, _like(FLOAT, value))
    return b.bitcast(b.fptrunc(single, _like(HALF, value)), _like(INT16, value))


def _widen_bfloat(b: Builder, bits: Value) -> Value:
    """A bfloat16 number is the upper half of the same number in float32."""
    upper = b.shl(b.zext(bits, _like(INT32, bits)), constant(INT32, 16, bits))
    return _widen_float(b, upper)


def _narrow_bfloat(b: Builder, value: Value) -> Value:
    bits = _narrow_float(b, value)
    sixteen = constant(INT32, 16, bits)
    odd = b.and_(b.lshr(bits, sixteen), constant(INT32, 1, bits))
    rounded = b.add(bits, b.add(odd, constant(INT32, 0x7FFF, bits)))
    # Rounding could carry the payload of a NaN away; a NaN stays one.
    quiet = b.or_(bits, constant(INT32, 0x400000, bits))
    chosen = b.select(b.fcmp_unordered("uno", value, value), quiet, rounded)
    return b.trunc(b.lshr(chosen, sixteen), _like(INT16, bits))


FORMATS = {
    Kind.FLOAT32: Format(INT32, 4, _widen_float, _narrow_float),
    Kind.BFLOAT16: Format(INT16, 2, _widen_bfloat, _narrow_bfloat),
    Kind.FLOAT16: Format(INT16, 2, _widen_half, _narrow_half),
    Kind.FLOAT64: Format(INT64, 8, _widen_double, _narrow_double, exact_squares=False),
}
