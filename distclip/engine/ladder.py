"""What a ladder of spikes asks of the host: lines in the log, a second computation, two errors.

The policy decides on the device. Its decision goes to the host by a copy that nothing waits for,
and is acted on before the next clip: the skipped step has left the weights as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distclip.common.foreign import in_one_line
from distclip.engine.aside import set_aside
from distclip.engine.program import StageStates
from distclip.engine.session import Session
from distclip.engine.walk import walk
from distclip.engine.walked import Walked
from distclip.errors import ConfigurationError, LadderExhaustedError, RewindRequested
from distclip.kernels import transfer
from distclip.policies import Ladder
from distclip.policies.compose import Stage, stages
from distclip.policies.protocol import Statistics, combine_norms
from distclip.statistics import collectives, waiting

_logger = logging.getLogger("distclip.ladder")

CLIP, SKIP, RECOMPUTE, REWIND, ABORT = range(1, 6)
_DONE = {
    CLIP: "left to be clipped",
    SKIP: "skipped",
    RECOMPUTE: "skipped, and to be computed again",
    REWIND: "skipped, and a rewind asked for",
    ABORT: "skipped, and the run ended",
}
_READ = ("seen", "rung", "ago", *Ladder.rungs)


class Noted:
    """What :meth:`Attendant.note` was given for one step."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.recompute: list[Callable[[], object]] = []


class Update(Protocol):
    """What an optimizer did, as :class:`distclip.monitor.UpdateReport` has it."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the parameters."""

    @property
    def norms(self) -> Tensor:
        """Float64 ``(parameters,)``, 2-norms of their updates."""


class Decided(NamedTuple):
    """Read from the device and logged, not acted on yet.

    ``what`` it is about, and what became of the step; ``first``: the step to go back to; ``norms``:
    of the gradients.
    """

    rung: int
    step: int
    first: int
    what: str
    norms: list[float]
    noted: Noted


class Attendant:
    """Does what the ladder of one clipper asks for.

    Args:
        session: of the clipper.
        path: of the ladder in its policy.
        policy: the ladder.
        group: the ranks that make the steps together.
    """

    def __init__(
        self, session: Session, path: str, policy: Ladder, group: ProcessGroup | None
    ) -> None:
        self._session, self._path, self._policy, self._group = session, path, policy, group
        self._noted = Noted()
        """What is known of the step to come."""
        self._taken = Noted()
        """What is known of the step that is being clipped."""
        self._pending: tuple[transfer.HostCopy, int, Noted] | None = None
        """The last step, not read yet: counts before and after, its number, what is known of it."""
        self._copy: transfer.HostCopy | None = None
        self._decision: Decided | None = None
        self._made: tuple[int, Noted] | None = None
        """The number of the last step, and what was noted for it."""
        self._update: tuple[transfer.HostCopy, int, Noted] | None = None
        """The last update that was judged, not read yet; its step, and what was noted for it."""
        self._watched = policy.updates is None
        """Whether updates are judged, need not be, or a warning was given that they are not."""
        self._offending: list[Any] = []

    @classmethod
    def of(cls, session: Session, group: ProcessGroup | None) -> Attendant | None:
        """The attendant of a session's policy; None where that has no ladder.

        Raises:
            ConfigurationError: it has two.
        """
        found: list[Stage] = [
            each for each in stages(session.policy, ()) if isinstance(each.policy, Ladder)
        ]
        if len(found) > 1:
            raise ConfigurationError(
                f"{len(found)} ladders in one policy, which would answer the same spike twice; "
                f"leave one"
            )
        if not found:
            return None
        policy = found[0].policy
        assert isinstance(policy, Ladder)
        return cls(session, found[0].path, policy, collectives.default_group(group))

    def note(self, batch: Any, recompute: Callable[[], object] | None) -> None:
        """See :meth:`distclip.GradClipper.note`."""
        if batch is not None:
            self._noted.batches.append(batch)
        if recompute is not None:
            self._noted.recompute.append(recompute)

    def begin(self) -> None:
        """A clip begins; whether or not it raises, what comes now is noted of the next step."""
        self._taken, self._noted = self._noted, Noted()

    def keep(
        self, before: StageStates, walked: Walked, step: int, found_inf: Tensor | None
    ) -> None:
        """Start copying what the ladder decided on a step. Waits for nothing.

        Args:
            before: the states before the step.
            walked: the step.
            step: counted from 0.
            found_inf: of the gradient scaler, None without one. A step that it drops is no spike.
        """
        noted, self._taken = self._taken, Noted()
        self._mention_unwatched()
        self._made = step, noted
        state = walked.states.get(self._path)
        if state and found_inf is not None:
            overflow = (found_inf > 0).any() | walked.nonfinite.any()
            old = before[self._path]
            state = {key: torch.where(overflow, old[key], state[key]) for key in state}
            walked.states[self._path] = state
        if not state or transfer.is_capturing(self._session.plan.device):
            return
        numbers = [before[self._path]["seen"], *(state[key] for key in _READ)]
        copied = torch.cat((torch.stack(numbers).double(), walked.raw))
        self._copy = transfer.HostCopy(copied, self._copy)
        self._pending = (self._copy, step, noted)

    def judge_update(self, update: Update) -> None:
        """Start copying what the ladder makes of an update that was made. Waits for nothing.

        Raises:
            ConfigurationError: norms of other parameters than those that are clipped.
        """
        session, policy = self._session, self._policy
        if policy.updates is None or self._made is None or not session.states.get(self._path):
            return
        if list(update.names) != list(session.plan.names):
            raise ConfigurationError(
                "note_update: this report is of other parameters than this GradClipper clips; "
                "build both of the same model"
            )
        self._watched = True
        parameters = session.program.parameters
        (members,) = (
            each.members for each in stages(session.policy, parameters) if each.path == self._path
        )
        norms = update.norms[list(members)]
        statistics = Statistics([parameters[member] for member in members], {2.0: norms})
        rung, state = policy.judge_update(statistics, session.states[self._path])
        session.states = {**session.states, self._path: state}
        total = combine_norms(norms, 2.0)
        copied = torch.stack([rung.double(), state["rewinds"].double(), total])
        self._update = (transfer.HostCopy(copied), *self._made)

    def _mention_unwatched(self) -> None:
        if not self._watched and self._made is not None:
            self._watched = True
            if self._session.speaks:
                _logger.warning(
                    "%r is to judge updates too, and got none of the last step: build "
                    "monitor.UpdateMonitor(model, optimizer, sinks=clipper.note_update)",
                    self._policy,
                )

    def forget(self) -> None:
        """Drop what is known of the last and the next step: the run goes back before them."""
        self._pending = self._decision = self._update = None
        self._noted, self._taken = Noted(), Noted()

    def loading(self, load: Callable[[], None]) -> Callable[[], None]:
        """What loads a state, and does not give back the rewinds that have been made."""

        def loads() -> None:
            made = self.made
            load()
            self.forget()
            self.made = made

        return loads

    @property
    def states(self) -> StageStates:
        """The session's, where what was decided and not done yet does not count as used.

        A decision is acted on before the next clip, and is not part of a state: whoever goes on
        from this one would have used what nobody has asked for. Waits for the last step.
        """
        self.tell()
        states, decision = self._session.states, self._decision
        if decision is None or decision.rung not in (RECOMPUTE, REWIND):
            return states
        key, state = Ladder.rungs[decision.rung - 1], states[self._path]
        return {**states, self._path: {**state, key: state[key] - 1}}

    @property
    def made(self) -> int:
        """Rewinds raised so far, read from the device. Setting it never lowers it."""
        state = self.states.get(self._path)
        return int(state["rewinds"]) if state else 0

    @made.setter
    def made(self, made: int) -> None:
        state = self._session.states.get(self._path)
        if state:
            state["rewinds"] = state["rewinds"].clamp(min=made)

    def tell(self) -> None:
        """Log the decision on the last step, if it was a spike. Waits for that step."""
        self._tell_of_gradients()
        if self._update is None:
            return
        (copy, step, noted), self._update = self._update, None
        rung, used, norm = copy.read().tolist()
        if not rung:
            return
        what = "a rewind asked for" if rung == REWIND else "the run ended"
        what = f"made, and {what}; used: {int(used)} of {self._policy.rewinds} rewinds"
        self._offending = list(noted.batches)
        first, made = max(step - self._policy.margin, 0), "a large update, which was made"
        self._decision = Decided(int(rung), step, first, made, [], noted)
        self._say(noted, f"{_at_step(step)}: a large update (norm {norm:.4g}), {what}")

    def _tell_of_gradients(self) -> None:
        if self._pending is None:
            return
        (copy, step, noted), self._pending = self._pending, None
        values = copy.read().tolist()
        count = 1 + len(_READ)
        before, seen, rung, ago, *used = map(int, values[:count])
        norms = values[count:]
        if seen == before:
            return
        if ago == 0:
            self._offending = []
        self._offending += noted.batches
        first = max(step - ago - self._policy.margin, 0)
        self._decision = Decided(rung, step, first, "a spike, which was skipped", norms, noted)
        budgets = ", ".join(
            f"{mine} of {getattr(self._policy, key)} {key}"
            for key, mine in zip(Ladder.rungs, used, strict=True)
        )
        total = self._joint(norms)
        self._say(noted, f"{_at_step(step)}: a spike (norm {total:.4g}), {_DONE[rung]}; used: "
                         f"{budgets}; largest: {self._largest(norms)}")  # fmt: skip

    def attend(self) -> None:
        """Act on the decision on the last step; before a clip, on every rank.

        Raises:
            RewindRequested: it was to go back.
            LadderExhaustedError: all budgets are used.
        """
        if transfer.is_capturing(self._session.plan.device):
            return
        self.tell()
        if self._decision is None:
            return
        found, self._decision = self._decision, None
        what = f"{_at_step(found.step)}: {found.what}"
        if found.rung == RECOMPUTE:
            self._recompute(found.step, found.norms, found.noted)
        elif found.rung == REWIND:
            self.forget()
            raise RewindRequested(
                f"{what}, after all that this ladder's other budgets are for. Load a checkpoint "
                f"taken at step {found.first} or before, leave out the batches "
                f"({_batches(self._offending)}), call update() of a gradient scaler if there "
                f"is one, and go on (distclip.errors.RewindRequested)",
                found.first,
                self._offending,
            )
        elif found.rung == ABORT:
            self.forget()
            raise LadderExhaustedError(
                f"{what}, and all budgets of {self._policy!r} are used. Batches of this episode: "
                f"{_batches(self._offending)}. Lower the learning rate, look at these batches, or "
                f"raise the budgets"
            )

    def _recompute(self, step: int, norms: list[float], noted: Noted) -> None:
        """Compute a skipped step again, compare, and leave everything as it was."""
        missing = torch.full((1,), float(not noted.recompute), device=self._session.plan.device)
        if self._group is not None:
            missing = collectives.all_reduce_max(missing.double(), self._group)
        if missing.item():
            self._say(noted, f"{_at_step(step)}: not computed again, since on some rank "
                             f"note() was given no recompute")  # fmt: skip
            return
        session, what = self._session, f"{_at_step(step)}: note(recompute=...)"
        try:
            parameters = [parameter for _, parameter in session.named]
            buffers = [each for module in session.watched.modules for each in module.buffers()]
            with set_aside(parameters, buffers):
                with waiting.all_or_none(self._group, what), torch.enable_grad():
                    for again in noted.recompute:
                        again()
                with torch.no_grad():
                    found = walk(session.program, session.states).raw.tolist()
        finally:
            if session.early is not None:
                session.early.forget()
        self._judge(step, norms, found, noted)

    def _judge(self, step: int, norms: list[float], again: list[float], noted: Noted) -> None:
        finite = torch.tensor([norms, again], dtype=torch.float64, device="cpu")
        joint = finite.new_tensor([self._joint(norms), self._joint(again)])
        limit = self._policy.tolerance * joint.nan_to_num(0.0, 0.0, 0.0).max()
        differs = ((finite[0] - finite[1]).abs() > limit) | (
            finite[0].isfinite() != finite[1].isfinite()
        )
        names = [n for n, d in zip(self._session.plan.names, differs.tolist(), strict=True) if d]
        norm, factor = joint[1].item(), self._factor(finite[0], finite[1])
        if names and factor is not None:
            text = (
                f"every result is {factor:.4g} times the first (norm {norm:.4g}), as where "
                f"note(recompute=...) leaves a loss scale on the gradients, or divides the loss "
                f"otherwise than the step does; only the same gradients tell hardware from data"
            )
        elif names:
            text = (
                f"the results differ (norm {norm:.4g}), which points at hardware: {_batches(names)}"
            )
        else:
            text = f"the results are equal (norm {norm:.4g}), which points at the data"
        self._say(
            noted,
            f"{_at_step(step)}: computed again, and {text}",
            error=bool(names) and factor is None,
        )

    def _joint(self, norms: list[float]) -> float:
        """The joint norm, as the report's ``total_norm``."""
        each = torch.tensor(norms, dtype=torch.float64, device="cpu")
        return combine_norms(each, self._session.program.shown).item()

    def _factor(self, first: Tensor, again: Tensor) -> float | None:
        """By which one factor, other than 1, all of several gradients differ; None: by no one."""
        ratios = (again / first)[(first > 0) | (again > 0)]
        if len(ratios) < 2 or not bool(ratios.isfinite().all()) or not bool((ratios > 0).all()):
            return None
        low, high = ratios.min().item(), ratios.max().item()
        return high if high - low <= self._policy.tolerance * high else None

    def _largest(self, norms: list[float]) -> str:
        pairs = zip(self._session.plan.names, norms, strict=True)
        worst = sorted(pairs, key=lambda pair: -pair[1] if pair[1] == pair[1] else -float("inf"))
        return ", ".join(f"{in_one_line(name)} {norm:.4g}" for name, norm in worst[:3])

    def _say(self, noted: Noted, text: str, *, error: bool = False) -> None:
        if noted.batches or self._session.speaks:
            batches = f"; batches: {_batches(noted.batches)}" if noted.batches else ""
            _logger.log(logging.ERROR if error else logging.WARNING, "%s%s", text, batches)


def _at_step(step: int) -> str:
    return f"step {step} (counted from 0), rank {collectives.global_rank()}"


def _batches(items: list[Any]) -> str:
    more = f" and {len(items) - 16} more" if len(items) > 16 else ""
    return ", ".join(in_one_line(each) for each in items[:16]) + more if items else "none noted"
