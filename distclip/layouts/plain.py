"""The plain layout: a whole tensor on this rank (single process, or a DDP replica)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from distclip.errors import UnsupportedGradientError
from distclip.layouts.piece import Box, Described, Entry, Holder, Piece, held


def describe(name: str, parameter: Tensor) -> Described:
    """A plain parameter is one piece that covers it; replicas are sorted out by the plan."""
    shape = tuple(parameter.shape)
    entry = Entry(name, shape, str(parameter.dtype).removeprefix("torch."))
    hold = held(parameter)
    piece = Piece(
        index=0,
        box=Box((0,) * len(shape), shape),
        share=1.0,
        gradient=partial(gradient_of, name, hold),
        weight=partial(weight_of, hold),
        trainable=parameter.requires_grad,
    )
    return entry, (piece,)


def weight_of(hold: Holder) -> Tensor:
    """The parameter's values."""
    return hold().detach()


def gradient_of(name: str, hold: Holder) -> Tensor | None:
    """The parameter's ``.grad``, None if there is none; see :mod:`distclip.layouts.soundness`.

    Raises:
        UnsupportedGradientError: a DTensor.
    """
    gradient = hold().grad
    if type(gradient) is not Tensor and isinstance(gradient, DTensor):
        raise UnsupportedGradientError(
            f"{name!r} is a plain tensor but its gradient is a DTensor ({gradient.placements}): "
            f"convert the gradient with full_tensor(), or shard the parameter alike"
        )
    return gradient


def check_dense(name: str, tensor: Tensor) -> Tensor:
    """``tensor`` itself, or a refusal by name."""
    if tensor.layout is not torch.strided and "sparse" not in str(tensor.layout):
        raise UnsupportedGradientError(
            f"the gradient of {name!r} has the layout {tensor.layout}; distclip measures strided "
            f"gradients only: set p.grad = p.grad.to_dense()"
        )
    if tensor.layout is not torch.strided:
        raise UnsupportedGradientError(
            f"the gradient of {name!r} is sparse ({tensor.layout}); here distclip takes only dense "
            f"ones (sparse ones, in COO, of tensors that lie whole on every rank): build the "
            f"embedding with sparse=False"
        )
    if tensor.is_meta:
        raise UnsupportedGradientError(
            f"the gradient of {name!r} is on the meta device and has no values; materialise the "
            f"model (to_empty, then initialise) before clipping"
        )
    return tensor


def unwrapped(what: str, tensor: Tensor) -> Tensor:
    """``tensor`` itself, or what an asynchronous collective has brought.

    Raises:
        UnsupportedGradientError: a tensor subclass that computes by rules of its own.
    """
    kind = type(tensor)
    if kind is Tensor or kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return tensor
    if isinstance(tensor, AsyncCollectiveTensor):
        return tensor.wait()
    raise UnsupportedGradientError(
        f"{what} is a {kind.__module__}.{kind.__qualname__}, whose operations are its own, so that "
        f"it cannot be measured and scaled as it is; replace it by a plain tensor before clipping"
    )
