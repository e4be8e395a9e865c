"""Accelerate: attaching, refusing, removing, logging, and what ``enable`` does."""

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("accelerate")
import distclip
from distclip import policies
from distclip.errors import ConfigurationError, DistclipError
from tests.helpers.logs import logged
from tests.integrations.accelerated import (
    LAYOUTS,
    Halve,
    Reference,
    SkipAbove,
    batch,
    by_both,
    by_hook,
    by_norm,
    clip_all,
    loss_of,
    make,
    mine,
    prepared,
    same,
    sgd,
    start,
    whole,
)

LR = 0.5


@pytest.mark.ranks(1)
def test_layerwise_optimizers_of_transformers_are_refused() -> None:
    pytest.importorskip("transformers")
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    accelerator = start("ddp")
    distclip.accelerate.attach(accelerator, Halve())
    with pytest.raises(DistclipError, match="without 'layerwise'"):
        accelerator.prepare(make(), LayerWiseDummyOptimizer({}))


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
def test_parameters_outside_prepared_models_are_said_to_have_no_names() -> None:
    accelerator = start("ddp")
    handle = distclip.accelerate.attach(accelerator, Halve())
    model = make()
    optimizer = accelerator.prepare_optimizer(sgd(model))
    with logged("distclip") as messages:
        by_hook(accelerator, model, optimizer, batch(0))

    assert any("4 of 4 parameters are in no model" in message for message in messages)
    assert handle.last_report.names[0] == "unnamed.0"


@pytest.mark.ranks(2)
def test_the_script_s_own_clipping_is_announced_once_by_the_main_process() -> None:
    accelerator, _, model, optimizer = prepared("ddp", Halve())
    with logged("distclip.accelerate") as messages:
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


@pytest.mark.ranks(1)
def test_a_wrapped_optimizer_is_refused_with_the_mend() -> None:
    accelerator = start("ddp")
    model = make()
    model, optimizer = accelerator.prepare(model, sgd(model))
    with pytest.raises(ConfigurationError, match="AcceleratedOptimizer runs no step hooks"):
        distclip.GradClipper(model, Halve()).attach(optimizer)
