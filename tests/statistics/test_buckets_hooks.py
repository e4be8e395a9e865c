"""Measuring in DDP's buckets beside other hooks, other clippers, copies and errors."""

import contextlib
import copy
import gc
import io
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from distclip import ConfigurationError, GradClipper, NonFiniteGradientError, policies
from distclip.statistics import buckets
from tests.engine.test_matrix import build
from tests.statistics.bucketed import all_of, clip_and_check, make, warm
from tests.statistics.overlapping import TIGHT, backward, gradients_of


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
