"""Overlap: the hooks on parameters, and what they keep alive."""

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distclip import GradClipper
from tests.engine.test_matrix import build
from tests.statistics.overlapping import TIGHT, backward, clip_and_check, hooks_on, make, used, warm


@pytest.mark.ranks(2)
def test_hooks_go_with_the_clipper() -> None:
    model = make()
    gc.collect()
    gc.disable()  # no cycle may be needed for it
    try:
        clipper = warm(model)
        assert hooks_on(model) == len(list(model.parameters()))
        gone = weakref.ref(clipper._session.early)  # type: ignore[arg-type]
        del clipper
        assert gone() is None
        assert hooks_on(model) == 0
    finally:
        gc.enable()
    backward(model, 1)


@pytest.mark.ranks(2)
def test_hooks_of_an_attached_clipper() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradClipper(model, build(TIGHT), overlap=True).attach(optimizer)
    gc.collect()
    assert hooks_on(model) == len(list(model.parameters()))
    del optimizer
    gc.collect()
    assert hooks_on(model) == 0


@pytest.mark.ranks(2)
def test_hooks_keep_no_model_alive() -> None:
    model = make()
    clipper = warm(model)
    early, parameter = clipper._session.early, weakref.ref(model.head.bias)
    del clipper, model
    gc.collect()
    assert parameter() is None
    assert early is not None


@pytest.mark.ranks(2)
def test_close() -> None:
    model = make()
    clipper = warm(model)
    backward(model, 1)
    clipper.close()
    clipper.close()
    assert hooks_on(model) == 0
    clip_and_check(clipper, model, early=0)
    GradClipper(model, build(TIGHT)).close()


@pytest.mark.ranks(2)
def test_a_second_clipper_of_the_same_parameters() -> None:
    model = make()
    first = warm(model)
    second = warm(model, document={"name": "agc", "clip_factor": 0.01})
    assert hooks_on(model) == 2 * len(list(model.parameters()))
    backward(model, 1)
    clip_and_check(first, model, early=used(model))
    clip_and_check(second, model, {"name": "agc", "clip_factor": 0.01}, early=0)  # changed by first
    del first
    model.zero_grad()
    backward(model, 2)
    clip_and_check(second, model, {"name": "agc", "clip_factor": 0.01}, early=used(model))


@pytest.mark.ranks(2)
def test_a_collection_inside_a_hook_removes_nothing_there() -> None:
    """A dropped clipper in a cycle, collected while FSDP2 walks over the hooks."""
    model = make()
    clipper = warm(model)
    other = GradClipper(model, build(TIGHT), overlap=True)
    other.loop = other  # type: ignore[attr-defined]
    early = clipper._session.early
    note = early.note  # type: ignore[union-attr]

    def collecting(position: int) -> None:
        gc.collect()
        note(position)

    early.note = collecting  # type: ignore[union-attr, method-assign]
    gc.disable()
    try:
        del other
        backward(model, 1)
    finally:
        gc.enable()
    clip_and_check(clipper, model, early=used(model))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("where", ["backward", "clip"])
def test_an_error_in_measuring_early_hangs_nobody(where: str, monkeypatch: Any) -> None:
    """On rank 0 only. It goes on without; the other rank still measures early."""
    model = make()
    clipper = warm(model)
    broken = dist.get_rank() == 0

    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory, say")

    if broken:
        name = "_measure" if where == "backward" else "_untouched"
        monkeypatch.setattr(clipper._session.early, name, fails)
    backward(model, 1)
    context: Any = contextlib.nullcontext()
    if broken:
        context = pytest.warns(UserWarning, match="RuntimeError: out of memory, say")
    with context:
        clip_and_check(clipper, model, early=None)
    model.zero_grad()
    backward(model, 2)
    clip_and_check(clipper, model, early=0 if broken else used(model))
    assert hooks_on(model) == (0 if broken else len(list(model.parameters())))


@pytest.mark.ranks(2)
def test_hooks_of_the_user_beside_it() -> None:
    """One before and one after, that change what they see."""
    model = make()
    before = model.body.bias.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))
    clipper = warm(model)
    after = model.middle.bias.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))
    for number in (1, 2):
        model.zero_grad()
        backward(model, number)
        clip_and_check(clipper, model)
    before.remove()
    after.remove()
    model.zero_grad()
    backward(model, 3)
    clip_and_check(clipper, model, early=used(model))
