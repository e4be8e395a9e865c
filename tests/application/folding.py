"""Fused optimizers, and what their kernels are told."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from distclip.testing import expected

# eps is large: with a small one Adam does not notice a coefficient.
KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (Adam, {"lr": 0.1, "eps": 1.0, "amsgrad": True, "weight_decay": 0.1}),
    "adamw": (AdamW, {"lr": 0.1, "eps": 1.0, "weight_decay": 0.1}),
    "adamw maximize": (AdamW, {"lr": 0.1, "eps": 1.0, "maximize": True}),
    "sgd": (SGD, {"lr": 0.1}),
    "sgd momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adagrad": (Adagrad, {"lr": 0.1, "eps": 1.0}),
}
if not hasattr(Adagrad([nn.Parameter(torch.ones(1))], fused=True), "_step_supports_amp_scaling"):
    del KINDS["adagrad"]  # torch 2.9's takes no scale, so nothing is folded into it


MAX_NORM = 0.3


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))


def gradients_of(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def give(model: nn.Module, step: int, factor: float = 1.0) -> None:
    for name, gradient in gradients_of(model, step).items():
        parameter = model.get_parameter(name)
        parameter.grad = (gradient * factor).to(parameter.dtype)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    listed = list(model.parameters())
    return [{"params": listed[:1]}, {"params": listed[1:], "lr": 0.02}]


class Reference:
    """The same training in float64 with torch's plainest step, clipped by the oracle."""

    def __init__(self, name: str, max_norm: float = MAX_NORM) -> None:
        kind, options = KINDS[name]
        self.model = model_of().double()
        self.optimizer = kind(groups(self.model), foreach=False, **options)  # type: ignore[call-arg]
        self.policy = {"name": "global_norm", "max_norm": max_norm}

    def step(self, step: int) -> dict[str, Tensor]:
        gradients = {name: g.double() for name, g in gradients_of(self.model, step).items()}
        want = expected(self.policy, gradients, dict(self.model.named_parameters()))
        clipped = {name: torch.as_tensor(g) for name, g in want.gradients.items()}
        for name, gradient in clipped.items():
            self.model.get_parameter(name).grad = gradient.clone()
        self.optimizer.step()
        return clipped


def same(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q.double(), rtol=2e-6, atol=2e-7)


def clean(optimizer: Any) -> bool:
    return not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def fused(name: str, model: nn.Module) -> Any:
    kind, options = KINDS[name]
    return kind(groups(model), fused=True, **options)  # type: ignore[call-arg]
