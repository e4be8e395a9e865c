"""Flat ranges as boxes, against numpy's own idea of where elements lie."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distclip.layouts import flat
from distclip.layouts.piece import Box

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def elements(shape: tuple[int, ...], box: Box) -> list[int]:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    index = tuple(slice(o, o + e) for o, e in zip(box.offsets, box.extents, strict=True))
    return [int(number) for number in numbers[index].reshape(-1)]


@given(SHAPES, st.data())
def test_boxes_are_the_range(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    found = flat.range_boxes(shape, start, stop)
    assert len(found) <= max(1, 2 * len(shape) - 1)
    covered: list[int] = []
    for box, first in found:
        assert first == len(covered)
        assert len(box.offsets) == len(box.extents) == len(shape)
        covered += elements(shape, box)
    assert covered == list(range(start, stop))


def test_a_whole_tensor_is_one_box() -> None:
    assert flat.range_boxes((3, 4), 0, 12) == [(Box((0, 0), (3, 4)), 0)]
    assert flat.range_boxes((3, 4), 4, 12) == [(Box((1, 0), (2, 4)), 0)]
    assert flat.range_boxes((), 0, 1) == [(Box((), ()), 0)]
    assert flat.range_boxes((0, 4), 0, 0) == []


@given(SHAPES, st.lists(st.integers(-3, 700), max_size=3))
def test_split_dims_say_which_units_are_whole(shape: tuple[int, ...], borders: list[int]) -> None:
    """The definition: units indexed by ``dims`` are whole if no other dim is cut."""
    numel = math.prod(shape)
    split = set(flat.split_dims(shape, borders))
    rank_of = np.zeros(numel, dtype=int)
    for border in borders:
        rank_of[max(0, border) :] += 1
    holder = rank_of.reshape(shape)
    for size in range(len(shape) + 1):
        for dims in itertools.combinations(range(len(shape)), size):
            others = tuple(dim for dim in range(len(shape)) if dim not in dims)
            whole = bool((holder.max(axis=others) == holder.min(axis=others)).all())
            if split <= set(dims):
                assert whole, dims
            elif size <= 1 and whole:  # no false alarm for rows, vectors and whole tensors
                pytest.fail(f"{shape} cut at {borders}: units {dims} are whole, but {split=}")
