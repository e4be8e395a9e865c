"""GradClipper, the one who walks the street."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, SupportsIndex, TypeAlias

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from distclip.application.eager import eagerly
from distclip.application.folded import FusedStep, Scope
from distclip.application.joint import AttachHandle
from distclip.application.stepping import skips_by_found_inf
from distclip.common.notebook import clipper_html
from distclip.engine import checkpoint
from distclip.engine.attaching import as_optimizers
from distclip.engine.following import checked_sinks, loading, with_followers
from distclip.engine.ladder import Attendant, Update
from distclip.engine.once import ClipOnce
from distclip.engine.program import StageStates
from distclip.engine.session import Session
from distclip.engine.walked import Apply
from distclip.errors import ConfigurationError
from distclip.layouts import plan as plans
from distclip.layouts.names import Target
from distclip.options import LOOKS, Every, Fixed, OnNonfinite, VerifyReplicas
from distclip.policies import ParameterInfo, Policy
from distclip.report import ClipReport

StepSink: TypeAlias = Callable[[int, ClipReport], None]

_COPIED = ("on_nonfinite", "norms", "verify_replicas", "fold", "overlap", *LOOKS)
"""Options that a deep copy has too."""

_ANEW = (
    "build GradClipper(model, policy) anew on every rank, for the model that is there, and give it "
    "load_state_dict(state)"
)

in_use = False
"""Whether a GradClipper has clipped in this process."""


class Watcher:
    """Sees every step of every GradClipper in this process; see ``watchers``."""

    def before(self, clipper: GradClipper, loss_scale: Tensor | None) -> None:
        """Gradients are as backward left them, ``loss_scale`` times too large where it is given."""

    def after(self, clipper: GradClipper, report: ClipReport, loss_scale: Tensor | None) -> None:
        """The gradients are clipped; called after the sinks.

        Where a fused optimizer multiplies as it steps, this is called after that step, which has
        written the clipped gradients, unscaled, to ``.grad``. ``loss_scale`` is as in ``before``,
        and None once the step has unscaled the gradients. Not called for a step that a gradient
        scaler dropped, of which nothing is left.
        """


watchers: list[Watcher] = []
"""Told of every step, on every rank: for tools around a training run, not for the run itself."""


class GradClipper:
    """Clips the gradients of a model, whatever its sharding, by any policy.

    ::

        clipper = distclip.GradClipper(model, policies.agc(0.01))
        loss.backward()
        report = clipper.clip_()          # or once: clipper.attach(optimizer)
        optimizer.step()

    In a distributed run every rank builds it at the same point: the ranks compare parameters,
    policy and configuration once. A step then costs one all-reduce, or none where nothing is
    sharded.

    Args:
        target: module, list of modules (pipeline stages, model parts), parameters, or
            (name, parameter) pairs. Parameters keep their sharding; nothing is gathered.
        policy: what to do; see :mod:`distclip.policies`.
        optimizer: for policies that need its parameter groups; ``attach`` gives it too. Several in
            a list: their groups are numbered through.
        on_nonfinite: ``"error"`` (raise on all ranks, gradients untouched; reads one flag on the
            host per step), ``"error_late"`` (drop the update, and raise on all ranks in the next
            step; reads no flag on the host; see :meth:`raise_late`), ``"skip"`` (the whole update
            is dropped), ``"zero"`` (the non-finite parameters' gradients become 0), ``"pass"`` (as
            torch).
        process_group: the ranks that hold this model together; all ranks by default.
        sinks: one or several, called after every clip as ``sink(step, report)``, with steps
            counted from 0. What one of them raises is raised when all have been called: the clip
            is then done and counted, and an attached optimizer has not stepped.
        norms: False: do not measure what only the report would show. With ``on_nonfinite="pass"``
            a policy that needs nothing from other ranks then communicates nothing.
        verify_replicas: when to compare the copies of tensors that lie on several ranks, weights
            and gradients, bit by bit: ``"first"`` (the first step), ``"never"``, or a number n (the
            first and every n-th step after it). Rides on the step's all-reduce; under plain DDP,
            which has none, a compared step costs one. Other steps cost nothing.
        fold: where it is attached to a fused Adam, AdamW, SGD or Adagrad that steps just these
            parameters, and one coefficient is for all of them, let the optimizer's kernel multiply
            as it reads, in place of a pass over the gradients before it. ``.grad`` is then clipped
            after the step. False: always before it, which is also the mend where only some ranks
            have another hook before the optimizer's step, and would clip before it: the kernel
            rounds otherwise, so that replicas drift apart by roundings.
        overlap: under FSDP2 and DDP, measure each gradient during backward, as soon as it is
            reduced, so that the clip only has to reduce and decide. What does not come so is
            measured at the clip, and so is what was changed in between, as far as that can be seen:
            read docs/overlap.md before you change gradients by hand. Holds until :meth:`close`.
        stuck_after: seconds that a clip waits for other ranks until it raises a CollectiveError
            that names those that are missing (on an accelerator: until it logs so and ends the
            process). None: what the environment variable DISTCLIP_STUCK_AFTER says, or without it
            no limit but that of the process group.
        ratios: n: every n-th step, measure the norms of the weights too, so that its report has the
            ratio of gradient to weight of each parameter. Reads the weights once, and travels in
            the same all-reduce.
        exponents: n: every n-th step, count the elements of the gradients by binary exponent, so
            that its report shows what is 0, subnormal, or near underflow or overflow of its dtype.
            Reads the gradients once more; 2 KiB a parameter in the same all-reduce.

    Raises:
        ConfigurationError: an argument that cannot be meant.
        UnsupportedGradientError: a sharding that distclip cannot read.
        RankMismatchError: ranks that disagree, on every rank.
        ProcessGroupError: a closed group, or one without this rank.
    """

    policy = Fixed(lambda options: options.policy)
    on_nonfinite = Fixed(lambda options: options.on_nonfinite)
    norms = Fixed(lambda options: options.norms)
    verify_replicas = Fixed(lambda options: options.verify_replicas)
    fold = Fixed(lambda options: options.fold)
    overlap = Fixed(lambda options: options.overlap)
    stuck_after = Fixed(lambda options: options.stuck_after)
    ratios = Fixed(lambda options: options.ratios)
    exponents = Fixed(lambda options: options.exponents)

    @eagerly
    def __init__(
        self,
        target: Target,
        policy: Policy,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        on_nonfinite: OnNonfinite = "error",
        process_group: ProcessGroup | None = None,
        sinks: StepSink | Sequence[StepSink] = (),
        norms: bool = True,
        verify_replicas: VerifyReplicas = "first",
        fold: bool = True,
        overlap: bool = False,
        stuck_after: float | None = None,
        ratios: Every = None,
        exponents: Every = None,
    ) -> None:
        given = {
            "policy": policy,
            "on_nonfinite": on_nonfinite,
            "norms": norms,
            "verify_replicas": verify_replicas,
            "fold": fold,
            "overlap": overlap,
            "stuck_after": stuck_after,
            "ratios": ratios,
            "exponents": exponents,
        }
        self._session = session = Session.open(
            target, given, process_group, as_optimizers(optimizer)
        )
        self._options = session.options
        self._ladder = Attendant.of(session, process_group)
        self.sinks: tuple[StepSink, ...] = checked_sinks(sinks)
        self.last_report: ClipReport | None = None
        """The report of the last clip."""
        tensors = [parameter for _, parameter in session.named]
        self._scope = Scope(tensors)
        self._once = ClipOnce(session, repr(self))
        self._apply: Apply | None = None

    def __repr__(self) -> str:
        """The policy, and how many parameters there are on all ranks."""
        return f"GradClipper({self.policy!r}, {len(self.names)} parameters)"

    def _repr_html_(self) -> str:
        """What a notebook shows: this clipper and its last report. Reads the host."""
        rows = [("policy", repr(self.policy)), ("parameters", f"{len(self.names):,}"),
                ("NaN or inf", f'on_nonfinite="{self.on_nonfinite}"')]  # fmt: skip
        last = self.last_report
        return clipper_html(rows, None if last is None else last.to_dict())

    @property
    def parameters(self) -> tuple[ParameterInfo, ...]:
        """All logical parameters, in the order of every per-parameter statistic."""
        return self._session.program.parameters

    @property
    def here(self) -> Mapping[str, Tensor]:
        """Name -> tensor of those that this rank has a part of, as the optimizer steps it."""
        return self._session.here

    @property
    def norm_type(self) -> float:
        """Order of the norms in the reports: that of the policy, 2 where it has none."""
        return self._session.program.shown

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of every per-parameter statistic."""
        return self._session.plan.names

    @eagerly
    def clip_(self, loss: Tensor | float | None = None) -> ClipReport:
        """Measure and clip the gradients that are there now, in place. Call it on every rank.

        Between ``backward`` (with synchronisation) and ``optimizer.step()``. Parameters without a
        gradient count as 0. Where the report says ``skipped``, nothing was changed and the caller
        leaves out the optimizer's step.

        Args:
            loss: as for :meth:`observe`.

        Raises:
            NonFiniteGradientError: under ``on_nonfinite="error"``.
            ReplicaDriftError: copies of one tensor differ between ranks, where it is looked for.
            UnsupportedGradientError: a sparse shard, or a ``Partial`` that cannot be reduced.
            RankMismatchError: ranks that clip by different rules, as far as they compare them.
            CollectiveError: a rank has died, or is missing for longer than ``stuck_after``.
            ProcessGroupError: the process group has been closed.
        """
        if loss is not None:
            self.observe(loss)
        report: ClipReport | None = self._once.by_hand_again()
        if report is None:
            report = self._clip(self.on_nonfinite, None)
            self._once.note_by_hand(report)
        return report

    @eagerly
    def observe(self, loss: Tensor | float) -> None:
        """Tell the loss of the step to come, for a policy that reads it; others ignore it.

        Several losses of one step (micro-batches) are averaged, and so are those of all ranks, in
        the one all-reduce of the clipping. Where nothing is sharded the loss costs that all-reduce.

        Args:
            loss: one number, any float dtype; not read on the host.

        Raises:
            ConfigurationError: several numbers, or a DTensor.
        """
        self._session.observe(loss)

    def note(self, batch: Any = None, recompute: Callable[[], object] | None = None) -> None:
        """Tell what the step to come is made of, for a :func:`~distclip.policies.ladder`.

        Several notes of one step (micro-batches) add up. For another policy it does nothing.

        Args:
            batch: what names this rank's batch in the log and in
                :attr:`RewindRequested.batches <distclip.RewindRequested>`; any value.
            recompute: forward and backward of the same batch, as the step makes them, without
                optimizer step; it and the batch are kept until the next clip. It is called there,
                on every rank or on none, with ``.grad`` None and the weights of this step. What it
                does not restore by itself (a random generator) makes the results differ. Under a
                gradient scaler it leaves gradients without the loss scale. Where the scaler drops
                a step before it is clipped, its notes are counted to the next.
        """
        if self._ladder is not None:
            self._ladder.note(batch, recompute)

    @eagerly
    def note_update(self, step: int, report: Update) -> None:
        """Have the :func:`~distclip.policies.ladder` judge an update, where it has ``updates``.

        A sink: ``monitor.UpdateMonitor(model, optimizer, sinks=clipper.note_update)``. Its decision
        is acted on before the next clip. For another policy it does nothing.

        Args:
            step: of the monitor; not used, since a ladder counts clips.
            report: of the step that the last clip was for.

        Raises:
            ConfigurationError: a report of other parameters.
        """
        if self._ladder is not None:
            self._ladder.judge_update(report)

    @property
    def rewinds(self) -> int:
        """Rewinds that its :func:`~distclip.policies.ladder` has raised; 0 without one.

        Reads the host. An integration that goes back to a state from before there was this clipper
        sets it; it is never lowered.
        """
        return 0 if self._ladder is None else self._ladder.made

    @rewinds.setter
    def rewinds(self, made: int) -> None:
        if self._ladder is not None:
            self._ladder.made = made

    @eagerly
    def attach(self, optimizer: Optimizer | Sequence[Optimizer], *more: Optimizer) -> AttachHandle:
        """Clip before every ``optimizer.step()`` from now on.

        A step that the policy, or ``on_nonfinite="skip"``, drops leaves momentum, weight decay and
        step counters as they are. Where ranks hold different parameters (stages, experts), every
        rank attaches at the same point. Works under ``torch.amp.GradScaler``, with fused
        optimizers too: norms are of the unscaled gradients, and a step that the scaler drops is
        left to it. Fused optimizers multiply by themselves where they can: see ``fold``.

        Several optimizers that step parts of one model (Muon for the matrices, AdamW for the rest)
        are given together: one norm over all, one clip per update, before the first of them steps
        in whatever order they do, and one skip for all. Under a scaler an overflow anywhere skips
        all of them.

        Args:
            optimizer: the torch optimizer that steps this model's parameters; or a list of them.
            more: further optimizers.

        Returns:
            A handle; ``handle.remove()`` undoes it.

        Raises:
            ConfigurationError: the clipper is attached already, an optimizer is given twice, or
                steps none of its parameters.
        """
        optimizers = (*as_optimizers(optimizer), *more)
        return self._once.attach(optimizers, self._clip_attached, self._follow, self.raise_late)

    def _clip_attached(
        self,
        loss_scale: Tensor | None,
        found_inf: Tensor | None,
        coming: FusedStep | None,
        *,
        overflow_drops: bool = False,
    ) -> ClipReport:
        report: ClipReport | None = self._once.before_step()
        if report is not None:
            return report
        return self.clip_before_step(loss_scale, found_inf, coming, overflow_drops=overflow_drops)

    @eagerly
    def clip_before_step(
        self,
        loss_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        coming: FusedStep | None = None,
        *,
        overflow_drops: bool = False,
    ) -> ClipReport:
        """As :meth:`clip_`, for gradients that a gradient scaler still has a hand in.

        Args:
            loss_scale: 0-dim; the gradients are this many times too large and stay so.
            found_inf: 0-dim or ``(1,)``, > 0 where the scaler found NaN or inf: it drops such a
                step itself, as a part of finding its scale, so it is no error here.
            coming: the step that follows, which multiplies in place of this where it can and
                ``fold`` allows it.
            overflow_drops: under a scaler, drop a step with NaN or inf whatever ``on_nonfinite``
                says, since the scaler sees only the gradients of one optimizer of several.
        """
        mode: OnNonfinite = "skip" if overflow_drops else self.on_nonfinite
        if found_inf is not None and mode in ("error", "error_late"):
            mode = "skip"
        folds = coming is not None and self.fold and coming.suits(self._scope)
        if watchers and coming is not None and not coming.alone:
            folds = False  # they are to see what this clipper did, and no other hook
        fold = coming if folds else None
        out = self._leaves_out(coming)
        return self._clip(mode, loss_scale, found_inf=found_inf, fold=fold, leaves_out=out)

    def _leaves_out(self, coming: FusedStep | None) -> bool:
        """Whether the steps to come leave an update out, without a read of a device."""
        if coming is None or self.plan.device.type == "cpu":
            return coming is not None
        return all(map(skips_by_found_inf, self._session.optimizers() or [coming.optimizer]))

    @eagerly
    def raise_late(self) -> None:
        """Raise now what the next step would, under ``on_nonfinite="error_late"``; else nothing.

        For the end of a training loop, and after replays of a CUDA graph, which run no Python.
        ``state_dict()`` and ``handle.remove()`` call it. Reads the host. Raises once for each
        error, and so does the step that follows, on all ranks alike. A ladder's decision on the
        last step is logged.

        Raises:
            NonFiniteGradientError: a step so far had a gradient that is not finite.
        """
        if self._ladder is not None:
            self._ladder.tell()
        self._session.late.raise_now()

    @eagerly
    def decide(
        self, on_nonfinite: OnNonfinite, loss_scale: Tensor | None = None
    ) -> tuple[ClipReport, Apply]:
        """Measure and decide, and leave the acting to the caller; for integrations of engines.

        DeepSpeed steps with fp32 copies of what is measured: clipped there, nothing is rounded to
        the gradients' own dtype. What cannot wait (dropping, passes before the last) is done here.

        Args:
            on_nonfinite: in place of the clipper's own.
            loss_scale: 0-dim; the measured gradients are this many times too large.

        Returns:
            The report, and what is still to be done.
        """
        report = self._clip(on_nonfinite, loss_scale, later=True)
        assert self._apply is not None  # `later` leaves it
        return report, self._apply

    @property
    def measured_early(self) -> int:
        """How many gradients of this rank the last clip found measured during backward."""
        return 0 if self._session.early is None else self._session.early.taken

    def close(self) -> None:
        """Stop measuring during backward; clipping goes on without. Other clippers do nothing.

        A clipper that is garbage collected does so by itself.
        """
        self._session.close()

    @property
    def expects_gradients(self) -> bool:
        """Whether a step in which no rank has a gradient is worth a warning."""
        return self._session.expects_gradients

    @expects_gradients.setter
    def expects_gradients(self, expected: bool) -> None:
        self._session.expects_gradients = expected

    @property
    def plan(self) -> plans.Plan:
        """The table of parameters, and where this rank's pieces of them lie."""
        return self._session.plan

    @eagerly
    def state_dict(self) -> dict[str, object]:
        """Plain values and tensors: the policy, its memory by parameter name, the step count.

        The same on every rank, whatever the sharding; saving that of one rank is enough. It goes
        through ``torch.save`` and ``torch.load(weights_only=True)``, and through
        ``torch.distributed.checkpoint`` (a ``GradClipper`` is ``Stateful``).

        Raises:
            NonFiniteGradientError: as :meth:`raise_late`.
        """
        self.raise_late()
        return with_followers(self._session.dump(self._states), self.sinks)

    @property
    def _states(self) -> StageStates:
        """The policies' memory, as it is handed on."""
        return self._session.states if self._ladder is None else self._ladder.states

    @eagerly
    def load_state_dict(self, state: dict[str, object]) -> None:
        """Load what :meth:`state_dict` gave, on every rank; any number of ranks, any sharding.

        From here on the clipper decides, bit by bit, as the one that was saved would have. An empty
        state (a checkpoint from before distclip was in use) gives a warning and changes nothing.
        Where the policy has another threshold than the one that was saved, and its memory means the
        same, one line in the log says so; a policy without memory loads the state of any other.

        Raises:
            StateError: a memory that means something else to this policy (another window, another
                policy), another model's parameters, a damaged state: says what differs. The clipper
                is then left as it was.
        """
        self.prepare_state_dict(state)()

    def prepare_state_dict(
        self, state: object, source: checkpoint.StateSource | None = None
    ) -> Callable[[], None]:
        """As :meth:`load_state_dict`, in two: check now, load when the result is called.

        For integrations, which load several clippers, or something else, only if all of it fits.

        Args:
            state: what :meth:`state_dict` gave.
            source: where it is from, for the messages.
        """
        load = loading(state, self.sinks, self._session.prepare(state, source))
        return load if self._ladder is None else self._ladder.loading(load)

    def __deepcopy__(self, memo: dict[int, Any]) -> GradClipper:
        """A clipper of the copied parameters, attached to the copied optimizers if this one is.

        Its policy's memory is copied, its sinks are not: two clippers would write one log.

        Raises:
            ConfigurationError: in a distributed run, where all ranks have to build one together.
        """
        session = self._session
        if session.is_shared:
            raise ConfigurationError(f"copy.deepcopy of {self!r} in a distributed run: {_ANEW}")
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        named = [(name, copy.deepcopy(parameter, memo)) for name, parameter in session.named]
        twin.__init__(  # type: ignore[misc]
            session.watched.copied(memo) or named,
            self.policy,
            **{name: getattr(self, name) for name in _COPIED},
        )
        twin._session.resume(session, copy.deepcopy(self._states, memo))
        if self._once.attached:
            twin.attach([copy.deepcopy(optimizer, memo) for optimizer in session.optimizers()])
        return twin

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise ConfigurationError(
            f"{self!r} cannot be pickled, since it belongs to the parameters of this process; "
            f"save clipper.state_dict(), and where it is loaded {_ANEW}"
        )

    def _follow(self, memo: dict[int, Any]) -> None:
        """An optimizer that this is attached to has been deep-copied, without its hooks."""
        if self._session.is_shared:
            self._once.warn_once(
                "copied",
                f"the copied optimizer has no step hooks, and nothing clips before its steps; "
                f"{_ANEW}, and attach that to the copied optimizer",
            )
        else:
            copy.deepcopy(self, memo)

    def _clip(
        self,
        mode: str,
        loss_scale: Tensor | None,
        *,
        found_inf: Tensor | None = None,
        later: bool = False,
        fold: FusedStep | None = None,
        leaves_out: bool = False,
    ) -> ClipReport:
        global in_use
        in_use = True
        session = self._session
        if self._ladder is not None:
            self._ladder.begin()
        session.begin(mode)
        if self._ladder is not None:
            self._ladder.attend()
        for watcher in watchers:
            watcher.before(self, loss_scale)
        step, states = session.step, session.states
        multiply = None if fold is None else fold.multiply
        walked = session.clip(mode, loss_scale, later=later, fold=multiply, leaves_out=leaves_out)
        if self._ladder is not None:
            self._ladder.keep(states, walked, step, found_inf)
        self._apply = walked.apply
        asks = leaves_out or walked.may_skip or mode != "error_late"
        never = walked.skipped is session.program.no_skip or not asks
        report = ClipReport(
            names=self.names,
            skipped=walked.skipped,
            _norm_type=session.program.shown,
            _dtype=self.plan.norm_dtype,
            _walked=walked,
            leave_out=None if never else walked.skipped,
        )
        self.last_report = report
        error = self._hand_out(step, report)
        if watchers and fold is not None and fold.multiplies:
            fold.then = functools.partial(self._show_stepped, report, loss_scale)
        else:
            self._show(report, loss_scale)
        session.look_at_overlap()
        if error is not None:
            raise error
        return report

    def _show(self, report: ClipReport, loss_scale: Tensor | None) -> None:
        for watcher in watchers:
            watcher.after(self, report, loss_scale)

    def _show_stepped(
        self, report: ClipReport, loss_scale: Tensor | None, skipped: bool | Tensor
    ) -> None:
        """As :meth:`_show`, after a step that was to multiply and unscale the gradients."""
        if not bool(skipped):
            self._show(report, None)
        elif bool(report.skipped):
            self._show(report, loss_scale)

    def _hand_out(self, step: int, report: ClipReport) -> Exception | None:
        """Call every sink, though one raises; returns the first error, for when all is done."""
        first = None
        for sink in self.sinks:
            try:
                sink(step, report)
            except Exception as error:
                first = first or error
        return first
