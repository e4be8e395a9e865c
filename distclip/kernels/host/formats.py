"""How numbers lie in memory, and how they become float64 and back, in LLVM's representation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir

from distclip.kernels.host.blocks import Kind

INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
POINTER = ir.PointerType()

Builder: TypeAlias = Any
IRValue: TypeAlias = Any


MARGIN = 2.0**-22
"""Relative error, with something to spare, of the float32 product of a float32 number and a
float64 number that is rounded to float32 first."""


@dataclasses.dataclass(frozen=True)
class Single:
    """How numbers of one kind become float32 and back.

    Attributes:
        widen: from their bits.
        exactly: to their bits, where a number is one that the kind holds, or NaN.
        narrow: to their bits, rounded to nearest; and for which numbers that is doubtful, as a
            number within :data:`MARGIN` is rounded to another one. None where products need
            float64.
    """

    widen: Callable[[Builder, IRValue], IRValue]
    exactly: Callable[[Builder, IRValue], IRValue]
    narrow: Callable[[Builder, IRValue], tuple[IRValue, IRValue]] | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """How numbers of one kind lie in memory.

    Attributes:
        bits: the integer type of the same size.
        size: bytes.
        widen: from those bits to float64, for a number or for a vector of them.
        narrow: the reverse, rounded to nearest, ties to even.
        single: how they become float32 and back, where float32 holds all of them.
        exact_squares: whether the square of every number is exact in float64, so that a fused
            multiplication and addition gives the same bits as two instructions.
    """

    bits: Any
    size: int
    widen: Callable[[Builder, IRValue], IRValue]
    narrow: Callable[[Builder, IRValue], IRValue]
    single: Single | None = None
    exact_squares: bool = True


def _like(kind: Any, value: IRValue) -> Any:
    """The scalar type ``kind``, or a vector of it where ``value`` is a vector."""
    is_vector = isinstance(value.type, ir.VectorType)
    return ir.VectorType(kind, value.type.count) if is_vector else kind


def constant(kind: Any, number: float, value: IRValue) -> IRValue:
    """The number as a constant of scalar type ``kind``, as often as ``value`` has elements."""
    of_kind = _like(kind, value)
    if isinstance(of_kind, ir.VectorType):
        return ir.Constant(of_kind, [number] * of_kind.count)
    return ir.Constant(of_kind, number)


def _widen_float(b: Builder, bits: IRValue) -> IRValue:
    return b.fpext(b.bitcast(bits, _like(FLOAT, bits)), _like(DOUBLE, bits))


def _narrow_float(b: Builder, value: IRValue) -> IRValue:
    return b.bitcast(b.fptrunc(value, _like(FLOAT, value)), _like(INT32, value))


def _widen_double(b: Builder, bits: IRValue) -> IRValue:
    return b.bitcast(bits, _like(DOUBLE, bits))


def _narrow_double(b: Builder, value: IRValue) -> IRValue:
    return b.bitcast(value, _like(INT64, value))


def _widen_half(b: Builder, bits: IRValue) -> IRValue:
    half = b.bitcast(bits, _like(HALF, bits))
    return b.fpext(b.fpext(half, _like(FLOAT, bits)), _like(DOUBLE, bits))


def _rounded(b: Builder, value: IRValue, digits: int, least: int, most: int) -> IRValue:
    """Float64 numbers to nearest, ties to even, with so many binary digits.

    Exponents below ``least`` have fewer, as they are spaced like those of ``least``. Numbers beyond
    ``most``, the largest exponent, stay beyond it.
    """
    bits = b.bitcast(value, _like(INT64, value))
    power = b.bitcast(b.and_(bits, constant(INT64, 0x7FF << 52, bits)), value.type)
    for sign, limit in (("<", 2.0**least), (">", 2.0**most)):
        bound = constant(DOUBLE, limit, value)
        power = b.select(b.fcmp_ordered(sign, power, bound), bound, power)
    # Next to this number float64 numbers are as far apart as the rounded ones.
    large = b.fmul(power, constant(DOUBLE, 1.5 * 2.0 ** (53 - digits), value))
    rounded = b.bitcast(b.fsub(b.fadd(value, large), large), bits.type)
    sign = b.and_(bits, constant(INT64, -(1 << 63), bits))  # of a zero
    return b.bitcast(b.or_(rounded, sign), value.type)


def _narrow_half(b: Builder, value: IRValue) -> IRValue:
    single = b.fptrunc(_rounded(b, value, 11, -14, 15), _like(FLOAT, value))
    return b.bitcast(b.fptrunc(single, _like(HALF, value)), _like(INT16, value))


def _single_of_half(b: Builder, bits: IRValue) -> IRValue:
    return b.fpext(b.bitcast(bits, _like(HALF, bits)), _like(FLOAT, bits))


def _half_of_single(b: Builder, value: IRValue) -> tuple[IRValue, IRValue]:
    ends = [
        b.bitcast(
            b.fptrunc(b.fmul(value, constant(FLOAT, factor, value)), _like(HALF, value)),
            _like(INT16, value),
        )
        for factor in (1.0 - MARGIN, 1.0 + MARGIN)
    ]
    return ends[1], b.icmp_unsigned("!=", *ends)


def _single_of_bfloat(b: Builder, bits: IRValue) -> IRValue:
    """A bfloat16 number is the upper half of the same number in float32."""
    upper = b.shl(b.zext(bits, _like(INT32, bits)), constant(INT32, 16, bits))
    return b.bitcast(upper, _like(FLOAT, bits))


def _widen_bfloat(b: Builder, bits: IRValue) -> IRValue:
    return b.fpext(_single_of_bfloat(b, bits), _like(DOUBLE, bits))


def _narrow_bfloat(b: Builder, value: IRValue) -> IRValue:
    bits = _narrow_float(b, _rounded(b, value, 8, -126, 127))
    return b.trunc(b.lshr(bits, constant(INT32, 16, bits)), _like(INT16, bits))


def _bfloat_of_single(b: Builder, value: IRValue) -> tuple[IRValue, IRValue]:
    bits = b.bitcast(value, _like(INT32, value))
    lower = b.and_(bits, constant(INT32, 0xFFFF, bits))
    from_tie = b.sub(lower, constant(INT32, 0x8000 - 4, bits))
    doubtful = b.icmp_unsigned("<=", from_tie, constant(INT32, 8, bits))
    rounded = b.add(bits, constant(INT32, 0x8000, bits))
    return b.trunc(b.lshr(rounded, constant(INT32, 16, bits)), _like(INT16, bits)), doubtful


def _upper_half(b: Builder, value: IRValue) -> IRValue:
    bits = b.bitcast(value, _like(INT32, value))
    return b.trunc(b.lshr(bits, constant(INT32, 16, bits)), _like(INT16, bits))


def _half_exactly(b: Builder, value: IRValue) -> IRValue:
    return b.bitcast(b.fptrunc(value, _like(HALF, value)), _like(INT16, value))


FORMATS = {
    Kind.FLOAT32: Format(
        INT32,
        4,
        _widen_float,
        _narrow_float,
        Single(
            lambda b, bits: b.bitcast(bits, _like(FLOAT, bits)),
            lambda b, value: b.bitcast(value, _like(INT32, value)),
        ),
    ),
    Kind.BFLOAT16: Format(
        INT16,
        2,
        _widen_bfloat,
        _narrow_bfloat,
        Single(_single_of_bfloat, _upper_half, _bfloat_of_single),
    ),
    Kind.FLOAT16: Format(
        INT16, 2, _widen_half, _narrow_half, Single(_single_of_half, _half_exactly, _half_of_single)
    ),
    Kind.FLOAT64: Format(INT64, 8, _widen_double, _narrow_double, exact_squares=False),
}
