"""Hugging Face Accelerate: one line, or ``accelerate launch ... -m distclip run`` and none.

The policy takes the place of ``Accelerator.clip_grad_norm_`` and ``clip_grad_value_``, and a hook
before the optimizer's step clips for scripts that never call them. Whichever comes first, a
gradient is clipped once per update. Only this file and ``accelerate_cpu`` import
``accelerate``.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import accelerate
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from distclip import policies
from distclip.application.stepping import StepHandle
from distclip.build import sinks_of
from distclip.clipper import GradClipper, Sink
from distclip.config import Config, load
from distclip.errors import ConfigurationError, DistclipError
from distclip.functional import get_total_norm
from distclip.integrations import accelerate_cpu, hooks
from distclip.integrations.checkpoints import Shelf
from distclip.layouts import fsdp1
from distclip.layouts.names import named_parameters
from distclip.policies import Policy
from distclip.policies._compose import reads_loss
from distclip.report import ClipReport
from distclip.statistics import collectives

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
    if getattr(accelerator, "_distclip", None) is not None:
        raise ConfigurationError(
            "this Accelerator has a distclip policy already, from an earlier attach() or from "
            "`distclip run`; call remove() on the first handle, or start without `distclip run`"
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
    for name in ("prepare", "prepare_model", "prepare_optimizer"):
        setattr(module.Accelerator, name, _attaching(getattr(module.Accelerator, name), config))


def _attaching(original: Any, config: Config) -> Any:
    alone = original.__name__ == "prepare_optimizer"

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        on_cpu = accelerate_cpu.requested()
        if not on_cpu:
            accelerate_cpu.check_ranks(self)
        if getattr(self, "_distclip", None) is None:
            Attachment(self, config)
        prepared = original(self, *args, **kwargs)
        if alone:
            self._distclip._adopt(prepared)
        elif on_cpu and not kwargs.get("evaluation_mode"):
            accelerate_cpu.verify(self, *(prepared if isinstance(prepared, tuple) else (prepared,)))
        return prepared

    return prepare


class Attachment:
    """A policy on one ``Accelerator``; made by :func:`attach`."""

    def __init__(self, accelerator: Any, config: Config) -> None:
        _refuse_engines(accelerator)
        self.accelerator = accelerator
        self.config = config
        self.last_report: ClipReport | None = None
        self._clippers: dict[frozenset[int], GradClipper] = {}
        self._measurers: dict[frozenset[int], GradClipper] = {}
        self._logs = 0
        self._handles: weakref.WeakKeyDictionary[Optimizer, StepHandle]
        self._handles = weakref.WeakKeyDictionary()
        self._called: dict[int, _Mark] = {}
        """Parameters (by id) that a call of the script has clipped since their last update."""
        self._announced = False
        self._reads_loss = reads_loss(config.policy)
        self._losses: list[Tensor] = []
        """Those of the first update, which come before there is a clipper."""
        replaced: dict[str, Any] = {
            "clip_grad_norm_": self.clip_grad_norm_,
            "clip_grad_value_": self.clip_grad_value_,
            "prepare_optimizer": self._prepare_optimizer,
            "free_memory": self._free_memory,
        }
        if self._reads_loss:
            replaced["backward"] = self._backward
        self._originals = {
            name: (getattr(accelerator, name), accelerator.__dict__.get(name)) for name in replaced
        }
        for name, replacement in replaced.items():
            setattr(accelerator, name, replacement)
        accelerator._distclip = self
        self._shelf = Shelf()
        self._hooks = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]
        for optimizer in accelerator._optimizers:
            self._adopt(optimizer)

    def remove(self) -> None:
        """Give the ``Accelerator`` its own clipping back; a second call does nothing."""
        if self.accelerator._distclip is not self:
            return
        for name, (_, before) in self._originals.items():
            if before is None:
                del self.accelerator.__dict__[name]
            else:
                setattr(self.accelerator, name, before)
        self.accelerator._distclip = None
        for hook in self._hooks:
            hook.remove()
        for optimizer, handle in self._handles.items():
            handle.remove()
            for accelerated in self._wrappers(optimizer):
                if accelerated.scaler is None:  # then Accelerate itself never touches it again
                    accelerated._is_overflow = False
        self._handles.clear()
        self._forget_models()

    def _save(self, models: object, weights: object, folder: str) -> None:
        on_each_node = self.accelerator.project_configuration.save_on_each_node
        here = self.accelerator.is_local_main_process
        if here if on_each_node else self.accelerator.is_main_process:
            self._shelf.save(self._clippers.values(), folder)

    def _load(self, models: object, folder: str) -> None:
        self._shelf.load(self._clippers.values(), folder)

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
        chosen = self._chosen([parameters] if isinstance(parameters, Tensor) else list(parameters))
        scaler = self.accelerator.scaler
        scaling = scaler is not None and scaler.is_enabled()
        if not chosen or not self.accelerator.sync_gradients:
            # Left scaled: more gradients are to come on top of them.
            scale = torch.tensor(scaler.get_scale()) if scaling else None
            if not all(map(fsdp1.is_reduced, chosen)):
                norm = get_total_norm([p.grad for p in chosen if p.grad is not None])
                return norm if scale is None else norm / scale
            return self._clipper(chosen, measuring=True).clip_before_step(scale).total_norm
        self._unscale(chosen)
        marks = [self._called.get(id(parameter)) for parameter in chosen]
        if any(mark and mark.outdated(p) for mark, p in zip(marks, chosen, strict=True)):
            fresh = chosen
        else:
            fresh = [p for mark, p in zip(marks, chosen, strict=True) if mark is None]
        if marks and not fresh and marks[0] is not None:
            return marks[0].report.total_norm
        # Gradients may be views of one buffer, as under FSDP1, and with it share its count of
        # changes: what is clipped now changes the marks of the others.
        sound = [p for p in self._stepped() if (m := self._called.get(id(p))) and not m.outdated(p)]
        # While a gradient scaler looks for its scale, an overflow is its business and no error.
        watched = torch.zeros(1) if scaling else None
        report = self._clipper(fresh).clip_before_step(found_inf=watched)
        for parameter in sound:
            known = self._called[id(parameter)].report
            self._called[id(parameter)] = _Mark.of(parameter, known)
        self._called.update((id(parameter), _Mark.of(parameter, report)) for parameter in fresh)
        self.last_report = report
        return report.total_norm

    def _before_step(
        self,
        optimizer: weakref.ref[Optimizer],
        loss_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> ClipReport | _Together:
        stepping = optimizer()
        assert stepping is not None  # it is calling
        parameters = _parameters_of(stepping)
        self._forget_dropped(stepping)
        called = [mark.report for p in parameters if (mark := self._called.get(id(p)))]
        if called:  # the script chose what to clip: the rest is left alone
            return _Together({id(report): report for report in called}.values())
        self.last_report = self._clipper(parameters).clip_before_step(loss_scale, found_inf)
        return self.last_report

    def _after_step(self, optimizer: weakref.ref[Optimizer], skipped: bool | Tensor) -> None:
        stepped = optimizer()
        assert stepped is not None
        self._forget(stepped)
        # So that the scheduler stands still too, as after an overflow under a gradient scaler.
        for accelerated in self._wrappers(stepped):
            if accelerated.scaler is None:
                accelerated._is_overflow = skipped
            elif bool(skipped):
                accelerated._accelerate_step_called = False

    def _unscale(self, parameters: list[Tensor]) -> None:
        """Unscale the gradients of the optimizers concerned, unless that has been done."""
        for accelerated in self._owners(parameters):
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
        if any(a.scaler is not None and a.step_was_skipped for a in self._wrappers(optimizer)):
            self._forget(optimizer)

    def _forget(self, optimizer: Optimizer) -> None:
        for parameter in _parameters_of(optimizer):
            self._called.pop(id(parameter), None)

    def observe(self, loss: Tensor | float) -> None:
        """Tell a loss of the update to come, as :meth:`distclip.GradClipper.observe`.

        For scripts that do not go through ``accelerator.backward(loss)``.
        """
        if not self._reads_loss:
            return
        for clipper in self._clippers.values():
            clipper.observe(loss)
        if not self._clippers:
            self._losses.append(torch.as_tensor(loss).detach())

    def _backward(self, loss: Tensor, **kwargs: Any) -> None:
        self._originals["backward"][0](loss, **kwargs)
        self.observe(loss)

    def _prepare_optimizer(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = self._originals["prepare_optimizer"][0](optimizer, *args, **kwargs)
        self._adopt(prepared)
        return prepared

    def _free_memory(self, *objects: Any) -> Any:
        self._forget_models()
        return self._originals["free_memory"][0](*objects)

    def _forget_models(self) -> None:
        self._clippers.clear()
        self._measurers.clear()
        self._called.clear()
        self._losses.clear()

    def _adopt(self, accelerated: Any) -> None:
        """Hook an optimizer. Its parameters are looked at first at a step: FSDP2 replaces them."""
        if self.accelerator.has_lomo_optimizer:
            raise DistclipError(
                "LOMO updates the weights during backward, before there is a norm to clip by; use "
                "another optimizer, or run without distclip"
            )
        if not isinstance(accelerated, AcceleratedOptimizer):
            return
        optimizer = _innermost(accelerated)
        if optimizer in self._handles:
            return
        reference = weakref.ref(optimizer)
        self._handles[optimizer] = StepHandle(
            optimizer,
            functools.partial(self._before_step, reference),
            functools.partial(self._after_step, reference),
        )
        hooks.mark_active("accelerate")

    def _wrappers(self, optimizer: Optimizer) -> list[AcceleratedOptimizer]:
        """The prepared optimizers around a torch optimizer, from outside to inside."""
        found = []
        for accelerated in self.accelerator._optimizers:
            if isinstance(accelerated, AcceleratedOptimizer):
                chain = [accelerated]
                while isinstance(chain[-1].optimizer, AcceleratedOptimizer):
                    chain.append(chain[-1].optimizer)
                if chain[-1].optimizer is optimizer:
                    found += chain
        return found

    def _owners(self, parameters: list[Tensor]) -> list[AcceleratedOptimizer]:
        """The prepared optimizers that step any of these."""
        wanted = set(map(id, parameters))
        return [
            accelerated
            for accelerated in self.accelerator._optimizers
            if not isinstance(accelerated.optimizer, AcceleratedOptimizer)
            and not wanted.isdisjoint(map(id, _parameters_of(accelerated.optimizer)))
        ]

    def _stepped(self) -> dict[Tensor, None]:
        """All parameters of all prepared optimizers, each once."""
        return {
            parameter: None
            for accelerated in self.accelerator._optimizers
            for parameter in _parameters_of(accelerated.optimizer)
        }

    def _chosen(self, listed: list[Tensor]) -> list[Tensor]:
        """The parameters that a call means, by their part in the model and not in this step.

        Frozen ones are left out. Where only parameters without a gradient are missing (``if p.grad
        is not None``) the whole model is meant: so the list, and with it the policy's state, does
        not depend on what happens to be there.
        """
        stepped = set(map(id, self._stepped()))

        def trained(parameters: Iterable[Tensor]) -> dict[int, Tensor]:
            return {id(p): p for p in parameters if p.requires_grad or id(p) in stepped}

        wholes = [trained(model.parameters()) for model in self.accelerator._models]
        chosen = trained(listed)
        present = {key for whole in wholes for key, p in whole.items() if p.grad is not None}
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if sharded and not getattr(self.accelerator, "is_fsdp2", False):
            chosen, present = self._agreed(chosen, present)
        if frozenset(chosen) in self._clippers:
            return list(chosen.values())
        for whole in wholes:
            if chosen and chosen.keys() < whole.keys():
                missing = whole.keys() - chosen.keys()
                if missing.isdisjoint(present):
                    return list(whole.values())
        return list(chosen.values())

    def _agreed(
        self, chosen: dict[int, Tensor], present: set[int]
    ) -> tuple[dict[int, Tensor], set[int]]:
        """What all ranks together have chosen, and which gradients any of them has.

        One small reduction per call, over the parameters that all ranks have in the same order.
        """
        known = {id(p): p for model in self.accelerator._models for p in model.parameters()}
        known |= {id(p): p for p in self._stepped()}
        group = collectives.default_group(None)
        if group is None:
            return chosen, present
        device = collectives.device_for(group, self.accelerator.device)
        flags = torch.tensor(
            [[key in chosen for key in known], [key in present for key in known]],
            dtype=torch.float64,
            device=device,
        )
        listed, there = (collectives.all_reduce_max(flags, group) > 0).tolist()
        agreed = {key: p for (key, p), flag in zip(known.items(), listed, strict=True) if flag}
        unknown = {key: p for key, p in chosen.items() if key not in known}
        return agreed | unknown, {key for key, flag in zip(known, there, strict=True) if flag}

    def _clipper(self, parameters: list[Tensor], *, measuring: bool = False) -> GradClipper:
        known = self._measurers if measuring else self._clippers
        key = frozenset(map(id, parameters))
        if key not in known:
            policy = policies.measure() if measuring else self.config.policy
            if known and not measuring and self._reads_loss:
                raise ConfigurationError(
                    f"{policy!r} reads the loss, and this script clips several sets of parameters "
                    f"by themselves (several optimizers, or clip_grad_norm_ on parts of a model): "
                    f"accelerator.backward(loss) does not say to which of them a loss belongs. "
                    f"Leave `loss` off, or build a GradClipper for each set and give it its own "
                    f"by clipper.observe(loss)"
                )
            known[key] = GradClipper(
                self._named(parameters),
                policy,
                optimizer=self._groups(parameters),
                on_nonfinite="pass" if measuring else self.config.on_nonfinite,
                sinks=() if measuring else self._next_sinks(),
                norms=True if measuring else self.config.norms,
                verify_replicas="never" if measuring else self.config.verify_replicas,
            )
            if not measuring:
                self._shelf.hand_over(known[key])
                for loss in self._losses:
                    known[key].observe(loss)
                self._losses.clear()
            if not measuring and self.accelerator.is_main_process:
                _logger.info("clipping %d parameters by %r", len(key), policy)
        return known[key]

    def _next_sinks(self) -> tuple[Sink, ...]:
        """A log for each set of parameters: lines of two with the same step would clash."""
        self._logs += 1
        log = self.config.log
        if log is None or self._logs == 1:
            return sinks_of(self.config)
        path = Path(log.jsonl)
        path = path.with_name(f"{path.stem}.{self._logs}{path.suffix}")
        if self.accelerator.is_main_process:
            _logger.warning("another set of parameters is clipped; its log is %s", path)
        numbered = log.model_copy(update={"jsonl": str(path)})
        return sinks_of(dataclasses.replace(self.config, log=numbered))

    def _named(self, parameters: list[Tensor]) -> list[tuple[str, Tensor]]:
        """Names as in the prepared models concerned; a number for a parameter that is in none."""
        wanted = set(map(id, parameters))
        concerned = [
            model
            for model in self.accelerator._models
            if not wanted.isdisjoint(map(id, model.parameters()))
        ]
        names = {id(p): name for name, p in named_parameters(concerned)} if concerned else {}
        unknown = sum(id(parameter) not in names for parameter in parameters)
        if unknown and self.accelerator.is_main_process:
            _logger.warning(
                "%d of %d parameters are in no model that Accelerator.prepare was given; they are "
                "called unnamed.0, unnamed.1, ..., which name patterns will not match",
                unknown,
                len(parameters),
            )
        return [
            (names.get(id(parameter), f"unnamed.{position}"), parameter)
            for position, parameter in enumerate(parameters)
        ]

    def _groups(self, parameters: list[Tensor]) -> Any:
        """The parameter groups of all optimizers that step these, in the shape of one optimizer."""
        owners = self._owners(parameters)
        return SimpleNamespace(
            param_groups=[group for owner in owners for group in owner.optimizer.param_groups]
        )

    def _announce(self, call: str) -> None:
        if not self._announced and self.accelerator.is_main_process:
            _logger.warning(
                "the script calls %s; the configured policy is applied in its place: %r",
                call,
                self.config.policy,
            )
        self._announced = True


class _Mark(NamedTuple):
    """A call of the script has clipped a parameter; its gradient as the call left it.

    Under FSDP1 it is the flat gradient of the whole unit: a parameter that has none on this rank
    has one on others, and all ranks have to see that there has been a backward.
    """

    report: ClipReport
    gradient: weakref.ref[Tensor] | None
    version: int

    @classmethod
    def of(cls, parameter: Tensor, report: ClipReport) -> _Mark:
        gradient = fsdp1.owner_of_gradient(parameter).grad
        if gradient is None:
            return cls(report, None, 0)
        return cls(report, weakref.ref(gradient), _version(gradient))

    def outdated(self, parameter: Tensor) -> bool:
        """Whether there has been a backward since, be it ``loss.backward()``."""
        gradient = fsdp1.owner_of_gradient(parameter).grad
        if gradient is None or self.gradient is None:
            return (gradient is None) != (self.gradient is None)
        return self.gradient() is not gradient or self.version != _version(gradient)


def _version(gradient: Tensor) -> int:
    """Counts the changes in place; a DTensor's local tensor has its own count."""
    return (gradient._local_tensor if isinstance(gradient, DTensor) else gradient)._version


def _innermost(accelerated: AcceleratedOptimizer) -> Optimizer:
    optimizer: Optimizer = accelerated
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
            "under DeepSpeed, Accelerate's clip_grad_norm_ runs after the update; distclip does "
            "not support it yet. Remove distclip from this launch, or launch with DDP or FSDP"
        )
    if kind in (DistributedType.XLA, DistributedType.MEGATRON_LM):
        raise DistclipError(f"distclip does not know how gradients are laid out under {kind.value}")
