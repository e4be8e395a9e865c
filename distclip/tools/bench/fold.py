"""A fused step with clipping folded into it, in place, or by torch: ``distclip bench fold``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from distclip import GradClipper, policies
from distclip.tools.bench.models import local

TIGHT = 1e-3
FOLD_SHAPES = [(1024, 1024)] * 30 + [(1024,)] * 48 + [(512, 1024)] * 4
"""33.6 M elements, the whole of it on each rank."""


class AdamWStep:
    """``optimizer.step()`` of one AdamW on parameters that all ways share."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-9, fused=True)

    def before(self) -> None:
        """Gradients as large as at the start: a step leaves clipped ones."""
        for parameter in self.parameters:
            gradient = parameter.grad
            assert gradient is not None
            local(gradient).fill_(1e-2)

    def __call__(self) -> None:
        """What is measured."""
        self.optimizer.step()


class Dividing(AdamWStep):
    """The step with a ``grad_scale``: what folding adds to it, without any clipping."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters)
        self.optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]


class Reading(AdamWStep):
    """One read of the gradients, then the step."""

    def __call__(self) -> None:
        """What is measured."""
        for parameter in self.parameters:
            gradient = parameter.grad
            assert gradient is not None
            local(gradient).sum()
        self.optimizer.step()


class Torch(AdamWStep):
    """torch's clipping, then the step."""

    def __call__(self) -> None:
        """What is measured."""
        torch.nn.utils.clip_grad_norm_(self.parameters, TIGHT)
        self.optimizer.step()


def clipped(parameters: Sequence[Tensor], *, fold: bool) -> AdamWStep:
    """A step that distclip clips before, or within."""
    step = AdamWStep(parameters)
    GradClipper(step.parameters, policies.global_norm(TIGHT), fold=fold).attach(step.optimizer)
    return step


def fold_parameters(world: int) -> list[Tensor]:
    """Sharded by FSDP2 on several ranks, plain on one; with gradients."""
    model = nn.Module()
    for number, shape in enumerate(FOLD_SHAPES):
        model.register_parameter(f"p{number}", nn.Parameter(torch.zeros(shape)))
    if world > 1:
        fully_shard(model)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return list(parameters)


def fold_ways() -> dict[str, AdamWStep]:
    """All of them; each has moments of its own, the parameters and gradients are the same."""
    parameters = fold_parameters(dist.get_world_size())
    return {
        "step + one read: sum()": Reading(parameters),
        "step alone": AdamWStep(parameters),
        "step that divides": Dividing(parameters),
        "step + distclip, folded": clipped(parameters, fold=True),
        "step + distclip, in place": clipped(parameters, fold=False),
        "torch clip_grad_norm_ + step": Torch(parameters),
    }
