"""AGGC: each kind of module against the running norm of its own gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, ClassVar

from distclip.errors import ConfigurationError
from distclip.policies import _history, checks
from distclip.policies._torch import torch
from distclip.policies.checks import Factor, Fraction, Share, at_least
from distclip.policies.protocol import (
    Action,
    Needs,
    ParameterInfo,
    Scale,
    ScalingPolicy,
    State,
    Statistics,
    combine_norms,
)
from distclip.policies.registry import register

if TYPE_CHECKING:
    from torch import Tensor

GROUP_EMA_EPS = 1e-12
"""Added to a norm before dividing, as the authors' code does."""


@register
@dataclass(frozen=True)
class GroupEMA(ScalingPolicy):
    """Scale the gradients of each functional group to a band around a running norm of the group.

    With the group's joint norm ``n`` and its running norm ``S``: where ``n > high_mult * S``, the
    group is scaled to ``high_mult * S``; where ``n < low_mult * S``, to ``low_mult * S``. Then
    ``S = ema_beta * S + (1 - ema_beta) * n`` with ``n`` as it is after scaling. AGGC
    (arXiv 2601.11864). With ``high_late`` or ``low_late`` the band moves: linearly over the steps
    ``late_start`` to ``late_stop``, from ``high_mult`` and ``low_mult`` to these.

    A group is what the modules of one kind have in common, over all layers: ``q_proj`` of
    ``layers.0.attn.q_proj.weight`` and ``layers.1.attn.q_proj.weight``. It is the last component
    of the module's path that is neither a number nor a part of an adapter (``lora_A``,
    ``base_layer``); parameters without one are one group.

    ``S`` begins with the first norm. In the authors' code it begins with 0, so that the second
    step is scaled to ``high_mult * (1 - ema_beta)`` of its norm, and ``S`` hardly rises from there
    unless ``max_down_scale`` holds it up. With ``low_mult`` **a coefficient may exceed 1**.

    NaN, inf and 0 do not enter ``S``. ``S`` grows by at most ``(high_mult - 1) * (1 - ema_beta)``
    a step: 0.1 % with these defaults.

    Args:
        high_mult: where the band ends above, times ``S``; >= 1.
        low_mult: where it begins below, times ``S``; 0 to 1, 0 raises nothing.
        ema_beta: weight of the past, 0 <= ema_beta < 1.
        max_down_scale: no coefficient is smaller than this; 0 to 1.
        max_up_scale: no coefficient is larger than this; >= 1.
        high_late: ``high_mult`` of late steps; None for no change.
        low_late: ``low_mult`` of late steps; None for no change.
        late_start: the step at which they begin to move, >= 0.
        late_stop: the step from which on they hold; after ``late_start``.

    Raises:
        ConfigurationError: a value outside of these ranges; late values without ``late_stop``,
            or the other way round.
    """

    high_mult: Factor = 1.05
    low_mult: Share = 0.0
    ema_beta: Fraction = 0.98
    max_down_scale: Share = 0.0
    max_up_scale: Factor = 1.1
    high_late: Factor | None = None
    low_late: Share | None = None
    late_start: Annotated[int, at_least(0)] = 0
    late_stop: Annotated[int, at_least(0)] = 0
    name: ClassVar[str] = "group_ema"
    per_parameter: ClassVar[frozenset[str]] = frozenset(("ema",))
    memory_fields: ClassVar[frozenset[str] | None] = frozenset(("ema_beta",))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.high_late, self.low_late) != (None, None):
            later = Annotated[int, at_least(self.late_start + 1)]
            checks.checked(self.name, "late_stop", self.late_stop, later)
        elif self.late_start or self.late_stop:
            raise ConfigurationError(
                f"group_ema: late_start is {self.late_start} and late_stop {self.late_stop}, and "
                f"nothing moves then; give high_late or low_late, or leave both out"
            )

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[2.0])

    def init(self, parameters: Sequence[ParameterInfo]) -> State:
        return {
            "ema": torch.zeros(len(parameters), dtype=torch.float64, device="cpu"),
            "steps": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        norms = statistics.gradient_norms(2.0)
        places = _groups(tuple(each.name for each in statistics.parameters), norms.device)
        joint = torch.stack(
            [combine_norms(norms[each], 2.0, in_range=statistics.in_range) for each in places[1]]
        )
        n, ema = joint[places[0]], state["ema"]
        counts, known = _history.is_sample(n), ema > 0
        late = (state["steps"] - self.late_start).double() / max(
            1, self.late_stop - self.late_start
        )
        late = late.clamp(0.0, 1.0)
        high = _moved(self.high_mult, self.high_late, late) * ema
        low = _moved(self.low_mult, self.low_late, late) * ema
        down = torch.clamp(high / (n + GROUP_EMA_EPS), min=self.max_down_scale)
        up = torch.clamp(low / (n + GROUP_EMA_EPS), max=self.max_up_scale)
        coefficients = torch.where(n < low, up, 1.0)
        # The contrary of "within", so that a NaN is handed on.
        coefficients = torch.where(known & ~(n <= high), down, coefficients)
        sample = torch.where(counts, n * coefficients, ema)
        new = torch.where(known, self.ema_beta * ema + (1.0 - self.ema_beta) * sample, sample)
        coefficients = torch.where(n == 0, 1.0, coefficients)
        new = torch.where(counts, new, ema)
        return (Scale(coefficients),), {"ema": new, "steps": state["steps"] + 1}


def _moved(early: float, later: float | None, late: Tensor) -> Tensor | float:
    """``early`` as far on its way to ``later`` as ``late`` says, 0 to 1."""
    return early if later is None else early + (later - early) * late


def functional_group(name: str) -> str:
    """The functional group of a parameter, by its name."""
    path = name.partition("@")[0].split(".")[:-1]
    kinds = [
        each
        for each in path
        if not (each.isdigit() or each.startswith("lora_") or each in ("base_layer", "default"))
    ]
    return kinds[-1] if kinds else ""


@lru_cache(maxsize=64)
def _groups(names: tuple[str, ...], device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The number of each parameter's group, and the parameters of each group."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(functional_group(name), []).append(index)
    numbers = [list(found).index(functional_group(name)) for name in names]
    members = tuple(torch.tensor(each, device=device) for each in found.values())
    return torch.tensor(numbers, device=device), members


group_ema = GroupEMA
