"""Overlap: gradients that are changed between backward and clip, and gradient scalers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distclip import ClipReport, GradClipper
from distclip.statistics import early
from tests.engine.test_matrix import build
from tests.statistics.overlapping import (
    LOOSE,
    TIGHT,
    backward,
    clip_and_check,
    gradients_of,
    loss_of,
    make,
    oracle,
    used,
    warm,
)


@torch.no_grad()
def _no_grad(edit: Callable[[], Any]) -> None:
    edit()


def _unscale(model: nn.Module) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))


def _grads(model: nn.Module) -> list[Any]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _locals(model: nn.Module) -> list[Tensor]:
    return [each.to_local() for each in _grads(model)]


def _set(parameter: Any, gradient: Any) -> None:
    parameter.grad = gradient


def _rewrapped(parameter: Any, shard: Tensor) -> None:
    parameter.grad = DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


EDITS: dict[str, Callable[[Any], Any]] = {
    # torch counts these
    "grad.mul_": lambda m: m.body.weight.grad.mul_(3),
    "no_grad, grad.mul_": lambda m: _no_grad(lambda: m.body.weight.grad.mul_(3)),
    "grad.detach().mul_": lambda m: m.body.weight.grad.detach().mul_(3),
    "grad.clamp_": lambda m: m.body.weight.grad.clamp_(-1e-3, 1e-3),
    "grad.copy_": lambda m: m.body.weight.grad.copy_(m.body.weight.grad * 3),
    "to_local().mul_": lambda m: m.body.weight.grad.to_local().mul_(3),
    "no_grad, to_local().mul_": lambda m: _no_grad(lambda: m.body.weight.grad.to_local().mul_(3)),
    "one local element": lambda m: _one_element(m.body.weight.grad.to_local()),
    "foreach, local tensors": lambda m: torch._foreach_mul_(_locals(m), 3.0),
    # replaced
    "grad = ...": lambda m: _set(m.body.weight, m.body.weight.grad * 3),
    "grad = None": lambda m: _set(m.body.weight, None),
    "grad = DTensor of a copy": lambda m: _rewrapped(
        m.body.weight, m.body.weight.grad.to_local() * 3
    ),
    "local.data = ...": lambda m: setattr(
        m.body.weight.grad._local_tensor, "data", m.body.weight.grad._local_tensor * 3
    ),
    # torch does not count these; samples show them
    "foreach, DTensors": lambda m: torch._foreach_mul_(_grads(m), 3.0),
    "foreach, some DTensors": lambda m: torch._foreach_mul_([m.head.bias.grad], 3.0),
    "GradScaler.unscale_": _unscale,
    "torch clip_grad_norm_": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e-3),
    "torch clip_grad_value_": lambda m: nn.utils.clip_grad_value_(m.parameters(), 1e-4),
    ".data.mul_": lambda m: m.body.weight.grad.data.mul_(3),
    "to_local().data.mul_": lambda m: m.body.weight.grad.to_local().data.mul_(3),
    "numpy": lambda m: [each.numpy().__imul__(3) for each in _locals(m)],
    "all_reduce": lambda m: dist.all_reduce(m.body.weight.grad.to_local()[:8]),
}


def _one_element(shard: Tensor) -> None:
    if shard.numel():
        shard.view(-1)[5] += 1.0


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("edit", EDITS)
def test_changed_gradients_are_measured_again(edit: str) -> None:
    model = make()
    clipper = warm(model)
    backward(model, 1)
    norms = {n: None if g is None else g.norm() for n, g in gradients_of(model).items()}
    EDITS[edit](model)
    changed = {n: None if g is None else g.norm() for n, g in gradients_of(model).items()}
    if dist.get_world_size() > 1 or edit != "all_reduce":
        assert norms != changed
    clip_and_check(clipper, model)
    model.zero_grad()
    backward(model, 2)
    clip_and_check(clipper, model, early=used(model))


@pytest.mark.ranks(2)
def test_what_shows_in_one_group_leaves_the_others_early() -> None:
    model = make()
    clipper = warm(model)
    backward(model, 1)
    model.body.weight.grad.mul_(3)
    clip_and_check(clipper, model, early=used(model) - 2)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", ["both", "shard", "wrapper"])
def test_another_tensor_with_the_same_samples(way: str) -> None:
    """Neither address, nor versions, nor samples tell: only that it is another tensor."""
    model = make()
    clipper = warm(model)
    backward(model, 1)
    gradient = model.body.weight.grad
    shard = gradient.to_local()
    unsampled(shard.data).add_(5.0)
    twin = shard.data
    while twin._version < shard._version:
        twin.add_(0.0)
    if way == "both":
        _rewrapped(model.body.weight, twin)
    elif way == "shard":
        gradient._local_tensor = twin
    else:
        model.body.weight.grad = DTensor(
            gradient._local_tensor, gradient._spec, requires_grad=False
        )
    replaced = model.body.weight.grad
    assert replaced._version == gradient._version
    assert replaced._local_tensor._version == shard._version
    assert replaced._local_tensor.data_ptr() == shard.data_ptr()
    clip_and_check(clipper, model, early=used(model) - 2)


@pytest.mark.ranks(2)
def test_an_element_that_only_its_version_tells_of() -> None:
    for changed in (lambda g: g.to_local(), lambda g: None):
        model = make()
        clipper = warm(model)
        backward(model, 1)
        gradient = model.body.weight.grad
        shard = changed(gradient)
        if shard is not None:  # counted on the local tensor
            unsampled(shard).add_(5.0)
        else:  # on the DTensor only
            keep = torch.ones_like(gradient)
            unsampled(keep.to_local()).add_(5.0)
            gradient.mul_(keep)
        clip_and_check(clipper, model, early=used(model) - 2)


@pytest.mark.ranks(2)
def test_what_cannot_be_seen() -> None:
    """As docs/overlap.md says: an uncounted change that misses all samples. Not without overlap."""
    model = make()
    clipper, plain = warm(model, document=LOOSE), GradClipper(model, build(LOOSE))
    backward(model, 1)
    unsampled(model.body.weight.grad.to_local().data).add_(5.0)
    stale, right = clipper.clip_().total_norm.item(), plain.clip_().total_norm.item()
    assert right > 5.0 > stale


def unsampled(shard: Tensor) -> Tensor:
    """The second of the elements of a contiguous tensor; the first is a sample."""
    assert shard.numel() >= 2 * early.SAMPLES
    return shard.view(-1)[1:2]


@pytest.mark.ranks(2)
def test_an_uncounted_change_that_shows_in_one_group_only() -> None:
    """Who changes one so may have changed the others so: none of them is trusted."""
    model = make()
    clipper = warm(model)
    backward(model, 1)
    unsampled(model.body.weight.grad.to_local().data).add_(5.0)
    model.middle.weight.grad.data.mul_(3)
    clip_and_check(clipper, model, early=0)


@pytest.mark.ranks(2)
def test_gradients_that_samples_cannot_vouch_for() -> None:
    """All samples are zero: multiplied or not, they would look the same."""
    model = make()
    clipper = warm(model, document=LOOSE)
    for _ in range(2):
        model.zero_grad()
        (model(torch.zeros(9, dtype=torch.long)) * 0.0).sum().backward()
        clip_and_check(clipper, model, LOOSE, early=0)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_under_a_gradient_scaler(fused: bool, unscaled: bool) -> None:
    """Attached. A fused optimizer is given scaled gradients: their norms come early."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused, foreach=not fused)
    reports: list[ClipReport] = []
    clipper = GradClipper(
        model, build(TIGHT), overlap=True, sinks=[lambda _, report: reports.append(report)]
    )
    clipper.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, number)).backward()
        scale = scaler.get_scale()
        want = oracle(
            TIGHT,
            model,
            {n: None if g is None else g / scale for n, g in gradients_of(model).items()},
        )
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert reports[-1].total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
        assert reports[-1].coefficient.item() == pytest.approx(want.coefficient, rel=1e-5)
        early = fused and not unscaled and number > 0
        assert clipper.measured_early == (used(model) if early else 0)


@pytest.mark.ranks(2)
def test_an_overflow_under_a_gradient_scaler() -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    GradClipper(model, build(TIGHT), overlap=True).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        optimizer.zero_grad()
        factor = math.inf if number == 2 else 1.0
        before = [p.detach().to_local().clone() for p in model.parameters()]
        scaler.scale(loss_of(model, number) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        after = [p.detach().to_local() for p in model.parameters()]
        assert all(map(torch.equal, before, after)) == (number == 2)
