"""Hugging Face Accelerate: one line, or ``accelerate launch ... -m distclip run`` and none.

The policy takes the place of ``Accelerator.clip_grad_norm_`` and ``clip_grad_value_``, and a hook
before the optimizer's step clips for scripts that never call them. Whichever comes first, a
gradient is clipped once per update. This is the only file that imports ``accelerate``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import accelerate
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim import Optimizer

from distclip import policies
from distclip.application.stepping import StepHandle
from distclip.build import sinks_of
from distclip.clipper import GradClipper
from distclip.config import Config, load
from distclip.errors import ConfigurationError, DistclipError
from distclip.integrations import accelerate_cpu, hooks
from distclip.layouts.names import clean
from distclip.policies import Policy
from distclip.report import ClipReport

_logger = logging.getLogger("distclip.accelerate")

PolicyOrConfig = Policy | str | os.PathLike[str] | Mapping[str, Any] | Config


def attach(accelerator: accelerate.Accelerator, policy_or_config: PolicyOrConfig) -> Attachment:
    """Let a policy do all the clipping of an ``Accelerator``.

    ::

        accelerator = Accelerator()
        distclip.accelerate.attach(accelerator, policies.agc(0.01))
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    ``accelerator.clip_grad_norm_(parameters, max_norm)`` then applies the policy, not ``max_norm``,
    to the parameters it is given and returns their norm before clipping; ``clip_grad_value_``
    applies it too. An optimizer whose parameters no call has named since the last update gets all
    of them clipped before its step. A step that the policy skips counts as skipped for
    ``accelerator.optimizer_step_was_skipped`` and the scheduler.

    Call it before or after ``prepare``, on every rank.

    Args:
        accelerator: single process, DDP or FSDP2; any mixed precision.
        policy_or_config: a policy, a configuration file or mapping.

    Returns:
        A handle; ``handle.remove()`` undoes everything, ``handle.last_report`` is the newest report.

    Raises:
        ConfigurationError: a bad configuration, or an accelerator that has a policy already.
        DistclipError: DeepSpeed or FSDP1, which need other hooks than these.
    """
    if getattr(accelerator, "_distclip", None) is not None:
        raise ConfigurationError(
            "this Accelerator has a distclip policy already; handle.remove() the first one"
        )
    return Attachment(accelerator, _config(policy_or_config))


def enable(module: ModuleType, config: Config) -> None:
    """Attach ``config`` to every ``Accelerator`` of this process, once it prepares something.

    What ``distclip run`` does as soon as the script imports Accelerate. It also sees to it that the
    ranks of a CPU launch are really there.

    Args:
        module: ``accelerate.accelerator``.
        config: a checked configuration.
    """
    cls = module.Accelerator
    original = cls.prepare

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        on_cpu = accelerate_cpu.requested()
        if not on_cpu:
            accelerate_cpu.check_ranks(self)
        if getattr(self, "_distclip", None) is None:
            Attachment(self, config)
        prepared = original(self, *args, **kwargs)
        if on_cpu:
            accelerate_cpu.verify(self, *(prepared if isinstance(prepared, tuple) else (prepared,)))
        return prepared

    cls.prepare = prepare


class Attachment:
    """A policy on one ``Accelerator``; made by :func:`attach`."""

    def __init__(self, accelerator: Any, config: Config) -> None:
        _refuse_engines(accelerator)
        self.accelerator = accelerator
        self.config = config
        self.last_report: ClipReport | None = None
        self._sinks = sinks_of(config)
        self._clippers: dict[tuple[int, ...], GradClipper] = {}
        self._measurers: dict[tuple[int, ...], GradClipper] = {}
        self._handles: dict[int, StepHandle] = {}
        self._clipped: dict[int, ClipReport] = {}
        """Parameters (by id) that a call of the script has clipped since the last update."""
        self._announced = False
        self._originals = {
            name: getattr(accelerator, name)
            for name in ("clip_grad_norm_", "clip_grad_value_", "prepare_optimizer", "backward")
        }
        accelerator.clip_grad_norm_ = self.clip_grad_norm_
        accelerator.clip_grad_value_ = self.clip_grad_value_
        accelerator.prepare_optimizer = self._prepare_optimizer
        accelerator.backward = self._backward
        accelerator._distclip = self
        for optimizer in accelerator._optimizers:
            self._adopt(optimizer)

    def remove(self) -> None:
        """Give the ``Accelerator`` its own clipping back."""
        for name in self._originals:
            self.accelerator.__dict__.pop(name, None)
        self.accelerator._distclip = None
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor:
        """What ``accelerator.clip_grad_norm_`` does now: the policy, on these parameters.

        Returns:
            Their norm before clipping, 0-dim float32 (float64 for float64 gradients). Between
            synchronised steps, under ``accumulate()``, gradients are only measured.
        """
        self._announce(f"clip_grad_norm_(max_norm={max_norm})")
        return self._clip(parameters).total_norm

    def clip_grad_value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """What ``accelerator.clip_grad_value_`` does now: the policy, on these parameters."""
        self._announce(f"clip_grad_value_(clip_value={clip_value})")
        self._clip(parameters)

    def _clip(self, parameters: Tensor | Iterable[Tensor]) -> ClipReport:
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        self.accelerator.unscale_gradients()
        if not self.accelerator.sync_gradients:
            return self._clipper(listed, self._measurers, policies.measure()).clip_()
        # A second call for the same parameters finds their gradients clipped already.
        fresh = [parameter for parameter in listed if id(parameter) not in self._clipped]
        if listed and not fresh:
            return self._clipped[id(listed[0])]
        clipper = self._clipper(fresh, self._clippers, self.config.policy)
        scaler = self.accelerator.scaler
        # While a gradient scaler looks for its scale, an overflow is its business and no error.
        watched = None if scaler is None or not scaler.is_enabled() else torch.zeros(1)
        report = clipper.clip_before_step(found_inf=watched)
        self._clipped.update((id(parameter), report) for parameter in listed)
        self.last_report = report
        return report

    def _before_step(
        self, optimizer: Optimizer, loss_scale: Tensor | None, found_inf: Tensor | None
    ) -> ClipReport | _Together:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        called = {id(p): self._clipped[id(p)] for p in parameters if id(p) in self._clipped}
        if called:  # the script chose what to clip: the rest is left alone
            return _Together({id(report): report for report in called.values()}.values())
        clipper = self._clipper(parameters, self._clippers, self.config.policy, optimizer)
        self.last_report = clipper.clip_before_step(loss_scale, found_inf)
        return self.last_report

    def _after_step(
        self, accelerated: AcceleratedOptimizer, optimizer: Optimizer, skipped: bool | Tensor
    ) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._clipped.pop(id(parameter), None)
        # So that the scheduler stands still too, as after an overflow under a gradient scaler.
        if accelerated.scaler is None:
            accelerated._is_overflow = skipped
        elif bool(skipped):
            accelerated._accelerate_step_called = False

    def _prepare_optimizer(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = self._originals["prepare_optimizer"](optimizer, *args, **kwargs)
        self._adopt(prepared)
        return prepared

    def _backward(self, *args: Any, **kwargs: Any) -> Any:
        # New gradients. (A step that a gradient scaler dropped has not cleared this.)
        self._clipped.clear()
        return self._originals["backward"](*args, **kwargs)

    def _adopt(self, accelerated: Any) -> None:
        """Hook an optimizer. Its parameters are looked at first at a step: FSDP2 replaces them."""
        optimizer = accelerated
        while isinstance(optimizer, AcceleratedOptimizer):
            accelerated, optimizer = optimizer, optimizer.optimizer
        if id(optimizer) in self._handles or not isinstance(accelerated, AcceleratedOptimizer):
            return
        self._handles[id(optimizer)] = StepHandle(
            optimizer,
            functools.partial(self._before_step, optimizer),
            functools.partial(self._after_step, accelerated, optimizer),
        )
        hooks.mark_active("accelerate")

    def _clipper(
        self,
        parameters: list[Tensor],
        known: dict[tuple[int, ...], GradClipper],
        policy: Policy,
        optimizer: Optimizer | None = None,
    ) -> GradClipper:
        key = tuple(map(id, parameters))
        if key not in known:
            measuring = known is self._measurers
            known[key] = GradClipper(
                self._named(parameters),
                policy,
                optimizer=optimizer or self._optimizer_of(parameters),
                on_nonfinite="pass" if measuring else self.config.on_nonfinite,
                sinks=() if measuring else self._sinks,
                norms=True if measuring else self.config.norms,
            )
            if not measuring and self.accelerator.is_main_process:
                _logger.info("clipping %d parameters by %r", len(parameters), policy)
        return known[key]

    def _named(self, parameters: list[Tensor]) -> list[tuple[str, Tensor]]:
        """Names as in the prepared models; a number for a parameter that is in none."""
        names: dict[int, str] = {}
        taken: set[str] = set()
        for number, model in enumerate(self.accelerator._models):
            for name, parameter in model.named_parameters():
                called = clean(name)
                called = f"{number}.{called}" if called in taken else called
                if names.setdefault(id(parameter), called) is called:
                    taken.add(called)
        return [
            (names.get(id(parameter), f"unnamed.{position}"), parameter)
            for position, parameter in enumerate(parameters)
        ]

    def _optimizer_of(self, parameters: list[Tensor]) -> Optimizer | None:
        """The one optimizer that steps all of these, for policies that ask for its groups."""
        wanted = set(map(id, parameters))
        for accelerated in self.accelerator._optimizers:
            optimizer: Optimizer = accelerated.optimizer
            if wanted <= {id(p) for group in optimizer.param_groups for p in group["params"]}:
                return optimizer
        return None

    def _announce(self, call: str) -> None:
        if not self._announced and self.accelerator.is_main_process:
            _logger.warning(
                "the script calls %s; the configured policy is applied in its place: %r",
                call,
                self.config.policy,
            )
        self._announced = True


class _Together:
    """Several reports about the parameters of one optimizer: skipped if any of them says so."""

    def __init__(self, reports: Iterable[ClipReport]) -> None:
        self.skipped = torch.stack([report.skipped for report in reports]).any()


def _config(policy_or_config: PolicyOrConfig) -> Config:
    if isinstance(policy_or_config, Config):
        return policy_or_config
    if isinstance(policy_or_config, Policy):
        return Config(policy=policy_or_config)
    return load(policy_or_config)


def _refuse_engines(accelerator: Any) -> None:
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        raise DistclipError(
            "under DeepSpeed, Accelerate's clip_grad_norm_ runs after the update; distclip does not "
            "support it yet. Remove distclip from this launch, or launch with DDP or FSDP2"
        )
    if kind == DistributedType.FSDP and not getattr(accelerator, "is_fsdp2", False):
        raise DistclipError(
            "FSDP1 keeps flat shards that distclip cannot read yet; set fsdp_version: 2 in the "
            "Accelerate configuration"
        )
    if kind in (DistributedType.XLA, DistributedType.MEGATRON_LM):
        raise DistclipError(f"distclip does not know how gradients are laid out under {kind.value}")
