"""A small problem for Accelerate, its reference, and policies that show when they are applied."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip.policies import Needs, Policy, Scale, Skip
from distclip.testing import expected
from tests.helpers.shards import full, local
from tests.helpers.shards import whole as whole

LAYOUTS = pytest.mark.parametrize("layout", ["ddp", "fsdp2", "fsdp1"])


LR = 0.5


@dataclass(frozen=True)
class Halve(Policy):
    """Applied twice it is a quarter."""

    name: ClassVar[str] = "halve"

    def update(self, statistics: Any, state: Any) -> Any:
        return (Scale(torch.full((len(statistics.parameters),), 0.5, dtype=torch.float64)),), state


@dataclass(frozen=True)
class SkipAbove(Policy):
    """Skips the update where the norm is larger."""

    limit: float
    name: ClassVar[str] = "skip_above"

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[2.0])

    def update(self, statistics: Any, state: Any) -> Any:
        return (Skip(statistics.total_norm() > self.limit),), state


class Model(nn.Module):
    """On two ranks the shards are uneven, on both some are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.head = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def make(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def batch(number: int, rows: int = 8) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(100 + number))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :1] * 3).square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def adamw(model: nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    # The large eps lets the size of the gradient matter.
    return torch.optim.AdamW(model.parameters(), lr=LR, eps=1.0, weight_decay=0.1, fused=fused)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return adamw(model, fused=True)


def start(layout: str, **options: Any) -> Any:
    """A fresh Accelerator in this rank."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedDataParallelKwargs

    from distclip.tools.launch import accelerate_cpu

    if layout == "fsdp2":
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
        }
    if layout.startswith("fsdp1"):
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "1",
            "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
            "FSDP_USE_ORIG_PARAMS": str(layout == "fsdp1"),
            "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
            "FSDP_SYNC_MODULE_STATES": "false",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        }
        # What FSDP1 says on CPU, and of a world of one.
        warnings.filterwarnings("ignore", module="torch.distributed.fsdp")
        warnings.filterwarnings("ignore", module="accelerate")
    if layout == "ddp with views":  # gradients that are the same tensors in every step
        options["kwargs_handlers"] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerate_cpu.become_cpu_rank(cpu=True)
    return Accelerator(**options)


def mine(x: Tensor) -> Tensor:
    """This rank's rows of a batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def local_gradients(model: nn.Module) -> list[Tensor | None]:
    gradients = [local(p.grad) for p in model.parameters()]
    return [None if g is None else g.clone() for g in gradients]


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    size = torch.cat([value.flatten() for value in wanted.values()]).norm()
    for name, value in wanted.items():
        error = (found[name] - value).norm() / size
        assert error <= tolerance, f"{name}: off by {error:.2e}"


class Reference:
    """The same training on whole batches in plain torch; what clipping does is told to it."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.norms: list[float] = []

    def update(self, policy: Any, *losses: Tensor, **options: Any) -> None:
        """``policy``: a factor per parameter name or for all, or a document for the oracle."""
        self.optimizer.zero_grad()
        for loss in losses:
            loss.backward()
        named = dict(self.model.named_parameters())
        if isinstance(policy, float):
            policy = dict.fromkeys(named, policy)
        if isinstance(policy, dict) and all(isinstance(v, float) for v in policy.values()):
            for name, factor in policy.items():
                if named[name].grad is not None:
                    named[name].grad.mul_(factor)
        else:
            self._oracle(policy, named, options)
        self.optimizer.step()

    def _oracle(self, policy: Any, named: dict[str, Any], options: dict[str, Any]) -> None:
        groups = {
            name: number
            for number, group in enumerate(self.optimizer.param_groups)
            for name, p in named.items()
            if any(p is member for member in group["params"])
        }
        gradients = {name: p.grad for name, p in named.items()}
        result = expected(policy, gradients, named, groups=groups, **options)
        self.norms.append(result.total_norm)
        for name, gradient in result.gradients.items():
            if gradient is not None:
                named[name].grad.copy_(torch.from_numpy(np.asarray(gradient)))


def counted(handle: Any) -> list[int]:
    """The number of each report that the sinks of this attachment are given from now on."""
    steps: list[int] = []
    sinks = ((lambda step, report: steps.append(step)),)
    begin = handle._clippers._begin

    def begin_counted(clipper: Any, key: Any) -> None:
        begin(clipper, key)
        clipper.sinks = sinks

    handle._clippers._begin = begin_counted
    return steps


def prepared(
    layout: str,
    policy: Any,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    *,
    late: bool = False,
    **options: Any,
) -> tuple[Any, Any, nn.Module, Any]:
    """Accelerator, attachment, model and optimizer."""
    accelerator = start(layout, **options)
    handle = None if late else distclip.accelerate.attach(accelerator, policy)
    model = make()
    model, stepper = accelerator.prepare(model, optimizer(model))
    if late:
        handle = distclip.accelerate.attach(accelerator, policy)
    return accelerator, handle, model, stepper


def clip_all(accelerator: Any, model: nn.Module) -> Tensor:
    norm: Tensor = accelerator.clip_grad_norm_(model.parameters(), 1e-9)
    return norm


def by_hook(a: Any, m: Any, o: Any, x: Tensor) -> None:
    a.backward(loss_of(m, x))
    o.step()
    o.zero_grad()


def by_norm(a: Any, m: Any, o: Any, x: Tensor) -> None:
    o.zero_grad()
    a.backward(loss_of(m, x))
    clip_all(a, m)
    o.step()


def by_value(a: Any, m: Any, o: Any, x: Tensor) -> None:
    o.zero_grad()
    a.backward(loss_of(m, x))
    a.clip_grad_value_(m.parameters(), 1e-9)
    o.step()


def by_both(a: Any, m: Any, o: Any, x: Tensor) -> None:
    o.zero_grad()
    a.backward(loss_of(m, x))
    a.clip_grad_value_(m.parameters(), 1e-9)
    assert clip_all(a, m) == clip_all(a, m)
    o.step()


def by_presence(a: Any, m: Any, o: Any, x: Tensor) -> None:
    o.zero_grad()
    a.backward(loss_of(m, x))
    a.clip_grad_norm_((p for p in m.parameters() if p.grad is not None), 1e-9)
    o.step()


def by_abandoning(a: Any, m: Any, o: Any, x: Tensor) -> None:
    """Clipped, then thrown away: what comes next is a new gradient, though no step was taken."""
    for zero in ({}, {"set_to_none": False}):
        o.zero_grad(**zero)
        (loss_of(m, x) * 7).backward()
        clip_all(a, m)
    o.zero_grad(set_to_none=False)
    loss_of(m, x).backward()
    clip_all(a, m)
    o.step()


def by_hand(a: Any, m: Any, o: Any, x: Tensor) -> None:
    """Accumulates without ``accumulate()``."""
    o.zero_grad()
    for half in x.chunk(2):
        a.backward(loss_of(m, half) / 2)
    clip_all(a, m)
    o.step()


def snapshot(optimizer: Any) -> list[Any]:
    """Every number in the optimizer's state."""
    state = optimizer.state_dict()["state"]
    return [
        torch.as_tensor(full(value)).clone()
        for index in sorted(state)
        for _, value in sorted(state[index].items())
    ]


def scaled(
    layout: str, policy: Any, optimizer: Any, **options: Any
) -> tuple[Any, Any, nn.Module, Any]:
    """As `prepared`, with the scaler that Accelerate itself makes on a GPU alone."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    accelerator = start(layout, mixed_precision="fp16", **options)
    kind: Any = torch.amp.GradScaler
    if layout != "ddp":
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        if optimizer is not fused:  # which torch itself cannot step after unscale_ of this one
            kind = ShardedGradScaler
    accelerator.scaler = kind("cpu", init_scale=1024.0, growth_interval=2)
    handle = distclip.accelerate.attach(accelerator, policy)
    model = make()
    model, stepper = accelerator.prepare(model, optimizer(model))
    accelerator.native_amp = True  # from here on: the weights stay float32, the losses are scaled
    return accelerator, handle, model, stepper
