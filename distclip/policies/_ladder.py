"""What to do about spikes, the milder first: clip, skip, recompute, rewind, abort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from distclip.errors import ConfigurationError
from distclip.policies._skip_norm import SkipNorm
from distclip.policies._skip_spikes import SkipSpikes
from distclip.policies._torch import torch
from distclip.policies.checks import Threshold, at_least
from distclip.policies.protocol import (
    Action,
    Needs,
    ParameterInfo,
    Policy,
    ScalingPolicy,
    Skip,
    State,
    Statistics,
)
from distclip.policies.registry import register
from distclip.policies.sound import check_sound, first_state

if TYPE_CHECKING:
    from torch import Tensor

_OF_SPIKES = "spikes."
_OF_UPDATES = "updates."


@register
@dataclass(frozen=True)
class Ladder(ScalingPolicy):
    """Do more about each spike that follows another, as far as the budgets go.

    ::

        ladder(skip_spikes(clip_sigma=3.0), clips=2, skips=3, recomputes=1, rewinds=2)

    ``spikes`` says what a spike is: a step that it would skip. Of the spikes of one episode the
    first ``clips`` are not skipped, so that its own clipping, and what is behind it in a chain, see
    them; the next ``skips`` are skipped; each of the next ``recomputes`` is skipped, and its
    gradients computed again and compared; each after it is skipped, and :exc:`RewindRequested`
    raised, ``rewinds`` times in the whole run; then :exc:`LadderExhaustedError` ends the run. Calm
    steps in a row end an episode, and refill all budgets but that of rewinds.

    Everything up to the skip is decided on the device. What needs the host is read from it one step
    late and comes before the next clip, on all ranks alike; the weights are then still those of the
    skipped step. Each decision is a line in the log ``distclip.ladder``, with what
    :meth:`distclip.GradClipper.note` was given.

    A step with a NaN or inf is a spike that is never clipped. (Under ``on_nonfinite="error"`` and
    ``"error_late"`` it is an error, under ``"zero"`` its gradients are 0.) One that a gradient
    scaler drops to find its scale is none.

    A large update may come of gradients that were no spikes (Adam divides by moments that lag
    behind). ``updates`` judges the norm of what the optimizer did, which
    ``monitor.UpdateMonitor(..., sinks=clipper.note_update)`` measures. It is known after the step,
    which nothing undoes but a load of an older state: so one that ``updates`` would skip is
    answered before the next clip by a rewind to before that step, from the same budget, or by the
    end of the run. The other rungs are not for it.

    Args:
        spikes: a policy that skips, such as :class:`SkipSpikes` or :class:`SkipNorm`. It ends a
            series of skips by itself after ``max_consecutive``, which should lie above the sum of
            the budgets.
        clips: spikes that are clipped, >= 0.
        skips: spikes that are skipped and no more, >= 0.
        recomputes: spikes after which the step is computed again, >= 0. How to is said in code, by
            ``note(recompute=...)``; without it the step is skipped and no more.
        rewinds: rewinds asked for in one run, >= 0. Loading an older state does not refill them.
        calm: steps in a row without a spike that end an episode, >= 1.
        margin: steps before the first spike of the episode to go back to, >= 0.
        tolerance: two results are equal where no parameter's gradient norm differs by more than
            this part of the joint norm, >= 0; 0 is bit by bit.
        updates: a policy that skips, by 2-norms alone; None: updates are not judged.

    Raises:
        ConfigurationError: a value outside of these ranges; ``spikes`` or ``updates`` is no single
            policy that scales or skips; ``clips`` with a policy that clips nothing. By a
            clipper that is given it: ``spikes`` or ``updates`` never skips.
    """

    spikes: Policy
    clips: Annotated[int, at_least(0)] = 0
    skips: Annotated[int, at_least(0)] = 5
    recomputes: Annotated[int, at_least(0)] = 1
    rewinds: Annotated[int, at_least(0)] = 2
    calm: Annotated[int, at_least(1)] = 100
    margin: Annotated[int, at_least(0)] = 0
    tolerance: Threshold = 1e-3
    updates: Policy | None = None
    name: ClassVar[str] = "ladder"
    memory_fields: ClassVar[frozenset[str] | None] = frozenset(("spikes", "updates"))
    counts_nonfinite: ClassVar[bool] = True
    rungs: ClassVar[tuple[str, ...]] = ("clips", "skips", "recomputes", "rewinds")
    """From the mildest up; above them there is only to abort. Also the keys of what is used."""

    def __post_init__(self) -> None:
        spikes = self.spikes
        _check("spikes", spikes)
        if self.updates is not None:
            _check("updates", self.updates)
            if self.updates.needs != Needs.of(gradients=[2.0]):
                raise ConfigurationError(
                    f"ladder: updates is judged by 2-norms of updates and by nothing else (a loss, "
                    f"another order), got {self.updates!r}"
                )
        super().__post_init__()
        clips = (isinstance(spikes, SkipSpikes) and spikes.clip_sigma is not None) or (
            isinstance(spikes, SkipNorm) and spikes.clip_norm not in (None, float("inf"))
        )
        if self.clips and isinstance(spikes, (SkipSpikes, SkipNorm)) and not clips:
            field = "clip_sigma" if isinstance(spikes, SkipSpikes) else "clip_norm"
            raise ConfigurationError(
                f"ladder: clips is {self.clips}, and {spikes!r} would leave these spikes as they "
                f"are; give it {field}, or use clips=0"
            )

    @property
    def needs(self) -> Needs:
        return self.spikes.needs

    def init(self, parameters: Sequence[ParameterInfo]) -> State:
        state: dict[str, Tensor] = {}
        for prefix, policy in ((_OF_SPIKES, self.spikes), (_OF_UPDATES, self.updates)):
            if policy is not None:
                inner = _initial(prefix.removesuffix("."), policy, parameters)
                state |= {prefix + key: value for key, value in inner.items()}
        for key in (*self.rungs, "seen", "rung", "calm", "ago"):
            state[key] = torch.zeros((), dtype=torch.int64, device="cpu")
        return state

    def update(self, statistics: Statistics, state: State) -> tuple[Sequence[Action], State]:
        actions, new, spike, finite = _judged(self.spikes, _OF_SPIKES, statistics, state)
        new |= {key: value for key, value in state.items() if key.startswith(_OF_UPDATES)}
        new |= self._climbed(state, spike, finite)
        skip = Skip(spike & (new["rung"] > 1))
        return (skip, *(each for each in actions if not isinstance(each, Skip))), new

    def judge_update(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """The rung that an update asks for, 0 for none, and the state after it.

        Args:
            statistics: 2-norms of the update of each parameter, in the place of its gradient's.
            state: as for :meth:`update`.
        """
        assert self.updates is not None
        _, new, spike, _ = _judged(self.updates, _OF_UPDATES, statistics, state)
        left = state["rewinds"] < self.rewinds
        new["rewinds"] = state["rewinds"] + (spike & left)
        top = len(self.rungs)
        return torch.where(spike, torch.where(left, top, top + 1), 0), state | new

    def _climbed(self, state: State, spike: Tensor, finite: Tensor) -> State:
        """The counters after this step, and the rung that it stands on: 0 for none."""
        over = state["calm"] >= self.calm
        free, rung, new = spike, torch.zeros_like(state["rung"]), {}
        for number, key in enumerate(self.rungs, 1):
            used = state[key] if key == "rewinds" else torch.where(over, 0, state[key])
            taken = free & (used < getattr(self, key))
            if key == "clips":
                taken = taken & finite
            new[key] = used + taken
            rung = torch.where(taken, number, rung)
            free = free & ~taken
        rung = torch.where(free, len(self.rungs) + 1, rung)
        first = over | (state["seen"] == 0)
        return new | {
            "rung": rung,
            "seen": state["seen"] + spike,
            "calm": torch.where(spike, 0, state["calm"] + 1),
            "ago": torch.where(first & spike, 0, state["ago"] + 1),
        }


def _check(field: str, policy: Policy) -> None:
    """Refuse what cannot judge a norm."""
    if not isinstance(policy, ScalingPolicy) or isinstance(policy, Ladder):
        raise ConfigurationError(
            f"ladder: {field} must be one policy that skips, such as policies.skip_spikes(), "
            f"got {policy!r}; put others behind the ladder, by policies.chain(ladder, ...)"
        )
    check_sound(f"ladder: {field}", policy)
    if policy.per_parameter:
        raise ConfigurationError(
            f"ladder: {policy!r} remembers something of each parameter, which is not supported "
            f"here; put it behind the ladder, by policies.chain(ladder, ...)"
        )


def _initial(field: str, policy: Policy, parameters: Sequence[ParameterInfo]) -> State:
    """The state of a policy within the ladder; refused where even a huge norm is no spike to it."""
    from distclip.policies.decide import rehearse  # which imports torch

    state = first_state(policy, parameters, torch.device("cpu"))
    actions, _ = rehearse(policy, parameters, state, torch.device("cpu"), norm=1e300)
    if not any(isinstance(each, Skip) for each in actions):
        raise ConfigurationError(
            f"ladder: {field} is {policy!r}, which never skips, so the ladder would do nothing; "
            f"give a policy that skips, such as policies.skip_spikes() or policies.skip_norm(...)"
        )
    return state


def _judged(
    policy: Policy, prefix: str, statistics: Statistics, state: State
) -> tuple[Sequence[Action], dict[str, Tensor], Tensor, Tensor]:
    """Actions and state of the policy with this prefix; whether it skips; whether all is finite."""
    old = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    actions, inner = policy.update(statistics, old)  # type: ignore[attr-defined]
    spike = torch.zeros_like(state["seen"], dtype=torch.bool)
    for action in actions:
        if isinstance(action, Skip):
            spike = spike | action.flag
    finite = torch.ones_like(spike)
    for norms in statistics.gradients.values():
        finite = finite & torch.isfinite(norms).all()
    new = {prefix + key: torch.where(finite, value, old[key]) for key, value in inner.items()}
    return actions, new, spike, finite


ladder = Ladder
