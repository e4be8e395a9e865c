"""A policy on a Lightning ``Trainer`` or a ``Fabric``: hooks on the torch optimizers inside them.

Only what both packages, ``lightning`` and ``pytorch_lightning``, have in common is used, and
neither is imported.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip.clipper import GradClipper
from distclip.config import Config
from distclip.config.logs import release_log
from distclip.engine.attaching import stepped_by
from distclip.engine.checkpoint import StateSource
from distclip.integrations import charge
from distclip.integrations.attachment import Attachment
from distclip.integrations.checkpoints import Shelf
from distclip.integrations.clippers import Clippers, named_in
from distclip.integrations.marks import Mark
from distclip.layouts import fsdp2
from distclip.layouts.gradients import is_uneven
from distclip.layouts.names import Target
from distclip.report import ClipReport
from distclip.statistics import collectives

_logger = logging.getLogger("distclip.lightning")

CHECKPOINT_KEY = "distclip"
"""Key of the policy's state in a checkpoint."""


class LightningAttachment(Attachment):
    """A policy on the optimizers of a ``Trainer`` or a ``Fabric``; each has its own norm and state.

    Attributes:
        models: modules that names are looked up in.
        reports: optimizer -> the newest report.
    """

    def __init__(self, owner: Any, kind: str, config: Config) -> None:
        super().__init__(owner, kind, config)
        self.models: list[nn.Module] = []
        self.reports: weakref.WeakKeyDictionary[Optimizer, ClipReport]
        self.reports = weakref.WeakKeyDictionary()
        self._clippers = Clippers(self, config)
        self._adopted = charge.Adopted(
            charge.Charge("lightning", self._clip_for_torch), self._before_step, self._after_step
        )
        self._undo += [self._release]

    def adopt(self, optimizer: Optimizer) -> None:
        """Clip before the steps of a torch optimizer, unless that is done already."""
        if self._adopted.add(optimizer):
            self._begin("lightning")

    def meant(self, parameters: list[Tensor]) -> tuple[Target, list[Optimizer]]:
        """The parameters with their names in the models, and the optimizers that step any."""
        return named_in(self.models, parameters), self.optimizers(parameters)

    def optimizers(self, parameters: list[Tensor]) -> list[Optimizer]:
        """All optimizers that step any of these."""
        wanted = set(map(id, parameters))
        return [o for o in self._adopted if not wanted.isdisjoint(map(id, stepped_by(o)))]

    def observe(self, loss: Tensor | float) -> None:
        self._clippers.observe(loss)

    def note(self, batch: Any = None, recompute: Callable[[], object] | None = None) -> None:
        """As :meth:`distclip.GradClipper.note`, for every optimizer."""
        self._clippers.note(batch, recompute)

    @property
    def reads_loss(self) -> bool:
        """Whether the policy reads losses."""
        return self._clippers.reads_loss

    def memory(self) -> tuple[Shelf, Iterable[GradClipper]]:
        return self._clippers.shelf, self._clippers.known.values()

    def load_from(self, state: Any, what: str) -> None:
        """As :meth:`load_state_dict`, for a state from ``what``."""
        shelf, clippers = self.memory()
        shelf.load_state_dict(state, clippers, StateSource(what))

    def _before_step(self, optimizer: Optimizer, due: charge.Due) -> ClipReport:
        clipper = self._clippers.of(stepped_by(optimizer))
        self.last_report = report = clipper.clip_before_step(*due)
        self.reports[optimizer] = report
        return report

    def _after_step(self, optimizer: Optimizer, skipped: bool | Tensor) -> None:
        """The step of an optimizer is over."""

    def _release(self) -> None:
        self._adopted.release()
        for clipper in self._clippers.known.values():
            release_log(clipper)

    def _clip_for_torch(self, parameters: list[Tensor]) -> Tensor:
        """In place of ``torch.nn.utils.clip_grad_norm_``, where ``distclip run`` replaces that."""
        self._announce(
            f"{charge.replaced_caller()} calls torch.nn.utils.clip_grad_norm_ "
            f"(or a function beside it)"
        )
        return self._clip_called(fsdp2.sharded(parameters))

    @abstractmethod
    def _clip_called(self, parameters: list[Tensor]) -> Tensor:
        """For a call of torch's functions: see to one clip per step, and return the norm before."""

    def _announce(self, call: str) -> None:
        if charge.SCRIPT not in self.announced and collectives.is_first():
            _logger.warning(
                "%s: the configured policy is applied in its place, before the optimizer's step: "
                "%r",
                call,
                self.config.policy,
            )
        self.announced.add(charge.SCRIPT)


class TrainerAttachment(LightningAttachment):
    """A policy on one ``Trainer`` while it fits."""

    def __init__(self, trainer: Any, module: Any, config: Config) -> None:
        super().__init__(trainer, "Trainer", config)
        self.models = [module]
        self.loss_factor = lambda: trainer.accumulate_grad_batches
        self._skipped: weakref.WeakKeyDictionary[Optimizer, bool | Tensor]
        self._skipped = weakref.WeakKeyDictionary()
        self._replace(module, "configure_gradient_clipping", self._configure)
        self._replace(trainer.precision_plugin, "clip_gradients", self._clip_gradients)
        self._replace(module, "lr_scheduler_step", self._scheduler_step)
        for optimizer in trainer.optimizers:
            self.adopt(optimizer)
        for optimizer in trainer.optimizers:
            self._clippers.of(stepped_by(optimizer))  # mistakes are reported before a step

    def begin_batch(self) -> None:
        """No optimizer has skipped a step yet in this batch."""
        self._skipped.clear()

    def leave_out_batch(self) -> None:
        """Nothing is made of this batch: schedulers that count steps do not count it."""
        for optimizer in self._owner.optimizers:
            self._skipped[optimizer] = True

    def _after_step(self, optimizer: Optimizer, skipped: bool | Tensor) -> None:
        self._skipped[optimizer] = skipped

    def _configure(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """In place of ``LightningModule.configure_gradient_clipping``."""
        module = original.__self__  # type: ignore[attr-defined]
        if original.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning"):
            self._announce(f"{type(module).__name__}.configure_gradient_clipping is not called")

    def _clip_gradients(
        self,
        original: Callable[..., Any],
        optimizer: Any,
        clip_val: Any = 0.0,
        *args: Any,
        **kw: Any,
    ) -> None:
        """In place of the precision plugin's, which ``LightningModule.clip_gradients`` calls."""
        if clip_val and clip_val > 0:
            self._announce(f"the script calls clip_gradients(gradient_clip_val={clip_val})")

    def _clip_called(self, parameters: list[Tensor]) -> Tensor:
        """Only measures: the policy clips before the step, once all micro-batches are there."""
        owners = self.optimizers(parameters)
        if any(map(is_uneven, parameters)):  # which of FSDP1's have a gradient differs by rank
            parameters = list({id(p): p for o in owners for p in stepped_by(o)}.values())
        return self._clippers.measured(parameters, self._scale(owners))

    def _scale(self, owners: list[Optimizer]) -> Tensor | None:
        """The loss scale that is still in the gradients of these optimizers."""
        scaler = getattr(self._owner.precision_plugin, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            return None
        states = [scaler._per_optimizer_states.get(id(owner)) for owner in owners]
        if any(state and state["stage"].name != "READY" for state in states):
            return None
        return torch.tensor(scaler.get_scale(), device="cpu")

    def _scheduler_step(self, original: Callable[..., Any], scheduler: Any, *args: Any) -> Any:
        """A scheduler that counts steps does not count one that was skipped."""
        configs = self._owner.lr_scheduler_configs
        by_step = any(c.scheduler is scheduler and c.interval == "step" for c in configs)
        if by_step and bool(self._skipped.get(getattr(scheduler, "optimizer", None), False)):  # type: ignore[arg-type]
            return None
        return original(scheduler, *args)


class FabricAttachment(LightningAttachment):
    """A policy on one ``Fabric``."""

    def __init__(self, fabric: Any, config: Config) -> None:
        super().__init__(fabric, "Fabric", config)
        self._called: weakref.WeakKeyDictionary[Optimizer, list[Mark]]
        self._called = weakref.WeakKeyDictionary()
        self._replace(fabric, "clip_gradients", self._clip_gradients)
        self._replace(fabric, "save", self._save)
        self._replace(fabric, "load", self._load)
        if self.reads_loss:
            self._replace(fabric, "backward", self._backward)
        self._begin("lightning")

    def _backward(self, original: Callable[..., Any], loss: Tensor, *args: Any, **kw: Any) -> None:
        original(loss, *args, **kw)
        self._observe_backward(loss)

    def _clip_gradients(
        self,
        original: Callable[..., Any],
        module: Any,
        optimizer: Any,
        clip_val: Any = None,
        max_norm: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | None:
        """In place of ``fabric.clip_gradients``: the policy, on what the optimizer steps."""
        named = f"max_norm={max_norm}" if clip_val is None else f"clip_val={clip_val}"
        self._announce(f"the script calls clip_gradients({named})")
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.adopt(optimizer)
        norm = self._clip_now(optimizer)
        return None if max_norm is None else norm

    def _clip_called(self, parameters: list[Tensor]) -> Tensor:
        """As ``fabric.clip_gradients``, for each optimizer that steps any of these."""
        norms = [self._clip_now(optimizer) for optimizer in self.optimizers(parameters)]
        return norms[0] if len(norms) == 1 else torch.stack(norms).norm()

    def _clip_now(self, optimizer: Optimizer) -> Tensor:
        """Clip before the step is made; returns the norm before, also to a second call."""
        if not self._is_clipped(optimizer):
            with self._other_marks_kept():
                super()._before_step(optimizer, self._due(optimizer))
            self._mark(optimizer)
        return self.reports[optimizer].total_norm

    def _mark(self, optimizer: Optimizer) -> None:
        report = self.reports[optimizer]
        self._called[optimizer] = [Mark.of(p, report) for p in stepped_by(optimizer)]

    def _is_clipped(self, optimizer: Optimizer) -> bool:
        """Whether a call has clipped the gradients that are there: no backward came since."""
        marks, parameters = self._called.get(optimizer), stepped_by(optimizer)
        if marks is None or len(marks) != len(parameters):  # a group was added
            return False
        return not any(map(Mark.outdated, marks, parameters))

    @contextlib.contextmanager
    def _other_marks_kept(self) -> Iterator[None]:
        """Clip one optimizer's gradients, which may be views of one buffer with those of others.

        Such views (FSDP1, DDP) share their count of changes.
        """
        sound = [other for other in self._called if self._is_clipped(other)]
        yield
        for other in sound:
            self._mark(other)

    def _due(self, optimizer: Optimizer) -> charge.Due:
        """Unscale the gradients, where the step to come does not."""
        precision = self._owner.strategy.precision
        scaler = getattr(precision, "scaler", None)
        if scaler is None:
            return charge.Due()
        found_inf = torch.zeros(
            1, device="cpu"
        )  # an overflow is a part of finding the scale, and no error
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # it unscales as it steps
            return charge.Due(torch.tensor(scaler.get_scale(), device="cpu"), found_inf)
        precision.unscale_gradients(optimizer)
        return charge.Due(found_inf=found_inf)

    def _before_step(self, optimizer: Optimizer, due: charge.Due) -> ClipReport:
        if self._is_clipped(optimizer):
            return self.reports[optimizer]
        with self._other_marks_kept():  # of a call whose step was left out nothing is used
            return super()._before_step(optimizer, due)

    def _after_step(self, optimizer: Optimizer, skipped: bool | Tensor) -> None:
        self._called.pop(optimizer, None)

    def _save(
        self, original: Callable[..., Any], path: Any, state: dict[str, Any], *args: Any, **kw: Any
    ) -> Any:
        return original(path, {**state, CHECKPOINT_KEY: self.state_dict()}, *args, **kw)

    def _load(
        self, original: Callable[..., Any], path: Any, state: Any = None, *args: Any, **kw: Any
    ) -> Any:
        remainder = original(path, state, *args, **kw)
        if state is not None:
            self.load_from(remainder.pop(CHECKPOINT_KEY, None), f"the state of distclip in {path}")
        return remainder
