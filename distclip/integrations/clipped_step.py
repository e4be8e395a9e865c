"""One update of a training worker, clipped: the seam for RL frameworks such as verl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip.clipper import GradClipper
from distclip.errors import ConfigurationError
from distclip.layouts import fsdp1
from distclip.report import ClipReport


class ClippedStep:
    """``optimizer_step() -> grad_norm``, the same for every engine of a training worker.

    ::

        step = distclip.ClippedStep(GradClipper(model, policy, on_nonfinite="skip"), optimizer)
        for minibatch in rollouts:
            ...                                  # forward and backward of all micro-batches
            grad_norm = step.optimizer_step()    # clip, step or skip

    verl's workers have this method once per engine. With torch optimizers one class serves plain
    and DDP models, FSDP1 and FSDP2: the clipper is attached to them. An engine that brings its own
    step (Megatron-LM's optimizers) is called between a clip by hand and the next backward; its
    gradients have to be whole in ``.grad`` or ``.main_grad``, which those of Megatron's distributed
    optimizer are not.

    Args:
        clipper: of the model that is stepped, not attached.
        optimizer: torch optimizers, one or several for one model; or one object with ``step()`` and
            ``zero_grad()`` whose ``step`` does not clip. A tuple that ``step`` returns begins with
            whether the weights were updated, as Megatron's does.
        scaler: the gradient scaler of the loss; with torch optimizers only. Under FSDP1 a
            ``ShardedGradScaler``.

    Raises:
        ConfigurationError: an attached clipper; an engine that clips by itself
            (``config.clip_grad``), shards gradients (``config.use_distributed_optimizer``), or
            scales losses; under FSDP1, a scaler that each rank decides by alone.
    """

    report: ClipReport | None = None
    """The report of the last step; None before, and where the scaler dropped the step."""

    skipped: bool = False
    """Whether the last step left the weights as they were."""

    def __init__(
        self,
        clipper: GradClipper,
        optimizer: Any,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        several = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        self.clipper = clipper
        self.optimizers = several
        self.scaler = scaler
        self._engine = None if all(isinstance(o, Optimizer) for o in several) else several[0]
        if self._engine is None:
            if scaler is not None and scaler.is_enabled():
                _check_scaler(clipper, several, scaler)
            self._handle = clipper.attach(several)
        else:
            _check_engine(several, scaler)

    def optimizer_step(self, loss: Tensor | float | None = None) -> Tensor:
        """Clip, and step or skip. Call it on every rank, after the last backward of the update.

        A skipped update leaves weights, momentum and step counters alone and sets the gradients to
        zero, as verl does. Reads the host once, where a step may be skipped, and twice more under a
        scaler.

        Args:
            loss: as for :meth:`GradClipper.observe`.

        Returns:
            The norm of the whole gradient before clipping, 0-dim, float32 or float64; of the
            unscaled gradients under a scaler, and inf where that dropped the step.

        Raises:
            NonFiniteGradientError: under the clipper's ``on_nonfinite="error"``.
        """
        if loss is not None:
            self.clipper.observe(loss)
        self.report, updated = self._step()
        if self.report is None or not updated:
            self.skipped = True
        else:
            self.skipped = self.report.leave_out is not None and bool(self.report.skipped)
        if self.skipped:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        if self.report is None:
            return torch.tensor(math.inf, device=self.clipper.plan.device)
        return self.report.total_norm

    def _step(self) -> tuple[ClipReport | None, bool]:
        """Clip and step; the report, and whether an engine that was asked to step did."""
        if self._engine is not None:
            report = self.clipper.clip_()
            if bool(report.skipped):
                return report, False
            done = self._engine.step()
            return report, bool(done[0]) if isinstance(done, tuple) else True
        self._handle.last_report = None
        for optimizer in self.optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            scale = self.scaler.get_scale()
            self.scaler.update()
            if self.scaler.get_scale() < scale:  # it was an overflow
                return None, False
        return self._handle.last_report, True


def _check_scaler(
    clipper: GradClipper, several: Sequence[Optimizer], scaler: torch.amp.GradScaler
) -> None:
    """Refuse a scaler that would drop a step on some ranks of FSDP1 only."""
    if not any(map(fsdp1.is_flattened, clipper.here.values())):
        return
    if type(scaler) is torch.amp.GradScaler:
        raise ConfigurationError(
            "ClippedStep: under FSDP1 a GradScaler drops a step only on the ranks whose part of "
            "the gradients overflows, and the others wait for them in the clip; give a "
            "torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler"
        )
    fused = [o for o in several if getattr(o, "_step_supports_amp_scaling", False)]
    if fused:
        raise ConfigurationError(
            f"ClippedStep: with a fused {type(fused[0]).__name__} a {type(scaler).__name__} does "
            f"not tell the other ranks of an overflow, and each goes on with a scale of its own; "
            f"build the optimizer with fused=False"
        )


def _check_engine(several: Sequence[Any], scaler: object) -> None:
    """Refuse an engine whose gradients a clip by hand does not reach, or would not be alone in."""
    engine, name = several[0], type(several[0]).__name__
    missing = [each for each in ("step", "zero_grad") if not callable(getattr(engine, each, None))]
    if missing or len(several) > 1:
        raise ConfigurationError(
            f"ClippedStep: give torch optimizers, or one object with step() and zero_grad(); got "
            f"{', '.join(type(each).__name__ for each in several)}"
        )
    scale = getattr(engine, "get_loss_scale", lambda: 1.0)()
    if scaler is not None or float(scale) != 1.0:
        raise ConfigurationError(
            f"ClippedStep: the gradients of {name} carry a loss scale, which only {name} can take "
            f"off, within its step, after the clip; train in bfloat16, without a scaler"
        )
    config: Any = getattr(engine, "config", None)
    if getattr(config, "clip_grad", 0.0):
        raise ConfigurationError(
            f"ClippedStep: {name} clips by itself (clip_grad={config.clip_grad}), and gradients "
            f"would be clipped twice; set clip_grad=0 in its configuration"
        )
    if getattr(config, "use_distributed_optimizer", False):
        raise ConfigurationError(
            f"ClippedStep: under the distributed optimizer of {name} each rank has reduced only a "
            f"part of main_grad; set use_distributed_optimizer=False, or let {name} clip"
        )
