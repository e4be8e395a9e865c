"""What is kept from step to step: the plan, the compiled policy, its memory, the ranks.

A session is opened by all ranks at one point, where they compare what they were given: by a
GradClipper for a run, by a function without memory for a call (:mod:`distclip.engine.calls`). From
then on :meth:`Session.clip` is one step: measure, reduce, decide, act.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from distclip.application.notices import Absence, warn
from distclip.engine import agreement, checkpoint, mentions
from distclip.engine.attaching import stepped_by
from distclip.engine.facts import agreed, infos, learn
from distclip.engine.late import LateError
from distclip.engine.losses import Losses
from distclip.engine.opening import Opened, open_together
from distclip.engine.passes import compile_passes, report_order
from distclip.engine.program import Program, StageStates
from distclip.engine.walk import Fold, Terms, walk
from distclip.engine.walked import Walked
from distclip.errors import ConfigurationError, DistclipError
from distclip.kernels import changing, transfer
from distclip.layouts import names as naming
from distclip.layouts import soundness
from distclip.layouts.fetching import Fetched
from distclip.layouts.names import Target
from distclip.policies import Policy
from distclip.policies.compose import parts_of, reads, stages
from distclip.policies.sound import first_state
from distclip.statistics import buckets, collectives, waiting
from distclip.statistics.overlap import Overlap

_logger = logging.getLogger("distclip")

_GO_ON = (
    '. To go on without such steps use on_nonfinite="skip" (or "zero" to drop only these gradients)'
)

GO_ON_OF_CALLS = "; error_if_nonfinite=False raises nothing and returns the norm that is not finite"


class Session:
    """One model, one policy, and the ranks that hold the model together.

    Args:
        opened: what the ranks agree on.
        watched: the modules that the parameters came from.
        optimizers: for policies that need parameter groups.

    Attributes:
        options: checked.
        plan: the table of parameters, and where this rank's pieces of them lie.
        program: the policy, compiled for the plan.
        named: the tensors of this rank, as the optimizer steps them.
        here: the same by name.
        known: their ids.
        watched: the modules that they came from.
        parts: whether ranks hold different parameters (stages, experts).
        states: the policies' memory.
        step: how many steps there have been.
        early: what measures during backward.
        late: errors that are raised one step late.
        expects_gradients: whether a step in which no rank has a gradient is worth a warning.
        fetched: the gradients of the step to come, where they have been fetched already.
    """

    def __init__(
        self, opened: Opened, watched: naming.Watched, optimizers: Sequence[Optimizer] = ()
    ) -> None:
        self._lasting = opened.lasting
        self.options, self.plan, self.named = opened.options, opened.plan, opened.named
        self.parts = opened.parts
        self.here = dict(self.named)
        self._limit, self._agreement = opened.limit, opened.agreement
        self._replicas = opened.replicas
        self._losses = Losses(self.policy)
        self.states: StageStates = {}
        # A state that one rank alone loads does not change what the next clip looks at: so ranks
        # send messages of one length, and hear by them that their steps differ.
        self.step, self._looks = 0, self.options.looks(0)
        self.expects_gradients = opened.lasting
        self.fetched: Fetched | None = None
        self._clips, self._mentioned_repetition = 0, False
        self._optimizers: list[tuple[weakref.ref[Optimizer], list[int]]] = []
        """Optimizers that are attached, and the ids of the parameters that each had then."""
        self.watched, self.known = watched, {id(parameter) for _, parameter in self.named}
        self._last = agreement.LastClip([parameter for _, parameter in self.named])
        self._absence = Absence(self.plan, self.named)
        self.late = LateError(self.plan.names)
        self.early: Overlap | None = None
        if self.options.overlap:
            self.early = Overlap(self.plan, buckets.ddp_modules(self.watched.modules))
            if not self.early.active:
                mentions.warn_of_no_overlap(self.early)
        self._members: dict[str, tuple[int, ...]] = {}
        """Stage path -> the parameters that its state is of."""
        self._learn(optimizers)
        if opened.lasting:
            mentions.mention_unmatched(self.policy, self.program.parameters, self.plan.group)

    @classmethod
    def open(
        cls,
        target: Target,
        given: Mapping[str, Any],
        process_group: ProcessGroup | None,
        optimizers: Sequence[Optimizer],
    ) -> Session:
        """A session for a run; every rank calls it at the same point.

        Args:
            target: as for :class:`distclip.GradClipper`.
            given: its options by name, not checked yet.
            process_group: the ranks; all by default.
            optimizers: for policies that need parameter groups.
        """
        opened = open_together(target, given, process_group)
        return cls(opened, naming.Watched(target), optimizers)

    def __del__(self) -> None:
        if (plan := getattr(self, "plan", None)) is not None:
            plan.release()  # a report that is kept has the plan, and shall not keep the model

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self.options.policy

    # ---- one step -------------------------------------------------------------------------------

    def begin(self, mode: str) -> None:
        """Before anything of a step: whether it can be made, and what is left of earlier ones.

        Raises:
            ProcessGroupError: the process group has been closed.
            NonFiniteGradientError: of an earlier step, under ``"error_late"``.
        """
        if self.plan.group is not None:
            collectives.check_open(self.plan.group)
        if mode == "error_late" and not transfer.is_capturing(self.plan.device):
            self.late.raise_earlier()

    def clip(
        self,
        mode: str,
        loss_scale: Tensor | None,
        *,
        later: bool = False,
        fold: Fold | None = None,
        leaves_out: bool = False,
        trouble: DistclipError | None = None,
    ) -> Walked:
        """Measure, reduce, decide and act once.

        Args:
            mode: what to do where a gradient is not finite; see :func:`distclip.engine.walk.walk`.
            loss_scale: 0-dim; the gradients are this many times too large, and stay so.
            later: leave what the last pass decides to ``Walked.apply``.
            fold: asked to multiply in place of the last pass.
            leaves_out: whether the step to come is left out where the report says so.
            trouble: what is wrong on this rank already; raised when all ranks have heard of it.
        """
        late = mode == "error_late"
        self._mention_repetition()
        terms = Terms(
            on_nonfinite="skip" if late else mode,
            loss_scale=loss_scale,
            replicas=self._replicas if self._compares_now() else None,
            trouble=trouble or self._trouble(),
            agreed=self._agreed(),
            loss=self._losses.take(),
            later=later,
            fold=fold,
            harmless=late and not leaves_out,
            fetched=self.fetched,
            go_on=_GO_ON if self._lasting else GO_ON_OF_CALLS,
            looks=self._looks,
        )
        self.fetched = None
        wait = waiting.Wait(self.step, self._limit) if self._lasting else waiting.current()
        waited = waiting.wait_for(wait)
        with torch.no_grad():
            try:
                walked = walk(self.program, self.states, terms)
            finally:
                waiting.wait_for(waited)
                if self.early is not None:
                    self.early.forget()
            self._clips += 1
            self.states = walked.states
            if late:
                self.late.note(walked.nonfinite, self.step)
            if self.expects_gradients and self._absence.is_here():
                self._absence.judge(walked.raw, speaks=self.speaks)
        if self._agreement is not None:
            self._last.remember()
        self.step, self._looks = self.step + 1, self.options.looks(self.step + 1)
        return walked

    def scale(self, coefficient: Tensor) -> None:
        """Multiply all gradients, which a :meth:`clip` has found sound, by one 0-dim number."""
        with torch.no_grad():
            fetched = [piece.gradient() for piece in self.plan.pieces]
            gradients, *_ = soundness.inspect(self.plan, fetched, first=False)
            present = [gradient for gradient in gradients if gradient is not None]
            changing.scale_(present, coefficient.to(self.plan.device).expand(len(present)))

    def look_at_overlap(self) -> None:
        """Say so where measuring during backward has ended, or never began."""
        early = self.early
        if early is None:
            return
        if early.error is not None:
            self.close()
            error = f"{type(early.error).__name__}: {early.error}"
            warn(
                f"measuring during backward (overlap=True) failed with {error}; from now on "
                f"gradients are measured at the clip, with the same result",
            )
        # The first backward may have been over when this was built.
        elif self._clips == 2 and early.active and not early.calls:
            mentions.warn_of_no_overlap(early)

    def close(self) -> None:
        """Stop measuring during backward."""
        if self.early is not None:
            self.early.close()
            self.early = None

    def observe(self, loss: Tensor | float) -> None:
        """See :meth:`distclip.GradClipper.observe`."""
        self._losses.add(loss, self.plan.device)

    # ---- the ranks ------------------------------------------------------------------------------

    @property
    def speaks(self) -> bool:
        """Whether this rank is one that warns and logs for all."""
        return self.parts or collectives.is_first(self.plan.group)

    @property
    def is_shared(self) -> bool:
        """Whether this is a distributed run."""
        return collectives.default_group(None) is not None or self.plan.group is not None

    def anywhere(self, here: bool) -> bool:
        """Whether gradients have changed on any rank.

        Where all ranks have DTensors of all parameters, a backward gives all of them gradients.
        """
        group = self.plan.group
        if group is None or (self.plan.all_spread and not self.parts):
            return here
        return self.on_any_rank(here)

    def on_any_rank(self, here: bool) -> bool:
        """Whether it is so on any rank; a collective over the group."""
        group = self.plan.group
        assert group is not None
        flag = torch.full((1,), float(here), dtype=torch.float64, device=self.plan.device)
        return bool(collectives.all_reduce_max(flag, group).item() > 0)

    def _agreed(self) -> agreement.Agreed | None:
        """What has to be the same on all ranks in this step, where anything travels that tells."""
        compares = self._compares_now() and self.options.verify_replicas != "never"
        if self._agreement is None or not (self.plan.group is not None or compares):
            return None
        memory = agreement.digest_of(self.states) if compares else ""
        return self._agreement.of_step(self.step, memory=memory, now=compares)

    def _compares_now(self) -> bool:
        every = self.options.verify_replicas
        return self._clips == 0 if isinstance(every, str) else self._clips % every == 0

    def _mention_repetition(self) -> None:
        """Where one rank alone clips twice, this is the last that can be said of it by name."""
        if self._agreement is None or self._mentioned_repetition or not self._last.is_repeated():
            return
        self._mentioned_repetition = True
        _logger.warning(
            "rank %d clips again at step %d, and no gradient has changed since the last clip: "
            "if not every rank does so, this rank is a step ahead of the others, and collectives "
            "that do not belong together will meet, hang or abort; call clip_() equally often on "
            "every rank",
            collectives.global_rank(),
            self.step,
        )

    def _trouble(self) -> DistclipError | None:
        """What is wrong on this rank before a gradient is looked at: parameters that came later."""
        newcomers = self.watched.newcomers(self.known)
        for reference, known in self._optimizers:
            optimizer = reference()
            if newcomers or optimizer is None:
                continue
            listed = stepped_by(optimizer)
            if list(map(id, listed)) != known:
                newcomers = [
                    f"one of shape {list(p.shape)} in the optimizer"
                    for p in listed
                    if id(p) not in self.known and id(p) not in known
                ]
        if not newcomers:
            return None
        more = f" and {len(newcomers) - 1} more" if len(newcomers) > 1 else ""
        return ConfigurationError(
            f"parameter {newcomers[0]!r}{more} came (or was replaced) after this GradClipper was "
            f"built, and would not be clipped; build the GradClipper anew, after everything that "
            f"changes the model (fully_shard, adapters such as LoRA)"
        )

    # ---- the policy -----------------------------------------------------------------------------

    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """From now on these step the parameters: their groups count, and what they are given."""
        self._learn(optimizers)
        if reads(self.policy).optimizers:
            mentions.mention_unmatched(self.policy, self.program.parameters, self.plan.group)
        self._optimizers = [
            (weakref.ref(each), list(map(id, stepped_by(each)))) for each in optimizers
        ]

    def optimizers(self) -> list[Optimizer]:
        """The optimizers that this session follows and that still exist."""
        return [each for reference, _ in self._optimizers if (each := reference())]

    def _learn(self, optimizers: Sequence[Optimizer]) -> None:
        """Look at what the policy wants to know of parameters, and compile it for that."""
        modules = self.watched.sources
        group = self.plan.group if self.parts else None
        self._facts = learn(self.policy, self.here, optimizers, modules, group)
        self.program = self._compiled()

    def _compiled(self) -> Program:
        parameters = infos(self.plan.entries, self._facts)
        passes = compile_passes(
            self.policy,
            parameters,
            self.plan,
            norms=self.options.norms,
            watch_nonfinite=self.options.on_nonfinite != "pass",
        )
        for stage in stages(self.policy, parameters):
            if stage.members and self._members.get(stage.path) != stage.members:
                theirs = [parameters[member] for member in stage.members]
                self.states[stage.path] = first_state(stage.policy, theirs, self.plan.device)
                self._members[stage.path] = stage.members
        parts = parts_of(self.policy, parameters)
        if self._agreement is not None:
            for what, numbers in agreed(self.policy, parameters, parts).items():
                self._agreement.note(what, numbers)
        shown = report_order(self.policy, parameters)
        return Program(self.plan, parameters, passes, shown, self.early, parts)

    # ---- its memory -----------------------------------------------------------------------------

    def resume(self, other: Session, states: StageStates) -> None:
        """Go on where another session of a copy of the model is, with these states."""
        self._facts = other._facts
        self.program = self._compiled()
        self.step, self._clips, self._looks = other.step, other._clips, other._looks
        self.states = states

    def dump(self, states: StageStates) -> dict[str, object]:
        """The session with these states, as :meth:`distclip.GradClipper.state_dict` returns it."""
        return checkpoint.dump(self._owner(), self.step, states)

    def prepare(
        self, state: object, source: checkpoint.StateSource | None = None
    ) -> Callable[[], None]:
        """See :meth:`distclip.GradClipper.prepare_state_dict`."""
        restored = checkpoint.restore(self._owner(), state, self.states, source)

        def load() -> None:
            self.late.forget()  # of steps that are taken back
            if restored is not None:
                self.step = restored.step
                self.states = {**self.states, **restored.states}
                if self._agreement is not None:
                    found = f"that of step {restored.step} [{agreement.digest_of(restored.states)}]"
                    self._agreement.note("loaded state", found)
                if collectives.is_first(self.plan.group):
                    restored.announce()

        return load

    def _owner(self) -> checkpoint.Owner:
        parameters = self.program.parameters
        return checkpoint.Owner(self.policy, stages(self.policy, parameters), parameters)
