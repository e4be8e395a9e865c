"""Gradients that are not finite, optimizers, and how a test sees that nothing has changed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip.policies import Action, Needs, ParameterInfo, Policy, Scale, Skip, State, Statistics
from tests.helpers.ranks import everyones
from tests.helpers.watching import bits
from tests.sharded import Sharded, Whole, whole

BAD = ("fc.weight", "norm.gain")
"""One element of each is made non-finite: on one rank's shard only."""


def poisoned(bad: float, seed: int = 0) -> Whole:
    values = whole(seed=seed)
    for name in BAD:
        gradient = values.gradients[name]
        assert gradient is not None
        gradient.view(-1)[-1] = bad
    return values


def all_bits(model: Sharded) -> list[Tensor | None]:
    return [bits(gradient) for _, gradient in model.local_gradients()]


def agree(text: str) -> None:
    assert set(everyones(text)) == {text}


class CountingScale(Policy):
    """Halves every gradient and keeps a sum of norms: a policy with a memory."""

    name = "counting"

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[2.0])

    def init(self, parameters: list[ParameterInfo]) -> State:  # type: ignore[override]
        return {"sum": torch.zeros((), dtype=torch.float64), "steps": torch.zeros(())}

    def update(self, statistics: Statistics, state: State) -> tuple[list[Action], State]:
        norms = statistics.gradient_norms(2.0)
        new = {"sum": state["sum"] + statistics.total_norm(), "steps": state["steps"] + 1}
        return [Scale(torch.full_like(norms, 0.5))], new

    def __repr__(self) -> str:
        return "CountingScale()"


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def fused_sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


def fused_adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True)


def foreach_adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, foreach=True)


OPTIMIZERS = [sgd, fused_sgd, adamw, fused_adamw, foreach_adamw]


def small() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def backward(model: nn.Module, factor: float = 1.0) -> Tensor:
    model.zero_grad()
    loss: Tensor = (model(torch.arange(3.0)) * factor).square().sum()
    loss.backward()
    return loss


def everything(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Parameters and optimizer state: momentum, moments, step counters."""
    state = [value for per in optimizer.state.values() for value in per.values()]
    tensors = [value for value in state if isinstance(value, Tensor)]
    return [value.detach().clone() for value in (*model.parameters(), *tensors)]


def unchanged(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


class Decided(Policy):
    """Skips the steps whose numbers it is given."""

    name = "decided"

    def __init__(self, *steps: int) -> None:
        self.steps = torch.tensor(steps)

    def __repr__(self) -> str:
        return f"Decided({self.steps.tolist()})"

    def init(self, parameters: Any) -> State:
        return {"step": torch.zeros(())}

    def update(self, statistics: Statistics, state: State) -> tuple[list[Action], State]:
        flag = (self.steps == state["step"]).any()
        return [Skip(flag)], {"step": state["step"] + 1}
