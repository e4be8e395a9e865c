"""Counts how many numbers have which binary exponent, in LLVM's intermediate representation.

A number's exponent says which counter in memory is increased. Numbers next to each other increase
counters of different histograms, so that none waits for the one before it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from llvmlite import ir

from distclip.common import exponents as rows
from distclip.kernels.host.blocks import Kind
from distclip.kernels.host.building import VECTOR_WIDTH, at, counting, tree, variable
from distclip.kernels.host.formats import (
    DOUBLE,
    FORMATS,
    INT8,
    INT32,
    INT64,
    Builder,
    IRValue,
    constant,
)

KIND_FRACTIONS = {Kind.FLOAT32: 23, Kind.BFLOAT16: 7, Kind.FLOAT16: 10, Kind.FLOAT64: 52}
"""Bits of a number below those of its exponent."""
KIND_NAMES = {kind: kind.name.lower() for kind in Kind}
EXPONENT_VALUES = {kind: 32 if kind is Kind.FLOAT16 else 256 for kind in Kind}
"""Values of those bits that are told apart; of float64 as many as of float32."""
SPACE = VECTOR_WIDTH * max(EXPONENT_VALUES.values()) + 1
"""64-bit counters on the stack: histograms of ``VECTOR_WIDTH`` numbers, and the zeros."""

LANES = ir.VectorType(INT64, VECTOR_WIDTH)
NOTHING = ir.Constant(LANES, [0] * VECTOR_WIDTH)


def _narrowed() -> list[int]:
    """From the bits of a float64 exponent to those of the nearest one of float32."""
    inner = np.clip(np.arange(1, 2047) - 1023, rows.LOWEST, rows.HIGHEST) - rows.LOWEST + 1
    return [0, *inner.tolist(), 255]


def space(b: Builder) -> IRValue:
    """Address of the counters, on the stack of the exported function."""
    with b.goto_entry_block():
        place = b.alloca(ir.ArrayType(INT64, SPACE))
    return b.ptrtoint(place, INT64)


def clear(b: Builder, kind: Kind, bins: IRValue) -> None:
    """Set all counters to 0."""
    with counting(b, _int(0), _int(VECTOR_WIDTH * EXPONENT_VALUES[kind]), VECTOR_WIDTH) as index:
        b.store(NOTHING, at(b, bins, index, 8), align=8)
    b.store(_int(0), at(b, bins, _int(SPACE - 1), 8))


@dataclasses.dataclass(frozen=True)
class Counter:
    """Counts what is read in one function; ``zeros`` and ``zeros_alone`` are variables in it."""

    kind: Kind
    bins: IRValue
    zeros: IRValue
    zeros_alone: IRValue

    def vector(self, b: Builder, address: IRValue, start: IRValue, bits: IRValue) -> None:
        """Count ``VECTOR_WIDTH`` numbers that lie side by side, of which ``bits`` are known."""
        size = FORMATS[self.kind].size
        is_zero = b.zext(self._is_zero(b, bits), LANES)
        b.store(b.add(b.load(self.zeros, typ=LANES), is_zero), self.zeros)
        in_word = 8 // size
        for first in range(0, VECTOR_WIDTH, in_word):
            place = at(b, address, b.add(start, _int(first)), size)
            word = b.load(place, align=size, typ=INT64)
            for number in range(in_word):
                field = b.lshr(word, _int(8 * size * number + KIND_FRACTIONS[self.kind]))
                self._count(b, field, _int(first + number))

    def alone(self, b: Builder, bits: IRValue, index: IRValue) -> None:
        """Count one number."""
        is_zero = b.zext(self._is_zero(b, bits), INT64)
        b.store(b.add(b.load(self.zeros_alone, typ=INT64), is_zero), self.zeros_alone)
        wide = bits if bits.type == INT64 else b.zext(bits, INT64)
        field = b.lshr(wide, _int(KIND_FRACTIONS[self.kind]))
        self._count(b, field, b.and_(index, _int(VECTOR_WIDTH - 1)))

    def finish(self, b: Builder) -> None:
        """Add the zeros to those of the rows before."""
        lanes = b.load(self.zeros, typ=LANES)
        parts = [b.extract_element(lanes, ir.Constant(INT32, n)) for n in range(VECTOR_WIDTH)]
        found = b.add(tree(b, b.add, parts), b.load(self.zeros_alone, typ=INT64))
        place = at(b, self.bins, _int(SPACE - 1), 8)
        b.store(b.add(b.load(place, typ=INT64), found), place)

    def _is_zero(self, b: Builder, bits: IRValue) -> IRValue:
        form = FORMATS[self.kind]
        magnitude = b.and_(bits, constant(form.bits, (1 << (8 * form.size - 1)) - 1, bits))
        return b.icmp_unsigned("==", magnitude, constant(form.bits, 0, bits))

    def _count(self, b: Builder, field: IRValue, histogram: IRValue) -> None:
        if self.kind is Kind.FLOAT64:
            table = b.ptrtoint(_narrowing(b.module), INT64)
            field = b.and_(field, _int(2047))
            field = b.zext(b.load(at(b, table, field, 1), typ=INT8), INT64)
        else:
            field = b.and_(field, _int(EXPONENT_VALUES[self.kind] - 1))
        start = b.mul(histogram, _int(EXPONENT_VALUES[self.kind]))
        place = at(b, self.bins, b.add(start, field), 8)
        b.store(b.add(b.load(place, typ=INT64), _int(1)), place)


def counter(b: Builder, kind: Kind, bins: IRValue) -> Counter:
    """In a function whose argument ``bins`` is the address of the counters."""
    zeros = variable(b, NOTHING)
    return Counter(kind, bins, zeros, variable(b, _int(0)))


def write(b: Builder, kind: Kind, bins: IRValue, record: IRValue, elements: IRValue) -> None:
    """Write what was counted as a row of :mod:`distclip.common.exponents`, float64."""
    fields, name = EXPONENT_VALUES[kind], KIND_NAMES[kind]
    lowest = max(rows.RANGES[name][0], rows.LOWEST)
    offset = rows.FIRST + lowest - rows.LOWEST - 1
    with counting(b, _int(0), _int(fields), VECTOR_WIDTH) as index:
        parts = [
            b.load(at(b, bins, b.add(index, _int(n * fields)), 8), align=8, typ=LANES)
            for n in range(VECTOR_WIDTH)
        ]
        total = b.sitofp(tree(b, b.add, parts), ir.VectorType(DOUBLE, VECTOR_WIDTH))
        b.store(total, at(b, record, b.add(index, _int(offset)), 8), align=8)

    def column(number: int) -> Any:
        return at(b, record, _int(number), 8)

    ends = [column(offset), column(offset + fields - 1)]
    without_exponent, nonfinite = (b.load(end, typ=DOUBLE) for end in ends)
    zeros = b.sitofp(b.load(at(b, bins, _int(SPACE - 1), 8), typ=INT64), DOUBLE)
    for end in ends:
        b.store(ir.Constant(DOUBLE, 0.0), end)
    b.store(zeros, column(rows.ZERO))
    b.store(b.fsub(without_exponent, zeros), column(rows.SUBNORMAL))
    b.store(nonfinite, column(rows.NONFINITE))
    b.store(b.sitofp(elements, DOUBLE), column(list(rows.RANGES).index(name)))


def _narrowing(module: Any) -> Any:
    name = "narrowed"
    if name not in module.globals:
        kind = ir.ArrayType(INT8, 2048)
        table = ir.GlobalVariable(module, kind, name)
        table.linkage, table.global_constant = "internal", True
        table.initializer = ir.Constant(kind, _narrowed())
    return module.globals[name]


def _int(number: int) -> Any:
    return ir.Constant(INT64, number)
