"""Accelerate: every way through an update clips once, on one rank as on many.

Most tests run inside the ranks of a warm pool, where an ``Accelerator`` costs milliseconds; the
launches at the end cost seconds each and show the same from outside.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

pytest.importorskip("accelerate")

import distclip
from distclip import policies
from distclip.application import folded
from distclip.application.stepping import StepHandle
from distclip.errors import ConfigurationError, DistclipError, NonFiniteGradientError
from distclip.policies import Needs, Policy, Scale, Skip
from distclip.testing import expected, run_on_ranks

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = pytest.mark.parametrize("layout", ["ddp", "fsdp2", "fsdp1"])
LR = 0.5


# ---- policies whose every application shows ----------------------------------------------------


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


# ---- one small problem, and its reference ------------------------------------------------------


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

    from distclip.integrations import accelerate_cpu

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
    accelerate_cpu.install(cpu=True)
    return Accelerator(**options)


def mine(x: Tensor) -> Tensor:
    """This rank's rows of a batch."""
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def whole(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name: p.detach().clone() for name, p in model.named_parameters()}
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p)
        .detach()
        .clone()
        for name, p in model.named_parameters()
    }


def local_gradients(model: nn.Module) -> list[Tensor | None]:
    gradients = [p.grad for p in model.parameters()]
    return [
        None if g is None else (g.to_local() if isinstance(g, DTensor) else g).clone()
        for g in gradients
    ]


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
        result = expected(
            policy,
            {n: None if p.grad is None else p.grad.numpy() for n, p in named.items()},
            {n: p.detach().numpy() for n, p in named.items()},
            groups=groups,
            **options,
        )
        self.norms.append(result.total_norm)
        for name, gradient in result.gradients.items():
            if gradient is not None:
                named[name].grad.copy_(torch.from_numpy(np.asarray(gradient)))


def counted(handle: Any) -> list[int]:
    """The number of each report that the sinks of this attachment are given from now on."""
    steps: list[int] = []
    sinks = ((lambda step, report: steps.append(step)),)
    handle._clippers._open_log = lambda clipper: setattr(clipper, "sinks", sinks)
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


# ---- one clip per update ------------------------------------------------------------------------


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


def by_parts(a: Any, m: Any, o: Any, x: Tensor) -> None:
    o.zero_grad()
    a.backward(loss_of(m, x))
    for name in ("body", "head"):
        part = [p for n, p in m.named_parameters() if name in n]
        a.clip_grad_norm_(part, 1e-9)
    clip_all(a, m)  # has nothing left to do, though the second part was clipped after the first
    o.step()


def by_overlap(a: Any, m: Any, o: Any, x: Tensor) -> None:
    o.zero_grad()
    a.backward(loss_of(m, x))
    a.clip_grad_norm_([p for n, p in m.named_parameters() if "head" in n], 1e-9)
    clip_all(a, m)
    o.step()


def by_presence(a: Any, m: Any, o: Any, x: Tensor) -> None:
    o.zero_grad()
    a.backward(loss_of(m, x))
    a.clip_grad_norm_((p for p in m.parameters() if p.grad is not None), 1e-9)
    o.step()


def by_torch_backward(a: Any, m: Any, o: Any, x: Tensor) -> None:
    o.zero_grad()
    loss_of(m, x).backward()
    clip_all(a, m)
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


def by_closure(a: Any, m: Any, o: Any, x: Tensor) -> None:
    def closure() -> Tensor:
        o.zero_grad()
        loss = loss_of(m, x)
        a.backward(loss)
        return loss

    o.step(closure)


def by_clipping_closure(a: Any, m: Any, o: Any, x: Tensor) -> None:
    def closure() -> Tensor:
        o.zero_grad()
        loss = loss_of(m, x)
        a.backward(loss)
        clip_all(a, m)
        return loss

    o.step(closure=closure)


def by_noise(a: Any, m: Any, o: Any, x: Tensor) -> None:
    """The script's own change after the clip is not clipped behind its back."""
    o.zero_grad()
    a.backward(loss_of(m, x))
    clip_all(a, m)
    for p in m.parameters():
        p.grad = None if p.grad is None else p.grad * 1.0
    o.step()


PATHS: list[Any] = [
    by_hook, by_norm, by_value, by_both, by_parts, by_overlap, by_presence, by_torch_backward,
    by_abandoning, by_hand, by_closure, by_clipping_closure, by_noise,
]  # fmt: skip
CLIPS = {by_parts: 2, by_overlap: 2, by_abandoning: 3}
"""Clips per update, where it is not one for all parameters."""


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("layout", ["ddp", "ddp with views", "fsdp2", "fsdp1"])
@pytest.mark.parametrize("late", [False, True], ids=["attached first", "prepared first"])
def test_each_gradient_is_clipped_once(layout: str, late: bool) -> None:
    for path in PATHS:
        accelerator, handle, model, optimizer = prepared(layout, Halve(), late=late)
        reports = counted(handle)
        reference = Reference(plain := make(), sgd(plain))
        for number in range(3):
            path(accelerator, model, optimizer, mine(batch(number)))
            reference.update(0.5, loss_of(plain, batch(number)))
        try:
            same(whole(model), whole(plain))
            assert len(reports) == 3 * CLIPS.get(path, 1)
        except AssertionError as error:
            raise AssertionError(f"{path.__name__}: {error}") from None


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("late", [False, True], ids=["attached first", "prepared first"])
def test_parameters_gathered_by_a_forward_are_clipped_once(late: bool) -> None:
    """After it no parameter of FSDP2's root module shows a gradient: the sharded ones have it."""

    def look(m: Any, x: Tensor) -> None:
        with torch.no_grad():
            m(x)
        assert not any(isinstance(p, DTensor) for p in m.parameters())

    def by_call(a: Any, m: Any, o: Any) -> None:
        clip_all(a, m)

    def by_parts(a: Any, m: Any, o: Any) -> None:
        for name in ("body", "head"):
            a.clip_grad_norm_([p for n, p in m.named_parameters() if name in n], 1e-9)

    def by_presence(a: Any, m: Any, o: Any) -> None:
        assert a.clip_grad_norm_([p for p in m.parameters() if p.grad is not None], 1e-9) > 0

    def by_hook(a: Any, m: Any, o: Any) -> None: ...

    for path in (by_call, by_parts, by_presence, by_hook):
        accelerator, handle, model, optimizer = prepared("fsdp2", Halve(), late=late)
        reference = Reference(plain := make(), sgd(plain))
        for number in range(3):
            x = batch(number, rows=12)
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, mine(x)))
            look(model, x)
            path(accelerator, model, optimizer)
            look(model, x)
            optimizer.step()
            # Or the next forward would be one with the weights of before the step.
            model.reshard()
            reference.update(0.5, loss_of(plain, x))
        try:
            same(whole(model), whole(plain))
        except AssertionError as error:
            raise AssertionError(f"{path.__name__}: {error}") from None
        assert handle.last_report is not None
        names = {"body.weight", "body.bias", "head.weight", "head.bias"}
        assert set().union(*(c.names for c in handle._clippers.known.values())) == names


@pytest.mark.ranks(1, 2)
@LAYOUTS
def test_what_an_explicit_call_leaves_out_is_left_alone(layout: str) -> None:
    accelerator, _, model, optimizer = prepared(layout, Halve())
    reference = Reference(plain := make(), sgd(plain))
    factors = {"body.weight": 0.5, "body.bias": 0.5, "head.weight": 1.0, "head.bias": 1.0}
    for number in range(2):
        accelerator.backward(loss_of(model, mine(batch(number))))
        accelerator.clip_grad_norm_([p for n, p in model.named_parameters() if "body" in n], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reference.update(factors, loss_of(plain, batch(number)))
    # A call that names nothing chooses nothing: the step clips all.
    accelerator.backward(loss_of(model, mine(batch(2))))
    assert accelerator.clip_grad_norm_([], 1.0) == 0
    optimizer.step()
    reference.update(0.5, loss_of(plain, batch(2)))

    same(whole(model), whole(plain))


@pytest.mark.ranks(2)
def test_a_list_of_what_has_a_gradient_is_the_whole_model() -> None:
    """One policy state and one log, whatever parts of the model a step uses."""
    accelerator, handle, model, optimizer = prepared("ddp", Halve())
    reports = counted(handle)
    for number in range(4):
        optimizer.zero_grad()
        out = model.module.body(mine(batch(number))).square().mean()
        accelerator.backward(out if number % 2 else loss_of(model, mine(batch(number))))
        accelerator.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        assert len(handle.last_report.names) == 4
        optimizer.step()

    assert reports == [0, 1, 2, 3]
    assert len(handle._clippers.known) == 1


@pytest.mark.ranks(2)
@LAYOUTS
def test_clipping_after_each_backward_of_one_update_clips_the_running_sum(layout: str) -> None:
    accelerator, _, model, optimizer = prepared(layout, Halve())
    reference = Reference(plain := make(), sgd(plain))
    for half in mine(batch(0)).chunk(2):
        accelerator.backward(loss_of(model, half) / 2)
        clip_all(accelerator, model)
    optimizer.step()
    halves = [torch.cat([rows.chunk(2)[i] for rows in batch(0).chunk(2)]) for i in (0, 1)]
    losses = (loss_of(plain, halves[0]) / 4, loss_of(plain, halves[1]) / 2)
    reference.update(0.5, *losses)

    same(whole(model), whole(plain))


@pytest.mark.ranks(1, 2)
@LAYOUTS
def test_unsynchronised_micro_batches_are_measured_and_left_alone(layout: str) -> None:
    accelerator, handle, model, optimizer = prepared(
        layout, policies.global_norm(0.5), gradient_accumulation_steps=2
    )
    reports = counted(handle)
    reference = Reference(plain := make(), sgd(plain))
    for number in range(3):
        for half in mine(batch(number)).chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, half))
                before = local_gradients(model)
                norm = clip_all(accelerator, model)
                if not accelerator.sync_gradients:
                    torch.testing.assert_close(local_gradients(model), before, rtol=0, atol=0)
                optimizer.step()
                optimizer.zero_grad()
        reference.update({"name": "global_norm", "max_norm": 0.5}, loss_of(plain, batch(number)))
        assert norm.item() == pytest.approx(reference.norms[-1], rel=1e-6)

    same(whole(model), whole(plain))
    assert reports == [0, 1, 2]


@pytest.mark.ranks(1, 2)
@LAYOUTS
def test_the_norm_is_a_plain_tensor_and_the_same_on_all_ranks(layout: str) -> None:
    accelerator, handle, model, _ = prepared(layout, policies.agc(0.01))
    accelerator.backward(loss_of(model, mine(batch(0))))
    norm = clip_all(accelerator, model)

    assert type(norm) is Tensor
    assert norm.shape == ()
    assert norm.dtype == torch.float32
    assert handle.last_report.total_norm is norm
    everywhere = [torch.zeros(()) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, norm)
    assert all(other == norm for other in everywhere)


# ---- the right numbers ---------------------------------------------------------------------------

ORACLE: dict[str, Any] = {
    "global_norm": {"policy": {"name": "global_norm", "max_norm": 0.3}},
    "agc": {"policy": {"name": "agc", "clip_factor": 0.02}},
    "value": {"policy": {"name": "value", "clip_value": 0.05}},
    "by_name": {
        "policy": {"name": "agc", "clip_factor": 0.02},
        "by_name": {"*.bias": None, "head.*": {"name": "global_norm", "max_norm": 0.1}},
    },
    "group_norm": {"policy": {"name": "group_norm", "max_norm": 0.2}},
}


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    """Weights and biases in groups of their own; the frozen one in none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1]}]
    groups.append({"params": [p for p in trained if p.dim() == 1], "lr": LR / 2})
    return torch.optim.SGD(groups, lr=LR, momentum=0.9)


@pytest.mark.ranks(1, 2)
@LAYOUTS
@pytest.mark.parametrize("name", ORACLE)
def test_policies_against_the_oracle(layout: str, name: str) -> None:
    document = ORACLE[name]
    policy = document["policy"]
    if "by_name" in document:
        policy = {"by_name": document["by_name"], "default": policy}
    for path in (by_hook, by_norm, by_value):
        accelerator, _, model, optimizer = prepared(layout, document, grouped)
        reference = Reference(plain := make(), grouped(plain))
        for number in range(4):
            path(accelerator, model, optimizer, mine(batch(number)))
            reference.update(policy, loss_of(plain, batch(number)))
        same(whole(model), whole(plain))


@pytest.mark.ranks(2)
@LAYOUTS
def test_group_norm_knows_the_groups_of_several_optimizers(layout: str) -> None:
    """One for the weights, one for the biases; and a frozen parameter is in neither."""
    accelerator = start(layout)
    distclip.accelerate.attach(accelerator, ORACLE["group_norm"])
    model, plain = make(), make()
    for each in (model, plain):
        each.head.bias.requires_grad_(False)
    reference = Reference(plain, grouped(plain))
    separate = [torch.optim.SGD([group], momentum=0.9) for group in grouped(model).param_groups]
    model, *optimizers = accelerator.prepare(model, *separate)
    for number in range(3):
        accelerator.backward(loss_of(model, mine(batch(number))))
        clip_all(accelerator, model)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        reference.update(ORACLE["group_norm"]["policy"], loss_of(plain, batch(number)))

    same(whole(model), whole(plain))


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("name", ["agc", "by_name"])
def test_flat_parameters_of_fsdp1(name: str) -> None:
    """``use_orig_params: false``: the script sees one parameter, the policy those it stands for."""
    document = ORACLE[name]
    policy = document["policy"]
    if "by_name" in document:
        policy = {"by_name": document["by_name"], "default": policy}
    for path in (by_hook, by_norm, by_value, by_both, by_presence, by_hand, by_abandoning):
        accelerator = start("fsdp1 flat")
        handle = distclip.accelerate.attach(accelerator, document)
        model = accelerator.prepare(make())
        optimizer = accelerator.prepare(sgd(model))  # the flat parameter is there only now
        reference = Reference(plain := make(), sgd(plain))
        assert len(list(model.parameters())) == 1
        for number in range(3):
            x = batch(number, 12)
            path(accelerator, model, optimizer, mine(x))
            reference.update(policy, loss_of(plain, x))
        assert handle.last_report.names == ("body.weight", "body.bias", "head.weight", "head.bias")
        try:
            same(whole(model), whole(plain))
        except AssertionError as error:
            raise AssertionError(f"{path.__name__}: {error}") from None


@pytest.mark.ranks(2, 3)
def test_parts_of_a_model_under_fsdp1_by_name_and_by_presence() -> None:
    """Each rank may hold elements of another part: the ranks agree on which part is meant."""
    accelerator, _, model, optimizer = prepared("fsdp1", Halve())
    reference = Reference(plain := make(), sgd(plain))
    for number, part in enumerate(["head", "body", "body", "head", ""]):
        for present in (True, False):
            x = batch(2 * number + present, 6)
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, mine(x)))
            chosen = [p for n, p in model.named_parameters() if part in n]
            if present:
                chosen = [p for p in chosen if p.grad is not None]
            norm = accelerator.clip_grad_norm_(chosen, 1e-9)
            optimizer.step()
            factors = {n: 0.5 if part in n else 1.0 for n, _ in plain.named_parameters()}
            plain.zero_grad()
            loss_of(plain, x).backward()
            wanted = [p.grad for n, p in plain.named_parameters() if part in n]
            norms = torch.stack([gradient.norm() for gradient in wanted])
            assert norm.item() == pytest.approx(norms.norm().item(), rel=1e-5), part
            plain.zero_grad()
            reference.update(factors, loss_of(plain, x))
    same(whole(model), whole(plain), 1e-5)


# ---- several models and optimizers ---------------------------------------------------------------


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("order", ["hook", "in turn", "interleaved"])
def test_two_models(order: str, tmp_path: Path) -> None:
    """Each is clipped once per update of its own, whatever gradients it gets on the way."""
    accelerator = start("ddp")
    log = {"jsonl": str(tmp_path / "clip.jsonl"), "per_parameter": True, "every": 2}
    handle = distclip.accelerate.attach(
        accelerator,
        {"policy": {"name": "agc", "clip_factor": 0.05}, "by_name": {"head.*": None}, "log": log},
    )
    policy = {"by_name": {"head.*": None}, "default": {"name": "agc", "clip_factor": 0.05}}
    plains = [make(1), make(2)]
    references = [Reference(plain, sgd(plain)) for plain in plains]
    models = [make(1), make(2)]
    models[0], models[1], *optimizers = accelerator.prepare(*models, *map(sgd, models))
    for number in range(3):
        x = batch(number)
        for turn, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for other in optimizers:
                other.zero_grad()
            accelerator.backward(loss_of(model, mine(x)))
            if order == "interleaved":
                clip_all(accelerator, model)
            # The other model gets a gradient too, which is not for this update.
            accelerator.backward(loss_of(models[1 - turn], mine(x)) * 0.1)
            if order == "in turn":
                clip_all(accelerator, model)
            optimizer.step()
            references[turn].update(policy, loss_of(plains[turn], x))
    for model, plain in zip(models, plains, strict=True):
        same(whole(model), whole(plain))
    dist.barrier()
    for name in ("clip.jsonl", "clip.2.jsonl"):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 2]
        assert set(lines[0]["parameters"]) == set(whole(plains[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.2.jsonl", "clip.jsonl"]
    assert len(handle._clippers.known) == 2


def test_parameters_of_models_that_share_names_are_told_apart() -> None:
    run_on_ranks(_two_models_one_optimizer, 2)


def _two_models_one_optimizer() -> None:
    accelerator = start("ddp")
    handle = distclip.accelerate.attach(accelerator, Halve())
    models = accelerator.prepare(make(1), make(2))
    optimizer = accelerator.prepare_optimizer(
        torch.optim.SGD([p for model in models for p in model.parameters()], lr=LR)
    )
    sum(loss_of(model, mine(batch(0))) for model in models).backward()
    optimizer.step()

    assert set(handle.last_report.names) == {
        f"{number}.{name}" for number in (0, 1) for name in whole(make())
    }


@pytest.mark.ranks(2)
@LAYOUTS
def test_a_call_for_all_serves_two_optimizers(layout: str) -> None:
    accelerator = start(layout)
    handle = distclip.accelerate.attach(accelerator, Halve())
    reports = counted(handle)
    model, plain = make(), make()
    separate = [torch.optim.SGD(part.parameters(), lr=LR) for part in (model.body, model.head)]
    model, body, head = accelerator.prepare(model, *separate)
    reference = Reference(plain, torch.optim.SGD(plain.parameters(), lr=LR))
    for number in range(2):
        accelerator.backward(loss_of(model, mine(batch(number))))
        clip_all(accelerator, model)
        body.step()
        head.step()
        body.zero_grad()
        head.zero_grad()
        reference.update(0.5, loss_of(plain, batch(number)))

    same(whole(model), whole(plain))
    assert reports == [0, 1]


# ---- skipping ------------------------------------------------------------------------------------


def snapshot(optimizer: Any) -> list[Any]:
    """Every number in the optimizer's state."""
    state = optimizer.state_dict()["state"]
    return [
        value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value).clone()
        for index in sorted(state)
        for _, value in sorted(state[index].items())
    ]


@pytest.mark.ranks(1, 2)
@LAYOUTS
@pytest.mark.parametrize("explicit", [True, False], ids=["call", "hook"])
@pytest.mark.parametrize("reason", ["nan", "policy"])
def test_a_skipped_update_leaves_everything_alone(layout: str, explicit: bool, reason: str) -> None:
    config = {"policy": {"name": "measure"}, "on_nonfinite": "skip"}
    accelerator, handle, model, optimizer = prepared(
        layout, config if reason == "nan" else SkipAbove(100.0), adamw
    )
    scheduler = accelerator.prepare(
        torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 0.9**step)
    )
    reference = Reference(plain := make(), adamw(plain))
    for number, factor in enumerate([1.0, math.nan if reason == "nan" else 1e6, 1.0, 1.0]):
        skipped = factor != 1.0
        before = whole(model), snapshot(optimizer), scheduler.get_last_lr()
        loss = loss_of(model, mine(batch(number)))
        # The trouble is on the last rank alone; the others have to know.
        accelerator.backward(loss * (factor if dist.get_rank() + 1 == dist.get_world_size() else 1))
        gradients = local_gradients(model)
        if explicit:
            clip_all(accelerator, model)
        optimizer.step()
        scheduler.step()
        assert accelerator.optimizer_step_was_skipped is skipped
        assert bool(handle.last_report.skipped) is skipped
        torch.testing.assert_close(local_gradients(model), gradients, equal_nan=True)
        optimizer.zero_grad()
        if skipped:
            after = whole(model), snapshot(optimizer), scheduler.get_last_lr()
            torch.testing.assert_close(after, before, rtol=0, atol=0)
        else:
            reference.optimizer.param_groups[0]["lr"] = before[2][0]
            reference.update(1.0, loss_of(plain, batch(number)))

    same(whole(model), whole(plain))


@pytest.mark.ranks(2)
@LAYOUTS
def test_a_call_for_all_that_is_skipped_stops_both_optimizers(layout: str) -> None:
    accelerator = start(layout)
    distclip.accelerate.attach(accelerator, SkipAbove(1e-9))
    model = make()
    separate = [torch.optim.SGD(part.parameters(), lr=LR) for part in (model.body, model.head)]
    model, body, head = accelerator.prepare(model, *separate)
    before = whole(model)
    accelerator.backward(loss_of(model, mine(batch(0))))
    clip_all(accelerator, model)
    body.step()
    assert (body.step_was_skipped, head.step_was_skipped) == (True, False)
    head.step()

    assert head.step_was_skipped
    same(whole(model), before, 0.0)


@pytest.mark.ranks(2)
@LAYOUTS
@pytest.mark.parametrize("explicit", [True, False], ids=["call", "hook"])
def test_an_error_is_raised_on_all_ranks_and_the_next_update_is_sound(
    layout: str, explicit: bool
) -> None:
    accelerator, _, model, optimizer = prepared(layout, Halve())
    before = whole(model)
    bad = math.nan if dist.get_rank() == 0 else 1.0
    accelerator.backward(loss_of(model, mine(batch(0))) * bad)
    with pytest.raises(NonFiniteGradientError, match=r"body\.weight"):
        clip_all(accelerator, model) if explicit else optimizer.step()
    same(whole(model), before, 0.0)
    optimizer.zero_grad()
    reference = Reference(plain := make(), sgd(plain))
    (by_norm if explicit else by_hook)(accelerator, model, optimizer, mine(batch(1)))
    reference.update(0.5, loss_of(plain, batch(1)))

    same(whole(model), whole(plain))


# ---- gradient scalers ----------------------------------------------------------------------------


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


@pytest.mark.ranks(1, 2)
@LAYOUTS
@pytest.mark.parametrize("optimizer", [fused, adamw, sgd])
@pytest.mark.parametrize("calls", ["all", "none", "first two"])
def test_gradient_scaler(layout: str, optimizer: Any, calls: str) -> None:
    """FIELD row 24: unscaled norms and a right clip, where the gradients are still scaled too."""
    policy = {"name": "global_norm", "max_norm": 0.2}
    accelerator, handle, model, stepper = scaled(layout, {"policy": policy}, optimizer)
    reports = counted(handle)
    scheduler = accelerator.prepare(
        torch.optim.lr_scheduler.LambdaLR(stepper.optimizer, lambda step: 1.0)
    )
    reference = Reference(plain := make(), optimizer(plain))
    # One overflow right after another: what a dropped update leaves behind concerns no later one.
    for number, factor in enumerate([1.0, math.inf, math.inf, 1.0, 1.0, 1.0]):
        skipped = factor != 1.0
        before = whole(model), snapshot(stepper)
        loss = loss_of(model, mine(batch(number)))
        scale = accelerator.scaler.get_scale()
        accelerator.backward(loss * (factor if dist.get_rank() == 0 else 1))
        called = calls == "all" or (calls == "first two" and number < 2)
        if called:
            norm = clip_all(accelerator, model)
            assert clip_all(accelerator, model).equal(norm) or skipped
        stepper.step()
        scheduler.step()
        stepper.zero_grad()
        assert accelerator.optimizer_step_was_skipped is skipped, number
        if skipped:
            torch.testing.assert_close((whole(model), snapshot(stepper)), before, rtol=0, atol=0)
            assert accelerator.scaler.get_scale() == scale / 2
            continue
        reference.update(policy, loss_of(plain, batch(number)))
        found = norm if called else handle.last_report.total_norm
        assert found.item() == pytest.approx(reference.norms[-1], rel=1e-6)
        assert not hasattr(stepper.optimizer, "found_inf")

    same(whole(model), whole(plain))
    assert accelerator.scaler.get_scale() == 1024 / 4 * 2
    seen_by_us = 6 if calls == "all" or optimizer is fused else 5 if calls == "first two" else 4
    assert len(reports) == seen_by_us


def norm_there(model: nn.Module, layout: str) -> float:
    """Of the gradients as they lie on the ranks."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in found]
    square = sum((part.double().square().sum() for part in parts), torch.zeros(()).double())
    if layout != "ddp":
        dist.all_reduce(square)
    return square.sqrt().item()


@pytest.mark.ranks(1, 2)
@LAYOUTS
def test_a_fused_step_multiplies_unless_the_script_asks_for_clipped_gradients(layout: str) -> None:
    policy = {"name": "global_norm", "max_norm": 1e-3}
    told: list[str] = []
    tell = folded.tell
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            folded, "tell", lambda o, name, value: (told.append(name), tell(o, name, value))
        )
        for fold in (True, False):
            accelerator, handle, model, stepper = scaled(
                layout, {"policy": policy, "fold": fold}, fused
            )
            for called in (False, True):
                accelerator.backward(loss_of(model, mine(batch(0))))
                if called:
                    clip_all(accelerator, model)
                    assert norm_there(model, layout) == pytest.approx(1e-3, rel=1e-4)
                stepper.step()
                assert norm_there(model, layout) == pytest.approx(1e-3, rel=1e-4)
                assert handle.last_report.clipped_norm.item() == pytest.approx(1e-3, rel=1e-4)
                stepper.zero_grad()
                assert told == ["grad_scale"]


@pytest.mark.ranks(1, 2)
def test_overlap_measures_during_backward_under_fsdp2() -> None:
    policy = {"name": "global_norm", "max_norm": 0.3}
    accelerator, handle, model, optimizer = prepared(
        "fsdp2", {"policy": policy, "overlap": True}, gradient_accumulation_steps=2
    )
    reference = Reference(plain := make(), sgd(plain))
    early = []
    for number in range(4):
        for half in mine(batch(number)).chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, half))
                if number % 2:  # and otherwise by the hook
                    clip_all(accelerator, model)
                optimizer.step()
                optimizer.zero_grad()
        reference.update(policy, loss_of(plain, batch(number)))
        found = handle.last_report.total_norm.item()
        assert found == pytest.approx(reference.norms[-1], rel=1e-6)
        (clipper,) = handle._clippers.known.values()
        early.append(clipper.measured_early)
    same(whole(model), whole(plain))
    # The clipper was built at the first step, after its backward, and the second told it how many
    # gradients come together.
    assert early == [0, 0, 4, 4]
    hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
    assert all(len(each) == 1 for each in hooks)
    del clipper
    accelerator.free_memory()
    assert not any(hooks)


@pytest.mark.ranks(1)
def test_layerwise_optimizers_of_transformers_are_refused() -> None:
    pytest.importorskip("transformers")
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    accelerator = start("ddp")
    distclip.accelerate.attach(accelerator, Halve())
    with pytest.raises(DistclipError, match="without 'layerwise'"):
        accelerator.prepare(make(), LayerWiseDummyOptimizer({}))


@pytest.mark.ranks(1, 2)
@LAYOUTS
@pytest.mark.parametrize("optimizer", [fused, sgd])
def test_gradient_scaler_with_accumulation_and_calls_for_parts(layout: str, optimizer: Any) -> None:
    """Accelerate itself unscales too early here, and raises at the second call."""
    accelerator, _, model, stepper = scaled(
        layout, Halve(), optimizer, gradient_accumulation_steps=2
    )
    reference = Reference(plain := make(), optimizer(plain))
    for number in range(3):
        x = mine(batch(number))
        for half in x.chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, half))
                for name in ("body", "head"):
                    part = [p for n, p in model.named_parameters() if name in n]
                    norm = accelerator.clip_grad_norm_(part, 1e-9)
                    assert norm < 100  # and not a thousand times as much
                stepper.step()
                stepper.zero_grad()
        reference.update(0.5, loss_of(plain, batch(number)))

    same(whole(model), whole(plain))


@pytest.mark.ranks(1, 2)
@LAYOUTS
@pytest.mark.parametrize("mode", ["pass", "zero"])
def test_the_scheduler_stands_still_where_a_fused_optimizer_drops_an_overflow(
    layout: str, mode: str
) -> None:
    """Accelerate by itself does not notice: there the optimizer's step is called all the same."""
    config = {"policy": {"name": "measure"}, "on_nonfinite": mode}
    accelerator, _, model, stepper = scaled(layout, config, fused)
    before = whole(model)
    for factor in (math.inf, 1.0):
        accelerator.backward(loss_of(model, mine(batch(0))) * factor)
        stepper.step()
        stepper.zero_grad()
        assert accelerator.optimizer_step_was_skipped is (factor != 1.0)
        if factor != 1.0:
            same(whole(model), before, 0.0)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("optimizer", [fused, sgd])
def test_gradient_scaler_and_two_models(optimizer: Any) -> None:
    """A call unscales the gradients of its own optimizer, and not those that are yet to come."""
    accelerator, _, first, stepper = scaled("ddp", Halve(), optimizer)
    accelerator.scaler.set_growth_interval(1000)
    second = make(1)
    accelerator.native_amp = False
    second, other = accelerator.prepare(second, optimizer(second))
    accelerator.native_amp = True
    plains = make(), make(1)
    references = [Reference(plain, optimizer(plain)) for plain in plains]
    for number in range(3):
        for model in (first, second):
            accelerator.backward(loss_of(model, mine(batch(number))))
        clip_all(accelerator, first)
        stepper.step()
        stepper.zero_grad()
        norm = clip_all(accelerator, second)
        assert 0.01 < norm < 100
        other.step()
        other.zero_grad()
        for plain, reference in zip(plains, references, strict=True):
            reference.update(0.5, loss_of(plain, batch(number)))
    for model, plain in zip((first, second), plains, strict=True):
        same(whole(model), whole(plain))


@pytest.mark.ranks(2)
@LAYOUTS
@pytest.mark.parametrize("optimizer", [fused, adamw])
def test_a_policy_skips_under_a_gradient_scaler(layout: str, optimizer: Any) -> None:
    for explicit in (True, False):
        accelerator, _, model, stepper = scaled(layout, SkipAbove(1e-9), optimizer)
        before = whole(model)
        accelerator.backward(loss_of(model, mine(batch(0))))
        if explicit:
            clip_all(accelerator, model)
        stepper.step()
        assert accelerator.optimizer_step_was_skipped
        assert accelerator.scaler.get_scale() == 1024
        same(whole(model), before, 0.0)
        assert not snapshot(stepper)


# ---- life cycle ----------------------------------------------------------------------------------


@pytest.mark.ranks(1)
def test_remove_restores_everything() -> None:
    def accelerators_own(self: Any) -> dict[str, Any]:
        names = ("clip_grad_norm_", "clip_grad_value_", "prepare_optimizer", "free_memory")
        return {name: self.__dict__.get(name) for name in names}

    accelerator = start("ddp")
    accelerator.free_memory = stranger = lambda *objects: objects  # somebody else's
    before = accelerators_own(accelerator)
    handle = distclip.accelerate.attach(accelerator, SkipAbove(1e-9))
    model = make()
    model, optimizer = accelerator.prepare(model, sgd(model))
    by_norm(accelerator, model, optimizer, batch(0))
    assert accelerator.optimizer_step_was_skipped
    handle.remove()

    assert accelerators_own(accelerator) == before
    assert accelerator.free_memory is stranger
    assert not accelerator.optimizer_step_was_skipped  # the scheduler would stand still for ever
    assert not optimizer.optimizer._optimizer_step_pre_hooks
    assert not optimizer.optimizer._optimizer_step_post_hooks
    reference = Reference(plain := make(), sgd(plain))
    by_hook(accelerator, model, optimizer, batch(1))
    reference.update(1.0, loss_of(plain, batch(0)), loss_of(plain, batch(1)))
    # The skipped gradient was still there: nobody had zeroed it.
    same(whole(model), whole(plain))

    second = distclip.accelerate.attach(accelerator, Halve())
    handle.remove()  # again, and the second stays
    optimizer.zero_grad()
    by_norm(accelerator, model, optimizer, batch(2))
    reference.update(0.5, loss_of(plain, batch(2)))
    same(whole(model), whole(plain))
    second.remove()


@pytest.mark.ranks(1)
def test_a_second_policy_is_refused() -> None:
    accelerator = start("ddp")
    distclip.accelerate.attach(accelerator, Halve())
    with pytest.raises(ConfigurationError, match="has a distclip policy already"):
        distclip.accelerate.attach(accelerator, Halve())


@pytest.mark.ranks(1)
def test_a_bad_configuration_leaves_the_accelerator_alone() -> None:
    accelerator = start("ddp")
    with pytest.raises(ConfigurationError, match="max_norm"):
        distclip.accelerate.attach(accelerator, {"policy": {"name": "global_norm", "max_nrm": 1}})
    assert "clip_grad_norm_" not in vars(accelerator)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("DEEPSPEED", "under DeepSpeed"),
        ("XLA", "under XLA"),
        ("MEGATRON_LM", "under MEGATRON_LM"),
    ],
)
def test_engines_with_other_seams_are_refused(kind: str, message: str) -> None:
    from accelerate.utils import DistributedType

    accelerator = SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=False)
    with pytest.raises(DistclipError, match=message):
        distclip.accelerate.attach(accelerator, Halve())


@pytest.mark.ranks(1)
def test_optimizers_that_step_in_backward_are_refused() -> None:
    accelerator = start("ddp")
    distclip.accelerate.attach(accelerator, Halve())
    accelerator.has_lomo_optimizer = True  # what Accelerate notes about them
    with pytest.raises(DistclipError, match="LOMO"):
        accelerator.prepare_optimizer(sgd(make()))


@pytest.mark.ranks(1, 2)
@LAYOUTS
def test_free_memory_frees_the_model_and_a_second_training_is_sound(layout: str) -> None:
    accelerator, _, model, optimizer = prepared(layout, Halve())
    by_norm(accelerator, model, optimizer, mine(batch(0)))
    by_hook(accelerator, model, optimizer, mine(batch(1)))
    gone = weakref.ref(next(model.parameters())), weakref.ref(optimizer.optimizer)
    if layout == "fsdp1" and dist.get_world_size() == 1:
        gone = gone[1:]  # the model is then NO_SHARD, which torch 2.13 itself keeps alive
    model, optimizer = accelerator.free_memory(model, optimizer)
    gc.collect()
    assert not any(reference() for reference in gone)

    model = make()
    model, optimizer = accelerator.prepare(model, sgd(model))
    reference = Reference(plain := make(), sgd(plain))
    by_norm(accelerator, model, optimizer, mine(batch(2)))
    reference.update(0.5, loss_of(plain, batch(2)))
    same(whole(model), whole(plain))


@pytest.mark.ranks(1, 2)
def test_prepare_piece_by_piece_and_twice() -> None:
    accelerator = start("ddp")
    distclip.accelerate.attach(accelerator, Halve())
    raw = make()
    model = accelerator.prepare_model(raw)
    optimizer = accelerator.prepare_optimizer(sgd(raw))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1.0)
    again, scheduler = accelerator.prepare(optimizer, scheduler)  # Accelerate wraps it twice
    assert again.optimizer is optimizer
    assert accelerator.prepare(again) is again
    reference = Reference(plain := make(), sgd(plain))
    for number, stepper in enumerate([optimizer, again]):
        by_norm(accelerator, model, stepper, mine(batch(number)))
        reference.update(0.5, loss_of(plain, batch(number)))
    again.zero_grad()
    by_hook(accelerator, model, again, mine(batch(2)))
    reference.update(0.5, loss_of(plain, batch(2)))

    same(whole(model), whole(plain))


@pytest.mark.ranks(1)
def test_a_skip_reaches_a_scheduler_of_an_optimizer_that_is_wrapped_twice() -> None:
    accelerator = start("ddp")
    distclip.accelerate.attach(accelerator, SkipAbove(1e-9))
    raw = make()
    model = accelerator.prepare_model(raw)
    inner = accelerator.prepare_optimizer(sgd(raw))
    outer = accelerator.prepare(inner)
    by_hook(accelerator, model, outer, batch(0))

    assert inner.step_was_skipped
    assert outer.step_was_skipped


@pytest.mark.ranks(1)
def test_parameters_outside_prepared_models_are_said_to_have_no_names() -> None:
    accelerator = start("ddp")
    handle = distclip.accelerate.attach(accelerator, Halve())
    model = make()
    optimizer = accelerator.prepare_optimizer(sgd(model))
    with heard("distclip.accelerate") as messages:
        by_hook(accelerator, model, optimizer, batch(0))

    assert any("4 of 4 parameters are in no model" in message for message in messages)
    assert handle.last_report.names[0] == "unnamed.0"


class heard:  # noqa: N801 - a context manager
    """What a logger says; caplog does not reach into the ranks."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)
        self.messages: list[str] = []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.messages.append(record.getMessage())  # type: ignore[method-assign]

    def __enter__(self) -> list[str]:
        self.logger.addHandler(self.handler)
        return self.messages

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self.handler)


@pytest.mark.ranks(2)
def test_the_script_s_own_clipping_is_announced_once_by_the_main_process() -> None:
    accelerator, _, model, optimizer = prepared("ddp", Halve())
    with heard("distclip.accelerate") as messages:
        for number in range(2):
            by_both(accelerator, model, optimizer, mine(batch(number)))
    wanted = ["the script calls clip_grad_value_(clip_value=1e-09); the configured policy is"]

    assert [message[: len(wanted[0])] for message in messages] == wanted[: 1 - dist.get_rank()]


@pytest.mark.ranks(1, 2)
@LAYOUTS
def test_the_log_has_one_line_per_update(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "clip.jsonl"
    config = {
        "policy": {"name": "global_norm", "max_norm": 0.3},
        "log": {"jsonl": str(path), "per_parameter": True},
    }
    accelerator, _, model, optimizer = prepared(layout, config, gradient_accumulation_steps=2)
    for number in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, mine(batch(number))))
            if number < 4:  # and the last by the hook
                clip_all(accelerator, model)
            optimizer.step()
            optimizer.zero_grad()
    dist.barrier()
    lines = [json.loads(line) for line in path.read_text().splitlines()]

    assert [line["step"] for line in lines] == [0, 1, 2]
    assert list(lines[0]["parameters"]) == ["body.weight", "body.bias", "head.weight", "head.bias"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.jsonl"]


@pytest.mark.ranks(2)
def test_local_sgd() -> None:
    """Every rank clips its own gradient there, and no collective is left waiting."""
    from accelerate.local_sgd import LocalSGD

    accelerator, _, model, optimizer = prepared(
        "ddp",
        # Replicas that part on purpose: with the check the first step would be an error.
        {"policy": {"name": "global_norm", "max_norm": 0.2}, "verify_replicas": "never"},
    )
    plains = [make(), make()]
    references = [Reference(plain, sgd(plain)) for plain in plains]
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2) as local:
        for number in range(4):
            by_norm(accelerator, model, optimizer, mine(batch(number)))
            local.step()
            for half, reference in zip(batch(number).chunk(2), references, strict=True):
                policy = {"name": "global_norm", "max_norm": 0.2}
                reference.update(policy, loss_of(reference.model, half))
            if number % 2:
                with torch.no_grad():
                    for a, b in zip(*(plain.parameters() for plain in plains), strict=True):
                        a.copy_((a + b) / 2)
                        b.copy_(a)

    same(whole(model), whole(plains[0]))


# ---- distclip run, within a rank -----------------------------------------------------------------


def enabled(layout: str) -> Any:
    """An Accelerator of a class of its own, which `enable` may change."""
    from accelerate import Accelerator

    from distclip.config import Config
    from distclip.integrations import accelerate as integration

    start(layout)
    own = type("Own", (Accelerator,), {})
    integration.enable(SimpleNamespace(Accelerator=own), Config(policy=Halve()))
    return own()


@pytest.mark.ranks(1, 2)
@LAYOUTS
def test_enable_attaches_at_prepare(layout: str) -> None:
    accelerator = enabled(layout)
    model, plain = make(), make()
    model, optimizer = accelerator.prepare(model, sgd(model))
    by_hook(accelerator, model, optimizer, mine(batch(0)))
    Reference(plain, sgd(plain)).update(0.5, loss_of(plain, batch(0)))
    same(whole(model), whole(plain))


@pytest.mark.ranks(2)
def test_enable_attaches_where_only_an_optimizer_is_prepared() -> None:
    accelerator = enabled("ddp")
    model, plain = make(), make()
    optimizer = accelerator.prepare_optimizer(sgd(model))
    by_hook(accelerator, model, optimizer, batch(0))
    Reference(plain, sgd(plain)).update(0.5, loss_of(plain, batch(0)))
    same(whole(model), whole(plain))
    # Nobody asks for a model that is only evaluated to be distributed.
    assert accelerator.prepare_model(make(), evaluation_mode=True) is not None


@pytest.mark.ranks(1)
def test_enable_leaves_a_policy_of_the_script_alone() -> None:
    accelerator = enabled("ddp")
    handle = distclip.accelerate.attach(accelerator, policies.measure())
    model = make()
    accelerator.prepare(model, sgd(model))
    assert accelerator._distclip is handle


# ---- the step itself -----------------------------------------------------------------------------


def stepping(skips: Iterable[bool] | None = None) -> Callable[..., Any]:
    """A `clip` that halves, or skips as told."""
    plan = None if skips is None else iter(skips)

    def clip(optimizer: torch.optim.Optimizer) -> Any:
        def decide(loss_scale: Tensor | None, found_inf: Tensor | None, coming: Any) -> Any:
            if plan is not None:
                return SimpleNamespace(skipped=torch.tensor(next(plan)))
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(0.5)
            return None

        return decide

    return clip


class Counting(torch.optim.SGD):
    """Counts its steps in the parameter group, gradients or not, as schedule-free ones do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_a_skip_gives_group_counters_back() -> None:
    model = make()
    optimizer = Counting(model.parameters(), lr=LR)
    skipped: list[Any] = []
    StepHandle(optimizer, stepping([False, True, False])(optimizer), skipped.append)
    for _ in range(3):
        loss_of(model, batch(0)).backward()
        optimizer.step()

    assert optimizer.param_groups[0]["k"] == 2
    assert skipped == [False, True, False]


def test_lbfgs_is_clipped_at_each_evaluation() -> None:
    def train(handled: bool) -> dict[str, Tensor]:
        model = make()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        if handled:
            StepHandle(optimizer, stepping()(optimizer))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(0))
            (loss if handled else loss * 0.5).backward()
            return loss

        optimizer.step(closure)
        return whole(model)

    same(train(True), train(False))


@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_skip_within_a_closure(by_keyword: bool) -> None:
    model = make()
    before = whole(model)
    optimizer = adamw(model)
    StepHandle(optimizer, stepping([True])(optimizer))
    closure = lambda: loss_of(model, batch(0)).backward()  # noqa: E731
    optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)

    same(whole(model), before, 0.0)
    assert not optimizer.state
    assert all(p.grad is not None for p in model.parameters())


def test_a_step_that_raised_does_not_bring_old_gradients_back() -> None:
    model = make()
    optimizer = sgd(model)
    StepHandle(optimizer, stepping([True, False])(optimizer))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(interrupt)
    (loss_of(model, batch(0)) * math.nan).backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    hook.remove()
    optimizer.zero_grad()
    loss_of(model, batch(0)).backward()
    optimizer.step()

    assert all(torch.isfinite(p).all() for p in model.parameters())


class Idle(torch.optim.AdamW):
    """Stands for a fused kernel on an accelerator: notes what it is told."""

    def step(self, closure: Any = None) -> Any:
        self.told = getattr(self, "found_inf", None)


@pytest.mark.parametrize("scaler", [False, True])
def test_several_handles_take_their_found_inf_back(scaler: bool) -> None:
    optimizer = Idle(make().parameters(), fused=True)
    flag = SimpleNamespace(skipped=torch.zeros((), dtype=torch.bool, device="meta"))
    skipped: list[Any] = []
    handles = [StepHandle(optimizer, lambda *_: flag, skipped.append) for _ in range(2)]
    for _ in range(2):
        if scaler:
            optimizer.found_inf = theirs = torch.zeros((), device="meta")
        optimizer.step()
        assert isinstance(optimizer.told, Tensor)
        assert all(isinstance(each, Tensor) for each in skipped)
        if scaler:
            assert optimizer.found_inf is theirs
            del optimizer.found_inf
        assert not hasattr(optimizer, "found_inf")
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert optimizer.told is None


@pytest.mark.ranks(1)
def test_a_wrapped_optimizer_is_refused_with_the_mend() -> None:
    accelerator = start("ddp")
    model = make()
    model, optimizer = accelerator.prepare(model, sgd(model))
    with pytest.raises(ConfigurationError, match="AcceleratedOptimizer runs no step hooks"):
        distclip.GradClipper(model, Halve()).attach(optimizer)


# ---- launches ------------------------------------------------------------------------------------


SCRIPT = Path(__file__).parent / "scripts" / "train_variants.py"


def run(folder: Path, command: Sequence[str], out: str = "result") -> tuple[dict[str, Any], str]:
    """Start a script; its result and what it wrote to stderr."""
    # Nothing of the surrounding run, which may itself be a launched one, reaches the ranks.
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "FSDP_", "DISTCLIP_", "TORCHELASTIC_"))
        and name not in {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    }
    environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = folder / f"{out}.json"
    done = subprocess.run(
        [sys.executable, "-m", *command, str(SCRIPT), str(result)],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return (json.loads(result.read_text()) if result.is_file() else {}), done.stderr


def distclip_run(policy: str) -> list[str]:
    return ["distclip", "run", "--config", str(ROOT / f"configs/policies/{policy}.yaml")]


def launch(config: Path, ranks: int, policy: str, *options: str) -> list[str]:
    launcher = ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    return [*launcher, "--num_processes", str(ranks), *options, "-m", *distclip_run(policy)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The result of the script in one process, without a launcher, under a policy."""
    folder = tmp_path_factory.mktemp("alone")
    known: dict[str, dict[str, Any]] = {}

    def result(policy: str) -> dict[str, Any]:
        if policy not in known:
            known[policy], stderr = run(folder, distclip_run(policy), out=policy)
            assert known[policy], stderr
            assert known[policy]["ranks"] == 1
        return known[policy]

    return result


@pytest.mark.parametrize(
    ("config", "ranks", "policy", "kind"),
    [
        ("ddp_cpu", 2, "agc", "MULTI_CPU"),
        ("fsdp2_cpu", 3, "agc", "FSDP"),
        ("fsdp2_cpu", 2, "global_norm", "FSDP"),
        ("fsdp1_cpu", 2, "agc", "FSDP"),
        ("fsdp1_cpu", 3, "global_norm", "FSDP"),
    ],
)
def test_a_launch_trains_as_one_process(
    tmp_path: Path,
    alone: Callable[[str], dict[str, Any]],
    config: str,
    ranks: int,
    policy: str,
    kind: str,
) -> None:
    path = ROOT / "configs" / "accelerate" / f"{config}.yaml"
    result, stderr = run(tmp_path, launch(path, ranks, policy))
    assert result, stderr
    assert (result.pop("ranks"), result.pop("kind")) == (ranks, kind)
    assert stderr.count("the script calls clip_grad_norm_(max_norm=1e-09)") == 1
    reference = alone(policy)
    for variant, weights in result.items():
        found, wanted = torch.tensor(weights), torch.tensor(reference[variant])
        error = (found - wanted).norm() / wanted.norm()
        assert error <= (1e-2 if variant == "bf16" else 1e-6), variant
    assert result["bf16"] != result["fused"]
    # The policy acts, and acts alike, however the script says it.
    assert result["parts"] != result["norm"]
    for variant in ("value", "never", "accumulate"):
        found, wanted = torch.tensor(result[variant]), torch.tensor(result["norm"])
        assert (found - wanted).norm() <= 1e-6 * wanted.norm(), variant


def test_one_process_does_what_the_oracle_says(alone: Callable[[str], dict[str, Any]]) -> None:
    for name, policy in {
        "agc": {"by_name": {"head.*": None}, "default": {"name": "agc", "clip_factor": 0.01}},
        "global_norm": {"name": "global_norm", "max_norm": 1.0},
    }.items():
        torch.manual_seed(0)
        layers = {"body": nn.Linear(13, 33), "middle": nn.Linear(33, 7), "head": nn.Linear(7, 1)}
        model = nn.ModuleDict(layers)
        reference = Reference(model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9))
        data = torch.Generator().manual_seed(1)
        for _ in range(20):
            x = torch.randn(24, 13, generator=data)
            found = model["head"](model["middle"](torch.tanh(model["body"](x))))
            target = x[:, :1].sin() * 9 + x[:, 1:2]
            reference.update(policy, nn.functional.mse_loss(found, target))
        wanted = torch.cat([p.detach().flatten() for p in model.parameters()])
        error = (torch.tensor(alone(name)["norm"]) - wanted).norm()
        assert error <= 1e-6 * wanted.norm(), name


def test_ranks_that_are_not_there_are_refused(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "accelerate" / "fsdp2_cpu.yaml").read_text()
    config = tmp_path / "silent.yaml"
    config.write_text(text.replace("use_cpu: true", "use_cpu: false"))
    result, stderr = run(tmp_path, launch(config, 2, "agc"))

    assert not result
    assert "2 processes were launched for FSDP2" in stderr
    assert "pass --cpu" in stderr
