"""Clipping the experts of a mixture, and everything else, each by a norm of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from distclip.policies._global_norm import GlobalNorm
from distclip.policies.checks import NormOrder, Threshold
from distclip.policies.compose import ByPart
from distclip.policies.registry import register


@register
class ExpertAware(ByPart):
    """``global_norm`` over all experts together, and another one over everything else.

    Few tokens reach an expert, and their number changes from step to step, so experts' gradients
    are noisier than dense ones; under one norm they decide about the step of all the others.

    Experts are known by their names: a component that ends in ``expert``, ``experts`` or
    ``expert_3``, but none that begins with ``shared_``, since every token passes those; and what
    ``declare_sharded`` declares to be another parameter on each rank. For other names write it
    out: ``by_part({"name=*.moe.w*": global_norm(1.0)}, default=global_norm(1.0))``.

    Args:
        max_norm: threshold >= 0 of what is no expert; ``math.inf`` measures only.
        expert_max_norm: threshold >= 0 of the experts; None for ``max_norm``.
        norm_type: order p > 0 or inf.

    Raises:
        ConfigurationError: a negative or NaN threshold, p <= 0.
    """

    name: ClassVar[str] = "expert_aware"
    labels: ClassVar[Mapping[str, str]] = {"kind=expert": "experts"}

    def __init__(
        self,
        max_norm: Threshold,
        expert_max_norm: Threshold | None = None,
        norm_type: NormOrder = 2.0,
    ) -> None:
        limit = max_norm if expert_max_norm is None else expert_max_norm
        super().__init__(
            {"kind=expert": GlobalNorm(limit, norm_type)},
            default=GlobalNorm(max_norm, norm_type),
        )


expert_aware = ExpertAware
