"""Models under FSDP1, and the same in one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from distclip.testing.models.flattened import wrap

ORIG = pytest.mark.parametrize("orig", [False, True], ids=["flat", "orig"])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(torch.tanh(self.body(x)))))


def make() -> Model:
    torch.manual_seed(0)
    return Model()


def wrapped(orig: bool, *, nested: bool = True, **options: Any) -> nn.Module:
    model = make()
    if nested:
        model.middle = wrap(model.middle, use_orig_params=orig, **options)
    return wrap(model, use_orig_params=orig, **options)


def batch(number: int = 0) -> Tensor:
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(number))


def mine(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :1] * 3).square().mean()


def truth(number: int = 0) -> dict[str, Tensor]:
    """Whole gradients, as one process has them."""
    model = make()
    loss_of(model, batch(number)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def total(gradients: dict[str, Tensor], part: str = "") -> float:
    chosen = [g.double().norm() for name, g in gradients.items() if part in name]
    return torch.stack(chosen).norm().item()


def trained(model: nn.Module) -> dict[str, Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def held(model: nn.Module) -> float:
    """Norm of the gradients that the optimizer is given, over all ranks."""
    local = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    square = torch.stack(local).sum()
    dist.all_reduce(square)
    return square.sqrt().item()
