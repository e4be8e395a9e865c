"""Norms of DDP's buckets: right however late the reduction is, and whatever happens after it."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from distclip import ConfigurationError, GradClipper, NonFiniteGradientError, policies
from distclip.statistics import buckets
from tests.engine.test_matrix import build
from tests.statistics import overlapping
from tests.statistics.overlapping import LOOSE, TIGHT, Model, backward, gradients_of, used

AGC = {"name": "agc", "clip_factor": 0.01}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "unused views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "static views": {"static_graph": True, "gradient_as_bucket_view": True},
}


def make(spare: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """In several buckets; ``spare`` is there for modules that may leave it out."""
    torch.manual_seed(0)
    model = Model().to(dtype)
    if not spare:
        del model.spare
    return DistributedDataParallel(model, bucket_cap_mb=0.004, **options)


def clip_and_check(clipper: GradClipper, model: Any, *args: Any, **options: Any) -> None:
    overlapping.clip_and_check(clipper, model.module, *args, **options)


def warm(model: Any, document: Any = TIGHT, spare: bool = False) -> GradClipper:
    """A clipper after one step: DDP makes its buckets anew after the first."""
    clipper = GradClipper(model, build(document), overlap=True)
    for number in range(2):
        model.zero_grad()
        backward(model, 90 + number, spare)
        clip_and_check(clipper, model, document)
    model.zero_grad()
    return clipper


def all_of(model: Any) -> int:
    return sum(1 for _ in model.parameters())


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


# ---- other hooks, other clippers -----------------------------------------------------------------


@pytest.mark.ranks(2)
@pytest.mark.parametrize("hook", [default_hooks.fp16_compress_hook, default_hooks.allreduce_hook])
def test_a_hook_that_is_registered_later_is_kept(hook: Any) -> None:
    model, other = make(), make()
    clipper = GradClipper(model, build(TIGHT), overlap=True)
    for each in (model, other):
        each.register_comm_hook(dist.group.WORLD, hook)
    for number in range(3):
        for each in (model, other):
            each.zero_grad()
            backward(each, number)
        want = gradients_of(other)
        assert all(torch.equal(g, want[name]) for name, g in gradients_of(model).items())  # type: ignore[arg-type]
        clip_and_check(clipper, model)
    assert clipper.measured_early == all_of(model)
    with pytest.raises(RuntimeError, match="only be called once"):
        model.register_comm_hook(None, hook)


@pytest.mark.ranks(2)
def test_what_cannot_be_followed_is_named() -> None:
    taken = make()
    taken.register_comm_hook(None, default_hooks.allreduce_hook)
    sparse = DistributedDataParallel(
        nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))
    )
    for model, why in ((taken, "before register_comm_hook"), (sparse, "use sparse=False")):
        with pytest.warns(UserWarning, match=why):
            clipper = GradClipper(model, policies.global_norm(1.0), overlap=True)
        clipper.close()
    model = make()
    clipper = GradClipper(model, policies.global_norm(1.0), overlap=True)
    with (
        model.join(divide_by_initial_world_size=False),
        pytest.raises(ConfigurationError, match="divide_by_initial_world_size=True"),
    ):
        backward(model, 0)
    with pytest.raises(ConfigurationError, match=r"wrap the copied \.module"):
        model.register_comm_hook.__deepcopy__({})(None, default_hooks.allreduce_hook)
    assert copy.deepcopy(model.register_comm_hook) is buckets._registered_on_copy


@pytest.mark.ranks(2)
def test_a_followed_module_is_saved_and_copied() -> None:
    model = make()
    clipper = warm(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    copied = copy.deepcopy(model)
    clipper.close()
    for each in (loaded, copied):
        assert all(map(torch.equal, each.parameters(), model.parameters()))
        with pytest.raises(ConfigurationError, match=r"wrap the copied \.module"):
            each.register_comm_hook(None, default_hooks.allreduce_hook)
        with pytest.warns(UserWarning, match=r"a copy of one whose buckets are followed"):
            GradClipper(each, policies.global_norm(1.0), overlap=True)


@pytest.mark.ranks(2)
def test_uneven_inputs() -> None:
    """In ``join`` a rank that has no more inputs calls the hook outside of any backward."""
    model = make()
    clipper = warm(model)
    with model.join():
        for number in range(2 + dist.get_rank()):
            backward(model, number)
    clipper.close()


@pytest.mark.ranks(2)
def test_closed_forgotten_and_built_again() -> None:
    model = make()
    first = warm(model)
    second = warm(model)
    backward(model, 1)
    clip_and_check(second, model, early=all_of(model))
    second.close()
    model.zero_grad()
    backward(model, 2)
    clip_and_check(first, model, early=all_of(model))
    del first, second
    gc.collect()
    model.zero_grad()
    backward(model, 3)
    assert not buckets._relays[model].owners
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warm(model)


@pytest.mark.ranks(2)
def test_an_error_in_measuring_hangs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    clipper = warm(model)

    def broken(*args: Any) -> None:
        raise ValueError("out of luck")

    if dist.get_rank() == 1:
        monkeypatch.setattr(buckets.Bucket, "_measured", broken)
    backward(model, 1)
    warned = pytest.warns(UserWarning, match="ValueError: out of luck")
    with warned if dist.get_rank() == 1 else contextlib.nullcontext():
        clipper.clip_()
    model.zero_grad()
    backward(model, 2)
    clip_and_check(clipper, model)


@pytest.mark.ranks(2)
def test_nan_is_found() -> None:
    model = make()
    clipper = warm(model)
    backward(model, 1, factor=float("nan") if dist.get_rank() else 1.0)
    with pytest.raises(NonFiniteGradientError):
        clipper.clip_()
