"""The elementwise part of the chain: RMS scaling, momentum, weight decay, the move itself.

Tensors here are local and dense; nothing is communicated. With ``b1``, ``b2`` the decay rates and
``c1 = 1 - b1 ** t``, ``c2 = 1 - b2 ** t`` (DreamerV3, ``embodied/jax/opt.py``)::

    v = b2 v + (1 - b2) g^2                     scale_by_rms
    u = g / (sqrt(v / c2) + eps)
    m = b1 m + (1 - b1) u                       scale_by_momentum
    d = m / c1      nesterov: ((1 - b1) u + b1 m) / c1
    p = p - lr (d + weight_decay p)

``u`` is never written down: ``u = sqrt(c2) g / (sqrt(v) + sqrt(c2) eps)``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

ON_HOST, ON_DEVICE = 1 << 16, 1 << 26
"""Elements worked on at a time: what a core's cache holds; what bounds the memory of a device."""

Number: TypeAlias = Any
"""A float, or a 0-dim tensor where nothing may be read on the host."""

Four: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Tensors of one parameter: itself, gradient, average of gradients, average of squares."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The numbers of one update.

    Attributes:
        root: ``sqrt(1 - beta2 ** t)``.
        correction: ``1 - beta1 ** t``.
        sign: -1 to maximise.
    """

    beta1: float
    beta2: float
    eps: float
    lr: Number
    root: Number
    correction: Number
    weight_decay: float
    nesterov: bool
    sign: float


@dataclass(slots=True)
class LocalTensors:
    """Local parts of parameters, one after another, and what belongs to each.

    Averages are float32 (float64 for float64), whatever the parameters and gradients are.
    """

    params: list[Tensor]
    gradients: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]

    def append(self, param: Tensor, gradient: Tensor, average: Tensor, square: Tensor) -> None:
        """Add the coefficients of one parameter."""
        self.params.append(param)
        self.gradients.append(gradient)
        self.averages.append(average)
        self.squares.append(square)

    def fours(self) -> Iterator[Four]:
        """Parameter by parameter, in the order of :meth:`append`."""
        return zip(self.params, self.gradients, self.averages, self.squares, strict=True)


def bias_correction(beta: float, step: Number) -> Number:
    """``1 - beta ** step`` without cancellation (jax has it off by 1.6e-5 at step 1, 0.999)."""
    rate = math.log(beta) if beta > 0 else -math.inf
    if isinstance(step, Tensor):
        return -torch.expm1(step.double() * rate)
    return -math.expm1(step * rate)


def coefficients(
    group: Mapping[str, Any], rate: Number, step: Number, decays: bool
) -> Coefficients:
    """The numbers of one update of one parameter, whose options are those of ``group``."""
    beta1, beta2 = group["betas"]
    return Coefficients(
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        lr=rate,
        root=bias_correction(beta2, step) ** 0.5,
        correction=bias_correction(beta1, step),
        weight_decay=group["weight_decay"] if decays else 0.0,
        nesterov=group["nesterov"],
        sign=-1.0 if group["maximize"] else 1.0,
    )


def update_(
    group: Mapping[str, Any],
    rate: float,
    fours: Sequence[Four],
    steps: Sequence[float],
    decays: Sequence[bool],
) -> None:
    """Change the parameters of one group, and their averages, in place.

    With ``foreach`` several tensors go to a kernel, and large ones in parts; otherwise tensor by
    tensor. The results are the same.

    Args:
        group: the options.
        rate: the learning rate of this update.
        fours: local tensors; empty ones are passed over.
        steps: per parameter the number of this update, from 1.
        decays: per parameter whether weight decay acts on it.
    """
    together: dict[Hashable, LocalTensors] = {}
    numbers: dict[Hashable, Coefficients] = {}
    for four, step, decay in zip(fours, steps, decays, strict=True):
        if not four[0].numel():
            continue
        key = (four[0].device, four[0].dtype, four[1].dtype, step, decay)
        if key not in together:
            together[key] = LocalTensors([], [], [], [])
            numbers[key] = coefficients(group, rate, step, decay)
        together[key].append(*four)
    for kind, tensors in together.items():
        if group["foreach"] is False:
            for four in tensors.fours():
                _one(four, numbers[kind])
        else:
            limit = ON_HOST if tensors.params[0].device.type == "cpu" else ON_DEVICE
            for part in parts(tensors, limit):
                _many(part, numbers[kind])


def parts(tensors: LocalTensors, limit: int) -> Iterator[LocalTensors]:
    """The elements in portions of about ``limit``; a tensor with gaps in it stays whole."""
    portion, size = LocalTensors([], [], [], []), 0
    for four in tensors.fours():
        for piece in _pieces(four, limit):
            count = piece[0].numel()
            if size and size + count > limit:
                yield portion
                portion, size = LocalTensors([], [], [], []), 0
            portion.append(*piece)
            size += count
    if size:
        yield portion


def _pieces(four: Four, limit: int) -> Iterator[Four]:
    count = four[0].numel()
    if count <= limit or not all(tensor.is_contiguous() for tensor in four):
        if count:
            yield four
        return
    yield from zip(*(torch.split(tensor.view(-1), limit) for tensor in four), strict=True)


def _many(tensors: LocalTensors, c: Coefficients) -> None:
    averages, squares = tensors.averages, tensors.squares
    params = [p.to(m.dtype) for p, m in zip(tensors.params, averages, strict=True)]
    gradients = [g.to(m.dtype) for g, m in zip(tensors.gradients, averages, strict=True)]
    torch._foreach_mul_(squares, c.beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - c.beta2)
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_add_(denominators, c.root * c.eps)
    torch._foreach_mul_(averages, c.beta1)
    weight = c.sign * (1.0 - c.beta1) * c.root
    torch._foreach_addcdiv_(averages, gradients, denominators, weight)
    if c.weight_decay:
        torch._foreach_mul_(params, 1.0 - c.lr * c.weight_decay)
    size = c.lr / c.correction
    torch._foreach_add_(params, averages, alpha=-size * (c.beta1 if c.nesterov else 1.0))
    if c.nesterov:
        torch._foreach_addcdiv_(params, gradients, denominators, -size * weight)
    for original, changed in zip(tensors.params, params, strict=True):
        if original is not changed:
            original.copy_(changed)


def _one(four: Four, c: Coefficients) -> None:
    original, gradient, average, square = four
    param, gradient = original.to(average.dtype), gradient.to(average.dtype)
    square.mul_(c.beta2).addcmul_(gradient, gradient, value=1.0 - c.beta2)
    denominator = square.sqrt().add_(c.root * c.eps)
    weight = c.sign * (1.0 - c.beta1) * c.root
    average.mul_(c.beta1).addcdiv_(gradient, denominator, value=weight)
    if c.weight_decay:
        param.mul_(1.0 - c.lr * c.weight_decay)
    size = c.lr / c.correction
    param.add_(average, alpha=-size * (c.beta1 if c.nesterov else 1.0))
    if c.nesterov:
        param.addcdiv_(gradient, denominator, value=-size * weight)
    if param is not original:
        original.copy_(param)


def update_captured_(
    group: Mapping[str, Any],
    rate: Tensor | float,
    fours: Sequence[Four],
    steps: Sequence[Tensor],
    decays: Sequence[bool],
) -> None:
    """As :func:`update_`, with rate and steps that are never read on the host."""
    for four, step, decay in zip(fours, steps, decays, strict=True):
        if four[0].numel():
            _one_captured(four, coefficients(group, rate, step, decay))


def _one_captured(four: Four, c: Coefficients) -> None:
    original, gradient, average, square = four
    param, gradient = original.to(average.dtype), gradient.to(average.dtype)
    square.mul_(c.beta2).addcmul_(gradient, gradient, value=1.0 - c.beta2)
    scaled = gradient / square.sqrt().add_(c.root * c.eps)
    scaled.mul_(c.sign * (1.0 - c.beta1) * c.root)
    average.mul_(c.beta1).add_(scaled)
    direction = scaled.add_(average, alpha=c.beta1) if c.nesterov else average
    if c.weight_decay:
        param.mul_(1.0 - c.lr * c.weight_decay)
    param.sub_(direction * (c.lr / c.correction))
    if param is not original:
        original.copy_(param)
