"""AutoClip: the threshold is a percentile of the norms seen so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from distclip.policies import _history
from distclip.policies._torch import torch
from distclip.policies.checks import LONGEST, Limit, at_least
from distclip.policies.norm_threshold import coefficient_to
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
class AutoClip(ScalingPolicy):
    """Global norm clipping at a percentile of the history of norms, the current one included.

    ``history.append(||g||)``, ``c = percentile(history, p)``, ``g *= min(1, c / (||g|| + 1e-6))``,
    linear between order statistics. Seetharaman et al. 2020 (arXiv 2007.14469, algorithm 1).

    ``window=None`` is the paper's whole history, in bounded memory: norms are counted in 16384
    bins of equal ratio (128 per octave, from 2**-64 to 2**64; int64, 128 KiB), and the threshold is
    within 0.28 % (``2 ** (1 / 256) - 1``) of the exact percentile while norms lie in that range.
    With a window the last ``window`` norms are kept and the percentile is exact.

    NaN, inf and 0 are not norms of the history. The threshold lies between the smallest and the
    largest norm that it was made of (within the 0.28 %).

    Args:
        percentile: p, 0 to 100. The paper's example is 10, which clips nine steps in ten; codes
            derived from it use 95 over a window of 1000.
        window: how many norms the history keeps; None keeps all, counted in bins.

    Raises:
        ConfigurationError: a percentile outside of 0 to 100, a window < 1 or > 1,000,000.
    """

    percentile: Annotated[float, Limit("0 to 100", minimum=0, maximum=100)] = 10.0
    window: Annotated[int, at_least(1), LONGEST] | None = None
    name: ClassVar[str] = "autoclip"
    memory_fields: ClassVar[frozenset[str] | None] = frozenset(("window",))

    relative_error: ClassVar[float] = _history.BIN_ERROR
    """Bound of the threshold's relative error with ``window=None``."""

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[2.0])

    def init(self, parameters: Sequence[ParameterInfo]) -> State:
        if self.window is None:
            return {"counts": torch.zeros(_history.BINS, dtype=torch.int64, device="cpu")}
        return {
            "norms": torch.zeros(self.window, dtype=torch.float64, device="cpu"),
            "seen": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        total = statistics.total_norm(2.0)
        wanted = _history.is_sample(total)
        if self.window is None:
            state = {"counts": _history.count_sample(state["counts"], total, wanted)}
            limit = _history.percentile_of_counts(state["counts"], self.percentile)
        else:
            norms, seen = _history.put(state["norms"], state["seen"], total, wanted)
            state = {"norms": norms, "seen": seen}
            limit = _history.percentile(norms, seen, self.percentile)
        shown = torch.where(torch.isinf(limit), math.nan, limit)
        return (Scale(coefficient_to(total, limit), shown),), state


autoclip = AutoClip
