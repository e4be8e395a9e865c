"""What an ``Accelerator`` has prepared: models and optimizers, and what they call parameters."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim import Optimizer

from distclip.engine.attaching import stepped_by
from distclip.errors import DistclipError
from distclip.integrations.clippers import named_in
from distclip.layouts import fsdp2
from distclip.layouts.gradients import is_uneven
from distclip.layouts.names import Target
from distclip.statistics import collectives


class Prepared:
    """Questions about one ``Accelerator``, answered anew each time: more may be prepared later."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def wrappers(self, optimizer: Optimizer) -> list[AcceleratedOptimizer]:
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

    def owners(self, parameters: list[Tensor]) -> list[AcceleratedOptimizer]:
        """The prepared optimizers that step any of these."""
        wanted = set(map(id, parameters))
        return [
            accelerated
            for accelerated in self.accelerator._optimizers
            if not isinstance(accelerated.optimizer, AcceleratedOptimizer)
            and not wanted.isdisjoint(map(id, stepped_by(accelerated.optimizer)))
        ]

    def stepped(self) -> dict[Tensor, None]:
        """All parameters of all prepared optimizers, each once."""
        return {
            parameter: None
            for accelerated in self.accelerator._optimizers
            for parameter in stepped_by(accelerated.optimizer)
        }

    def chosen(self, listed: list[Tensor], known: Container[frozenset[int]]) -> list[Tensor]:
        """The parameters that a call means, by their part in the model and not in this step.

        Frozen ones are left out. Where only parameters without a gradient are missing (``if p.grad
        is not None``) the whole model is meant: so the list, and with it the policy's state, does
        not depend on what happens to be there.
        """
        stepped = set(map(id, self.stepped()))

        def trained(parameters: Iterable[Tensor]) -> dict[int, Tensor]:
            return {id(p): p for p in parameters if p.requires_grad or id(p) in stepped}

        models = [list(model.parameters()) for model in self.accelerator._models]
        # Those that FSDP2 has gathered at the moment show no gradient: the sharded ones have it.
        meant = [fsdp2.sharded(parameters) for parameters in models]
        wholes = [trained(parameters) for parameters in meant]
        chosen = trained(fsdp2.sharded(listed))
        pairs = [
            pair for both in zip(models, meant, strict=True) for pair in zip(*both, strict=True)
        ]
        present = {id(p) for shown, p in pairs if shown.grad is not None}
        gathered = any(shown is not p for shown, p in pairs)
        if any(map(is_uneven, self._known().values())):
            chosen, present = self._agreed(chosen, present)
        if frozenset(chosen) in known:
            return list(chosen.values())
        for whole in wholes:
            if (chosen or gathered) and chosen.keys() < whole.keys():
                missing = whole.keys() - chosen.keys()
                if missing.isdisjoint(present):
                    return list(whole.values())
        return list(chosen.values())

    def _known(self) -> dict[int, Tensor]:
        """All parameters of all prepared models and optimizers, by id."""
        known = {id(p): p for model in self.accelerator._models for p in model.parameters()}
        return known | {id(p): p for p in self.stepped()}

    def _agreed(
        self, chosen: dict[int, Tensor], present: set[int]
    ) -> tuple[dict[int, Tensor], set[int]]:
        """What all ranks together have chosen, and which gradients any of them has.

        One small reduction per call, over the parameters that all ranks have in the same order.
        """
        known = self._known()
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

    def meant(self, parameters: list[Tensor]) -> tuple[Target, list[Optimizer]]:
        """Names as in the prepared models concerned, and the torch optimizers that step these."""
        optimizers = [innermost(owner) for owner in self.owners(parameters)]
        return named_in(self.accelerator._models, parameters), optimizers


def innermost(accelerated: AcceleratedOptimizer) -> Optimizer:
    """The torch optimizer that a wrapper holds."""
    optimizer: Optimizer = accelerated
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def refuse_engines(accelerator: Any) -> None:
    """Refuse what needs other hooks than these.

    Raises:
        DistclipError: DeepSpeed, XLA or Megatron-LM.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        raise DistclipError(
            "under DeepSpeed, Accelerate's clip_grad_norm_ runs after the update, in which the "
            "engine has clipped: attach to that, after prepare(): "
            "distclip.deepspeed.attach(accelerator.deepspeed_engine_wrapped.engine, policy)"
        )
    if kind in (DistributedType.XLA, DistributedType.MEGATRON_LM):
        raise DistclipError(f"distclip does not know how gradients are laid out under {kind.value}")


def refuse_lomo(accelerator: Any) -> None:
    """Refuse an optimizer that steps during backward.

    Raises:
        DistclipError: it is LOMO.
    """
    if accelerator.has_lomo_optimizer:
        raise DistclipError(
            "LOMO updates the weights during backward, before there is a norm to clip by; use "
            "another optimizer, or run without distclip"
        )
