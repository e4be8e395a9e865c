"""Accelerate: every way through an update clips once, on one rank as on many.

The tests run inside the ranks of a warm pool, where an ``Accelerator`` costs milliseconds.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

pytest.importorskip("accelerate")
from distclip import policies
from tests.integrations.accelerated import (
    LAYOUTS,
    Halve,
    Reference,
    batch,
    by_abandoning,
    by_both,
    by_hand,
    by_hook,
    by_norm,
    by_presence,
    by_value,
    clip_all,
    counted,
    local_gradients,
    loss_of,
    make,
    mine,
    prepared,
    same,
    sgd,
    whole,
)

LR = 0.5


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


def by_torch_backward(a: Any, m: Any, o: Any, x: Tensor) -> None:
    o.zero_grad()
    loss_of(m, x).backward()
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
        if any(isinstance(p, DTensor) for p in m.parameters()):
            m.unshard()  # Accelerate 1.10 has the root sharded again after its forward
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
