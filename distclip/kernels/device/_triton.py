"""The Triton kernels. Import only where Triton is (``multi_tensor.is_usable``).

All are deterministic: every floating-point sum is in an order fixed by shapes and addresses; only
whole numbers are added by atomic operations, to the same result in any order. Sums run
in float32 over at most ``TURNS`` elements of a lane and are combined in float64, which is exact to
about 1e-7 relative; a part whose float32 sum shows overflow or underflow is read again in float64,
decided on the device. ``KIND`` is the order of the norm, 0 for the maximum.

Tensors come as addresses in a table. An address that is no multiple of 16 bytes is rounded down,
and the elements before the tensor are masked, so that full chunks are read 16 bytes at a time.
"""

# No `from __future__ import annotations`: Triton reads these annotations.

import triton
import triton.language as tl

from distclip.common import exponents as rows

WIDTH = tl.constexpr(rows.COLUMNS)
ZERO = tl.constexpr(rows.ZERO)
SUBNORMAL = tl.constexpr(rows.SUBNORMAL)
NONFINITE = tl.constexpr(rows.NONFINITE)
OF_ZERO_BITS = tl.constexpr(rows.FIRST - 1)
"""Columns of a row of counts; the last is where the bits 0 of an exponent would count."""


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add(total, x, KIND: tl.constexpr):
    if KIND == 2:
        return total + x * x
    if KIND == 1:
        return total + tl.abs(x)
    return tl.maximum(total, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamped(x, bound, BOUNDED: tl.constexpr):
    if BOUNDED:
        x = tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)
        x = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _take(sums, largest, x, bound, KIND: tl.constexpr, BOUNDED: tl.constexpr):
    """Sums, and the largest magnitudes where the sums are not these, with more elements in them."""
    x = _clamped(x.to(tl.float32), bound, BOUNDED)
    if KIND != 0:
        largest = tl.maximum(largest, tl.abs(x))
    return _add(sums, x, KIND), largest


@triton.jit
def _is_doubtful(sums, largest, LEAST: tl.constexpr):
    """Whether float32 sums may have lost something to overflow or underflow."""
    return (((sums > LEAST) & (sums < float("inf"))) == 0) & (largest != 0.0)


@triton.jit
def _chunk(address, numel, number, DTYPE: tl.constexpr, SIZE: tl.constexpr, ELEMENTS: tl.constexpr):
    """One chunk of a tensor, counted from its address rounded down to 16 bytes.

    Returns that address as a pointer, the tensor's first element and the one after its last, the
    chunk's first, and how many it has.
    """
    aligned = (address // 16) * 16
    head = (address - aligned) // SIZE
    stop = head + numel
    start = number * ELEMENTS
    left = tl.minimum(stop - start, ELEMENTS).to(tl.int32)
    base = tl.multiple_of(aligned.to(tl.pointer_type(DTYPE)), 16)
    return base, head, stop, start, left


@triton.jit
def _count(bins, zeros, x, inside, SIZE: tl.constexpr, FRACTION: tl.constexpr):
    """Numbers by the value of the bits of their exponent, and the zeros among those inside."""
    bits = x.to(tl.int32 if SIZE == 4 else tl.int16, bitcast=True).to(tl.int32)
    exponents = (bits >> FRACTION) & (31 if FRACTION == 10 else 255)
    magnitude = bits & (0x7FFFFFFF if SIZE == 4 else 0x7FFF)
    return bins + tl.histogram(exponents, 256), zeros + ((magnitude == 0) & inside).to(tl.int32)


@triton.jit
def _add_counts(row, bins, zeros, outside, elements, FRACTION: tl.constexpr):
    """Add what was counted of a chunk, ``outside`` lanes among it, to the row of its tensor."""
    fields = tl.arange(0, 256)
    found = tl.sum(zeros, axis=0)
    values = (bins - tl.where(fields == 0, outside + found, 0)).to(tl.int64)
    columns = fields + (OF_ZERO_BITS + (112 if FRACTION == 10 else 0))
    columns = tl.where(fields == 0, SUBNORMAL, columns)
    columns = tl.where(fields == (31 if FRACTION == 10 else 255), NONFINITE, columns)
    tl.atomic_add(row + columns, values, mask=values != 0)
    tl.atomic_add(row + ZERO, found.to(tl.int64))
    dtype = 0 if FRACTION == 10 else 1 if FRACTION == 7 else 2
    tl.atomic_add(row + dtype, elements.to(tl.int64))


@triton.jit
def measure_chunk(
    pointers,  # int64 (segments,)
    numels,  # int64 (segments,)
    firsts,  # int64 (segments + 1,), the first chunk of each
    owners,  # int64 (chunks,), the segment of each
    outputs,  # int64 (segments,), where its bound lies
    bounds,  # float64, ``BOUNDED``: to what elements are clamped first
    partials,  # float64 (chunks,), written
    counts,  # int64 (tensors, columns), where exponents are counted: added to
    offset,  # of this launch's chunks among all
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    FRACTION: tl.constexpr,
    BOUNDED: tl.constexpr,
    KIND: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Sum of p-th powers, or the maximum, of one chunk of ``BLOCK * TURNS`` elements.

    ``FRACTION``: bits of a number below those of its exponent, which is counted; 0: it is not.
    """
    # Long: one kernel, which Triton compiles as a whole.
    program = tl.program_id(0).to(tl.int64) + offset
    owner = tl.load(owners + program)
    address, numel = tl.load(pointers + owner), tl.load(numels + owner)
    number = program - tl.load(firsts + owner)
    base, head, stop, start, left = _chunk(address, numel, number, DTYPE, SIZE, BLOCK * TURNS)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    bins = tl.zeros([256], tl.int32)
    zeros = tl.zeros([BLOCK], tl.int32)
    read = 0
    bound = 0.0
    if BOUNDED:
        bound = tl.load(bounds + tl.load(outputs + owner)).to(tl.float32)
    if (start >= head) & (left == BLOCK * TURNS):
        for turn in tl.static_range(TURNS):
            x = tl.load(base + start + turn * BLOCK + lanes)
            sums, largest = _take(sums, largest, x, bound, KIND, BOUNDED)
            if FRACTION:
                bins, zeros = _count(bins, zeros, x, lanes >= 0, SIZE, FRACTION)
        read = BLOCK * TURNS
    else:
        at = 0
        while at < left:
            index = start + at + lanes
            inside = (index >= head) & (index < stop)
            x = tl.load(base + index, mask=inside, other=0.0)
            sums, largest = _take(sums, largest, x, bound, KIND, BOUNDED)
            if FRACTION:
                bins, zeros = _count(bins, zeros, x, inside, SIZE, FRACTION)
            at += BLOCK
        read = at
    if FRACTION:
        elements = (start + left - tl.maximum(start, head)).to(tl.int32)
        row = counts + tl.load(outputs + owner) * WIDTH
        _add_counts(row, bins, zeros, read - elements, elements, FRACTION)
    if KIND == 0:
        result = tl.reduce(sums, 0, _larger).to(tl.float64)
    else:
        result = tl.sum(sums.to(tl.float64), axis=0)
        if _is_doubtful(result, tl.max(largest, axis=0), LEAST):
            exact = tl.zeros([BLOCK], tl.float64)
            at = 0
            while at < left:
                index = start + at + lanes
                x = tl.load(base + index, mask=(index >= head) & (index < stop), other=0.0)
                x = _clamped(x.to(tl.float32), bound, BOUNDED)
                exact = _add(exact, x.to(tl.float64), KIND)
                at += BLOCK
            result = tl.sum(exact, axis=0)
    tl.store(partials + program, result)


@triton.jit
def combine(
    partials,  # float64 (chunks,)
    firsts,  # int64 (segments + 1,)
    outputs,  # int64 (segments,), where the result goes
    norms,  # float64, written
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The norm of one tensor, from the sums (or maxima) of its chunks."""
    segment = tl.program_id(0)
    first = tl.load(firsts + segment)
    last = tl.load(firsts + segment + 1)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    at = first
    while at < last:
        x = tl.load(partials + at + lanes, mask=at + lanes < last, other=0.0)
        if KIND == 0:
            sums = _larger(sums, x)
        else:
            sums += x
        at += BLOCK
    if KIND == 0:
        result = tl.reduce(sums, 0, _larger)
    else:
        result = tl.sum(sums, axis=0)
    if KIND == 2:
        result = tl.sqrt(result)
    tl.store(norms + tl.load(outputs + segment), result)


@triton.jit
def measure_rows(
    pointers,  # int64 (matrices,)
    heights,  # int64 (matrices,)
    widths,  # int64 (matrices,)
    firsts,  # int64 (matrices + 1,), the first tile of each
    outputs,  # int64 (matrices,), where the result of its first row goes
    owners,  # int64 (tiles,), the matrix of each
    norms,  # float64, written
    offset,  # of this launch's tiles among all
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    KIND: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNS: tl.constexpr,
):
    """The norms of ``ROWS`` rows."""
    program = tl.program_id(0).to(tl.int64) + offset
    owner = tl.load(owners + program)
    row = (program - tl.load(firsts + owner)) * ROWS + tl.arange(0, ROWS)
    inside = row < tl.load(heights + owner)
    width = (tl.load(widths + owner) // VECTOR) * VECTOR
    address = tl.load(pointers + owner)
    first = address.to(tl.pointer_type(DTYPE))
    if VECTOR > 1:
        first = tl.multiple_of(first, 16)
    base = first + row[:, None] * width
    lanes = tl.arange(0, COLUMNS)[None, :]
    result = tl.zeros([ROWS], tl.float64)
    largest = tl.zeros([ROWS, COLUMNS], tl.float32)
    at = 0
    while at < width:
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for turn in tl.static_range(TURNS):
            column = at + turn * COLUMNS + lanes
            x = tl.load(base + column, mask=inside[:, None] & (column < width), other=0.0)
            sums, largest = _take(sums, largest, x, 0.0, KIND, False)
        if KIND == 0:
            result = _larger(result, tl.reduce(sums, 1, _larger).to(tl.float64))
        else:
            result += tl.sum(sums, axis=1).to(tl.float64)
        at += COLUMNS * TURNS
    if KIND != 0:
        doubtful = _is_doubtful(result, tl.max(largest, axis=1), LEAST)
        if tl.max(doubtful.to(tl.int32), axis=0) > 0:
            exact = tl.zeros([ROWS], tl.float64)
            at = 0
            while at < width:
                column = at + lanes
                x = tl.load(base + column, mask=inside[:, None] & (column < width), other=0.0)
                wide = x.to(tl.float32).to(tl.float64)
                exact += tl.sum(_add(tl.zeros([ROWS, COLUMNS], tl.float64), wide, KIND), axis=1)
                at += COLUMNS
            result = tl.where(doubtful, exact, result)
    if KIND == 2:
        result = tl.sqrt(result)
    tl.store(norms + tl.load(outputs + owner) + row, result, mask=inside)


@triton.jit
def _steps(coefficient, WIDE: tl.constexpr):
    """Two factors of a float64 coefficient, so that the second is a normal number of float32."""
    small = tl.abs(coefficient) < 1.1754943508222875e-38
    step = tl.where(small, 1.1754943508222875e-38, 1.0)
    factor = coefficient * tl.where(small, 8.507059173023462e37, 1.0)
    return step.to(WIDE), factor.to(WIDE)


@triton.jit
def scale(
    pointers,
    numels,
    firsts,
    outputs,  # int64 (segments,), where its coefficient lies
    owners,
    coefficients,  # float64
    stride,  # between coefficients; 0: one for all
    offset,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Multiply one chunk, not even read where the coefficient is 1; or, ``DROP``, set it to 0."""
    program = tl.program_id(0).to(tl.int64) + offset
    owner = tl.load(owners + program)
    coefficient = tl.load(coefficients + tl.load(outputs + owner) * stride)
    if coefficient != 1.0:
        step, factor = _steps(coefficient, WIDE)
        address, numel = tl.load(pointers + owner), tl.load(numels + owner)
        number = program - tl.load(firsts + owner)
        base, head, stop, start, left = _chunk(address, numel, number, DTYPE, SIZE, BLOCK * TURNS)
        lanes = tl.arange(0, BLOCK)
        if (start >= head) & (left == BLOCK * TURNS):
            for turn in tl.static_range(TURNS):
                here = base + start + turn * BLOCK + lanes
                if DROP:
                    tl.store(here, tl.zeros([BLOCK], DTYPE))
                else:
                    tl.store(here, (tl.load(here).to(WIDE) * step * factor).to(DTYPE))
        else:
            at = 0
            while at < left:
                index = start + at + lanes
                inside = (index >= head) & (index < stop)
                if DROP:
                    tl.store(base + index, tl.zeros([BLOCK], DTYPE), mask=inside)
                else:
                    x = tl.load(base + index, mask=inside, other=0.0)
                    tl.store(base + index, (x.to(WIDE) * step * factor).to(DTYPE), mask=inside)

                at += BLOCK


@triton.jit
def scale_rows(
    pointers,
    heights,
    widths,
    firsts,
    outputs,
    owners,
    coefficients,  # float64
    offset,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Multiply ``ROWS`` rows, each by its own coefficient; those of 1 are not even read."""
    program = tl.program_id(0).to(tl.int64) + offset
    owner = tl.load(owners + program)
    row = (program - tl.load(firsts + owner)) * ROWS + tl.arange(0, ROWS)
    inside = row < tl.load(heights + owner)
    factors = tl.load(coefficients + tl.load(outputs + owner) + row, mask=inside, other=1.0)
    changed = factors != 1.0
    if tl.max(changed.to(tl.int32), axis=0) > 0:
        step, factor = _steps(factors, WIDE)
        width = (tl.load(widths + owner) // VECTOR) * VECTOR
        address = tl.load(pointers + owner)
        first = address.to(tl.pointer_type(DTYPE))
        if VECTOR > 1:
            first = tl.multiple_of(first, 16)
        base = first + row[:, None] * width
        lanes = tl.arange(0, COLUMNS)[None, :]
        at = 0
        while at < width:
            here = base + at + lanes
            mask = changed[:, None] & (at + lanes < width)
            x = tl.load(here, mask=mask, other=0.0).to(WIDE)
            tl.store(here, (x * step[:, None] * factor[:, None]).to(DTYPE), mask=mask)
            at += COLUMNS
