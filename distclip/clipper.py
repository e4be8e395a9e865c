"""GradClipper, the one who walks the street."""

from __future__ import annotations

import copy
import logging
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn, SupportsIndex, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distclip._version import __version__
from distclip.application.eager import eagerly
from distclip.application.folded import FusedStep, Scope
from distclip.application.joint import AttachHandle, GradientsSeen
from distclip.application.notices import Absence, earlier_clip, note_clip, sample, warn
from distclip.application.stepping import skips_by_found_inf
from distclip.engine import agreement, checkpoint, handshake
from distclip.engine.late import LateError
from distclip.engine.ledger import Apply, Program, States
from distclip.engine.passes import check_weights, compile_passes, report_order
from distclip.engine.replicas import ReplicaCheck
from distclip.engine.walk import Fold, walk
from distclip.errors import ConfigurationError, DistclipError
from distclip.kernels import transfer
from distclip.layouts import fsdp2, slices
from distclip.layouts import names as naming
from distclip.layouts import plan as plans
from distclip.layouts.detect import describe, refuse_dummy, refuse_stepped_in_backward
from distclip.layouts.names import Named, Target
from distclip.layouts.piece import Described, Entry
from distclip.options import NAMES, Fixed, OnNonfinite, Options, VerifyReplicas
from distclip.policies import Measure, ParameterInfo, Policy
from distclip.policies._compose import reads_loss, stages, unmatched
from distclip.report import ClipReport
from distclip.statistics import buckets, collectives, waiting
from distclip.statistics.overlap import Overlap

Sink: TypeAlias = Callable[[int, ClipReport], None]

_logger = logging.getLogger("distclip")

_COPIED = ("on_nonfinite", "norms", "verify_replicas", "fold", "overlap")
"""Options that a deep copy has too."""

_ANEW = (
    "build GradClipper(model, policy) anew on every rank, for the model that is there, and give it "
    "load_state_dict(state)"
)

_GO_ON = (
    '. To go on without such steps use on_nonfinite="skip" (or "zero" to drop only these gradients)'
)

_attached_now: weakref.WeakSet[GradClipper] = weakref.WeakSet()
"""Clippers that are attached, or were."""

in_use = False
"""Whether a GradClipper has clipped in this process."""


class Watcher:
    """Sees every step of every GradClipper in this process; see ``watchers``."""

    def before(self, clipper: GradClipper, loss_scale: Tensor | None) -> None:
        """Gradients are as backward left them, ``loss_scale`` times too large where it is given."""

    def after(self, clipper: GradClipper, report: ClipReport) -> None:
        """They are clipped; called after the sinks."""


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
        sinks: called after every clip as ``sink(step, report)``, with steps counted from 0. What
            one of them raises is raised when all have been called: the clip is then done and
            counted, and an attached optimizer has not stepped.
        norms: False: do not measure what only the report would show. With ``on_nonfinite="pass"``
            a policy that needs nothing from other ranks then communicates nothing.
        verify_replicas: when to compare the copies of tensors that lie on several ranks, weights
            and gradients, bit by bit: ``"first"`` (the first step), ``"never"``, or a number n (the
            first and every n-th step after it). Rides on the step's all-reduce; under plain DDP,
            which has none, a compared step costs one. Other steps cost nothing.
        fold: where it is attached to a fused Adam, AdamW, SGD or Adagrad that steps just these
            parameters, and one coefficient is for all of them, let the optimizer's kernel multiply
            as it reads, in place of a pass over the gradients before it. ``.grad`` is then clipped
            after the step. False: always before it.
        overlap: under FSDP2 and DDP, measure each gradient during backward, as soon as it is
            reduced, so that the clip only has to reduce and decide. What does not come so is
            measured at the clip, and so is what was changed in between, as far as that can be seen:
            read docs/overlap.md before you change gradients by hand. Holds until :meth:`close`.
        stuck_after: seconds that a clip waits for other ranks until it raises a CollectiveError
            that names those that are missing (on an accelerator: until it logs so and ends the
            process). None: what the environment variable DISTCLIP_STUCK_AFTER says, or without it
            no limit but that of the process group.

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

    @eagerly
    def __init__(
        self,
        target: Target,
        policy: Policy,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        on_nonfinite: OnNonfinite = "error",
        process_group: ProcessGroup | None = None,
        sinks: Sequence[Sink] = (),
        norms: bool = True,
        verify_replicas: VerifyReplicas = "first",
        fold: bool = True,
        overlap: bool = False,
        stuck_after: float | None = None,
    ) -> None:
        given = {
            "policy": policy,
            "on_nonfinite": on_nonfinite,
            "norms": norms,
            "verify_replicas": verify_replicas,
            "fold": fold,
            "overlap": overlap,
            "stuck_after": stuck_after,
        }
        self._options: Options
        self._replicas: ReplicaCheck | None = None
        self._agreement: agreement.Agreement | None = None
        self._walks = 0
        self.sinks = tuple(sinks)
        self._named: Named = []
        self._here: dict[str, Tensor] = {}
        self._optimizers: list[tuple[weakref.ref[Optimizer], list[int]]] = []
        """Those that it is attached to, and the ids of the parameters that each had then."""
        self._parts = False
        self._reads_loss = False
        self._warned_of_no_loss = False
        self._mentioned_repetition = False
        self._plan = self._compare_notes(target, given, process_group)
        self._watched = naming.Watched(target)
        self._known = {id(parameter) for _, parameter in self._named}
        self._last = agreement.LastClip([parameter for _, parameter in self._named])
        self._scope = Scope([parameter for _, parameter in self._named])
        wide = any(entry.dtype in ("float64", "complex128") for entry in self._plan.entries)
        self._dtype = torch.float64 if wide else torch.float32
        self._step = 0
        self._attached: AttachHandle | None = None
        self._by_hand: GradientsSeen | None = None
        """Gradients as a ``clip_`` has left them, where this is attached too."""
        self._hand_report: ClipReport | None = None
        self._said: set[str] = set()
        self._sample = sample([parameter for _, parameter in self._named])
        self._absence = Absence(self._plan, self._named)
        self.expects_gradients = True
        """Whether a step in which no rank has a gradient is worth a warning."""
        self._states: States = {}
        self._loss: Tensor | None = None
        self._late = LateError(self.names)
        self._apply: Apply | None = None
        self._early = None
        if overlap:
            self._early = Overlap(self._plan, buckets.modules_of(self._watched.modules))
        if self._early is not None and not self._early.active:
            self._warn_of_no_overlap()
        self._program = self._compile(_listed(optimizer))
        self._shown = repr(self)
        self._mention_unmatched()

    def __repr__(self) -> str:
        """The policy, and how many parameters there are on all ranks."""
        return f"GradClipper({self.policy!r}, {len(self.names)} parameters)"

    @property
    def parameters(self) -> tuple[ParameterInfo, ...]:
        """All logical parameters, in the order of every per-parameter statistic."""
        return self._program.parameters

    @property
    def here(self) -> Mapping[str, Tensor]:
        """Name -> tensor of those that this rank has a part of, as the optimizer steps it."""
        return self._here

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of every per-parameter statistic."""
        return self._plan.names

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
        attached = self._attached is not None and self._attached.active
        if attached:
            self._warn_once(
                "by hand",
                f"{self!r} is attached to an optimizer, and clip_() is called too: one of the two "
                f"is enough. Gradients that have not changed in between are clipped, and counted "
                f"in the policy's memory, once",
            )
            if (report := self._clipped_by_hand()) is not None:
                return report
        self._hand_report = report = self._clip(self.on_nonfinite, None)
        if attached:
            self._by_hand = GradientsSeen(self._gradients())
        if self._changes_gradients:
            note_clip(self._sample, self._shown, id(self))
        return report

    def _clipped_by_hand(self) -> ClipReport | None:
        """The report of the last ``clip_``, if no gradient on any rank has changed since."""
        if self._by_hand is None:
            return None
        changed = self._by_hand.differ(self._gradients())
        if self._plan.group is not None:
            changed = self._on_any_rank(changed)
        if changed:
            self._by_hand = None
            return None
        return self._hand_report

    def _gradients(self) -> list[Tensor | None]:
        return [parameter.grad for _, parameter in self._named]

    @property
    def _changes_gradients(self) -> bool:
        return not isinstance(self.policy, Measure)

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warn(message)

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
        if not self._reads_loss:
            return
        if isinstance(loss, DTensor):
            raise ConfigurationError(
                "observe: the loss is a DTensor, and to read it the ranks would have to talk; give "
                "loss.full_tensor()"
            )
        value = torch.as_tensor(loss).detach()
        if value.numel() != 1:
            raise ConfigurationError(
                f"observe: the loss must be one number, got a tensor of shape {list(value.shape)}; "
                f"give its mean"
            )
        value = value.to(self._plan.device, torch.float64).reshape(())
        given = torch.stack([value, torch.ones_like(value)])
        self._loss = given if self._loss is None else self._loss + given

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
        optimizers = (*_listed(optimizer), *more)
        self._check_attachable(optimizers)
        for name, parameter in self._named:
            refuse_stepped_in_backward(name, parameter)
        self._mention_others(optimizers)
        handle = AttachHandle(
            optimizers, self._clip_attached, self._anywhere, self._follow, self.raise_late
        )
        try:
            self._program = self._compile(optimizers)
        except Exception:
            handle.remove()
            raise
        self._optimizers = [
            (weakref.ref(each), list(map(id, _stepped_by(each)))) for each in optimizers
        ]
        self._mention_unstepped(optimizers)
        self._attached = handle
        _attached_now.add(self)
        return handle

    def _clip_attached(
        self,
        loss_scale: Tensor | None,
        found_inf: Tensor | None,
        coming: FusedStep | None,
        *,
        overflow_drops: bool = False,
    ) -> ClipReport:
        report = self._clipped_by_hand()
        self._by_hand = None
        if report is not None:
            return report
        by = earlier_clip(self._sample, id(self)) if self._changes_gradients else None
        if by is not None:
            self._warn_once(
                "earlier",
                f"these gradients have been clipped already since their backward, by {by}, and are "
                f"now clipped by {self!r}, which is attached to the optimizer: leave one of them "
                f"out, or give policies.chain(...) to one GradClipper if both are meant",
            )
        return self.clip_before_step(loss_scale, found_inf, coming, overflow_drops=overflow_drops)

    def _mention_others(self, optimizers: Sequence[Optimizer]) -> None:
        """Warn of another clipper that is attached and has some of the same parameters."""
        for other in list(_attached_now):
            attached = other is not self and other._attached is not None and other._attached.active
            if not attached or not (self._changes_gradients and other._changes_gradients):
                continue
            shared = [name for name, p in self._named if id(p) in other._known]
            if shared:
                more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
                warn(
                    f"{self!r} is attached while {other!r} is, and both clip {shared[0]!r}{more}, "
                    f"in every update one after the other. If both are meant, give "
                    f"policies.chain(...) to one GradClipper; else remove() the handle of the "
                    f"other first"
                )

    def _check_attachable(self, optimizers: Sequence[Optimizer]) -> None:
        if self._attached is not None and self._attached.active:
            raise ConfigurationError(
                "this GradClipper is attached already; where several optimizers step one model, "
                "give all of them in one call, clipper.attach(first, second), for one norm and one "
                "decision over all, or else handle.remove() the first attachment"
            )
        if not optimizers:
            raise ConfigurationError("attach: expected an optimizer, got an empty list")
        mine = {id(parameter) for _, parameter in self._named}
        for number, optimizer in enumerate(optimizers):
            if not hasattr(optimizer, "param_groups"):
                raise ConfigurationError(
                    f"attach: expected the optimizer that steps the parameters, got a "
                    f"{type(optimizer).__name__}"
                )
            refuse_dummy(optimizer)
            stepped = list(_stepped_by(optimizer))
            if any(map(operator.is_not, stepped, fsdp2.sharded(stepped))):
                raise ConfigurationError(
                    f"the optimizer ({type(optimizer).__name__}) was built of parameters that "
                    f"FSDP2 had gathered for a forward: those get no gradient, and their memory is "
                    f"freed; build it before the first forward, or after model.reshard()"
                )
            if any(optimizer is other for other in optimizers[:number]):
                raise ConfigurationError(f"attach: optimizer {number} is given twice; give it once")
            if mine and mine.isdisjoint(map(id, stepped)):
                which = f" (number {number}, {type(optimizer).__name__})" * (len(optimizers) > 1)
                raise ConfigurationError(
                    f"the optimizer{which} steps none of this GradClipper's parameters; FSDP2 "
                    f"(fully_shard) replaces parameters: build both after sharding, from the same "
                    f"model"
                )

    def _anywhere(self, here: bool) -> bool:
        """Whether gradients have changed on any rank.

        Where all ranks have DTensors of all parameters, a backward gives all of them gradients.
        """
        group = self._plan.group
        if group is None or (self._plan.holds is not None and not self._parts):
            return here
        return self._on_any_rank(here)

    def _on_any_rank(self, here: bool) -> bool:
        group = self._plan.group
        assert group is not None
        flag = torch.full((1,), float(here), dtype=torch.float64, device=self._plan.device)
        return bool(collectives.all_reduce_max(flag, group).item() > 0)

    def _mention_unstepped(self, optimizers: Sequence[Optimizer]) -> None:
        """A parameter that is clipped and never stepped counts in the norm of the others."""
        stepped = {id(p) for optimizer in optimizers for p in _stepped_by(optimizer)}
        names = [n for n, p in self._named if p.requires_grad and id(p) not in stepped]
        if names and (self._parts or collectives.is_first(self._plan.group)):
            _logger.warning(
                "attach: no attached optimizer steps %s%s, whose gradients are measured and "
                "clipped with the others; if another optimizer steps them, attach to both: "
                "clipper.attach(first, second)",
                ", ".join(map(repr, names[:3])),
                f" and {len(names) - 3} more trainable parameters" if len(names) > 3 else "",
            )

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
        # Watchers are shown what has been clipped.
        folds = coming is not None and self.fold and not watchers and coming.suits(self._scope)
        multiply = coming.multiply if coming and folds else None
        return self._clip(mode, loss_scale, fold=multiply, leaves_out=self._leaves_out(coming))

    def _leaves_out(self, coming: FusedStep | None) -> bool:
        """Whether the steps to come leave an update out, without a read of a device."""
        if coming is None or self._plan.device.type == "cpu":
            return coming is not None
        optimizers = [each for reference, _ in self._optimizers if (each := reference())]
        return all(map(skips_by_found_inf, optimizers or [coming.optimizer]))

    @eagerly
    def raise_late(self) -> None:
        """Raise now what the next step would, under ``on_nonfinite="error_late"``; else nothing.

        For the end of a training loop, and after replays of a CUDA graph, which run no Python.
        ``state_dict()`` and ``handle.remove()`` call it. Reads the host. Each error is raised once.

        Raises:
            NonFiniteGradientError: a step so far had a gradient that is not finite.
        """
        self._late.raise_now()

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
        return 0 if self._early is None else self._early.taken

    def close(self) -> None:
        """Stop measuring during backward; clipping goes on without. Other clippers do nothing.

        A clipper that is garbage collected does so by itself.
        """
        if self._early is not None:
            self._early.close()
            self._early = None

    @property
    def plan(self) -> plans.Plan:
        """The table of parameters, and where this rank's pieces of them lie."""
        return self._plan

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
        return checkpoint.dump(self._owner(), self._step, self._states)

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
        self, state: object, source: checkpoint.Source | None = None
    ) -> Callable[[], None]:
        """As :meth:`load_state_dict`, in two: check now, load when the result is called.

        For integrations, which load several clippers, or something else, only if all of it fits.

        Args:
            state: what :meth:`state_dict` gave.
            source: where it is from, for the messages.
        """
        restored = checkpoint.restore(self._owner(), state, self._states, source)

        def load() -> None:
            self._late.forget()  # of steps that are taken back
            if restored is not None:
                self._step = restored.step
                self._states = {**self._states, **restored.states}
                if self._agreement is not None:
                    found = f"that of step {restored.step} [{agreement.digest_of(restored.states)}]"
                    self._agreement.note("loaded state", found)
                if collectives.is_first(self._plan.group):
                    restored.announce()

        return load

    def __deepcopy__(self, memo: dict[int, Any]) -> GradClipper:
        """A clipper of the copied parameters, attached to the copied optimizers if this one is.

        Its policy's memory is copied, its sinks are not: two clippers would write one log.

        Raises:
            ConfigurationError: in a distributed run, where all ranks have to build one together.
        """
        if self._is_shared():
            raise ConfigurationError(f"copy.deepcopy of {self!r} in a distributed run: {_ANEW}")
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        named = [(name, copy.deepcopy(parameter, memo)) for name, parameter in self._named]
        groups: dict[int, list[Tensor]] = {}
        for info in self._program.parameters:
            if info.group is not None:
                groups.setdefault(info.group, []).append(dict(named)[info.name])
        known = [groups.get(number, []) for number in range(max(groups, default=-1) + 1)]
        twin.__init__(  # type: ignore[misc]
            self._watched.copied(memo) or named,
            self.policy,
            optimizer=SimpleNamespace(param_groups=[{"params": group} for group in known]),
            **{name: getattr(self, name) for name in _COPIED},
        )
        twin._step, twin._walks = self._step, self._walks
        twin._states = copy.deepcopy(self._states, memo)
        if self._attached is not None and self._attached.active:
            alive = [optimizer for reference, _ in self._optimizers if (optimizer := reference())]
            twin.attach([copy.deepcopy(optimizer, memo) for optimizer in alive])
        return twin

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise ConfigurationError(
            f"{self!r} cannot be pickled, since it belongs to the parameters of this process; "
            f"save clipper.state_dict(), and where it is loaded {_ANEW}"
        )

    def _is_shared(self) -> bool:
        return collectives.default_group(None) is not None or self._plan.group is not None

    def _follow(self, memo: dict[int, Any]) -> None:
        """An optimizer that this is attached to has been deep-copied, without its hooks."""
        if self._is_shared():
            self._warn_once(
                "copied",
                f"the copied optimizer has no step hooks, and nothing clips before its steps; "
                f"{_ANEW}, and attach that to the copied optimizer",
            )
        else:
            copy.deepcopy(self, memo)

    def _owner(self) -> checkpoint.Owner:
        parameters = self._program.parameters
        return checkpoint.Owner(self.policy, stages(self.policy, parameters), parameters)

    def _clip(
        self,
        mode: str,
        loss_scale: Tensor | None,
        *,
        later: bool = False,
        fold: Fold | None = None,
        leaves_out: bool = False,
    ) -> ClipReport:
        global in_use
        in_use = True
        if self._plan.group is not None:
            collectives.check_open(self._plan.group)
        late = mode == "error_late"
        if late and not transfer.is_capturing(self._plan.device):
            self._late.raise_earlier()
        for watcher in watchers:
            watcher.before(self, loss_scale)
        self._mention_repetition()
        agreed = self._agreed()
        loss, self._loss = self._loss, None
        if self._reads_loss and loss is None:
            self._warn_of_no_loss()
        try:
            with waiting.waiting_for(waiting.Wait(self._step, self._limit)), torch.no_grad():
                walked = walk(
                    self._program,
                    self._states,
                    on_nonfinite="skip" if late else mode,
                    loss_scale=loss_scale,
                    replicas=self._replicas if self._compares_now() else None,
                    trouble=self._trouble(),
                    agreed=agreed,
                    loss=loss,
                    later=later,
                    fold=fold,
                    harmless=late and not leaves_out,
                    go_on=_GO_ON,
                )
        finally:
            if self._early is not None:
                self._early.forget()
        with torch.no_grad():
            self._walks += 1
            self._states, self._apply = walked.states, walked.apply
            if late:
                self._late.note(walked.nonfinite, self._step)
            asks = leaves_out or walked.may_skip or not late
            never = walked.skipped is self._program.no_skip or not asks
            report = ClipReport(
                names=self.names,
                skipped=walked.skipped,
                _norm_type=self._program.shown,
                _dtype=self._dtype,
                _walked=walked,
                leave_out=None if never else walked.skipped,
            )
            if self.expects_gradients and self._absence.is_here():
                speaks = self._parts or collectives.is_first(self._plan.group)
                self._absence.judge(walked.raw, speaks=speaks)
        self._last.remember()
        step, self._step = self._step, self._step + 1
        error = self._hand_out(step, report)
        for watcher in watchers:
            watcher.after(self, report)
        if self._early is not None:
            self._look_at_overlap(self._early)
        if error is not None:
            raise error
        return report

    def _hand_out(self, step: int, report: ClipReport) -> Exception | None:
        """Call every sink, though one raises; returns the first error, for when all is done."""
        first = None
        for sink in self.sinks:
            try:
                sink(step, report)
            except Exception as error:
                first = first or error
        return first

    def _look_at_overlap(self, early: Overlap) -> None:
        """Say so where measuring during backward has ended, or never began."""
        if early.error is not None:
            self.close()
            error = f"{type(early.error).__name__}: {early.error}"
            warn(
                f"measuring during backward (overlap=True) failed with {error}; from now on "
                f"gradients are measured at the clip, which is as right and takes its time then",
            )
        # The first backward may have been over when this was built.
        elif self._walks == 2 and early.active and not early.calls:
            self._warn_of_no_overlap()

    def _warn_of_no_overlap(self) -> None:
        reasons = [] if self._early is None else self._early.refused
        warn(
            reasons[0] + ". Until then overlap=True has no effect, and all gradients are measured "
            "at the clip"
            if reasons
            else "overlap=True has no effect here: no gradient comes from FSDP2 (fully_shard), nor "
            "from a DistributedDataParallel module given as target, to the device of the "
            "statistics, so all are measured at the clip, as without it",
        )

    def _compares_now(self) -> bool:
        every = self.verify_replicas
        return self._walks == 0 if isinstance(every, str) else self._walks % every == 0

    def _agreed(self) -> agreement.Agreed | None:
        """What has to be the same on all ranks in this step, where anything travels that tells."""
        compares = self._compares_now() and self.verify_replicas != "never"
        if self._agreement is None or not (self._plan.group is not None or compares):
            return None
        memory = agreement.digest_of(self._states) if compares else ""
        return self._agreement.of_step(self._step, memory=memory, now=compares)

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
            self._step,
        )

    def _trouble(self) -> DistclipError | None:
        """What is wrong on this rank before a gradient is looked at: parameters that came later."""
        newcomers = self._watched.newcomers(self._known)
        for reference, known in self._optimizers:
            optimizer = reference()
            if newcomers or optimizer is None:
                continue
            listed = _stepped_by(optimizer)
            if list(map(id, listed)) != known:
                newcomers = [
                    f"one of shape {list(p.shape)} in the optimizer"
                    for p in listed
                    if id(p) not in self._known and id(p) not in known
                ]
        if not newcomers:
            return None
        more = f" and {len(newcomers) - 1} more" if len(newcomers) > 1 else ""
        return ConfigurationError(
            f"parameter {newcomers[0]!r}{more} came (or was replaced) after this GradClipper was "
            f"built, and would not be clipped; build the GradClipper anew, after everything that "
            f"changes the model (fully_shard, adapters such as LoRA)"
        )

    def _mention_unmatched(self) -> None:
        """A pattern for nothing is mostly a typing error, or meant for another model.

        Or for other parameters of a script that clips by parts: so it is no warning.
        """
        patterns = unmatched(self.policy, self.names)
        if patterns and collectives.is_first(self._plan.group):
            _logger.warning(
                "by_name: no parameter's name matches %s, so what is said of it concerns none of "
                "the %d parameters here (%s)",
                ", ".join(map(repr, patterns)),
                len(self.names),
                ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else ""),
            )

    def _warn_of_no_loss(self) -> None:
        if not self._warned_of_no_loss:
            warn(
                f"{self.policy!r} reads the loss, and this step has none: call "
                f"clipper.observe(loss) before the step, or clipper.clip_(loss=loss); with "
                f"Accelerate accelerator.backward(loss), or the handle's observe(loss). Steps "
                f"without one are judged by their norm alone",
            )
        self._warned_of_no_loss = True

    def _compare_notes(
        self, target: Target, given: Mapping[str, Any], process_group: ProcessGroup | None
    ) -> plans.Plan:
        """The one conversation between the ranks: do all of them mean the same model and policy?"""
        group = collectives.default_group(process_group)
        try:
            self._options = Options(**given)
            limit = self._options.stuck_after
            self._limit = waiting.limit_from_environment() if limit is None else float(limit)
            described = self._describe(target)
        except Exception as error:
            if group is not None:  # the others are waiting to hear from this rank
                collectives.gather(handshake.trouble(__version__, error), group)
            raise
        device = self._named[0][1].device if self._named else torch.device("cpu")
        if group is None:
            return plans.local_plan(described, device)
        table = tuple(entry for entry, _ in described)
        ranks = collectives.ranks_of(group)
        notes = handshake.meet(self._notes(table), __version__, group)
        common = handshake.common_device(each.device for each in notes)
        if device.type != common:
            device = torch.device(common)
        device = collectives.device_for(group, device)
        me = ranks[collectives.rank_in(group)]
        described, tables = slices.settle(described, [each.table for each in notes], ranks, me)
        plans.check_tables(tables, ranks, stages=naming.is_list_of_modules(target))
        if plans.needs_reduction(tables) or self._reads_loss:
            rank = collectives.rank_in(group)
            self._parts = plans.differ(tables)
            plan = plans.merged_plan(described, tables, rank, ranks, device, group)
        else:
            plan = plans.local_plan(plans.in_order_of(tables[0], described), device)
        on_host = device.type == "cpu" or self.on_nonfinite == "error"
        self._agreement = agreement.Agreement(group, device, immediate=on_host)
        if self.verify_replicas != "never":
            self._replicas = ReplicaCheck.of(plan, group, plans.copied(tables, ranks))
        return plan

    def _describe(self, target: Target) -> list[Described]:
        """Read off this rank's parameters."""
        self._reads_loss = reads_loss(self.policy)
        named = naming.named_parameters(target)
        self._named, described = describe(named)
        check_weights(self.policy, described)
        self._here = dict(self._named)
        return described

    def _notes(self, table: tuple[Entry, ...]) -> handshake.Notes:
        return handshake.Notes(
            versions=(("torch", torch.__version__),),
            options=tuple((name, repr(getattr(self._options, name))) for name in NAMES),
            table=table,
            frozen=tuple(name for name, parameter in self._named if not parameter.requires_grad),
            device=self._named[0][1].device.type if self._named else "",
        )

    def _compile(self, optimizers: Sequence[Optimizer]) -> Program:
        groups: dict[int, int] = {}
        listed = [group for optimizer in optimizers for group in optimizer.param_groups]
        for number, group in enumerate(listed):
            groups.update({id(parameter): number for parameter in group["params"]})
        here = {
            name: groups[id(parameter)]
            for name, parameter in self._here.items()
            if id(parameter) in groups
        }
        parameters = [ParameterInfo(entry.name, entry.shape) for entry in self._plan.entries]
        if self._parts and any(s.policy.needs.groups for s in stages(self.policy, parameters)):
            assert self._plan.group is not None
            ranks = collectives.ranks_of(self._plan.group)
            here = handshake.merge_groups(collectives.gather(here, self._plan.group), ranks)
        parameters = [
            ParameterInfo(entry.name, entry.shape, here.get(entry.name))
            for entry in self._plan.entries
        ]
        passes = compile_passes(
            self.policy,
            parameters,
            self._plan.entries,
            norms=self.norms,
            watch_nonfinite=self.on_nonfinite != "pass",
        )
        for stage in stages(self.policy, parameters):
            if stage.members and stage.path not in self._states:
                infos = [parameters[member] for member in stage.members]
                state = stage.policy.init(infos)
                device = self._plan.device
                self._states[stage.path] = {key: value.to(device) for key, value in state.items()}
        if self._agreement is not None:
            reads = any(s.policy.needs.groups for s in stages(self.policy, parameters))
            numbers = {each.name: each.group for each in parameters} if reads else {}
            self._agreement.note("parameter groups", numbers)
        shown = report_order(self.policy, parameters)
        return Program.of(self._plan, parameters, passes, shown, self._early)


def _listed(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    if optimizer is None:
        return ()
    return tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)


def _stepped_by(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
