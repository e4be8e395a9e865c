"""Gradients that are clipped twice in one update, and steps that find none to clip."""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

import distclip
from distclip import ConfigurationError, GradClipper, policies
from tests.helpers.watching import watch
from tests.sharded import mesh_of


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))


def backward(model: nn.Module, factor: float = 1.0) -> None:
    (model(torch.ones(2, 4)).square().sum() * factor).backward()


def steps_of(clipper: GradClipper) -> int:
    states: Any = clipper.state_dict()["states"]
    return int(states[""]["shared"]["steps"])


def heard(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    assert all("distclip" not in each.filename.split("/tests/")[-1] for each in caught)
    return [str(each.message) for each in caught]


# ---- by hand and attached ----


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("twice", [False, True])
def test_by_hand_and_attached_is_one_clip_in_the_policys_memory(twice: bool) -> None:
    model, alone = model_of(), model_of()
    for each in (model, alone):
        fully_shard(each, mesh=mesh_of((dist.get_world_size(),), ("dp",)))
    optimizer, other = SGD(model.parameters(), lr=0.01), SGD(alone.parameters(), lr=0.01)
    counted: list[int] = []
    clipper = GradClipper(
        model, policies.adagc(warmup_steps=2), sinks=[lambda step, _: counted.append(step)]
    )
    single = GradClipper(alone, policies.adagc(warmup_steps=2))
    clipper.attach(optimizer)
    single.attach(other)

    def run() -> None:
        for step in range(4):
            for each in (model, alone):
                each.zero_grad()
                backward(each, 2.0**step)
            report = clipper.clip_()
            if twice:
                assert clipper.clip_() is report
            optimizer.step()
            other.step()

    texts = heard(run)
    assert len(texts) == 1
    assert "attached to an optimizer, and clip_() is called too" in texts[0]
    assert "GradClipper(AdaGC" in texts[0]
    assert counted == [0, 1, 2, 3]
    assert steps_of(clipper) == steps_of(single) == 4
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_clip_after_each_micro_batch_clips_what_has_been_added() -> None:
    model = model_of()
    optimizer = SGD(model.parameters(), lr=0.01)
    norms: list[float] = []
    clipper = GradClipper(
        model, policies.global_norm(0.5), sinks=[lambda _, r: norms.append(r.total_norm.item())]
    )
    clipper.attach(optimizer)

    def run() -> None:
        backward(model)
        clipper.clip_()
        backward(model)
        clipper.clip_()
        backward(model)
        optimizer.step()

    assert len(heard(run)) == 1
    assert len(norms) == 3
    assert all(norm > 0.5 for norm in norms)


def test_a_skip_by_hand_skips_the_attached_step() -> None:
    model = model_of()
    optimizer = SGD(model.parameters(), lr=0.01)
    clipper = GradClipper(model, policies.global_norm(0.5), on_nonfinite="skip")
    clipper.attach(optimizer)
    backward(model, math.nan)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="one of the two is enough"):
        assert clipper.clip_().skipped
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.ranks(2, timeout=20)
def test_a_backward_that_only_one_rank_has_seen_is_clipped_by_all() -> None:
    dense, expert = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))
    distclip.declare_sharded(expert, dist.group.WORLD)
    optimizer = SGD([dense, expert], lr=0.1)
    norms: list[float] = []
    clipper = GradClipper(
        [("dense", dense), ("expert", expert)],
        policies.global_norm(1.0),
        sinks=[lambda _, r: norms.append(r.total_norm.item())],
    )
    clipper.attach(optimizer)

    def run() -> None:
        dense.grad = torch.full((4,), 2.0)
        clipper.clip_()
        if dist.get_rank() == 1:
            expert.grad = torch.full((3,), 5.0)
        optimizer.step()

    heard(run)
    assert norms == pytest.approx([4.0, math.sqrt(1 + 75)], rel=1e-5)


# ---- two that clip the same ----


def test_two_attached_to_the_same_parameters_are_named() -> None:
    model = model_of()
    optimizer = SGD(model.parameters(), lr=0.01)
    first = GradClipper(model, policies.global_norm(1.0))
    handle = first.attach(optimizer)
    second = GradClipper(model[0], policies.value(0.1))
    texts = heard(lambda: second.attach(optimizer))
    assert len(texts) == 1
    assert repr(first) in texts[0]
    assert repr(second) in texts[0]
    assert "'weight' and 1 more" in texts[0]
    handle.remove()
    third = GradClipper(model[1:], policies.value(0.1))
    assert heard(lambda: third.attach(optimizer)) == []
    assert heard(lambda: GradClipper(model, policies.measure()).attach(optimizer)) == []


def test_clippers_of_gone_optimizers_are_no_others() -> None:
    model = model_of()
    kept = GradClipper(model, policies.global_norm(1.0))
    kept.attach(SGD(model.parameters(), lr=0.01))
    again = GradClipper(model, policies.global_norm(1.0))
    assert heard(lambda: again.attach(SGD(model.parameters(), lr=0.01))) == []


BY_HAND: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    "distclip.clip_grad_norm_": lambda m: lambda: distclip.clip_grad_norm_(m.parameters(), 0.5),
    "distclip.clip_grad_value_": lambda m: lambda: distclip.clip_grad_value_(m.parameters(), 0.5),
    "distclip.clip_grad_agc_": lambda m: lambda: distclip.clip_grad_agc_(m.parameters()),
    "GradClipper(Value(clip_value=0.1), 6 parameters)": lambda m: (
        GradClipper(m, policies.value(0.1)).clip_
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_clip_by_somebody_else_before_the_attached_one_is_named_once(name: str) -> None:
    model = model_of()
    optimizer = SGD(model.parameters(), lr=0.01)
    clipper = GradClipper(model, policies.global_norm(0.01))
    clipper.attach(optimizer)
    by_hand = BY_HAND[name](model)

    def run() -> None:
        for _ in range(3):
            model.zero_grad()
            backward(model)
            by_hand()
            optimizer.step()

    texts = heard(run)
    assert len(texts) == 1
    assert f"clipped already since their backward, by {name}" in texts[0]
    assert repr(clipper) in texts[0]


def test_who_is_right_hears_nothing() -> None:
    """Parts of a model, a GAN, measuring, accumulation, trying out policies one after another."""
    model = model_of()
    optimizers = [SGD(part.parameters(), lr=0.01) for part in model]
    parts = [GradClipper(part, policies.global_norm(0.1)) for part in model]
    watched = GradClipper(model, policies.measure())

    def run() -> None:
        for step, part in itertools.product(range(2), parts):
            model.zero_grad()
            backward(model)
            watched.clip_()
            distclip.clip_grad_norm_(model.parameters(), math.inf)
            distclip.grad_norms(model)
            for each in parts:
                each.clip_()
            if step:
                part.clip_()
        handles = [c.attach(o) for c, o in zip(parts, optimizers, strict=True)]
        for _ in range(2):
            model.zero_grad()
            backward(model)
            backward(model)
            watched.clip_()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:  # with the same gradients, on purpose
                optimizer.step()
        for handle in handles:
            handle.remove()
        for clip_value in (0.5, 0.1):
            GradClipper(model, policies.value(clip_value)).clip_()
        distclip.clip_grad_value_(model.parameters(), 0.1)
        backward(model)
        parts[0].attach(optimizers[0])
        optimizers[0].step()
        other = model_of()
        whole = SGD(other.parameters(), lr=0.01)
        GradClipper(other, policies.global_norm(0.01)).attach(whole)
        backward(other)
        distclip.clip_grad_norm_(other.parameters(), 0.1)
        backward(other)
        whole.step()

    assert heard(run) == []


# ---- nothing to clip ----


def test_an_optimizer_in_backward_by_a_hook_is_noticed() -> None:
    model = model_of()
    optimizers = {p: SGD([p], lr=0.1) for p in model.parameters()}

    def hook(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    clipper = GradClipper(model, policies.global_norm(0.1))

    def run() -> None:
        for _ in range(3):
            backward(model)
            clipper.clip_()

    texts = heard(run)
    assert len(texts) == 1
    assert "none of the 6 parameters ('0.weight', '0.bias', '1.weight', ...)" in texts[0]
    assert "6 of them ('0.weight') have a hook of register_post_accumulate_grad_hook" in texts[0]


@pytest.mark.ranks(1, 2)
def test_an_unsynchronised_backward_is_noticed() -> None:
    model = model_of()
    fully_shard(model, mesh=mesh_of((dist.get_world_size(),), ("dp",)))
    if dist.get_world_size() > 1:
        model.set_requires_gradient_sync(False)
        backward(model)
    clipper = GradClipper(model, policies.global_norm(0.1))
    texts = heard(lambda: [clipper.clip_() for _ in range(3)])
    assert len(texts) == (dist.get_rank() == 0)
    for text in texts:
        assert "set_requires_gradient_sync(False)" in text
        assert ("their norm on all ranks is 0" in text) == (dist.get_world_size() > 1)


def test_other_reasons() -> None:
    frozen = model_of().requires_grad_(False)
    clipper = GradClipper(frozen, policies.global_norm(0.1))
    assert "frozen" in heard(clipper.clip_)[0]
    listed = list((model := model_of()).parameters())
    clipper = GradClipper(listed, policies.global_norm(0.1))
    for layer in model:
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        layer.bias = nn.Parameter(layer.bias.detach().clone())
    backward(model)
    assert heard(clipper.clip_) == []
    assert "parameters that were replaced in the model since" in heard(clipper.clip_)[0]
    assert heard(clipper.clip_) == []


def test_one_step_without_gradients_among_others_is_left_alone() -> None:
    """As of a batch that does not reach these parameters."""
    model = model_of()
    clipper = GradClipper(model, policies.global_norm(1.0))

    def run() -> None:
        for _ in range(3):
            clipper.clip_()
            backward(model)
            clipper.clip_()
            model.zero_grad()

    assert heard(run) == []


@pytest.mark.ranks(2, 3)
def test_a_rank_without_gradients_among_others_is_right() -> None:
    expert = nn.Parameter(torch.ones(3))
    distclip.declare_sharded(expert, dist.group.WORLD)
    if dist.get_rank() == 1:
        expert.grad = torch.ones(3)
    clipper = GradClipper([("expert", expert)], policies.global_norm(1.0))
    assert heard(lambda: [clipper.clip_() for _ in range(3)]) == []


def test_looking_costs_no_collective_and_no_loop() -> None:
    model = model_of()
    backward(model)
    clipper = GradClipper(model, policies.global_norm(1.0))
    clipper.clip_()
    asked: list[int] = []
    for piece in clipper.plan.pieces:
        object.__setattr__(piece, "gradient", lambda piece=piece: asked.append(1))
    with watch() as seen:
        assert not clipper._session._absence.is_here()
    assert not asked
    assert not seen.ops


# ---- used-up generators ----


def generators() -> dict[str, Any]:
    used, begun = model_of().parameters(), model_of().parameters()
    list(used)
    next(begun)
    return {"is used up": used, "has been begun": begun, "gives nothing": iter([])}


@pytest.mark.parametrize("words", ["is used up", "has been begun", "gives nothing"])
def test_a_generator_that_was_used_before(words: str) -> None:
    for call in (
        lambda given: distclip.clip_grad_norm_(given, 1.0),
        lambda given: distclip.clip_grad_value_(given, 1.0),
        distclip.clip_grad_agc_,
        distclip.get_total_norm,
    ):
        texts = heard(lambda call=call: call(generators()[words]))
        assert len(texts) == 1
        assert words in texts[0]
    with pytest.raises(ConfigurationError, match=words):
        GradClipper(generators()[words], policies.global_norm(1.0))
    named = model_of().named_parameters()
    list(named)
    assert "is used up" in heard(lambda: distclip.grad_norms(named))[0]


def test_what_may_be_empty_is_left_alone() -> None:
    bare = nn.ReLU()

    def run() -> None:
        assert distclip.clip_grad_norm_(bare.parameters(), 1.0) == 0.0
        assert distclip.clip_grad_norm_([], 1.0) == 0.0
        GradClipper(bare.parameters(), policies.global_norm(1.0)).clip_()
        GradClipper([], policies.global_norm(1.0)).clip_()

    assert heard(run) == []
