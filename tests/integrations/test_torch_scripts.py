"""Plain torch scripts: each update is clipped once, as one process would, however they clip."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_ as bound_early
from torch.optim import SGD, AdamW

import distclip
from distclip import policies
from distclip.config import Config
from distclip.errors import NonFiniteGradientError, UnsupportedGradientError
from distclip.integrations import charge, torch_scripts
from tests.integrations.accelerated import (
    Halve,
    Reference,
    SkipAbove,
    batch,
    loss_of,
    make,
    same,
    sgd,
    snapshot,
    start,
    whole,
)

STEPS = 20
LAYOUTS = ["ddp", "fsdp2", "fsdp1", "fsdp1_flat"]
AGC = {"name": "agc", "clip_factor": 0.05}


@contextmanager
def running(policy: Any, **options: Any) -> Iterator[Any]:
    """The integration, as ``distclip run`` installs it."""
    document = {"policy": policy} if isinstance(policy, (dict, list)) else None
    if document is not None:
        config = distclip.config.load({**document, **options})
    else:
        config = Config(policy=policy, **options)
    scripts = torch_scripts.enable(sys.modules["torch.optim.optimizer"], config)
    try:
        yield scripts
    finally:
        scripts.remove()


def mine(x: Tensor) -> Tensor:
    """This rank's rows of a batch."""
    if not dist.is_initialized():
        return x
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def wrapped(layout: str, model: nn.Module) -> nn.Module:
    if layout == "one" or not dist.is_initialized():
        return model
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp2":
        for child in model.children():
            fully_shard(child)
        return fully_shard(model)
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=layout == "fsdp1"
    )


# ---- how scripts clip --------------------------------------------------------------------------


def never(model: nn.Module) -> None:
    return None


def by_utils(model: nn.Module) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), 1e-9)


def by_module(model: nn.Module) -> Tensor:
    return torch.nn.utils.clip_grad.clip_grad_norm_(list(model.parameters()), 1e-9)


def by_early_name(model: nn.Module) -> Tensor:
    return bound_early(model.parameters(), max_norm=1e-9)


def by_late_name(model: nn.Module) -> Tensor:
    from torch.nn.utils import clip_grad_norm_

    return clip_grad_norm_(model.parameters(), 1e-9, norm_type=2, error_if_nonfinite=True)


def by_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-9)


def by_given_norm(model: nn.Module) -> Tensor:
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    nn.utils.clip_grads_with_norm_(model.parameters(), 1e-9, norm)
    return norm


def by_both(model: nn.Module) -> Tensor:
    by_value(model)
    return by_utils(model)


def by_presence(model: nn.Module) -> Tensor:
    return nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1e-9)


def measuring(model: nn.Module) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), math.inf)


WAYS: list[Callable[[nn.Module], Any]] = [
    never, by_utils, by_module, by_early_name, by_late_name, by_value, by_given_norm, by_both,
    by_presence, measuring,
]  # fmt: skip


def plain(norm: Any) -> float:
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def train(
    layout: str,
    policy: Any,
    clip: Callable[[nn.Module], Any] = never,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    steps: int = STEPS,
    micro: int = 1,
) -> tuple[dict[str, Tensor], list[float], list[float], int]:
    """Weights; norms that the script saw; norms in reports; how many clips there were."""
    with running(policy) as scripts:
        seen: list[float] = []
        model = wrapped(layout, make())
        stepper = optimizer(model)
        clips: list[float] = []
        for number in range(steps):
            stepper.zero_grad()
            for part in mine(batch(number)).chunk(micro):
                (loss_of(model, part) / micro).backward()
            norm = clip(model)
            stepper.step()
            seen += [] if norm is None else [plain(norm)]
            clips.append(scripts.last_report.total_norm.item())
        counts = [c._session.step for c in scripts._clippers.known.values()]
        return whole(model), seen, clips, sum(counts)


def reference(
    policy: Any,
    steps: int = STEPS,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
) -> tuple[dict[str, Tensor], list[float]]:
    model = make()
    oracle = Reference(model, optimizer(model))
    for number in range(steps):
        oracle.update(policy, loss_of(model, batch(number)))
    return whole(model), oracle.norms


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
def test_micro_batches(world_size: int) -> None:
    """A call after each of them clips the sum of the first update twice, and then once a step."""
    layout = "one" if world_size == 1 else "fsdp2"
    wanted, _ = reference(0.5, 4)
    found, *_, count = train(layout, Halve(), never, steps=4, micro=2)
    same(found, wanted)
    assert count == 4
    with running(Halve()) as scripts:
        model = wrapped(layout, make())
        stepper = sgd(model)
        for number in range(4):
            stepper.zero_grad()
            for part in mine(batch(number)).chunk(2):
                (loss_of(model, part) / 2).backward()
                norm = plain(by_utils(model))
            whole_norm = plain(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            assert norm == pytest.approx(whole_norm)
            stepper.step()
            assert scripts.last_report.total_norm.item() == pytest.approx(norm)
            half = plain(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            assert half == pytest.approx(norm / 2)
        assert sum(c._session.step for c in scripts._clippers.known.values()) == 5
        assert "late" in scripts._said


@pytest.mark.ranks(2)
def test_gradients_that_are_not_reduced_are_only_measured() -> None:
    wanted, _ = reference(0.5, 4)
    with running(Halve()) as scripts:
        model = wrapped("ddp", make())
        stepper = sgd(model)
        for number in range(4):
            stepper.zero_grad()
            first, second = mine(batch(number)).chunk(2)
            with model.no_sync():
                (loss_of(model, first) / 2).backward()
            assert by_utils(model) > 0
            (loss_of(model, second) / 2).backward()
            by_utils(model)
            stepper.step()
        assert sum(c._session.step for c in scripts._clippers.known.values()) == 4
    same(whole(model), wanted)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("first", [0, 2])
def test_one_rank_alone_may_measure_what_is_not_sharded(first: int) -> None:
    policy = {"name": "global_norm", "max_norm": 0.5}
    wanted, norms = reference(policy, 4)
    with running(policy):
        model = wrapped("ddp", make())
        stepper = sgd(model)
        for number in range(4):
            stepper.zero_grad()
            loss_of(model, mine(batch(number))).backward()
            if dist.get_rank() == 0 and number >= first:
                assert measuring(model).item() == pytest.approx(norms[number], rel=1e-5)
            stepper.step()
    same(whole(model), wanted, 2e-6)


@pytest.mark.ranks(2)
def test_a_forward_without_gradients_says_nothing_about_the_backward_before_it() -> None:
    """The clipped norm is that of both optimizers; without the call each has its own."""
    policy = {"name": "global_norm", "max_norm": 0.5}
    wanted, _ = reference(policy, 4)
    with running(policy) as scripts:
        model = wrapped("ddp", make())
        pair = of_two(model.module)
        for number in range(4):
            model.zero_grad()
            first, second = mine(batch(number)).chunk(2)
            with model.no_sync():
                (loss_of(model, first) / 2).backward()
            with torch.no_grad():
                model(first)
            assert by_utils(model) > 0
            assert len(scripts._clippers.known) == (number > 0)
            (loss_of(model, second) / 2).backward()
            with torch.no_grad():
                model(first)
            by_utils(model)
            for stepper in pair:
                stepper.step()
        assert sum(c._session.step for c in scripts._clippers.known.values()) == 4
    same(whole(model), wanted, 2e-6)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("order", ["never", "unscaled", "scaled"])
def test_a_gradient_scaler(world_size: int, order: str) -> None:
    """Norms are of unscaled gradients, an overflow is no error, and drops the whole step."""
    layout = "one" if world_size == 1 else "ddp"
    policy = {"name": "global_norm", "max_norm": 0.5}
    wanted, norms = reference(policy, 4)
    with running(policy):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        model = wrapped(layout, make())
        stepper = sgd(model)
        seen = []
        for number in (0, 1, "overflow", 2, 3):
            stepper.zero_grad()
            loss = loss_of(model, mine(batch(0 if number == "overflow" else number)))
            scaler.scale(loss * (math.inf if number == "overflow" else 1)).backward()
            if order == "unscaled":
                scaler.unscale_(stepper)
            norm = None if order == "never" else by_utils(model)
            before = snapshot(stepper)
            scaler.step(stepper)
            scaler.update()
            if number == "overflow":
                assert len(snapshot(stepper)) == len(before)
                assert all(map(torch.equal, snapshot(stepper), before))
            elif norm is not None:
                seen.append(norm.item())
        assert seen == pytest.approx([] if order == "never" else norms, rel=1e-5)
    same(whole(model), wanted, 2e-6)


def test_an_optimizer_without_the_scaler_of_another() -> None:
    """Each is clipped to 1e-3, in the first update and later, whichever of them comes first."""
    for scaled_first in (True, False):
        with running(policies.global_norm(1e-3)):
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            models = [make(1), make(2)]
            pair = [sgd(model) for model in models]
            for number in range(3):
                for turn in (0, 1) if scaled_first else (1, 0):
                    model, stepper = models[turn], pair[turn]
                    stepper.zero_grad()
                    loss = loss_of(model, batch(number))
                    (loss if turn else scaler.scale(loss)).backward()
                    norm = by_utils(model)
                    true = nn.utils.get_total_norm([p.grad for p in model.parameters()])
                    if number and turn:
                        assert norm > true  # clipped there and then
                    stepper.step() if turn else scaler.step(stepper)
                    after = nn.utils.get_total_norm([p.grad for p in model.parameters()])
                    assert after.item() == pytest.approx(1e-3, rel=1e-2)
                scaler.update()


@pytest.mark.parametrize("several", [False, True])
def test_micro_batches_under_a_gradient_scaler(several: bool) -> None:
    """One clip an update, of the whole sum, also where two optimizers are clipped as one."""
    wanted, _ = reference(0.5, 4)
    with running(Halve()) as scripts:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        model = make()
        steppers = of_two(model) if several else [sgd(model)]
        for number in range(4):
            model.zero_grad()
            for part in batch(number).chunk(2):
                scaler.scale(loss_of(model, part) / 2).backward()
                norm = by_utils(model)
            for stepper in steppers:
                scaler.step(stepper)
            scaler.update()
            assert scripts.last_report.total_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        assert sum(c._session.step for c in scripts._clippers.known.values()) == 4
    same(whole(model), wanted, 2e-6)


def test_what_is_clipped_late_is_what_the_script_clips() -> None:
    with running(policies.global_norm(1e-3)):
        model = make()
        stepper = sgd(model)
        for _ in range(3):
            stepper.zero_grad()
            for part in batch(0).chunk(2):
                loss_of(model, part).backward()
                by_utils(model.body)
            left = [p.grad.clone() for p in model.head.parameters()]
            stepper.step()
            assert all(map(torch.equal, left, [p.grad for p in model.head.parameters()]))
            norm = nn.utils.get_total_norm([p.grad for p in model.body.parameters()])
            assert norm.item() == pytest.approx(1e-3, rel=1e-2)


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


def of_two(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [sgd(part) for part in model.children()]


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


def test_what_no_optimizer_steps_is_left_to_torch() -> None:
    with running(Halve()):
        image = torch.ones(4, requires_grad=True)
        image.grad = torch.full((4,), 3.0)
        assert nn.utils.clip_grad_norm_([image], 1.5).item() == 6.0
        torch.testing.assert_close(image.grad, torch.full((4,), 0.75))
        nn.utils.clip_grad_value_(image, 0.5)
        torch.testing.assert_close(image.grad, torch.full((4,), 0.5))
        nn.utils.clip_grads_with_norm_(image, 0.25, torch.tensor(1.0))
        torch.testing.assert_close(image.grad, torch.full((4,), 0.125))


def test_an_optimizer_of_another_integration_is_left_alone() -> None:
    model = make()
    with running(Halve()) as scripts:
        stepper = sgd(model)
        handle = distclip.GradClipper(model, policies.measure()).attach(stepper)
        loss_of(model, batch(0)).backward()
        norm = by_utils(model)
        assert norm.item() > 1e-9
        assert nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() < 1e-8
        stepper.step()
        assert scripts.last_report is None
        handle.remove()
        other = sgd(model)
        calls: list[int] = []

        def clip(parameters: list[Tensor]) -> Tensor:
            calls.append(len(parameters))
            return torch.tensor(7.0)

        charge.take(other, charge.Charge("framework", clip))
        assert by_utils(stepper and model).item() == 7.0
        by_value(model)
        other.step()
        assert calls == [4, 4]
        assert scripts.last_report is None


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


def test_an_order_of_its_own_and_a_group_norm() -> None:
    with running({"name": "group_norm", "max_norm": 1e-3}) as scripts:
        model = make()
        stepper = SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
        loss_of(model, batch(0)).backward()
        largest = max(p.grad.abs().max().item() for p in model.parameters())
        found = nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=math.inf)
        assert found.item() == pytest.approx(largest)
        stepper.step()
        norms = [p.grad.norm().item() for p in model.parameters()]
        assert norms == pytest.approx([1e-3] * 4, rel=1e-2)
        assert scripts.last_report.names == (
            "body.weight", "body.bias", "head.weight", "head.bias",
        )  # fmt: skip


def test_names() -> None:
    """Those of the outermost module; without one, those that the optimizer was given."""
    with running(policies.measure()) as scripts:
        outer = nn.ModuleDict({"left": make(), "right": make()})
        frozen = outer["left"].head.bias.requires_grad_(False)
        loss_of(outer["left"], batch(0)).backward()
        sgd(outer["left"]).step()
        assert scripts.last_report.names[0] == "left.body.weight"
        assert len(scripts.last_report.names) == 4
        assert frozen.grad is None
        loose = nn.Parameter(torch.ones(2))
        loose.grad = torch.ones(2)
        first = SGD([("mine", loose)], lr=0.1)
        first.step()
        assert scripts.last_report.names == ("mine",)
        SGD([loose], lr=0.1).step()  # the same parameters: the same clipper, and its memory
        assert scripts.last_report.names == ("mine",)
        assert first.state_dict()["param_groups"][0]["param_names"] == ["mine"]
        bare = nn.Parameter(torch.ones(2))
        bare.grad = torch.ones(2)
        SGD([bare], lr=0.1).step()
        assert scripts.last_report.names == ("group0.0",)


def test_clippers_of_models_that_are_gone_are_forgotten() -> None:
    with running(policies.measure()) as scripts:
        for _ in range(3):
            model = make()
            stepper = sgd(model)
            loss_of(model, batch(0)).backward()
            by_utils(model)
            stepper.step()
            assert len(scripts._clippers.known) == 1
            del model, stepper


def test_a_step_within_backward_is_refused() -> None:
    with running(Halve()):
        model = make()
        steppers = {p: SGD([p], lr=0.1) for p in model.parameters()}
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: steppers[p].step())
        with pytest.raises(UnsupportedGradientError, match="SGD steps during backward"):
            loss_of(model, batch(0)).backward()
        same(whole(model), whole(make()), 0.0)


def test_nonfinite() -> None:
    with running(policies.global_norm(1.0)):
        model = make()
        stepper = sgd(model)
        (loss_of(model, batch(0)) * math.nan).backward()
        with pytest.raises(NonFiniteGradientError, match=r"body\.weight"):
            by_utils(model)
        with pytest.raises(NonFiniteGradientError):
            stepper.step()
    with running({"name": "global_norm", "max_norm": 1.0}, on_nonfinite="skip"):
        stepper = sgd(model)
        assert math.isnan(by_utils(model))
        with pytest.raises(RuntimeError, match="error_if_nonfinite=True"):
            by_late_name(model)
        stepper.step()
    same(whole(model), whole(make()), 0.0)


def test_what_is_mentioned_once(caplog: pytest.LogCaptureFixture) -> None:
    with running(policies.global_norm(1.0)):
        model = make()
        stepper = sgd(model)
        for _ in range(2):
            assert by_utils(model).item() == 0.0
        stepper.step()
        text = caplog.text
        assert text.count("the configured policy is applied in its place") == 1
        assert text.count("none of the 4 parameters has a gradient") == 1
        assert text.count("SGD steps 4 parameters, and none of them has a gradient") == 1
        for number in range(25):
            model.zero_grad()
            loss_of(model, batch(number)).backward()
            by_utils(model)
        assert caplog.text.count("no torch optimizer that has these 4 parameters") == 1
        assert "with no step in between" not in caplog.text


def test_everything_is_restored(caplog: pytest.LogCaptureFixture) -> None:
    names = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_")
    before = [getattr(nn.utils, name) for name in names]
    made = torch.optim.Optimizer.__init__, FullyShardedDataParallel.clip_grad_norm_, bound_early
    caplog.set_level(logging.ERROR)
    with running(Halve()):
        model = make()
        stepper = sgd(model)
        loss_of(model, batch(0)).backward()
        stepper.step()
        assert nn.utils.clip_grad_norm_ is not before[0]
        assert charge.of(stepper) is not None
    assert [getattr(nn.utils, name) for name in names] == before
    assert made == (
        torch.optim.Optimizer.__init__, FullyShardedDataParallel.clip_grad_norm_, bound_early
    )  # fmt: skip
    assert charge.of(stepper) is None
    gradients = [p.grad.clone() for p in model.parameters()]
    stepper.step()
    assert all(map(torch.equal, gradients, [p.grad for p in model.parameters()]))
