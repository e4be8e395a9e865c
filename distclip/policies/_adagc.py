"""AdaGC: each gradient against its own norm in the past."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from distclip.policies._torch import torch
from distclip.policies.checks import Factor, Fraction, Positive, Threshold, at_least
from distclip.policies.protocol import (
    Action,
    Needs,
    ParameterInfo,
    Scale,
    ScalingPolicy,
    State,
    Statistics,
)
from distclip.policies.registry import register


@register
@dataclass(frozen=True)
class AdaGC(ScalingPolicy):
    """Scale each gradient to at most ``lambda_rel`` times a running norm of its own.

    After the warm-up ``h_i = min(1, lambda_rel * gamma_i / ||g_i||)`` and ``gamma_i = beta *
    gamma_i + (1 - beta) * h_i ||g_i||``. In the warm-up the global norm is clipped to
    ``lambda_abs``, and ``gamma_i`` is the smallest norm so far. AdaGC, 2025 (arXiv 2502.11034).

    Norms are taken *raw* in the warm-up, as the Paddle code does: where they are taken after the
    global clipping, one spike makes ``gamma`` collapse for good. A NaN, inf or zero norm leaves its
    parameter's ``gamma`` alone; the first norm after that sets a ``gamma`` that is not set yet
    (idle experts, LoRA). ``gamma`` never falls below ``floor``; in a step it grows by at most
    ``(1 - beta) * (lambda_rel - 1)`` of itself, and with ``max_growth`` it stays at most that many
    times what it was at the end of the warm-up.

    Args:
        lambda_rel: how far above its running norm a gradient may lie, >= 1.
        beta: weight of the past in the running norm, 0 <= beta < 1.
        warmup_steps: steps of the warm-up, >= 1.
        lambda_abs: threshold of the global norm in the warm-up, >= 0; ``math.inf`` for none.
        floor: least running norm, finite and > 0: a tensor whose gradients vanished for a while
            finds back from it.
        max_growth: limit of the running norm as a multiple of its first value, >= 1; None for none.

    Raises:
        ConfigurationError: a value outside of these ranges.
    """

    lambda_rel: Factor = 1.05
    beta: Fraction = 0.98
    warmup_steps: Annotated[int, at_least(1)] = 100
    lambda_abs: Threshold = 1.0
    floor: Positive = 1e-6
    max_growth: Factor | None = None
    name: ClassVar[str] = "adagc"
    memory_fields: ClassVar[frozenset[str] | None] = frozenset(("beta", "warmup_steps"))
    per_parameter: ClassVar[frozenset[str]] = frozenset(("gamma", "first"))

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[2.0])

    def init(self, parameters: Sequence[ParameterInfo]) -> State:
        # 0 is "not set yet": no norm that counts is 0.
        unset = torch.zeros(len(parameters), dtype=torch.float64, device="cpu")
        return {
            "gamma": unset,
            "first": unset.clone(),
            "steps": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        norms, total = statistics.gradient_norms(2.0), statistics.total_norm(2.0)
        gamma, first, steps = state["gamma"], state["first"], state["steps"]
        counts = torch.isfinite(norms) & (norms > 0)
        unset = gamma == 0
        warm = steps >= self.warmup_steps

        together = torch.full_like(total, self.lambda_abs) / total
        together = torch.where(total <= self.lambda_abs, 1.0, together)
        if math.isinf(self.lambda_abs):
            together = torch.ones_like(total)
        limits = torch.where(unset, math.inf, self.lambda_rel * gamma)
        # A NaN norm is not ">" anything, but it must not pass as "within the limit" either.
        alone = torch.where((norms <= limits) | unset, 1.0, limits / norms)

        smallest = torch.where(unset, norms, torch.minimum(gamma, norms))
        running = self.beta * gamma + (1.0 - self.beta) * torch.minimum(norms, limits)
        running = torch.where(unset, norms, running)
        new = torch.where(warm, running, smallest).clamp(min=self.floor)
        if self.max_growth is not None:
            most = torch.where(warm & (first > 0), self.max_growth * first, math.inf)
            new = torch.minimum(new, most)
        starts = ~warm | (first == 0)
        state = {
            "gamma": torch.where(counts, new, gamma),
            "first": torch.where(counts & starts, new, first),
            "steps": steps + torch.isfinite(total).long(),
        }
        shown = torch.where(warm, math.nan, self.lambda_abs)
        return (Scale(torch.where(warm, alone, together), shown),), state


adagc = AdaGC
