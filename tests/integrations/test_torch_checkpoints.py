"""Scripts under ``distclip run`` that save and load with plain torch keep the policy's memory."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    _patch_optimizer_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.optim import Optimizer

from distclip import policies
from distclip.errors import NonFiniteGradientError, StateError
from distclip.integrations.torch_checkpoints import OPTIMIZER_KEY
from tests.helpers.logs import logged
from tests.integrations.accelerated import Model, batch, loss_of, make, same, sgd, whole
from tests.integrations.saving import (
    ADAGC,
    AUTOCLIP,
    NONE,
    STEPS,
    begun,
    full,
    load,
    save,
    step,
    trained,
)
from tests.integrations.scripted import LAYOUTS, running


@pytest.mark.ranks(1, 2)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(world_size: int) -> None:
    for layout in LAYOUTS if world_size > 1 else ["one"]:
        for policy in (ADAGC, AUTOCLIP) if layout in ("one", "fsdp2") else (ADAGC,):
            with running(policy):
                model, stepper = begun(layout)
                step(model, stepper, range(4))
                checkpoint = save(layout, model, stepper)
                step(model, stepper, range(4, STEPS))
                wanted = whole(model)
            assert checkpoint["optimizer"][OPTIMIZER_KEY]["clippers"][0]["step"] == 4
            with running(policy):
                same(trained(layout, range(4, STEPS), checkpoint), wanted, 0.0)
            del checkpoint["optimizer"][OPTIMIZER_KEY]
            with running(policy):  # without its memory the policy decides otherwise
                other = trained(layout, range(4, STEPS), checkpoint)
            assert any(not torch.equal(other[name], wanted[name]) for name in wanted), policy


@pytest.mark.ranks(1, 2)
def test_checkpoints_load_with_distclip_and_without(world_size: int) -> None:
    for layout in ("ddp", "fsdp1") if world_size > 1 else ["one"]:
        plain, stepper = begun(layout)
        step(plain, stepper, range(2))
        before = save(layout, plain, stepper)
        assert OPTIMIZER_KEY not in before["optimizer"]
        with running(ADAGC), logged("distclip.torch") as found:
            model, stepper = begun(layout)
            load(layout, model, stepper, before)
            assert not found  # nothing is lost, if nothing is clipped
            step(model, stepper, range(2, 4))
            load(layout, model, stepper, before)
            assert [NONE in each for each in found] == [True] * (dist.get_rank() == 0)
            step(model, stepper, range(2, 4))
            clipped = save(layout, model, stepper)
        assert OPTIMIZER_KEY in clipped["optimizer"]
        weights = trained(layout, range(4, 6), clipped)
        del clipped["optimizer"][OPTIMIZER_KEY]
        same(weights, trained(layout, range(4, 6), clipped), 0.0)


@pytest.mark.ranks(2)
def test_fsdp1_saves_and_loads_on_the_first_rank_alone() -> None:
    with running(ADAGC):
        model, stepper = begun("fsdp1")
        step(model, stepper, range(4))
        with full("fsdp1", model, rank0_only=True):
            weights = model.state_dict()
            state = FSDP.optim_state_dict(model, stepper)
        assert (OPTIMIZER_KEY in state) == (dist.get_rank() == 0)
        at = whole(model)
        step(model, stepper, range(4, STEPS))
        wanted = whole(model)
    with running(ADAGC):
        model, stepper = begun("fsdp1")
        with full("fsdp1", model):
            model.load_state_dict(at)
        with full("fsdp1", model, rank0_only=True):
            FSDP.optim_state_dict_to_load(model, stepper, state, load_directly=True)
        step(model, stepper, range(4, STEPS))
        same(whole(model), wanted, 0.0)
    assert bool(weights) == (dist.get_rank() == 0)


def test_a_load_in_a_run_takes_the_memory_back() -> None:
    with running(ADAGC) as scripts:
        model, stepper = begun("one")
        step(model, stepper, range(4))
        checkpoint = save("one", model, stepper)
        step(model, stepper, range(4, STEPS))
        wanted = whole(model)
        load("one", model, stepper, checkpoint)
        (clipper,) = scripts._clippers.known.values()
        assert clipper.state_dict()["step"] == 4
        step(model, stepper, range(4, STEPS))
        same(whole(model), wanted, 0.0)


def test_each_of_two_equal_models_gets_its_own_memory() -> None:
    """Loaded in another order than they were saved, and before either has a clipper."""
    states = []
    with running(ADAGC):
        for seed in (0, 1):
            model = make(seed)
            stepper = sgd(model)
            step(model, stepper, range(4 + seed))
            states.append(stepper.state_dict())
    with running(ADAGC) as scripts:
        models = [make(seed) for seed in (0, 1)]
        steppers = list(map(sgd, models))
        for number in (1, 0):
            steppers[number].load_state_dict(states[number])
        # What waits is saved again.
        assert steppers[1].state_dict()[OPTIMIZER_KEY]["clippers"][0]["step"] == 5
        for number in (1, 0):
            step(models[number], steppers[number], [9])
        assert [c.state_dict()["step"] for c in scripts._clippers.known.values()] == [6, 5]


def test_two_optimizers_that_are_clipped_as_one() -> None:
    def pair(model: Model) -> list[Optimizer]:
        return [sgd(model.body), sgd(model.head)]

    def update(model: Model, steppers: list[Optimizer], number: int) -> None:
        model.zero_grad()
        loss_of(model, batch(number)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()

    with running(ADAGC):
        model = make()
        steppers = pair(model)
        for number in range(4):
            update(model, steppers, number)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        states = [copy.deepcopy(stepper.state_dict()) for stepper in steppers]
        update(model, steppers, 4)
        wanted = whole(model)
    with running(ADAGC) as scripts:
        model = make(7)
        model.load_state_dict(weights)
        steppers = pair(model)
        for stepper, state in zip(steppers, states, strict=True):
            stepper.load_state_dict(state)
        update(model, steppers, 4)
        same(whole(model), wanted, 0.0)
        (clipper,) = scripts._clippers.known.values()
        assert clipper.state_dict()["step"] == 5
        assert [len(s.state_dict()[OPTIMIZER_KEY]["clippers"]) for s in steppers] == [1, 1]


def test_a_load_is_made_where_a_late_error_is_still_to_come() -> None:
    with running(ADAGC, on_nonfinite="error_late"):
        model, stepper = begun("one")
        plain = copy.deepcopy(stepper.state_dict())
        step(model, stepper, range(2))
        own = copy.deepcopy(stepper.state_dict())
        for state, raises in ((plain, True), (own, False)):
            loss_of(model, batch(2)).backward()
            model.head.weight.grad.fill_(torch.nan)
            stepper.step()
            stepper.load_state_dict(state)
            with pytest.raises(NonFiniteGradientError) if raises else nullcontext():
                step(model, stepper, [2])


def test_what_does_not_fit_is_refused() -> None:
    with running(ADAGC):
        model, stepper = begun("one")
        step(model, stepper, range(3))
        state = stepper.state_dict()
    with running(AUTOCLIP):
        model, stepper = begun("one")
        with pytest.raises(StateError, match=r"delete the key 'distclip' from it"):
            stepper.load_state_dict(state)
        assert not stepper.state  # nothing was loaded
    with running(ADAGC):
        other = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
        stepper = sgd(other)
        stepper.load_state_dict(state)  # as torch: its parameters have no names
        other(torch.ones(2, 5)).sum().backward()
        stepper.step()  # another model: none of its parameters
        model = make()
        model.head = nn.Linear(7, 1, bias=False)
        model.extra = nn.Parameter(torch.ones(1))
        stepper = sgd(model)
        stepper.load_state_dict(state)
        (model.head(model.body(torch.ones(2, 5))).sum() * model.extra.sum()).backward()
        with pytest.raises(StateError, match=r"missing: 'extra'; unexpected: 'head\.bias'|extra"):
            stepper.step()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_lost_is_mentioned() -> None:
    with running(ADAGC), logged("distclip.torch") as found:
        model, stepper = begun("one")
        step(model, stepper, range(3))
        for _ in range(2):
            state = get_optimizer_state_dict(model, stepper)
            assert OPTIMIZER_KEY not in state
            set_optimizer_state_dict(model, stepper, state)
        assert [NONE in each for each in found] == [True]
        dcp.save({"optimizer": stepper}, checkpoint_id="memory://here")
        assert ["no folder" in each for each in found[1:]] == [True]
    with running(policies.global_norm(1.0)), logged("distclip.torch") as found:
        model, stepper = begun("one")
        set_optimizer_state_dict(model, stepper, state)
        step(model, stepper, range(3))
        dcp.save({"optimizer": stepper}, checkpoint_id="memory://there")
        assert not found


class OwnMethods(torch.optim.SGD):
    """Loads by itself, as the optimizers of bitsandbytes; saves through torch's method."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mine": 1}

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        assert not move_to_device
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group["lr"] = saved["lr"]


def test_an_optimizer_whose_class_loads_by_itself() -> None:
    methods = vars(OwnMethods)["state_dict"], vars(OwnMethods)["load_state_dict"]
    with running(ADAGC):
        model = make()
        stepper = OwnMethods(model.parameters(), lr=0.1)
        step(model, stepper, range(4))
        state = stepper.state_dict()
        assert len(state[OPTIMIZER_KEY]["clippers"]) == state["mine"] == 1
    with running(ADAGC) as scripts:
        model = make()
        stepper = OwnMethods(model.parameters(), lr=0.2)
        stepper.load_state_dict(state, move_to_device=False)
        assert stepper.param_groups[0]["lr"] == 0.1
        step(model, stepper, [4])
        (clipper,) = scripts._clippers.known.values()
        assert clipper.state_dict()["step"] == 5
    assert methods == (vars(OwnMethods)["state_dict"], vars(OwnMethods)["load_state_dict"])


def test_an_optimizer_whose_methods_torch_has_replaced() -> None:
    """They call that of the class by keyword: ``Optimizer.state_dict(self=optimizer)``."""
    with running(ADAGC):
        model = make()
        stepper = sgd(model)
        _patch_optimizer_state_dict(model, optimizers=stepper)
        step(model, stepper, [0])
        stepper.load_state_dict(stepper.state_dict())


def test_everything_is_restored() -> None:
    before = Optimizer.state_dict, Optimizer.load_state_dict
    methods = [vars(FSDP)[name] for name in ("optim_state_dict", "optim_state_dict_to_load")]
    with running(ADAGC):
        assert Optimizer.state_dict is not before[0]
    assert before == (Optimizer.state_dict, Optimizer.load_state_dict)
    assert methods == [vars(FSDP)[n] for n in ("optim_state_dict", "optim_state_dict_to_load")]
