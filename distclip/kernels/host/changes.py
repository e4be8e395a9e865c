"""The loops that change numbers in place, in LLVM's intermediate representation.

A product is that of float64, rounded once. Most products of bfloat16 and float16 numbers need no
float64: in float32 they are known to :data:`MARGIN`, and both ends of that interval round to the
same number. Where they do not, as near a tie, the float64 product decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from llvmlite import ir

from distclip.kernels.host.building import VECTOR_WIDTH, at, counting, splat
from distclip.kernels.host.formats import (
    DOUBLE,
    FLOAT,
    INT64,
    POINTER,
    Builder,
    Format,
    IRValue,
    Single,
)

Change: TypeAlias = Callable[[Builder, IRValue, IRValue], IRValue]
"""From the value and the row's number (a coefficient or a bound) to the new value."""
TURN = 2 * VECTOR_WIDTH
"""Numbers that are changed in one turn of a loop in float64."""
QUICK_TURN, QUICK_WIDTH = 32, 16
"""Numbers in one turn of a loop in float32, and in one of its vectors."""

TINY, HUGE = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127
"""The smallest and the largest normal number of float32."""


def clamped(b: Builder, value: IRValue, bound: IRValue | None) -> IRValue:
    """``value`` clamped to +-``bound``, a scalar or as many as there are values; NaN stays NaN."""
    if bound is None:
        return value
    upper = b.select(b.fcmp_ordered(">", value, bound), bound, value)
    lower = b.fneg(bound)
    return b.select(b.fcmp_ordered("<", upper, lower), lower, upper)


def _multiplied(b: Builder, value: IRValue, factor: IRValue) -> IRValue:
    return b.fmul(value, factor)


CHANGES: dict[str, Change] = {"scale": _multiplied, "clamp": clamped}


def change_function(module: Any, name: str, how: str, form: Format, *, strided: bool) -> Any:
    """``void name(i64 address, i64 length, i64 step, double number)``: one row changed."""
    kind = ir.FunctionType(ir.VoidType(), [INT64, INT64, INT64, DOUBLE])
    function = ir.Function(module, kind, name)
    function.linkage = "internal"
    b = ir.IRBuilder(function.append_basic_block("entry"))
    address, length, step, number = function.args
    change = CHANGES[how]
    done: IRValue = ir.Constant(INT64, 0)

    def changed(place: IRValue, memory: Any, by: IRValue) -> None:
        bits = b.load(place, align=form.size, typ=memory)
        b.store(form.narrow(b, change(b, form.widen(b, bits), by)), place, align=form.size)

    def in_vectors(start: IRValue, count: int) -> None:
        for part in range(0, count, VECTOR_WIDTH):
            place = at(b, address, b.add(start, ir.Constant(INT64, part)), form.size)
            changed(place, ir.VectorType(form.bits, VECTOR_WIDTH), several)

    if not strided:
        several = splat(b, number)
        if how == "scale" and form.single is not None and form.single.narrow is not None:
            done = _multiplied_quickly(b, form, form.single, address, length, number, in_vectors)
        elif how == "clamp" and form.single is not None:
            done = _clamped_quickly(b, form, form.single, address, length, number)
        whole = _multiple(b, length, TURN)
        with counting(b, done, whole, TURN) as index:
            in_vectors(index, TURN)
        done = whole
    with counting(b, done, length, 1) as index:
        changed(b.inttoptr(b.add(address, b.mul(index, step)), POINTER), form.bits, number)
    b.ret_void()
    return function


def _multiple(b: Builder, length: IRValue, turn: int) -> IRValue:
    """The largest multiple of ``turn`` that is at most ``length``."""
    return b.mul(b.sdiv(length, ir.Constant(INT64, turn)), ir.Constant(INT64, turn))


def _multiplied_quickly(
    b: Builder,
    form: Format,
    single: Single,
    address: IRValue,
    length: IRValue,
    number: IRValue,
    exactly: Callable[[IRValue, int], None],
) -> IRValue:
    """Multiply in float32 as far as that is certain; returns where it ended, 0 if not begun.

    ``exactly(start, count)`` multiplies in float64. A coefficient beyond the normal numbers of
    float32 has no close enough neighbour there.
    """
    narrow = single.narrow
    assert narrow is not None
    size = b.select(b.fcmp_ordered("<", number, ir.Constant(DOUBLE, 0.0)), b.fneg(number), number)
    normal = b.and_(
        b.fcmp_ordered(">=", size, ir.Constant(DOUBLE, TINY)),
        b.fcmp_ordered("<=", size, ir.Constant(DOUBLE, HUGE)),
    )
    end = b.select(normal, _multiple(b, length, QUICK_TURN), ir.Constant(INT64, 0))
    factors = splat(b, b.fptrunc(number, FLOAT), QUICK_WIDTH)
    memory = ir.VectorType(form.bits, QUICK_WIDTH)
    with counting(b, ir.Constant(INT64, 0), end, QUICK_TURN) as index:
        places, results, doubts = [], [], []
        for part in range(0, QUICK_TURN, QUICK_WIDTH):
            place = at(b, address, b.add(index, ir.Constant(INT64, part)), form.size)
            bits = b.load(place, align=form.size, typ=memory)
            rounded, doubt = narrow(b, b.fmul(single.widen(b, bits), factors))
            places.append(place)
            results.append(rounded)
            doubts.append(doubt)
        with b.if_else(_any(b, doubts), likely=False) as (doubtful, certain):
            with doubtful:
                exactly(index, QUICK_TURN)
            with certain:
                for place, rounded in zip(places, results, strict=True):
                    b.store(rounded, place, align=form.size)
    return end


def _clamped_quickly(
    b: Builder, form: Format, single: Single, address: IRValue, length: IRValue, number: IRValue
) -> IRValue:
    """Clamp in float32 as far as whole turns go; returns where they end.

    To the bound as the format holds it: what is clamped in float64 and rounded is the same number.
    """
    end = _multiple(b, length, QUICK_TURN)
    bound = splat(b, single.widen(b, form.narrow(b, number)), QUICK_WIDTH)
    memory = ir.VectorType(form.bits, QUICK_WIDTH)
    with counting(b, ir.Constant(INT64, 0), end, QUICK_TURN) as index:
        for part in range(0, QUICK_TURN, QUICK_WIDTH):
            place = at(b, address, b.add(index, ir.Constant(INT64, part)), form.size)
            bits = b.load(place, align=form.size, typ=memory)
            value = clamped(b, single.widen(b, bits), bound)
            b.store(single.exactly(b, value), place, align=form.size)
    return end


def _any(b: Builder, flags: Sequence[IRValue]) -> IRValue:
    """Whether any flag of some vectors of flags is set."""
    some = flags[0]
    for each in flags[1:]:
        some = b.or_(some, each)
    mask = b.bitcast(some, ir.IntType(some.type.count))
    return b.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))
