"""The peers of ``distclip bench``, as their users call them; formulas written from their papers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def torch_clip(parameters: Sequence[Tensor], max_norm: float) -> Callable[[], object]:
    """``torch.nn.utils.clip_grad_norm_``."""
    return functools.partial(torch.nn.utils.clip_grad_norm_, list(parameters), max_norm)


def titan_clip(parameters: Sequence[Tensor], max_norm: float) -> Callable[[], object]:
    """What torchtitan does: a total norm as one DTensor, made whole, then the scaling."""
    listed = list(parameters)

    def act() -> Tensor:
        gradients = [p.grad for p in listed if p.grad is not None]
        total: Tensor = torch.nn.utils.get_total_norm(gradients, 2.0, foreach=True)
        if isinstance(total, DTensor):
            total = total.full_tensor()
        torch.nn.utils.clip_grads_with_norm_(listed, max_norm, total, foreach=True)
        return total

    return torch.no_grad()(act)


def torch_total_norm(gradients: Sequence[Tensor]) -> Callable[[], object]:
    """``torch.nn.utils.get_total_norm``, made whole where it is one of DTensors."""
    listed = list(gradients)

    def act() -> Tensor:
        total: Tensor = torch.nn.utils.get_total_norm(listed)
        return total.full_tensor() if isinstance(total, DTensor) else total

    return torch.no_grad()(act)


def norms_in_float32(tensors: Sequence[Tensor]) -> Callable[[], object]:
    """The norm of each local tensor, summed in float32 whatever its dtype."""
    return lambda: [torch.linalg.vector_norm(x, dtype=torch.float32) for x in tensors]


def accelerate_clip(parameters: Sequence[Tensor], max_norm: float) -> Callable[[], object]:
    """``Accelerator.clip_grad_norm_``, of an Accelerator that prepared nothing.

    Raises:
        ImportError: Accelerate is not installed.
    """
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    listed = list(parameters)
    return lambda: accelerator.clip_grad_norm_(listed, max_norm)


def unit_norm(tensor: Tensor) -> Tensor:
    """Norms of rows, NFNet's units (Brock et al. 2021, section 4.1): of all where there is one dim.

    With kept dims, in the tensor's dtype.
    """
    dims = tuple(range(1, tensor.dim())) or None
    norms: Tensor = torch.linalg.vector_norm(tensor, 2.0, dim=dims, keepdim=tensor.dim() > 1)
    return norms


def _bounded(
    parameters: Sequence[Tensor], clip_factor: float, eps: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each gradient, and how large its units may be."""
    for p in parameters:
        assert p.grad is not None
        yield p.grad, unit_norm(p).clamp_(min=eps).mul_(clip_factor)


def agc_where(
    parameters: Sequence[Tensor], clip_factor: float, eps: float = 1e-3
) -> Callable[[], object]:
    """The formula of timm: the clipped gradient everywhere, then a choice of it or the old one."""

    @torch.no_grad()
    def act() -> None:
        for gradient, most in _bounded(parameters, clip_factor, eps):
            norm = unit_norm(gradient)
            clipped = gradient * (most / norm.clamp(min=1e-6))
            gradient.copy_(torch.where(norm < most, gradient, clipped))

    return act


def agc_coefficient(
    parameters: Sequence[Tensor], clip_factor: float, eps: float = 1e-3
) -> Callable[[], object]:
    """Composer's formula: a coefficient of at most 1 for every unit, multiplied in place."""

    @torch.no_grad()
    def act() -> None:
        for gradient, most in _bounded(parameters, clip_factor, eps):
            coefficient = most / unit_norm(gradient)
            gradient.mul_(coefficient.nan_to_num_(1.0).clamp_(max=1.0))

    return act


def fsdp1_clip(model: Any, max_norm: float) -> Callable[[], object]:
    """FSDP1's own method."""
    return lambda: model.clip_grad_norm_(max_norm)
