"""The loops over host memory, in LLVM's intermediate representation.

Every loop is written with explicit vectors and a fixed order of additions, so a result has the same
bits on every processor, whatever the width of its registers. (A compiler that vectorises a plain
loop by itself has to reorder the sum, in a way that depends on the processor.) Sums are float64:
squares of float32, bfloat16 and float16 numbers are exact in it, and neither overflow nor vanish.

The exported functions take a table of *blocks* (see :mod:`distclip.kernels.host.blocks`), the first
and last of them to work on, and an array of float64 numbers, one for each row:

* ``squares``, ``roots``, ``magnitudes``, ``largest``: the sum of squares, its square root, the sum
  of absolute values and the largest absolute value of each row;
* ``scale``: multiply each row by its coefficient; rows whose coefficient is 1 are not touched;
* ``clamp``: clamp each element to the block's bound;
* ``squares_counted``, ``magnitudes_counted``, ``largest_counted``: measure, and count the exponents
  of each block in the same reading. In place of the array they take two addresses: the array's, and
  that of ``RECORD`` numbers for each block, which begin as 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llvmlite import ir

from distclip.kernels.host import counting as exponents
from distclip.kernels.host.blocks import BOUNDED, COLUMNS, COUNTED, RECORD, STRIDED, Column, Kind
from distclip.kernels.host.building import WIDTH, at, counting, splat, tree, variable
from distclip.kernels.host.changes import change_function, clamped
from distclip.kernels.host.formats import (
    DOUBLE,
    FORMATS,
    INT32,
    INT64,
    POINTER,
    Builder,
    Format,
    Value,
    constant,
)

UNROLLED = 4
"""Vectors that are summed side by side, so that no addition waits for the one before it."""

# ---- measuring -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is computed of a row: an accumulator per lane, and how the lanes are combined.

    Attributes:
        accumulates: the scalar type of the accumulator, given the format.
        start: its first value.
        take: accumulator and bits of the next numbers to the new accumulator.
        combine: of two accumulators.
        finish: the last accumulator, a scalar, to the float64 result.
    """

    accumulates: Callable[[Format], Any]
    take: Callable[[Builder, Format, Value, Value, Value | None], Value]
    combine: Callable[[Builder, Value, Value], Value]
    finish: Callable[[Builder, Format, Value], Value]


def _add_square(b: Builder, f: Format, total: Value, bits: Value, bound: Value | None) -> Value:
    value = clamped(b, f.widen(b, bits), bound)
    flags = ("contract",) if f.exact_squares else ()
    return b.fadd(b.fmul(value, value, flags=flags), total, flags=flags)


def _without_sign(b: Builder, f: Format, bits: Value) -> Value:
    return b.and_(bits, constant(f.bits, (1 << (8 * f.size - 1)) - 1, bits))


def _add_magnitude(b: Builder, f: Format, total: Value, bits: Value, bound: Value | None) -> Value:
    value = clamped(b, f.widen(b, _without_sign(b, f, bits)), bound)
    return b.fadd(value, total)


def _take_larger(b: Builder, f: Format, most: Value, bits: Value, bound: Value | None) -> Value:
    """Without their sign, the bits of numbers are in the order of the numbers, NaN on top."""
    return _larger(b, most, _without_sign(b, f, bits))


def _larger(b: Builder, first: Value, second: Value) -> Value:
    return b.select(b.icmp_unsigned(">", first, second), first, second)


def _sum(b: Builder, first: Value, second: Value) -> Value:
    return b.fadd(first, second)


def _root(b: Builder, f: Format, total: Value) -> Value:
    return b.call(b.module.declare_intrinsic("llvm.sqrt", [DOUBLE]), [total])


MEASURES = {
    "squares": Measure(lambda f: DOUBLE, _add_square, _sum, lambda b, f, total: total),
    "roots": Measure(lambda f: DOUBLE, _add_square, _sum, _root),
    "magnitudes": Measure(lambda f: DOUBLE, _add_magnitude, _sum, lambda b, f, total: total),
    "largest": Measure(
        lambda f: f.bits, _take_larger, _larger, lambda b, f, most: f.widen(b, most)
    ),
}


def _row_function(
    module: Any,
    name: str,
    measure: Measure,
    kind: Kind,
    *,
    bounded: bool,
    strided: bool,
    counted: bool,
) -> Any:
    """``double name(i64 address, i64 length, i64 step, double bound)``: one row measured.

    With ``counted`` and a fifth argument, the address of counters of exponents.
    """
    form = FORMATS[kind]
    arguments = [INT64, INT64, INT64, DOUBLE, *[INT64] * counted]
    function = ir.Function(module, ir.FunctionType(DOUBLE, arguments), name)
    function.linkage = "internal"
    b = ir.IRBuilder(function.append_basic_block("entry"))
    address, length, step, bound = function.args[:4]
    counter = exponents.counter(b, kind, function.args[4]) if counted else None
    scalar = measure.accumulates(form)
    done: Value = ir.Constant(INT64, 0)
    totals: list[Value] = []
    if not strided:
        vector, memory = ir.VectorType(scalar, WIDTH), ir.VectorType(form.bits, WIDTH)
        nothing = ir.Constant(vector, [0] * WIDTH)
        bounds = splat(b, bound) if bounded else None
        lanes = [variable(b, nothing) for _ in range(UNROLLED)]
        turn = WIDTH * UNROLLED
        whole = b.mul(b.sdiv(length, ir.Constant(INT64, turn)), ir.Constant(INT64, turn))
        with counting(b, done, whole, turn) as index:
            for number, lane in enumerate(lanes):
                place = b.add(index, ir.Constant(INT64, number * WIDTH))
                bits = b.load(at(b, address, place, form.size), align=form.size, typ=memory)
                total = b.load(lane, typ=vector)
                b.store(measure.take(b, form, total, bits, bounds), lane)
                if counter is not None:
                    counter.vector(b, address, place, bits)
        done = whole
        combine = functools.partial(measure.combine, b)
        summed = tree(b, combine, [b.load(lane, typ=vector) for lane in lanes])
        parts = [b.extract_element(summed, ir.Constant(INT32, n)) for n in range(WIDTH)]
        totals.append(tree(b, combine, parts))
    rest = variable(b, ir.Constant(scalar, 0))
    with counting(b, done, length, 1) as index:
        place = b.inttoptr(b.add(address, b.mul(index, step)), POINTER)
        bits = b.load(place, align=form.size, typ=form.bits)
        total = b.load(rest, typ=scalar)
        b.store(measure.take(b, form, total, bits, bound if bounded else None), rest)
        if counter is not None:
            counter.alone(b, bits, index)
    if counter is not None:
        counter.finish(b)
    totals.append(b.load(rest, typ=scalar))
    total = totals[0] if len(totals) == 1 else measure.combine(b, *totals)
    result = measure.finish(b, form, total)
    if bounded and measure is MEASURES["largest"]:
        result = clamped(b, result, bound)
    b.ret(result)
    return function


# ---- the exported functions ------------------------------------------------------------------


class _Block:
    """The columns of one row of the table, read where they are asked for."""

    def __init__(self, b: Builder, table: Value, number: Value) -> None:
        self._b = b
        self._start = b.add(table, b.mul(number, ir.Constant(INT64, 8 * COLUMNS)))

    def __getitem__(self, column: Column) -> Value:
        place = self._b.add(self._start, ir.Constant(INT64, 8 * column))
        return self._b.load(self._b.inttoptr(place, POINTER), typ=INT64)


def _over_blocks(
    module: Any, name: str, numbers: str, variants: Mapping[int, Any], *, counted: bool
) -> None:
    """``void name(i64 table, i64 first, i64 last, i64 values)``.

    Args:
        module: where the function goes.
        name: of the function.
        numbers: what each row does with its place in ``values``: ``"writes"`` its result there,
            ``"reads"`` its coefficient there, or takes its ``"bound"`` from the block.
        variants: variant of a block -> the function of one row.
        counted: the functions count exponents, and ``values`` is where two addresses are.
    """
    kind = ir.FunctionType(ir.VoidType(), [INT64, INT64, INT64, INT64])
    function = ir.Function(module, kind, name)
    b = ir.IRBuilder(function.append_basic_block("entry"))
    table, first, last, values = function.args
    bins = None
    if counted:
        bins = exponents.space(b)
        values, records = (
            b.load(at(b, values, ir.Constant(INT64, n), 8), typ=INT64) for n in (0, 1)
        )
    with counting(b, first, last, 1) as number:
        block = _Block(b, table, number)
        after = b.append_basic_block("after")
        choice = b.switch(block[Column.VARIANT], after)
        for variant, row in variants.items():
            here = b.append_basic_block(f"variant{variant}")
            choice.add_case(ir.Constant(INT64, variant), here)
            b.position_at_end(here)
            if bins is None:
                _rows(b, block, row, values, numbers)
            else:
                exponents.clear(b, Kind(variant // 4), bins)
                _rows(b, block, row, values, numbers, bins)
                record = b.add(records, b.mul(number, ir.Constant(INT64, 8 * RECORD)))
                elements = b.mul(block[Column.ROWS], block[Column.LENGTH])
                exponents.write(b, Kind(variant // 4), bins, record, elements)
            b.branch(after)
        b.position_at_end(after)
    b.ret_void()


def _rows(b: Builder, block: _Block, row: Any, values: Value, numbers: str, *more: Value) -> None:
    """Call ``row`` for every row of a block, with ``more`` arguments."""
    address, length, step = (block[c] for c in (Column.ADDRESS, Column.LENGTH, Column.STEP))
    distance, index = block[Column.ROW_STEP], block[Column.INDEX]
    bound = b.bitcast(block[Column.BOUND], DOUBLE)
    with counting(b, ir.Constant(INT64, 0), block[Column.ROWS], 1) as number:
        start = b.add(address, b.mul(number, distance))
        place = at(b, values, b.add(index, number), 8)
        if numbers == "writes":
            b.store(b.call(row, [start, length, step, bound, *more]), place)
        elif numbers == "bound":
            b.call(row, [start, length, step, bound])
        else:
            factor = b.load(place, typ=DOUBLE)
            with b.if_then(b.fcmp_unordered("!=", factor, ir.Constant(DOUBLE, 1.0))):
                b.call(row, [start, length, step, factor])


def module_text(name: str, kinds: Iterable[Kind]) -> str:
    """One exported function, for numbers of the given kinds, as the text of an LLVM module."""
    module = ir.Module(f"distclip_{name}")
    counted = name.endswith(COUNTED)
    measure = MEASURES.get(name.removesuffix(COUNTED))
    variants: dict[int, Any] = {}
    for kind in kinds:
        for flags in range(4):
            title = f"{kind.name}_{flags}".lower()
            strided, bounded = bool(flags & STRIDED), bool(flags & BOUNDED)
            if counted and bounded:  # what is counted is never clamped
                continue
            if measure is not None:
                how = {"bounded": bounded, "strided": strided, "counted": counted}
                row = _row_function(module, title, measure, kind, **how)
            elif bounded:  # changing takes no notice of the bound of a measurement
                row = variants[4 * kind + flags - BOUNDED]
            else:
                row = change_function(module, title, name, FORMATS[kind], strided=strided)
            variants[4 * kind + flags] = row
    numbers = "writes" if measure is not None else "reads" if name == "scale" else "bound"
    _over_blocks(module, name, numbers, variants, counted=counted)
    return str(module)
