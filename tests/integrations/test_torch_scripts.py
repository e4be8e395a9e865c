"""Plain torch scripts: each update is clipped once, as one process would, however they clip."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as bound_early
from torch.optim import SGD, AdamW

import distclip
from tests.helpers.logs import logged
from tests.integrations.accelerated import (
    Halve,
    Reference,
    SkipAbove,
    batch,
    loss_of,
    make,
    same,
    sgd,
    start,
    whole,
)
from tests.integrations.scripted import (
    LAYOUTS,
    STEPS,
    by_late_name,
    by_library,
    by_utils,
    by_value,
    measuring,
    mine,
    never,
    of_two,
    reference,
    running,
    train,
    wrapped,
)

AGC = {"name": "agc", "clip_factor": 0.05}


def by_module(model: nn.Module) -> Tensor:
    return torch.nn.utils.clip_grad.clip_grad_norm_(list(model.parameters()), 1e-9)


def by_early_name(model: nn.Module) -> Tensor:
    return bound_early(model.parameters(), max_norm=1e-9)


def by_given_norm(model: nn.Module) -> Tensor:
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    nn.utils.clip_grads_with_norm_(model.parameters(), 1e-9, norm)
    return norm


def by_both(model: nn.Module) -> Tensor:
    by_value(model)
    return by_utils(model)


def by_presence(model: nn.Module) -> Tensor:
    return nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1e-9)


WAYS: list[Callable[[nn.Module], Any]] = [
    never, by_utils, by_module, by_early_name, by_late_name, by_value, by_given_norm, by_both,
    by_presence, measuring,
]  # fmt: skip


def by_method(model: nn.Module) -> Tensor:
    return model.clip_grad_norm_(1e-9)


@pytest.mark.ranks(1, 2, 4)
def test_twenty_steps_are_those_of_one_process(world_size: int) -> None:
    policies_of = (AGC, {"name": "global_norm", "max_norm": 0.5})
    wanted = [reference(policy) for policy in policies_of]
    for layout in LAYOUTS if world_size > 1 else ["one"]:
        by_call = by_method if layout.startswith("fsdp1") else by_utils
        if layout == "fsdp1":  # torch's function on what is a part of a flat gradient here
            by_call = by_presence
        for policy, clip, (weights, norms) in zip(
            policies_of, (never, by_call), wanted, strict=True
        ):
            found, seen, reported, count = train(layout, policy, clip)
            same(found, weights, 2e-6)
            assert count == STEPS
            assert reported == pytest.approx(norms, rel=2e-5)
            assert seen == (reported if clip is by_call else [])


@pytest.mark.ranks(1, 2)
def test_one_clip_however_the_script_clips(world_size: int) -> None:
    wanted, _ = reference(0.5, 3)
    for layout in ["ddp", "fsdp2"] if world_size > 1 else ["one"]:
        for clip in WAYS:
            found, seen, reported, count = train(layout, Halve(), clip, steps=3)
            same(found, wanted)
            assert count == 3, clip.__name__
            if clip not in (never, by_value):
                assert seen == pytest.approx(reported, rel=1e-6), clip.__name__


@pytest.mark.ranks(1, 2)
def test_the_optimizers_of_a_gan_clip_their_own_parameters(world_size: int) -> None:
    """Though each backward leaves gradients on both models."""
    policy = {"name": "zclip", "warmup_steps": 4, "max_norm": None, "z_thresh": 0.5}

    def gan(*models: nn.Module, rows: Callable[[Tensor], Tensor], update: Any) -> None:
        steppers = [AdamW(model.parameters(), lr=0.1, eps=1.0) for model in models]
        for number in range(STEPS):
            x = rows(batch(number))
            for turn, (stepper, sign) in enumerate(zip(steppers, (1.0, -0.1), strict=True)):
                stepper.zero_grad()
                fake = x + models[0](x)
                update(turn, stepper, sign * models[1](fake).square().mean())

    pair = make(1), make(2)
    memories: list[dict[str, Any]] = [{}, {}]
    norms: list[list[float]] = [[], []]

    def by_oracle(turn: int, stepper: Any, loss: Tensor) -> None:
        oracle = Reference(pair[turn], stepper)
        stepper.zero_grad = lambda: None
        oracle.update(policy, loss, memory=memories[turn])
        del stepper.zero_grad
        norms[turn] += oracle.norms

    gan(*pair, rows=lambda x: x, update=by_oracle)
    for by_hand in (False, True):
        with running(policy) as scripts:
            layout = "one" if world_size == 1 else "ddp"
            models = [wrapped(layout, make(seed)) for seed in (1, 2)]
            seen: list[list[float]] = [[], []]

            def update(
                turn: int, stepper: Any, loss: Tensor, seen: Any = seen, models: Any = models,
                scripts: Any = scripts, by_hand: bool = by_hand,
            ) -> None:  # fmt: skip
                loss.backward()
                if by_hand:
                    by_utils(models[turn])
                stepper.step()
                seen[turn].append(scripts.last_report.total_norm.item())

            gan(*models, rows=mine, update=update)
            assert [c._session.step for c in scripts._clippers.known.values()] == [STEPS] * 2
        for turn in (0, 1):
            assert seen[turn] == pytest.approx(norms[turn], rel=1e-4)
            same(whole(models[turn]), whole(pair[turn]), 1e-5)


@pytest.mark.ranks(1, 2)
def test_a_skip_really_skips(world_size: int) -> None:
    layout = "one" if world_size == 1 else "fsdp2"
    for clip in (never, by_utils):
        with running(SkipAbove(1e-9)):
            model = wrapped(layout, make())
            stepper = AdamW(model.parameters(), lr=0.5, weight_decay=0.1)
            loss_of(model, mine(batch(0))).backward()
            clip(model)
            stepper.step()
            same(whole(model), whole(make()), 0.0)
            assert not stepper.state


class Container(torch.optim.Optimizer):
    """Optimizers of model parts as one, as torchtitan has it."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.optimizers = [SGD(part.parameters(), lr=0.5, momentum=0.9) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], {})

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


@pytest.mark.ranks(1, 2)
def test_a_container_of_optimizers_is_clipped_as_one(world_size: int) -> None:
    layout = "one" if world_size == 1 else "fsdp2"
    policy = {"name": "global_norm", "max_norm": 0.5}
    wanted, norms = reference(policy, 4)
    for clip in (never, by_utils):
        found, _, reported, count = train(
            layout, policy, clip, lambda model: Container(list(model.children())), steps=4
        )
        same(found, wanted, 2e-6)
        assert reported == pytest.approx(norms, rel=1e-5)
        assert count == 4


def test_the_parts_of_a_container_do_not_count_beside_it() -> None:
    with running({"name": "group_norm", "max_norm": 1e-3}) as scripts:
        model = make()
        stepper = Container([model.body, model.head])
        assert scripts._objects.owners([model.head.bias]) == [stepper]
        loss_of(model, batch(0)).backward()
        stepper.step()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_two_optimizers_of_one_model() -> None:
    """Alone each clips its own parameters; what the script clips as one, is."""
    policy = {"name": "global_norm", "max_norm": 0.5}
    wanted, norms = reference(policy, 4)
    with running(policy) as scripts:
        model = make()
        pair = of_two(model)
        seen = []
        for number in range(4):
            model.zero_grad()
            loss_of(model, batch(number)).backward()
            seen.append(by_utils(model).item())
            for stepper in pair:
                stepper.step()
        assert seen == pytest.approx(norms, rel=1e-5)
        same(whole(model), wanted, 2e-6)
        assert len(scripts._clippers.known) == 1
        loss_of(model, batch(0)).backward()
        pair[0].step()
        assert len(scripts._clippers.known) == 2


def test_a_closure_is_clipped_after_each_evaluation() -> None:
    model, twin = make(), make()
    kind = {"lr": 0.1, "max_iter": 4}
    ours, theirs = torch.optim.LBFGS(model.parameters(), **kind), None
    theirs = torch.optim.LBFGS(twin.parameters(), **kind)

    def closure(of: nn.Module, optimizer: Any, factor: float) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(of, batch(0))
            loss.backward()
            for parameter in of.parameters():
                parameter.grad.mul_(factor)
            return loss

        return evaluate

    with running(Halve()):
        for _ in range(3):
            ours.step(closure(model, ours, 1.0))
            theirs_step = type(theirs).step.__wrapped__
            theirs_step(theirs, closure(twin, theirs, 0.5))
    same(whole(model), whole(twin))


@pytest.mark.ranks(1, 2)
def test_torchs_functions_in_a_script_of_accelerate(world_size: int) -> None:
    """Such a call becomes Accelerate's own policy, and there is one clip."""
    pytest.importorskip("accelerate")
    wanted, _ = reference(0.5, 3)
    for layout in ("ddp", "fsdp2"):
        with running(Halve()) as scripts:
            accelerator = start(layout)
            handle = distclip.accelerate.attach(accelerator, Halve())
            model = make()
            model, stepper = accelerator.prepare(model, sgd(model))
            for number in range(3):
                stepper.zero_grad()
                accelerator.backward(loss_of(model, mine(batch(number))))
                norm = by_utils(model)
                stepper.step()
                assert norm == handle.last_report.total_norm
            assert scripts.last_report is None
            handle.remove()
        same(whole(model), wanted)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("front", ["torch", "accelerate", "lightning"])
def test_a_call_of_an_installed_package_is_not_taken_for_the_script_s(front: str) -> None:
    pytest.importorskip(front)

    def told(call: Callable[..., Any]) -> list[str]:
        with running(Halve()), logged() as messages:
            model = make()
            optimizer: Any = sgd(model)
            handle, calls = None, [nn.utils.clip_grad_norm_]
            if front == "accelerate":
                accelerator = start("ddp")
                handle = distclip.accelerate.attach(accelerator, Halve())
                model, optimizer = accelerator.prepare(model, optimizer)
                calls += [accelerator.clip_grad_norm_]
            elif front == "lightning":
                fabric = lightnings.fabric_of("ddp", [distclip.lightning.ClipCallback(Halve())])
                model, optimizer = lightnings.prepared(fabric, "ddp")
            loss_of(model, batch(0)).backward()
            for each in calls:
                call(each, model.parameters(), 1e-9)
            optimizer.step()
            if handle is not None:
                handle.remove()
        return [message.partition(" calls ")[0] for message in messages if " calls " in message]

    if front == "lightning":
        from tests.integrations import lightnings
    assert told(by_library) == ["somelib"]
    assert told(lambda function, *given: function(*given)) == ["the script"]
