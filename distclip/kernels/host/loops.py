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
* ``clamp``: clamp each row to its bound; rows whose bound is inf are not touched.

Some take two addresses in place of that of the array, of which the first is the array's:

* ``squares_counted``, ``magnitudes_counted``, ``largest_counted`` also count the exponents of each
  block, in the same reading, in ``RECORD`` numbers for each block, which begin as 0;
* ``squares_clamped``, ``magnitudes_clamped`` take the bounds of the rows in the array, and measure
  them as if clamped to these; the measures of the rows as they are go to another array.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llvmlite import ir

from distclip.kernels.host import counting as exponents
from distclip.kernels.host.blocks import BLOCK_COLUMNS, CLAMPED, COUNTED, RECORD, Column, Kind
from distclip.kernels.host.building import VECTOR_WIDTH, at, counting, splat, tree, variable
from distclip.kernels.host.changes import change_function, clamped
from distclip.kernels.host.formats import (
    DOUBLE,
    FORMATS,
    INT32,
    INT64,
    POINTER,
    Builder,
    Format,
    IRValue,
    constant,
)

UNROLLED = 4
"""Vectors that are summed side by side, so that no addition waits for the one before it."""

# ---- measuring -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RowReduction:
    """What is computed of a row: an accumulator per lane, and how the lanes are combined.

    Attributes:
        accumulates: the scalar type of the accumulator, given the format.
        start: its first value.
        take: accumulator and bits of the next numbers to the new accumulator.
        combine: of two accumulators.
        finish: the last accumulator, a scalar, to the float64 result.
    """

    accumulates: Callable[[Format], Any]
    take: Callable[[Builder, Format, IRValue, IRValue, IRValue | None], IRValue]
    combine: Callable[[Builder, IRValue, IRValue], IRValue]
    finish: Callable[[Builder, Format, IRValue], IRValue]


def _add_square(
    b: Builder, f: Format, total: IRValue, bits: IRValue, bound: IRValue | None
) -> IRValue:
    value = clamped(b, f.widen(b, bits), bound)
    flags = ("contract",) if f.exact_squares else ()
    return b.fadd(b.fmul(value, value, flags=flags), total, flags=flags)


def _without_sign(b: Builder, f: Format, bits: IRValue) -> IRValue:
    return b.and_(bits, constant(f.bits, (1 << (8 * f.size - 1)) - 1, bits))


def _add_magnitude(
    b: Builder, f: Format, total: IRValue, bits: IRValue, bound: IRValue | None
) -> IRValue:
    value = clamped(b, f.widen(b, _without_sign(b, f, bits)), bound)
    return b.fadd(value, total)


def _take_larger(
    b: Builder, f: Format, most: IRValue, bits: IRValue, bound: IRValue | None
) -> IRValue:
    """Without their sign, the bits of numbers are in the order of the numbers, NaN on top."""
    return _larger(b, most, _without_sign(b, f, bits))


def _larger(b: Builder, first: IRValue, second: IRValue) -> IRValue:
    return b.select(b.icmp_unsigned(">", first, second), first, second)


def _sum(b: Builder, first: IRValue, second: IRValue) -> IRValue:
    return b.fadd(first, second)


def _root(b: Builder, f: Format, total: IRValue) -> IRValue:
    return b.call(b.module.declare_intrinsic("llvm.sqrt", [DOUBLE]), [total])


MEASURES = {
    "squares": RowReduction(lambda f: DOUBLE, _add_square, _sum, lambda b, f, total: total),
    "roots": RowReduction(lambda f: DOUBLE, _add_square, _sum, _root),
    "magnitudes": RowReduction(lambda f: DOUBLE, _add_magnitude, _sum, lambda b, f, total: total),
    "largest": RowReduction(
        lambda f: f.bits, _take_larger, _larger, lambda b, f, most: f.widen(b, most)
    ),
}


class _Accumulator:
    """One measure of the numbers that a function reads, from its first to its last."""

    def __init__(
        self, b: Builder, measure: RowReduction, form: Format, bound: IRValue | None
    ) -> None:
        self._measure, self._form = measure, form
        self._scalar = measure.accumulates(form)
        self._vector = ir.VectorType(self._scalar, VECTOR_WIDTH)
        nothing = ir.Constant(self._vector, [0] * VECTOR_WIDTH)
        self._bound, self._bounds = bound, None if bound is None else splat(b, bound)
        self._lanes = [variable(b, nothing) for _ in range(UNROLLED)]
        self._rest = variable(b, ir.Constant(self._scalar, 0))

    def vector(self, b: Builder, lane: int, bits: IRValue) -> None:
        """Take ``VECTOR_WIDTH`` numbers into a lane of their own."""
        total = b.load(self._lanes[lane], typ=self._vector)
        taken = self._measure.take(b, self._form, total, bits, self._bounds)
        b.store(taken, self._lanes[lane])

    def alone(self, b: Builder, bits: IRValue) -> None:
        """Take one number."""
        total = b.load(self._rest, typ=self._scalar)
        b.store(self._measure.take(b, self._form, total, bits, self._bound), self._rest)

    def result(self, b: Builder) -> IRValue:
        """The float64 result for the row."""
        combine = functools.partial(self._measure.combine, b)
        lanes = tree(b, combine, [b.load(lane, typ=self._vector) for lane in self._lanes])
        parts = [b.extract_element(lanes, ir.Constant(INT32, n)) for n in range(VECTOR_WIDTH)]
        total = combine(tree(b, combine, parts), b.load(self._rest, typ=self._scalar))
        return self._measure.finish(b, self._form, total)


def _row_function(
    module: Any, name: str, measure: RowReduction, kind: Kind, ending: str, *, strided: bool
) -> Any:
    """``double name(i64 address, i64 length, i64 step, ...)``: one row measured.

    Where exponents are counted, the address of the counters follows. Where numbers are clamped, it
    is the bound, and where to write the measure of the row as it is.
    """
    form, more = FORMATS[kind], {"": [], COUNTED: [INT64], CLAMPED: [DOUBLE, INT64]}[ending]
    kinds = [INT64, INT64, INT64, *more]
    function = ir.Function(module, ir.FunctionType(DOUBLE, kinds), name)
    function.linkage = "internal"
    b = ir.IRBuilder(function.append_basic_block("entry"))
    address, length, step, *given = function.args
    counter = exponents.counter(b, kind, given[0]) if ending == COUNTED else None
    sums = [_Accumulator(b, measure, form, given[0] if ending == CLAMPED else None)]
    if ending == CLAMPED:
        sums.append(_Accumulator(b, measure, form, None))
    done: IRValue = ir.Constant(INT64, 0)
    if not strided:
        memory, turn = ir.VectorType(form.bits, VECTOR_WIDTH), VECTOR_WIDTH * UNROLLED
        whole = b.mul(b.sdiv(length, ir.Constant(INT64, turn)), ir.Constant(INT64, turn))
        with counting(b, done, whole, turn) as index:
            for lane in range(UNROLLED):
                place = b.add(index, ir.Constant(INT64, lane * VECTOR_WIDTH))
                bits = b.load(at(b, address, place, form.size), align=form.size, typ=memory)
                for each in sums:
                    each.vector(b, lane, bits)
                if counter is not None:
                    counter.vector(b, address, place, bits)
        done = whole
    with counting(b, done, length, 1) as index:
        place = b.inttoptr(b.add(address, b.mul(index, step)), POINTER)
        bits = b.load(place, align=form.size, typ=form.bits)
        for each in sums:
            each.alone(b, bits)
        if counter is not None:
            counter.alone(b, bits, index)
    if counter is not None:
        counter.finish(b)
    if ending == CLAMPED:
        b.store(sums[1].result(b), b.inttoptr(given[1], POINTER))
    b.ret(sums[0].result(b))
    return function


# ---- the exported functions ------------------------------------------------------------------


class _Block:
    """The columns of one row of the table, read where they are asked for."""

    def __init__(self, b: Builder, table: IRValue, number: IRValue) -> None:
        self._b = b
        self._start = b.add(table, b.mul(number, ir.Constant(INT64, 8 * BLOCK_COLUMNS)))

    def __getitem__(self, column: Column) -> IRValue:
        place = self._b.add(self._start, ir.Constant(INT64, 8 * column))
        return self._b.load(self._b.inttoptr(place, POINTER), typ=INT64)


def _over_blocks(
    module: Any, name: str, variants: Mapping[int, Any], *, ending: str, neutral: float | None
) -> None:
    """``void name(i64 table, i64 first, i64 last, i64 values)``.

    Args:
        module: where the function goes.
        name: of the function.
        variants: variant of a block -> the function of one row.
        ending: of the name; says what is made beside the measure of each row.
        neutral: for changes, the number that says to leave a row as it is; None: rows are measured.
    """
    kind = ir.FunctionType(ir.VoidType(), [INT64, INT64, INT64, INT64])
    function = ir.Function(module, kind, name)
    b = ir.IRBuilder(function.append_basic_block("entry"))
    table, first, last, values = function.args
    bins, beside = exponents.space(b) if ending == COUNTED else None, None
    if ending:
        values, beside = (
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
                _rows(b, block, row, values, neutral=neutral, beside=beside)
            else:
                exponents.clear(b, Kind(variant // 2), bins)
                _rows(b, block, row, values, bins=bins)
                record = b.add(beside, b.mul(number, ir.Constant(INT64, 8 * RECORD)))
                elements = b.mul(block[Column.ROWS], block[Column.LENGTH])
                exponents.write(b, Kind(variant // 2), bins, record, elements)
            b.branch(after)
        b.position_at_end(after)
    b.ret_void()


def _rows(
    b: Builder,
    block: _Block,
    row: Any,
    values: IRValue,
    *,
    neutral: float | None = None,
    beside: IRValue | None = None,
    bins: IRValue | None = None,
) -> None:
    """Call ``row`` for every row of a block, with its number in ``values``, which it may replace.

    Args:
        b: where the calls go.
        block: of the table.
        row: function of one row.
        values: address of the rows' numbers.
        neutral: as for :func:`_over_blocks`.
        beside: address of the numbers of the rows as they are, where ``values`` has their bounds.
        bins: address of counters.
    """
    address, length, step = (block[c] for c in (Column.ADDRESS, Column.LENGTH, Column.STEP))
    distance, index = block[Column.ROW_STEP], block[Column.INDEX]
    with counting(b, ir.Constant(INT64, 0), block[Column.ROWS], 1) as number:
        start = b.add(address, b.mul(number, distance))
        nth = b.add(index, number)
        place = at(b, values, nth, 8)
        if neutral is not None:
            given = b.load(place, typ=DOUBLE)
            with b.if_then(b.fcmp_unordered("!=", given, ir.Constant(DOUBLE, neutral))):
                b.call(row, [start, length, step, given])
        elif beside is not None:
            raw = b.ptrtoint(at(b, beside, nth, 8), INT64)
            b.store(b.call(row, [start, length, step, b.load(place, typ=DOUBLE), raw]), place)
        else:
            more = [] if bins is None else [bins]
            b.store(b.call(row, [start, length, step, *more]), place)


NEUTRAL = {"scale": 1.0, "clamp": math.inf}
"""The coefficient and the bound that change nothing."""


def module_text(name: str, kinds: Iterable[Kind]) -> str:
    """One exported function, for numbers of the given kinds, as the text of an LLVM module."""
    module = ir.Module(f"distclip_{name}")
    plain, underscore, which = name.partition("_")
    ending = underscore + which
    variants: dict[int, Any] = {}
    for kind in kinds:
        for strided in (False, True):
            title = f"{kind.name}_{strided}".lower()
            if plain in MEASURES:
                row = _row_function(module, title, MEASURES[plain], kind, ending, strided=strided)
            else:
                row = change_function(module, title, plain, FORMATS[kind], strided=strided)
            variants[2 * kind + strided] = row
    _over_blocks(module, name, variants, ending=ending, neutral=NEUTRAL.get(plain))
    return str(module)
