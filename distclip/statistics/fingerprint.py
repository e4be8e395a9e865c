"""Fingerprints: one 64-bit number for the bits of a tensor, whatever way it is cut into pieces.

A tensor is a matrix of 16-bit words ``b``: its last dims are the columns, the others the rows, both
numbered in the *logical* tensor. Its fingerprint is ``sum_ij r_i c_j (b_ij + 1)`` modulo ``2**64``,
with
pseudo-random odd weights ``r`` and ``c`` (multilinear hashing, Carter and Wegman 1979, modulo a
power of two as Dietzfelbinger 1996). So it is a plain sum: fingerprints of pieces add up to that of
the whole, and integer arithmetic makes that exact in any order.

Equal bits have equal fingerprints. A change within one word is never missed, since odd weights have
inverses. Two tensors that differ in any other way agree with a probability below ``2**-42``: their
words differ by less than ``2**16``, which leaves 48 random bits, of which the two levels of weights
cost at most 6.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

FINGERPRINT_COLUMNS = 256
"""Trailing dims are columns until there are so many."""

FINGERPRINT_CHUNK = {"cpu": 2**16}
"""Elements that are looked at together, by kind of device: bounds the memory that is taken."""

CHUNK_ELSEWHERE = 2**20

_SEED = -7046029254386353131  # 2**64 / golden ratio, as a signed number
_MIX = (-4658895280553007687, -7723592293110705685)  # of SplitMix64 (Steele et al. 2014)


def box_fingerprint(tensor: Tensor, shape: Sequence[int], offsets: Sequence[int]) -> Tensor:
    """The fingerprint of a box of a logical tensor.

    Args:
        tensor: the box, any strided dtype.
        shape: of the logical tensor, with as many dims.
        offsets: where the box begins in it.

    Returns:
        0-dim int64, to be understood modulo ``2**64``; 0 for an empty box.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dim() == 0:
        tensor, shape, offsets = tensor.reshape(1), (1,), (0,)
    split = len(shape) - 1
    while split > 0 and math.prod(shape[split:]) < FINGERPRINT_COLUMNS:
        split -= 1
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    chunk = FINGERPRINT_CHUNK.get(tensor.device.type, CHUNK_ELSEWHERE)
    waiting = [(tensor, tuple(offsets))] if tensor.numel() else []
    while waiting:
        part, start = waiting.pop()
        if part.numel() > chunk:
            dim = next(dim for dim, extent in enumerate(part.shape) if extent > 1)
            size = max(1, chunk * part.shape[dim] // part.numel())
            for number, piece in enumerate(torch.split(part, size, dim)):
                moved = start[dim] + number * size
                waiting.append((piece, (*start[:dim], moved, *start[dim + 1 :])))
        else:
            total += _of_chunk(part, tuple(shape), start, split)
    return total


def _of_chunk(part: Tensor, shape: tuple[int, ...], offsets: tuple[int, ...], split: int) -> Tensor:
    word = torch.int16 if part.element_size() > 1 else torch.int8
    words = part.contiguous().unsqueeze(-1).view(word)
    each = words.shape[-1]
    extents = tuple(part.shape)
    columns = _odd_weights(
        (*shape[split:], each), (*offsets[split:], 0), (*extents[split:], each), 1, part.device
    )
    rows = _odd_weights(shape[:split], offsets[:split], extents[:split], 2, part.device)
    products = words.reshape(-1, columns.numel()).to(torch.int64).mul_(columns)
    return ((products.sum(1) + columns.sum()) * rows).sum()  # of words + 1


@functools.lru_cache(maxsize=4)
def _odd_weights(
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    extents: tuple[int, ...],
    stream: int,
    device: torch.device,
) -> Tensor:
    """Odd weights of the elements of a box, by their number in the logical tensor, int64 flat."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, offset, extent in zip(shape, offsets, extents, strict=True):
        steps = torch.arange(offset, offset + extent, dtype=torch.int64, device=device)
        index = index.unsqueeze(-1) * size + steps
    mixed = (index.flatten() * 2 + stream) * _SEED
    mixed = (mixed ^ _shifted(mixed, 30)) * _MIX[0]
    mixed = (mixed ^ _shifted(mixed, 27)) * _MIX[1]
    return (mixed ^ _shifted(mixed, 31)) | 1


def _shifted(values: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
