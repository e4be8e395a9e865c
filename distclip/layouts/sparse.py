"""Sparse gradients (``torch.nn.Embedding(sparse=True)``) of tensors that lie whole on a rank.

What is measured and changed is the dense tensor of their values, once no two of those stand for the
same elements: the elements that are not there are 0, add nothing to a norm, and stay 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distclip.layouts.piece import Piece


def is_sparse(gradient: Tensor) -> bool:
    """Whether a gradient is sparse in COO layout, the only one that is supported."""
    return gradient.layout is torch.sparse_coo


def entry_values(gradient: Tensor) -> Tensor:
    """The values ``(entries, *dense dims)``, in the gradient's own memory.

    Of indices that occur more than once the entries are summed first, in the gradient itself.
    """
    if not gradient.is_coalesced():
        gradient.copy_(gradient.coalesce())
    return gradient._values()


def dense(piece: Piece, gradient: Tensor | None) -> Tensor | None:
    """The whole of what :func:`entry_values` gave the values of, by the piece's own gradient.

    A dense gradient comes as it is. So do values of full length, which are all there are.
    """
    if gradient is None or tuple(gradient.shape) == piece.box.extents:
        return gradient
    whole = piece.gradient()
    return None if whole is None else whole.to_dense()


def spread(
    piece: Piece, gradient: Tensor, factors: Tensor, unit_dims: Sequence[int]
) -> tuple[Tensor, tuple[int, ...]]:
    """The factors of units as factors of the gradient in hand, dense or values.

    Args:
        piece: whose gradient it is.
        gradient: of ``piece.box.extents``, or the values of a sparse one.
        factors: ``(units,)``, row-major in ``unit_dims``.
        unit_dims: dims of the parameter that index its units.

    Returns:
        The factors, and the dims of ``gradient`` that index them.
    """
    extents = piece.box.extents
    whole = None if tuple(gradient.shape) == extents else piece.gradient()
    if whole is None:
        return factors, tuple(unit_dims)
    shape = [extent if dim in unit_dims else 1 for dim, extent in enumerate(extents)]
    everywhere = factors.view(shape).expand(extents)
    return everywhere[tuple(whole._indices())].flatten(), tuple(range(gradient.dim()))
