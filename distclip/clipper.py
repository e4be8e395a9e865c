"""GradClipper, the one who walks the street."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from distclip import checkpoint
from distclip._version import __version__
from distclip.application.stepping import StepHandle
from distclip.errors import ConfigurationError, DistclipError
from distclip.handshake import Notes, compare, refuse_troubled
from distclip.layouts import names as naming
from distclip.layouts import plan as plans
from distclip.layouts.detect import detect
from distclip.layouts.names import Named, Target
from distclip.layouts.piece import Described
from distclip.ledger import Program, States
from distclip.passes import compile_passes, report_order
from distclip.policies import ParameterInfo, Policy
from distclip.policies._compose import stages
from distclip.report import ClipReport
from distclip.statistics import collectives
from distclip.walk import walk

OnNonfinite: TypeAlias = Literal["error", "skip", "zero", "pass"]
Sink: TypeAlias = Callable[[int, ClipReport], None]


in_use = False
"""Whether a GradClipper has clipped in this process."""


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
        optimizer: for policies that need its parameter groups; ``attach`` gives it too.
        on_nonfinite: ``"error"`` (raise on all ranks, gradients untouched; reads one flag on the
            host per step), ``"skip"`` (the whole update is dropped), ``"zero"`` (the non-finite
            parameters' gradients become 0), ``"pass"`` (as torch).
        process_group: the ranks that hold this model together; all ranks by default.
        sinks: called after every step as ``sink(step, report)``, with steps counted from 0.
        norms: False: do not measure what only the report would show. With ``on_nonfinite="pass"``
            a policy that needs nothing from other ranks then communicates nothing.

    Raises:
        ConfigurationError: an argument that cannot be meant.
        UnsupportedGradientError: a sharding that distclip cannot read.
        RankMismatchError: ranks that disagree, on every rank.
        ProcessGroupError: a closed group, or one without this rank.
    """

    def __init__(
        self,
        target: Target,
        policy: Policy,
        *,
        optimizer: Optimizer | None = None,
        on_nonfinite: OnNonfinite = "error",
        process_group: ProcessGroup | None = None,
        sinks: Sequence[Sink] = (),
        norms: bool = True,
    ) -> None:
        self.policy = policy
        self.on_nonfinite = on_nonfinite
        self.sinks = tuple(sinks)
        self._norms = norms
        self._named: Named = []
        self._reads_loss = False
        self._warned_of_no_loss = False
        self._plan = self._compare_notes(target, process_group)
        wide = any(entry.dtype in ("float64", "complex128") for entry in self._plan.entries)
        self._dtype = torch.float64 if wide else torch.float32
        self._step = 0
        self._attached: StepHandle | None = None
        self._states: States = {}
        self._loss: Tensor | None = None
        self._program = self._compile(optimizer)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of every per-parameter statistic."""
        return self._plan.names

    def clip_(self, loss: Tensor | float | None = None) -> ClipReport:
        """Measure and clip the gradients that are there now, in place. Call it on every rank.

        Between ``backward`` (with synchronisation) and ``optimizer.step()``. Parameters without a
        gradient count as 0. Where the report says ``skipped``, nothing was changed and the caller
        leaves out the optimizer's step.

        Args:
            loss: as for :meth:`observe`.

        Raises:
            NonFiniteGradientError: under ``on_nonfinite="error"``.
            UnsupportedGradientError: a sparse gradient, or a ``Partial`` that cannot be reduced.
            ProcessGroupError: the process group has been closed.
        """
        if loss is not None:
            self.observe(loss)
        return self._clip(self.on_nonfinite, None)

    def observe(self, loss: Tensor | float) -> None:
        """Tell the loss of the step to come, for a policy that reads it; others ignore it.

        Several losses of one step (micro-batches) are averaged, and so are those of all ranks, in
        the one all-reduce of the clipping. Where nothing is sharded the loss costs that all-reduce.

        Args:
            loss: one number, any float dtype; not read on the host.
        """
        if not self._reads_loss:
            return
        value = torch.as_tensor(loss).detach()
        if value.numel() != 1:
            raise ConfigurationError(
                f"observe: the loss must be one number, got a tensor of shape {list(value.shape)}; "
                f"give its mean"
            )
        value = value.to(self._plan.device, torch.float64).reshape(())
        given = torch.stack([value, torch.ones_like(value)])
        self._loss = given if self._loss is None else self._loss + given

    def attach(self, optimizer: Optimizer) -> StepHandle:
        """Clip before every ``optimizer.step()`` from now on.

        A step that the policy, or ``on_nonfinite="skip"``, drops leaves momentum, weight decay and
        step counters as they are. Works under ``torch.amp.GradScaler``, with fused optimizers too:
        norms are of the unscaled gradients, and a step that the scaler drops is left to it.

        Args:
            optimizer: the torch optimizer that steps this model's parameters.

        Returns:
            A handle; ``handle.remove()`` undoes it.

        Raises:
            ConfigurationError: the clipper is attached already, or the optimizer steps none of its
                parameters.
        """
        if self._attached is not None and self._attached.active:
            raise ConfigurationError(
                "this GradClipper is attached already, and would clip all its parameters before "
                "the steps of both optimizers; build one GradClipper for each optimizer's "
                "parameters, or handle.remove() the first"
            )
        mine = {id(parameter) for _, parameter in self._named}
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if mine and mine.isdisjoint(stepped):
            raise ConfigurationError(
                "the optimizer steps none of this GradClipper's parameters; FSDP2 (fully_shard) "
                "replaces parameters: build both after sharding, from the same model"
            )
        self._program = self._compile(optimizer)
        self._attached = StepHandle(optimizer, self.clip_before_step)
        return self._attached

    def clip_before_step(
        self, loss_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> ClipReport:
        """As :meth:`clip_`, for gradients that a gradient scaler still has a hand in.

        Args:
            loss_scale: 0-dim; the gradients are this many times too large and stay so.
            found_inf: 0-dim or ``(1,)``, > 0 where the scaler found NaN or inf: it drops such a
                step itself, as a part of finding its scale, so it is no error here.
        """
        mode = self.on_nonfinite
        if found_inf is not None and mode == "error":
            mode = "skip"
        return self._clip(mode, loss_scale)

    def state_dict(self) -> dict[str, object]:
        """Plain values and tensors: the policy, its memory by parameter name, the step count.

        The same on every rank, whatever the sharding; saving that of one rank is enough. It goes
        through ``torch.save`` and ``torch.load(weights_only=True)``, and through
        ``torch.distributed.checkpoint`` (a ``GradClipper`` is ``Stateful``).
        """
        return checkpoint.dump(self._owner(), self._step, self._states)

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Load what :meth:`state_dict` gave, on every rank; any number of ranks, any sharding.

        From here on the clipper decides, bit by bit, as the one that was saved would have. An empty
        state (a checkpoint from before distclip was in use) gives a warning and changes nothing.

        Raises:
            StateError: the state of another policy, or of another model: says which parameters are
                missing or unexpected. The clipper is then left as it was.
        """
        loaded = checkpoint.restore(self._owner(), state, self._states)
        if loaded is not None:
            self._step = loaded[0]
            self._states = {**self._states, **loaded[1]}

    def _owner(self) -> checkpoint.Owner:
        parameters = self._program.parameters
        return checkpoint.Owner(self.policy, stages(self.policy, parameters), parameters)

    def _clip(self, mode: str, loss_scale: Tensor | None) -> ClipReport:
        global in_use
        in_use = True
        if self._plan.group is not None:
            collectives.check_open(self._plan.group)
        loss, self._loss = self._loss, None
        if self._reads_loss and loss is None:
            self._warn_of_no_loss()
        with torch.no_grad():
            walked = walk(
                self._program,
                self._states,
                on_nonfinite=mode,
                loss_scale=loss_scale,
                loss=loss,
            )
            self._states = walked.states
            report = ClipReport(
                names=self.names,
                skipped=walked.skipped,
                _norm_type=self._program.shown,
                _dtype=self._dtype,
                _norms=walked.raw,
                _after=walked.after,
                _applied=walked.coefficients,
                _smallest=walked.smallest,
                _clipped=walked.clipped,
                _threshold=walked.threshold,
                _nonfinite=walked.nonfinite,
            )
        step, self._step = self._step, self._step + 1
        for sink in self.sinks:
            sink(step, report)
        return report

    def _warn_of_no_loss(self) -> None:
        if not self._warned_of_no_loss:
            warnings.warn(
                f"{self.policy!r} reads the loss, and this step has none: call "
                f"clipper.observe(loss) before the step, or clipper.clip_(loss=loss). Steps "
                f"without one are judged by their norm alone",
                stacklevel=4,
            )
        self._warned_of_no_loss = True

    def _compare_notes(self, target: Target, process_group: ProcessGroup | None) -> plans.Plan:
        """The one conversation between the ranks: do all of them mean the same model and policy?"""
        group = collectives.default_group(process_group)
        try:
            described = self._describe(target)
        except DistclipError as error:
            if group is not None:  # the others are waiting to hear from this rank
                collectives.gather(str(error), group)
            raise
        device = self._named[0][1].device if self._named else torch.device("cpu")
        device = collectives.device_for(group, device)
        if group is None:
            return plans.local_plan(described, device)
        table = tuple(entry for entry, _ in described)
        ranks = collectives.ranks_of(group)
        mine = Notes(__version__, self._configuration(), table)
        digests = collectives.gather(mine.digest(), group)
        refuse_troubled(digests, ranks)
        notes = [mine] * len(ranks)
        if any(digest != digests[0] for digest in digests):
            notes = collectives.gather(mine, group)
            compare(notes, ranks)
        tables = [each.table for each in notes]
        plans.check_tables(tables, ranks, stages=naming.is_list_of_modules(target))
        if not plans.needs_reduction(tables) and not self._reads_loss:
            return plans.local_plan(described, device)
        rank = collectives.rank_in(group)
        return plans.merged_plan(described, tables, rank, ranks, device, group)

    def _describe(self, target: Target) -> list[Described]:
        """Check what this rank was given, and read off its parameters."""
        if not isinstance(self.policy, Policy):
            raise ConfigurationError(
                f"policy must be a policy such as policies.global_norm(1.0), got {self.policy!r}"
            )
        if self.on_nonfinite not in get_args(OnNonfinite):
            raise ConfigurationError(
                f"on_nonfinite must be one of {', '.join(map(repr, get_args(OnNonfinite)))}, got "
                f"{self.on_nonfinite!r}"
            )
        self._reads_loss = any(stage.policy.needs.loss for stage in stages(self.policy, ()))
        self._named = naming.named_parameters(target)
        naming.refuse_meta(self._named)
        return [detect(name, parameter) for name, parameter in self._named]

    def _configuration(self) -> str:
        return f"policy={self.policy!r}, on_nonfinite={self.on_nonfinite!r}, norms={self._norms}"

    def _compile(self, optimizer: Optimizer | None) -> Program:
        groups: dict[int, int] = {}
        if optimizer is not None:
            for number, group in enumerate(optimizer.param_groups):
                groups.update({id(parameter): number for parameter in group["params"]})
        by_name = {name: groups.get(id(parameter)) for name, parameter in self._named}
        parameters = [
            ParameterInfo(entry.name, entry.shape, by_name.get(entry.name))
            for entry in self._plan.entries
        ]
        passes = compile_passes(
            self.policy,
            parameters,
            self._plan.entries,
            norms=self._norms,
            watch_nonfinite=self.on_nonfinite != "pass",
        )
        for stage in stages(self.policy, parameters):
            if stage.members and stage.path not in self._states:
                infos = [parameters[member] for member in stage.members]
                state = stage.policy.init(infos)
                device = self._plan.device
                self._states[stage.path] = {key: value.to(device) for key, value in state.items()}
        return Program.of(self._plan, parameters, passes, report_order(self.policy, parameters))
