"""Norms of DDP's buckets: right however late the reduction is, and whatever happens after it."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distclip import GradClipper, policies
from tests.engine.test_matrix import build
from tests.statistics.bucketed import AGC, KINDS, all_of, clip_and_check, make, warm
from tests.statistics.overlapping import LOOSE, TIGHT, backward, used

_worker = ThreadPoolExecutor(1)


def slow(state: object, bucket: Any) -> Any:
    """Reduces late, on another thread: until then the bucket holds this rank's gradients."""
    future: Any = torch.futures.Future()
    buffer = bucket.buffer()

    def run() -> None:
        time.sleep(0.02)
        average = buffer / dist.get_world_size()
        dist.all_reduce(average)
        buffer.copy_(average)
        future.set_result(buffer)

    _worker.submit(run)
    return future


slow.__annotations__.clear()  # torch compares them with types


# ---- right, and early ----------------------------------------------------------------------------


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("kind", KINDS)
def test_right_and_early(kind: str) -> None:
    for document in (TIGHT, LOOSE, AGC):
        model = make(**KINDS[kind])
        clipper = warm(model, document)
        for number in (1, 2):
            model.zero_grad(set_to_none=number == 1)
            backward(model, number)
            clip_and_check(clipper, model, document, early=all_of(model))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", KINDS)
def test_however_late_the_reduction_is(kind: str) -> None:
    model = make(**KINDS[kind])
    clipper = GradClipper(model, build(TIGHT), overlap=True)
    model.register_comm_hook(None, slow)
    for number in range(3):
        model.zero_grad()
        backward(model, number)
        clip_and_check(clipper, model, early=None if number == 0 else all_of(model))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_gradients_are_those_of_ddp_to_the_bit(dtype: torch.dtype) -> None:
    for kind in ("plain", "views"):
        model, other = make(dtype=dtype, **KINDS[kind]), make(dtype=dtype, **KINDS[kind])
        clipper = GradClipper(model, policies.measure(), overlap=True)
        for number in range(3):
            for each in (model, other):
                each.zero_grad()
                backward(each, number)
            for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
                assert torch.equal(one.grad, two.grad), name
            clip_and_check(clipper, model, {"name": "measure"})
        assert clipper.measured_early == all_of(model)


@pytest.mark.ranks(2)
def test_the_clip_reads_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from distclip.kernels import measuring

    model = make()
    clipper = warm(model, LOOSE)
    backward(model, 1)
    read: list[int] = []
    norms = measuring.norms

    def counted(tensors: Any, *args: Any, **options: Any) -> Tensor:
        read.append(sum(each is not None for each in tensors))
        return norms(tensors, *args, **options)

    monkeypatch.setattr(measuring, "norms", counted)
    clipper.clip_()
    assert sum(read) == 0


# ---- accumulation, several backwards, unused parameters ------------------------------------------


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", KINDS)
def test_accumulation(kind: str) -> None:
    model = make(**KINDS[kind])
    clipper = warm(model)
    for synced in (False, True):
        model.zero_grad()
        for micro in range(3):
            wait = synced or micro == 2
            with contextlib.nullcontext() if wait else model.no_sync():
                backward(model, 10 + micro)
        clip_and_check(clipper, model, early=all_of(model))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", ["plain", "views"])
def test_what_comes_after_the_reduction_counts(kind: str) -> None:
    """A backward without synchronisation adds to gradients that were measured."""
    model = make(**KINDS[kind])
    clipper = warm(model)
    backward(model, 1)
    with model.no_sync():
        backward(model, 2)
    norms = {name: p.grad.double().norm().item() for name, p in model.named_parameters()}
    report = clipper.clip_()
    assert dict(report.parameter_norms) == {
        name.removeprefix("module."): pytest.approx(norm, rel=1e-6) for name, norm in norms.items()
    }
    assert clipper.measured_early == 0


@pytest.mark.ranks(3)
@pytest.mark.parametrize("kind", ["unused", "unused views"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_parameters_that_no_rank_uses(kind: str, set_to_none: bool) -> None:
    model = make(spare=True, **KINDS[kind])
    clipper = warm(model, spare=True)
    for number, spare in enumerate((True, False, True, True, False, False), start=1):
        model.zero_grad(set_to_none=set_to_none)
        backward(model, number, spare)
        clip_and_check(clipper, model)
        assert clipper.measured_early >= (used(model.module, spare=True) if spare else 1)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("kind", ["unused", "unused views"])
def test_gradients_that_ddp_does_not_write(kind: str) -> None:
    """Different on each rank, and then used by none: DDP reduces a copy, and leaves them alone."""
    model = make(spare=True, **KINDS[kind])
    clipper = warm(model, spare=True)
    backward(model, 1, spare=True)
    for parameter in model.module.spare.parameters():
        parameter.grad.mul_(1.0 + dist.get_rank())
    backward(model, 2, spare=False)
    norms = {n.removeprefix("module."): p.grad.double().norm() for n, p in model.named_parameters()}
    report = clipper.clip_()
    for name, norm in norms.items():
        assert report.parameter_norms[name] == pytest.approx(norm.item(), rel=1e-6), name


@pytest.mark.ranks(2)
def test_parameters_that_one_rank_uses() -> None:
    model = make(spare=True, find_unused_parameters=True)
    clipper = warm(model, spare=True)
    for number in (1, 2):
        model.zero_grad()
        backward(model, number, spare=dist.get_rank() == 0)
        clip_and_check(clipper, model, early=used(model.module, spare=True))


# ---- changed in between --------------------------------------------------------------------------


def _data(gradients: list[Tensor]) -> None:
    for gradient in gradients:
        gradient.data.mul_(2)


CHANGES: dict[str, Callable[[list[Tensor]], Any]] = {
    "in place": lambda gradients: gradients[3].mul_(3),
    "one element": lambda gradients: gradients[2].view(-1)[0].add_(1),
    "foreach": lambda gradients: torch._foreach_mul_(gradients, 0.5),
    "zeroed": lambda gradients: gradients[0].zero_(),
    "data": _data,
    "numpy": lambda gradients: gradients[1].numpy().__imul__(3),
    "collective": lambda gradients: dist.all_reduce(gradients[1]),
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", ["plain", "views"])
def test_changed(kind: str) -> None:
    for label, change in CHANGES.items():
        model = make(**KINDS[kind])
        clipper = warm(model)
        backward(model, 1)
        change([p.grad for p in model.parameters()])
        try:
            clip_and_check(clipper, model)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from error
        assert clipper.measured_early < all_of(model), label


@pytest.mark.ranks(2)
def test_replaced_and_removed() -> None:
    model = make()
    clipper = warm(model)
    backward(model, 1)
    listed = list(model.parameters())
    listed[0].grad = listed[0].grad * 2
    listed[1].grad = None
    clip_and_check(clipper, model)
    clip_and_check(clipper, model, early=0)


@pytest.mark.ranks(2)
def test_a_scaler_that_unscales() -> None:
    model = make()
    clipper = warm(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert scaler.scale(torch.ones(())) == 4.0
    backward(model, 1, factor=4.0)
    scaler.unscale_(optimizer)
    clip_and_check(clipper, model, early=0)
