"""Hugging Face Accelerate: one line, or ``accelerate launch ... -m distclip run`` and none.

The policy takes the place of ``Accelerator.clip_grad_norm_`` and ``clip_grad_value_``, and a hook
before the optimizer's step clips for scripts that never call them. Whichever comes first, a
gradient is clipped once per update. Only this file and ``accelerate_prepared`` import
``accelerate``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import accelerate
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim import Optimizer

from distclip.clipper import GradClipper
from distclip.config import Config
from distclip.engine.attaching import stepped_by
from distclip.errors import ConfigurationError
from distclip.integrations import charge, deepspeed_json, hooks
from distclip.integrations.accelerate_prepared import (
    Prepared,
    innermost,
    refuse_engines,
    refuse_lomo,
)
from distclip.integrations.accelerate_rewinds import Rewinds as Rewinds
from distclip.integrations.attachment import Attachment
from distclip.integrations.checkpoints import Shelf
from distclip.integrations.clippers import Clippers
from distclip.integrations.given import PolicyOrConfig, config_of
from distclip.integrations.marks import JointDecision, Marks
from distclip.integrations.patches import replace
from distclip.report import ClipReport

_logger = logging.getLogger("distclip.accelerate")


def attach(
    accelerator: accelerate.Accelerator, policy_or_config: PolicyOrConfig
) -> AcceleratorAttachment:
    """Let a policy do all the clipping of an ``Accelerator``.

    ::

        accelerator = Accelerator()
        distclip.accelerate.attach(accelerator, policies.agc(0.01))
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    ``accelerator.clip_grad_norm_(parameters, max_norm)`` then applies the policy, not ``max_norm``,
    to the parameters it is given and returns their norm before clipping; ``clip_grad_value_``
    applies it too. An optimizer none of whose parameters such a call has named since its last
    update gets all of them clipped before its step; otherwise what the calls left out is left
    alone. A step that the policy skips counts as skipped for
    ``accelerator.optimizer_step_was_skipped`` and the scheduler.

    Parameters are called as in the prepared model that they belong to. Each set of parameters that
    is clipped by itself (generator and discriminator) has its own policy state, and from the second
    on its own log: ``clip.jsonl``, ``clip.2.jsonl``. ``accelerator.save_state`` keeps these states
    in ``distclip.pt``, and ``load_state`` restores them, on any number of ranks.

    A policy that reads the loss gets it from ``accelerator.backward(loss)``, averaged over the
    micro-batches of an update and over the ranks; a script that calls ``loss.backward()`` gives it
    by ``handle.observe(loss)``.

    Call it before or after ``prepare``, on every rank.

    Args:
        accelerator: single process, DDP, FSDP1 or FSDP2; any mixed precision.
        policy_or_config: a policy, a configuration file or mapping.

    Returns:
        A handle: ``remove()`` undoes everything, ``last_report`` is the newest report.

    Raises:
        ConfigurationError: a bad configuration, or an accelerator that has a policy already. At a
            step: a policy that reads the loss, where several sets of parameters are clipped.
        DistclipError: DeepSpeed, XLA or Megatron-LM, which need other hooks than these.
    """
    return AcceleratorAttachment(accelerator, config_of(policy_or_config))


def enable(module: ModuleType, config: Config | None) -> None:
    """Attach ``config`` to every ``Accelerator`` of this process, once it prepares something.

    What ``distclip run`` does as soon as the script imports Accelerate. Under DeepSpeed the engine
    gets the policy instead.
    """

    def prepare(original: Callable[..., Any], accelerator: Any, *args: Any, **kwargs: Any) -> Any:
        engine = accelerator.distributed_type == DistributedType.DEEPSPEED
        if engine:  # "auto" in the JSON gets its value before Accelerate reads it
            plugin = accelerator.state.deepspeed_plugin
            deepspeed_json.resolve_auto(plugin.deepspeed_config, plugin.gradient_clipping)
        elif config is None:
            raise ConfigurationError(
                "run: no configuration, and this launch does not use DeepSpeed, whose JSON might "
                "have one: give --config policy.yaml before the script"
            )
        elif getattr(accelerator, "_distclip", None) is None:
            AcceleratorAttachment(accelerator, config)
        prepared = original(accelerator, *args, **kwargs)
        if original.__name__ == "prepare_optimizer" and not engine:
            accelerator._distclip._adopt(prepared)
        return prepared

    for name in ("prepare", "prepare_model", "prepare_optimizer"):
        replace(module.Accelerator, name, prepare)


class AcceleratorAttachment(Attachment):
    """A policy on one ``Accelerator``; made by :func:`attach`."""

    def __init__(self, accelerator: Any, config: Config) -> None:
        super().__init__(accelerator, "Accelerator", config)
        refuse_engines(accelerator)
        self.accelerator = accelerator
        self._prepared = Prepared(accelerator)
        self._clippers = Clippers(self._prepared, config)
        self._adopted = charge.Adopted(
            charge.Charge("accelerate", self._clip_for_torch), self._before_step, self._after_step
        )
        self._called = Marks()
        """Parameters (by id) that a call of the script has clipped since their last update."""
        replaced: dict[str, Callable[..., Any]] = {
            "clip_grad_norm_": lambda original, *a, **k: self.clip_grad_norm_(*a, **k),
            "clip_grad_value_": lambda original, *a, **k: self.clip_grad_value_(*a, **k),
            "prepare_optimizer": self._prepare_optimizer,
            "free_memory": self._free_memory,
        }
        if self._clippers.reads_loss:
            replaced["backward"] = self._backward
        self._undo += [self._forget_models, self._release]
        for name, replacement in replaced.items():
            self._replace(accelerator, name, replacement)
        self._undo += [
            accelerator.register_save_state_pre_hook(self._save).remove,
            accelerator.register_load_state_pre_hook(self._load).remove,
        ]
        self._begin()
        for optimizer in accelerator._optimizers:
            self._adopt(optimizer)

    def _release(self) -> None:
        """Take the hooks off all optimizers."""
        for optimizer in self._adopted:
            for accelerated in self._prepared.wrappers(optimizer):
                if accelerated.scaler is None:  # then Accelerate itself never touches it again
                    accelerated._is_overflow = False
        self._adopted.release()

    def memory(self) -> tuple[Shelf, Iterable[GradClipper]]:
        return self._clippers.shelf, self._clippers.known.values()

    def _save(self, models: object, weights: object, folder: str) -> None:
        on_each_node = self.accelerator.project_configuration.save_on_each_node
        here = self.accelerator.is_local_main_process
        if here if on_each_node else self.accelerator.is_main_process:
            self._clippers.shelf.save(self._clippers.known.values(), folder)

    def _load(self, models: object, folder: str) -> None:
        self._clippers.shelf.load(self._clippers.known.values(), folder)

    def clip_grad_norm_(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2
    ) -> Tensor:
        """What ``accelerator.clip_grad_norm_`` does now: the policy, on these parameters.

        Returns:
            Their norm before clipping, 0-dim float32 (float64 for float64 gradients); where an
            earlier call has clipped the very same gradients, the norm that it found. Between
            synchronised steps, under ``accumulate()``, gradients are only measured: under DDP the
            result is then that of this rank, as under FSDP1, and under FSDP2 there are none to
            measure.
        """
        self._announce(f"clip_grad_norm_(max_norm={max_norm})")
        return self._clip(parameters)

    def clip_grad_value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
        """What ``accelerator.clip_grad_value_`` does now: the policy, on these parameters."""
        self._announce(f"clip_grad_value_(clip_value={clip_value})")
        self._clip(parameters)

    def _clip(self, parameters: Tensor | Iterable[Tensor]) -> Tensor:
        listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        chosen = self._prepared.chosen(listed, self._clippers.known)
        scaler = self.accelerator.scaler
        scaling = scaler is not None and scaler.is_enabled()
        if not chosen or not self.accelerator.sync_gradients:
            # Left scaled: more gradients are to come on top of them.
            scale = torch.tensor(scaler.get_scale(), device="cpu") if scaling else None
            return self._clippers.measured(chosen, scale)
        self._unscale(chosen)
        fresh = self._called.fresh(chosen)
        if not fresh:
            return self._called[id(chosen[0])].report.total_norm
        # While a gradient scaler looks for its scale, an overflow is its business and no error.
        watched = torch.zeros(1, device="cpu") if scaling else None
        clipper = self._clippers.of(fresh)
        self.last_report = report = self._called.clip(
            fresh, lambda: clipper.clip_before_step(found_inf=watched), self._prepared.stepped()
        )
        return report.total_norm

    def _before_step(self, optimizer: Optimizer, due: charge.Due) -> ClipReport | JointDecision:
        parameters = stepped_by(optimizer)
        self._forget_dropped(optimizer)
        called = [mark.report for p in parameters if (mark := self._called.get(id(p)))]
        if called:  # the script chose what to clip: the rest is left alone
            return JointDecision({id(report): report for report in called}.values())
        self.last_report = report = self._clippers.of(parameters).clip_before_step(*due)
        return report

    def _after_step(self, optimizer: Optimizer, skipped: bool | Tensor) -> None:
        self._forget(optimizer)
        # So that the scheduler stands still too, as after an overflow under a gradient scaler.
        for accelerated in self._prepared.wrappers(optimizer):
            if accelerated.scaler is None:
                accelerated._is_overflow = skipped
            elif bool(skipped):
                accelerated._accelerate_step_called = False

    def _unscale(self, parameters: list[Tensor]) -> None:
        """Unscale the gradients of the optimizers concerned, unless that has been done."""
        for accelerated in self._prepared.owners(parameters):
            self._forget_dropped(accelerated.optimizer)
            if accelerated.scaler is not None:
                # Accelerate says so again if the step of this update is dropped, which no hook
                # gets to see.
                accelerated._is_overflow = False
            try:
                self.accelerator.unscale_gradients(accelerated)
            except RuntimeError as error:
                if "already been called" not in str(error):
                    raise

    def _forget_dropped(self, optimizer: Optimizer) -> None:
        """Forget the calls of an update that ended in the gradient scaler."""
        if any(
            a.scaler is not None and a.step_was_skipped for a in self._prepared.wrappers(optimizer)
        ):
            self._forget(optimizer)

    def _forget(self, optimizer: Optimizer) -> None:
        for parameter in stepped_by(optimizer):
            self._called.pop(id(parameter), None)

    def observe(self, loss: Tensor | float) -> None:
        self._clippers.observe(loss)

    def note(self, batch: Any = None, recompute: Callable[[], object] | None = None) -> None:
        """As :meth:`distclip.GradClipper.note`, for all sets of parameters."""
        self._clippers.note(batch, recompute)

    def drop_step(self) -> None:
        """Drop the gradients of a step that an error has ended, and what a scaler knows of them."""
        for accelerated in self.accelerator._optimizers:
            accelerated.optimizer.zero_grad()
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            scaler.update(scaler.get_scale())  # or the next unscaling would be refused

    def begin_anew(self) -> None:
        """Forget what the policy remembers, as before the first step."""
        self._forget_models()

    def _backward(self, original: Callable[..., Any], loss: Tensor, **kwargs: Any) -> None:
        original(loss, **kwargs)
        self._observe_backward(loss)

    def _prepare_optimizer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prepared = original(*args, **kwargs)
        self._adopt(prepared)
        return prepared

    def _free_memory(self, original: Callable[..., Any], *objects: Any) -> Any:
        self._forget_models()
        return original(*objects)

    def _forget_models(self) -> None:
        self._clippers.forget()
        self._called.clear()

    def _adopt(self, accelerated: Any) -> None:
        """Hook an optimizer. Its parameters are looked at first at a step: FSDP2 replaces them."""
        refuse_lomo(self.accelerator)
        if isinstance(accelerated, AcceleratedOptimizer) and self._adopted.add(
            innermost(accelerated)
        ):
            hooks.mark_active("accelerate")

    def _clip_for_torch(self, parameters: list[Tensor]) -> Tensor:
        """In place of ``torch.nn.utils.clip_grad_norm_``, where ``distclip run`` replaces that."""
        self._announce("torch.nn.utils.clip_grad_norm_ (or a function beside it)")
        return self._clip(parameters)

    def _announce(self, call: str) -> None:
        caller = charge.replaced_caller()
        if caller not in self.announced and self.accelerator.is_main_process:
            _logger.warning(
                "%s calls %s; the configured policy is applied in its place: %r",
                caller,
                call,
                self.config.policy,
            )
        self.announced.add(caller)
