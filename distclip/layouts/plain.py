"""The plain layout: a whole tensor on this rank (single process, or a DDP replica)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType
from typing import cast

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from distclip.errors import UnsupportedGradientError
from distclip.layouts import sparse
from distclip.layouts.piece import (
    Box,
    Claimed,
    ClaimedWeights,
    Described,
    Entry,
    Hold,
    Holder,
    Layout,
    Piece,
    held,
)

TENSOR = {Tensor}
WEIGHTS = {Tensor, torch.nn.Parameter}
_grad, _layout = map(operator.attrgetter, ("grad", "layout"))


def describe(name: str, parameter: Tensor) -> Described:
    """A plain parameter is one piece that covers it; replicas are sorted out by the plan."""
    shape = tuple(parameter.shape)
    entry = Entry(name, shape, str(parameter.dtype).removeprefix("torch."))
    hold = held(parameter)
    fetch = main_gradient_of if has_main_gradient(parameter) else gradient_of
    piece = Piece(
        index=0,
        box=Box((0,) * len(shape), shape),
        share=1.0,
        gradient=partial(fetch, name, hold),
        weight=partial(weight_of, name, hold),
        trainable=parameter.requires_grad,
        hold=hold,
    )
    return entry, (piece,)


def describe_tensor(name: str, tensor: Tensor) -> Described:
    """The entry and piece of a plain tensor that is measured itself (``get_total_norm``)."""
    shape, hold = tuple(tensor.shape), held(tensor)
    entry = Entry(name, shape, str(tensor.dtype).removeprefix("torch."))
    # What cannot be measured is an error at the measurement, whose flag all ranks receive.
    fetch = partial(_measurable, name, hold)
    return entry, (Piece(0, Box((0,) * len(shape), shape), 1.0, fetch, fetch, hold=hold),)


def _measurable(name: str, hold: Holder) -> Tensor:
    """The tensor itself, or a refusal by name."""
    tensor = hold().detach()
    return tensor if sparse.is_sparse(tensor) else check_dense(name, tensor)


def weight_of(name: str, hold: Holder) -> Tensor:
    """The parameter's values.

    Raises:
        UnsupportedGradientError: a tensor subclass that offers none.
    """
    return values_of(name, hold().detach())


def gradient_of(name: str, hold: Holder) -> Tensor | None:
    """The parameter's ``.grad``, or else its ``main_grad``; None if there is neither.

    See :mod:`distclip.layouts.soundness` for whether it can be measured.

    Raises:
        UnsupportedGradientError: a DTensor.
    """
    parameter = hold()
    gradient = parameter.grad
    if gradient is None:
        return getattr(parameter, "main_grad", None)
    if type(gradient) is not Tensor and isinstance(gradient, DTensor):
        raise UnsupportedGradientError(
            f"{name!r} is a plain tensor but its gradient is a DTensor ({gradient.placements}): "
            f"convert the gradient with full_tensor(), or shard the parameter alike"
        )
    return gradient


def has_main_gradient(parameter: Tensor) -> bool:
    """Whether Megatron accumulates this parameter's gradients elsewhere than in ``.grad``."""
    return getattr(parameter, "main_grad", None) is not None


def main_gradient_of(name: str, hold: Holder) -> Tensor | None:
    """The gradient of a parameter that has a ``main_grad``: Megatron's, mostly float32 for bf16.

    Megatron adds ``.grad`` to it after each backward of a parameter, and sets ``.grad`` to None.

    Raises:
        UnsupportedGradientError: a ``.grad`` beside it: which of the two is stepped with?
    """
    parameter = hold()
    main: Tensor | None = getattr(parameter, "main_grad", None)
    if main is None or parameter.grad is None:
        return gradient_of(name, hold)
    raise UnsupportedGradientError(
        f"{name!r} has gradients in .grad and in .main_grad, and an optimizer steps with one of "
        f"them: Megatron adds .grad to .main_grad during backward and sets it to None, which has "
        f"not been done here. Do it (p.main_grad.add_(p.grad); p.grad = None), or delete main_grad "
        f"if it is left over"
    )


def hold_of(piece: Piece) -> Hold | None:
    """The hold on the parameter of a plain piece; None for a piece of another layout."""
    fetch = piece.gradient
    if isinstance(fetch, partial) and fetch.func is gradient_of:
        return cast(Hold, piece.hold)
    return None


def _claim_grads(pieces: Sequence[Piece]) -> tuple[list[int], list[Hold]]:
    """The pieces of parameters whose gradient is in ``.grad``: their places and holds."""
    found = [(place, hold_of(piece)) for place, piece in enumerate(pieces)]
    places = [place for place, hold in found if hold is not None]
    return places, [hold for _, hold in found if hold is not None]


def at_once(pieces: Sequence[Piece]) -> Claimed | None:
    """For :mod:`distclip.layouts.fetching`: parameters whose gradient is in ``.grad``."""
    places, holds = _claim_grads(pieces)
    return (places, partial(_gradients, Hold.of_all(holds))) if holds else None


def weights_at_once(pieces: Sequence[Piece]) -> ClaimedWeights | None:
    """As :func:`at_once`, for the weights of plain parameters."""
    places, holds = _claim_grads(pieces)
    return (places, partial(_weights, Hold.of_all(holds))) if holds else None


def _gradients(given: Callable[[], Sequence[Tensor]]) -> tuple[list[Tensor | None], None] | None:
    parameters = given()
    gradients = list(map(_grad, parameters))
    kinds = set(map(type, gradients))
    if NoneType in kinds:
        gradients = [
            getattr(parameter, "main_grad", None) if gradient is None else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
        kinds = set(map(type, gradients)) - {NoneType}
    return (gradients, None) if kinds == TENSOR else None


def _weights(given: Callable[[], Sequence[Tensor]]) -> list[Tensor] | None:
    """All weights at once; None where any of them is no plain strided tensor.

    The parameters themselves: to be read where autograd does not look.
    """
    weights = list(given())
    usual = set(map(type, weights)) <= WEIGHTS and set(map(_layout, weights)) == {torch.strided}
    return weights if usual else None


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


def values_of(name: str, weight: Tensor) -> Tensor:
    """The values of a weight; of a tensor subclass those within it, or what ``dequantize`` gives.

    Within: an inner tensor of the same shape and dtype (float8 all-gather of torchao under FSDP2).

    Raises:
        UnsupportedGradientError: a subclass that offers neither.
    """
    kind = type(weight)
    if kind is Tensor or kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return weight
    if isinstance(weight, AsyncCollectiveTensor):
        return weight.wait()
    found: list[Tensor] = []
    if hasattr(weight, "__tensor_flatten__"):
        inner = [getattr(weight, each) for each in weight.__tensor_flatten__()[0]]
        found = [t for t in inner if t.shape == weight.shape and t.dtype is weight.dtype]
    if len(found) != 1 and kind.dequantize is not Tensor.dequantize:
        found = [weight.dequantize()]
    if len(found) != 1 or type(found[0]) is kind:
        raise UnsupportedGradientError(
            f"parameter {name!r} is a {kind.__module__}.{kind.__qualname__}, which offers its "
            f"values neither as an inner tensor of the same shape and dtype nor by dequantize(), "
            f"and the policy reads weights; leave it out with by_name, or use a policy of gradient "
            f"norms"
        )
    return values_of(name, found[0].detach())


def _found(name: str, parameter: Tensor) -> list[Described]:
    return [describe(name, parameter)]


LAYOUT = Layout(_found, at_once, weights_at_once)
