"""Accelerate: several models and several optimizers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("accelerate")
import distclip
from distclip.testing import run_on_ranks
from tests.integrations.accelerated import (
    LAYOUTS,
    Halve,
    Reference,
    SkipAbove,
    batch,
    clip_all,
    counted,
    fused,
    loss_of,
    make,
    mine,
    same,
    scaled,
    sgd,
    start,
    whole,
)

LR = 0.5


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
