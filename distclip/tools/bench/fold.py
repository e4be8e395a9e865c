"""A fused step with clipping folded into it, in place, or by torch: ``distclip bench fold``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from distclip import GradClipper, policies
from distclip.tools.bench.models import local_gradients
from distclip.tools.bench.timing import Bench, Ways
from distclip.tools.bench.ways import TIGHT

FOLD_SHAPES = [(1024, 1024)] * 30 + [(1024,)] * 48 + [(512, 1024)] * 4
"""33.6 M elements, the whole of it on each rank."""


def fold_bench() -> Bench:
    """All of the ways; each has moments of its own, the parameters and gradients are the same."""
    parameters = _parameters(dist.get_world_size())
    gradients = local_gradients(parameters)
    dividing = _adamw(parameters)
    dividing.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    plain, reading, by_torch = (_adamw(parameters) for _ in range(3))

    def read_and_step() -> None:
        for gradient in gradients:
            gradient.sum()
        reading.step()

    def torch_clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, TIGHT)
        by_torch.step()

    ways: Ways = {
        "step + one read: sum()": read_and_step,
        "step alone": plain.step,
        "step that divides": dividing.step,
        "step + distclip, folded": _clipped(parameters, fold=True).step,
        "step + distclip, in place": _clipped(parameters, fold=False).step,
        "torch clip_grad_norm_ + step": torch_clip_and_step,
    }
    # As large as at the start: a step leaves clipped ones.
    return Bench(ways, before=lambda: [gradient.fill_(1e-2) for gradient in gradients])


def _adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-9, fused=True)


def _clipped(parameters: Sequence[Tensor], *, fold: bool) -> torch.optim.Optimizer:
    """An optimizer whose step distclip clips before, or within."""
    optimizer = _adamw(parameters)
    GradClipper(parameters, policies.global_norm(TIGHT), fold=fold).attach(optimizer)
    return optimizer


def _parameters(world: int) -> list[Tensor]:
    """Sharded by FSDP2 on several ranks, plain on one; with gradients."""
    model = nn.Module()
    for number, shape in enumerate(FOLD_SHAPES):
        model.register_parameter(f"p{number}", nn.Parameter(torch.zeros(shape)))
    if world > 1:
        fully_shard(model)
    parameters: list[Tensor] = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return parameters
