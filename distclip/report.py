"""What one clipping step found and did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distclip.policies._protocol import combine_norms


@dataclass(frozen=True)
class ClipReport:
    """The result of :meth:`GradClipper.clip_`. Reading it never starts a collective.

    The scalars are 0-dim tensors on the statistics' device: float32, or float64 where a gradient
    is float64. Norms are of the policy's order (2 where it has none) over whole tensors, each
    element counted once.

    Attributes:
        total_norm: norm of all gradients before clipping.
        clipped_norm: the same after it. NaN where an elementwise clamp came after a scaling, since
            that would have to be measured again.
        coefficient: the smallest coefficient that was applied, 1 where nothing was clipped. A
            lower bound where a chain scales the same parameter by units of two kinds.
        threshold: the policy's threshold in its own measure (``max_norm``, ``clip_factor``, ...);
            of a composed policy the first one's; NaN where there is none.
        skipped: bool; this update is to be skipped (``attach`` does it).
        clipped_fraction: mean over parameters of the share of their units that were clipped; a
            parameter clipped as a whole counts 1.
    """

    total_norm: Tensor
    clipped_norm: Tensor
    coefficient: Tensor
    threshold: Tensor
    skipped: Tensor
    clipped_fraction: Tensor
    names: Sequence[str]
    _norms: Tensor
    _coefficients: Tensor
    _nonfinite: Tensor

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        norm_type: float,
        dtype: torch.dtype,
        *,
        raw: Tensor,
        after: Tensor,
        coefficients: Tensor,
        smallest: Tensor,
        clipped: Tensor,
        threshold: Tensor,
        skipped: Tensor,
        nonfinite: Tensor,
    ) -> ClipReport:
        """Build from float64 statistics of shape ``(len(names),)``."""
        total = combine_norms(raw, norm_type).to(dtype)
        clipped_norm = combine_norms(after, norm_type).to(dtype)
        fraction = clipped.mean() if len(names) else clipped.new_zeros(())
        least = smallest.min() if len(names) else smallest.new_ones(())
        return cls(
            total_norm=total,
            clipped_norm=torch.where(skipped, total, clipped_norm),
            coefficient=torch.where(skipped, torch.ones_like(least), least).to(dtype),
            threshold=threshold.to(dtype),
            skipped=skipped,
            clipped_fraction=torch.where(skipped, torch.zeros_like(fraction), fraction).to(dtype),
            names=names,
            _norms=raw,
            _coefficients=torch.where(skipped, 1.0, coefficients),
            _nonfinite=nonfinite,
        )

    @cached_property
    def parameter_norms(self) -> Mapping[str, float]:
        """Name -> norm of its whole gradient before clipping. Reads the host."""
        return dict(zip(self.names, self._norms.tolist(), strict=True))

    @cached_property
    def parameter_coefficients(self) -> Mapping[str, float]:
        """Name -> what its gradient was multiplied by. Reads the host.

        Where the units of a parameter have different coefficients: its norm after clipping by its
        norm before.
        """
        return dict(zip(self.names, self._coefficients.tolist(), strict=True))

    @cached_property
    def nonfinite(self) -> tuple[str, ...]:
        """Names of the parameters with a NaN or inf in their gradient. Reads the host."""
        flags = self._nonfinite.tolist()
        return tuple(name for name, bad in zip(self.names, flags, strict=True) if bad)

    def to_dict(self, *, per_parameter: bool = True) -> dict[str, Any]:
        """Plain numbers, for a log. Reads the host.

        Args:
            per_parameter: with ``"parameters": {name: {"norm": ..., "coefficient": ...}}``.
        """
        shown: dict[str, Any] = {
            "total_norm": self.total_norm.item(),
            "clipped_norm": self.clipped_norm.item(),
            "coefficient": self.coefficient.item(),
            "threshold": self.threshold.item(),
            "skipped": bool(self.skipped.item()),
            "clipped_fraction": self.clipped_fraction.item(),
            "nonfinite": list(self.nonfinite),
        }
        if per_parameter:
            coefficients = self.parameter_coefficients
            shown["parameters"] = {
                name: {"norm": norm, "coefficient": coefficients[name]}
                for name, norm in self.parameter_norms.items()
            }
        return shown

    def __str__(self) -> str:
        if bool(self.skipped.item()):
            return f"norm {self.total_norm.item():.4g}, skipped"
        threshold = self.threshold.item()
        limit = "" if math.isnan(threshold) else f", threshold {threshold:.4g}"
        return (
            f"norm {self.total_norm.item():.4g} -> {self.clipped_norm.item():.4g} "
            f"(coefficient {self.coefficient.item():.4g}{limit})"
        )
