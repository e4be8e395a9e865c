"""What the policies with a threshold on a norm have in common."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distclip.policies._torch import torch
from distclip.policies.checks import NormOrder, Threshold
from distclip.policies.protocol import Needs, ScalingPolicy

if TYPE_CHECKING:
    from torch import Tensor

TORCH_EPS = 1e-6
"""Added to the norm before dividing, as ``torch.nn.utils.clip_grad_norm_`` does."""

SMALLEST = sys.float_info.min


def norm_coefficient(norms: Tensor, max_norm: float) -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))``, any shape; all 1 for an infinite ``max_norm``.

    An infinite threshold means "measure": inf / inf must not turn into NaN (pytorch#31367).
    """
    if math.isinf(max_norm):
        return torch.ones_like(norms)
    if norms.dim() == 0 and norms.dtype is torch.float64 and _is_here(norms):
        # The same bits, sooner: of four operations on one number the calls are what takes time.
        coefficient = 1.0 / (norms.item() + TORCH_EPS) * max_norm
        return torch.scalar_tensor(min(coefficient, 1.0), dtype=norms.dtype, device=norms.device)
    return (norms + TORCH_EPS).reciprocal_().mul_(max_norm).clamp_(max=1.0)


def _is_here(number: Tensor) -> bool:
    """Whether it can be read: without a wait for a device, and without cutting a graph."""
    return number.is_cpu and type(number) is torch.Tensor and not number.requires_grad


def joint_coefficient(norms: Tensor, norm_type: float, max_norm: float) -> Tensor:
    """:func:`norm_coefficient` of the joint p-norm, also where float64 cannot hold that norm.

    Args:
        norms: float64 ``(parameters,)``, not empty.
        norm_type: p > 0 or inf.
        max_norm: the threshold.

    Returns:
        0-dim float64.
    """
    if math.isinf(max_norm):
        return norms.new_ones(())
    from distclip.kernels.powers import scaled_norm  # which imports torch

    relative, scale = scaled_norm(norms, norm_type)
    relative = relative.clamp(min=SMALLEST)  # 0 for gradients of 0
    whole = TORCH_EPS / relative + (1.0 if scale is None else scale)
    return whole.reciprocal_().mul_(max_norm).div_(relative).clamp_(max=1.0)


def coefficient_to(norms: Tensor, limits: Tensor) -> Tensor:
    """As :func:`norm_coefficient`, to limits that are tensors; 1 where a limit is inf or NaN.

    NaN and inf norms are handed on as torch does, except where there is no limit.
    """
    known = torch.isfinite(limits)
    return torch.where(known, torch.clamp(limits / (norms + TORCH_EPS), max=1.0), 1.0)


@dataclass(frozen=True)
class NormThreshold(ScalingPolicy):
    """A policy that compares p-norms of gradients with ``max_norm``.

    Raises:
        ConfigurationError: a negative or NaN threshold, p <= 0.
    """

    max_norm: Threshold
    norm_type: NormOrder = 2.0

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[self.norm_type])
