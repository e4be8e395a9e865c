"""What a ladder of spikes asks of the host: lines in the log, a second computation, two errors.

The policy decides on the device. Its decision goes to the host by a copy that nothing waits for,
and is acted on before the next clip: the skipped step has left the weights as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distclip.common.foreign import clean
from distclip.engine.program import States
from distclip.engine.session import Session
from distclip.engine.walk import walk
from distclip.engine.walked import Walked
from distclip.errors import ConfigurationError, LadderExhaustedError, RewindRequested
from distclip.kernels import transfer
from distclip.policies import Ladder
from distclip.policies.compose import Stage, stages
from distclip.statistics import collectives

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
    """What the caller told of one step."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.recompute: list[Callable[[], object]] = []


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
        self._pending: tuple[transfer.HostCopy, int, Noted] | None = None
        """Of the last step, not read yet: seen before and after, and the rest."""
        self._copy: transfer.HostCopy | None = None
        self._decision: tuple[int, int, int, list[float], Noted] | None = None
        """Read and logged, not acted on yet: rung, step, first step, norms, notes."""
        self._offending: list[Any] = []

    @classmethod
    def of(cls, session: Session, group: ProcessGroup | None) -> Attendant | None:
        """That of a session's policy; None where that has no ladder.

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

    def keep(self, before: States, walked: Walked, step: int) -> None:
        """Start copying what the ladder decided on a step. Waits for nothing."""
        noted, self._noted = self._noted, Noted()
        state = walked.states.get(self._path)
        if not state or transfer.is_capturing(self._session.plan.device):
            return
        numbers = [before[self._path]["seen"], *(state[key] for key in _READ)]
        copied = torch.cat((torch.stack(numbers).double(), walked.raw))
        self._copy = transfer.HostCopy(copied, self._copy)
        self._pending = (self._copy, step, noted)

    def forget(self) -> None:
        """The last step is taken back, and the one that was to come is not made."""
        self._pending = self._decision = None
        self._noted = Noted()

    def loading(self, load: Callable[[], None]) -> Callable[[], None]:
        """What loads a state, and does not give back the rewinds that have been made."""

        def loads() -> None:
            made = self._session.states.get(self._path, {}).get("rewinds")
            load()
            self.forget()
            state = self._session.states.get(self._path)
            if made is not None and state:
                state["rewinds"] = torch.maximum(state["rewinds"], made)

        return loads

    def tell(self) -> None:
        """Log the decision on the last step, if it was a spike. Waits for that step."""
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
        self._decision = (rung, step, first, norms, noted)
        budgets = ", ".join(
            f"{mine} of {getattr(self._policy, key)} {key}"
            for key, mine in zip(Ladder.rungs, used, strict=True)
        )
        total = sum(norm * norm for norm in norms) ** 0.5
        self._say(noted, f"{_line(step)}: a spike (norm {total:.4g}), {_DONE[rung]}; used: "
                         f"{budgets}; largest: {self._largest(norms)}")  # fmt: skip

    def attend(self, loss_scale: Tensor | None) -> None:
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
        (rung, step, first, norms, noted), self._decision = self._decision, None
        if rung == RECOMPUTE:
            self._recompute(step, norms, noted, loss_scale)
        elif rung == REWIND:
            self.forget()
            raise RewindRequested(
                f"{_line(step)}: a spike after all others of this ladder's budgets; its update was "
                f"skipped. Load a checkpoint taken at step {first} or before, leave out the "
                f"batches of the spikes ({_shown(self._offending)}), and go on "
                f"(distclip.errors.RewindRequested)",
                first,
                self._offending,
            )
        elif rung == ABORT:
            self.forget()
            raise LadderExhaustedError(
                f"{_line(step)}: a spike, and all budgets of {self._policy!r} are used; its update "
                f"was skipped. Batches of this episode's spikes: {_shown(self._offending)}. Lower "
                f"the learning rate, look at these batches, or raise the budgets"
            )

    def _recompute(
        self, step: int, norms: list[float], noted: Noted, loss_scale: Tensor | None
    ) -> None:
        """Compute a skipped step again, compare, and leave everything as it was."""
        missing = torch.full((1,), float(not noted.recompute), device=self._session.plan.device)
        if self._group is not None:
            missing = collectives.all_reduce_max(missing.double(), self._group)
        if missing.item():
            self._say(noted, f"{_line(step)}: not computed again, since on some rank "
                             f"note(recompute=...) has not said how")  # fmt: skip
            return
        parameters = [parameter for _, parameter in self._session.named]
        kept = [None if p.grad is None else p.grad.clone() for p in parameters]
        try:
            for parameter in parameters:
                parameter.grad = None
            with torch.enable_grad():
                for again in noted.recompute:
                    again()
            with torch.no_grad():
                session = self._session
                found = walk(session.program, session.states, loss_scale=loss_scale).raw.tolist()
        finally:
            with torch.no_grad():
                for parameter, gradient in zip(parameters, kept, strict=True):
                    if gradient is None or parameter.grad is None:
                        parameter.grad = gradient
                    else:
                        parameter.grad.copy_(gradient)
            if self._session.early is not None:
                self._session.early.forget()
        self._judge(step, norms, found, noted)

    def _judge(self, step: int, norms: list[float], again: list[float], noted: Noted) -> None:
        finite = torch.tensor([norms, again], dtype=torch.float64)
        limit = self._policy.tolerance * finite.norm(dim=1).nan_to_num(0.0, 0.0, 0.0).max()
        differs = ((finite[0] - finite[1]).abs() > limit) | (
            finite[0].isfinite() != finite[1].isfinite()
        )
        names = [n for n, d in zip(self._session.plan.names, differs.tolist(), strict=True) if d]
        norm = finite[1].norm().item()
        if names:
            text = (
                f"the results differ (norm {norm:.4g}), which points at hardware: {_shown(names)}"
            )
        else:
            text = f"the results are equal (norm {norm:.4g}), which points at the data"
        self._say(noted, f"{_line(step)}: computed again, and {text}", error=bool(names))

    def _largest(self, norms: list[float]) -> str:
        pairs = zip(self._session.plan.names, norms, strict=True)
        worst = sorted(pairs, key=lambda pair: -pair[1] if pair[1] == pair[1] else -float("inf"))
        return ", ".join(f"{clean(name)} {norm:.4g}" for name, norm in worst[:3])

    def _say(self, noted: Noted, text: str, *, error: bool = False) -> None:
        if noted.batches or self._session.speaks:
            batches = f"; batches: {_shown(noted.batches)}" if noted.batches else ""
            _logger.log(logging.ERROR if error else logging.WARNING, "%s%s", text, batches)


def _line(step: int) -> str:
    return f"step {step} (counted from 0), rank {collectives.global_rank()}"


def _shown(items: list[Any]) -> str:
    more = f" and {len(items) - 16} more" if len(items) > 16 else ""
    return ", ".join(clean(each) for each in items[:16]) + more if items else "none noted"
