"""LaProp on sharded parameters: the same trajectory on 1 to 4 ranks as the float64 chain has."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

import distclip
from distclip import GradClipper, policies
from distclip.optim import LaProp, dreamer_v3
from distclip.testing import expected
from tests.helpers.shards import local
from tests.helpers.watching import watch
from tests.optim.chain import Chain
from tests.sharded import Sharded, Whole, shard, whole

LAYOUTS = ["plain", "fsdp2", "hsdp", "tp", "fsdp2_tp", "mixed"]

CONFIGS: dict[str, dict[str, Any]] = {
    "dreamer": {"lr": 1e-2, "warmup": 2},
    "nesterov, decay": {"lr": 1e-2, "warmup": 0, "nesterov": True, "weight_decay": 0.1},
    "no agc, linear": {"agc": 0.0, "lr": 1e-2, "warmup": 1, "schedule": "linear", "anneal": 4},
}


def for_chain(configuration: dict[str, Any]) -> dict[str, Any]:
    return {"agc": 0.3, "eps": 1e-20, **configuration}


def compare(model: Sharded, chain: Chain, *, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    for name, parameter in model.parameters.items():
        want = chain.p[name].reshape(-1)[model.elements[name].numpy()]
        np.testing.assert_allclose(
            local(parameter).detach().double().numpy(), want, rtol=rtol, atol=atol, err_msg=name
        )


def run(values: Whole, layout: str, configuration: dict[str, Any], steps: int = 5) -> None:
    model = shard(layout, values)
    chain = Chain(values.weights, **for_chain(configuration))
    optimizer = dreamer_v3(model.named(), **configuration)
    for step in range(steps):
        gradients = whole(seed=step, scale=10.0 ** (step % 3)).gradients
        if step == 3:
            gradients["fc.weight"] = None
        model.set_gradients(gradients)
        optimizer.step()
        chain.step(gradients)
        compare(model, chain)


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_follows_the_chain(layout: str) -> None:
    for label, configuration in CONFIGS.items():
        try:
            run(whole(seed=9), layout, configuration)
        except Exception as error:
            raise AssertionError(f"{label!r}: {error}") from error


@pytest.mark.ranks(2, 4)
def test_one_all_reduce_a_step() -> None:
    values = whole()
    for agc, reductions in ((0.3, 1), (0.0, 0)):
        model = shard("fsdp2", values)
        optimizer = dreamer_v3(model.named(), agc=agc, on_nonfinite="pass")
        model.set_gradients(values.gradients)
        optimizer.step()
        with watch() as seen:
            optimizer.step()
        assert len(seen.collectives) == reductions, seen.collectives
        assert not seen.dtensor_ops


@pytest.mark.ranks(2)
def test_partial_gradients_are_reduced_first() -> None:
    """Without clipping too, where no GradClipper has done it."""
    for agc in (0.3, 0.0):
        values = whole()
        model = shard("tp", values)
        chain = Chain(values.weights, **for_chain({"lr": 1e-2, "agc": agc}))
        optimizer = LaProp(model.named(), lr=1e-2, agc=agc, eps=1e-20)
        model.set_gradients(values.gradients)
        name = next(n for n in model.parameters if "conv" in n)
        parameter = model.parameters[name]
        assert isinstance(parameter, DTensor)
        full = values.gradients[name]
        assert full is not None
        parameter.grad = DTensor.from_local(
            full / dist.get_world_size(), parameter.device_mesh, [Partial()], run_check=False
        )
        optimizer.step()
        chain.step(values.gradients)
        compare(model, chain)


@pytest.mark.ranks(2)
def test_skip_changes_nothing_on_any_rank() -> None:
    values = whole()
    model = shard("fsdp2", values)
    optimizer = dreamer_v3(model.named(), lr=1e-2, warmup=0, on_nonfinite="skip")
    for step in range(2):
        model.set_gradients(whole(seed=step).gradients)
        optimizer.step()
    before = {n: p.detach().clone() for n, p in model.parameters.items()}
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in optimizer.state]
    model.set_gradients(values.gradients)
    grad = model.parameters["fc.weight"].grad
    assert isinstance(grad, DTensor)
    if dist.get_rank() == 1:
        grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.report is not None
    assert optimizer.report.nonfinite == ("fc.weight",)
    assert optimizer.param_groups[0]["updates"] == 2
    for name, parameter in model.parameters.items():
        assert torch.equal(local(parameter), local(before[name])), name
    for state, kept in zip(optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(local(state[k]), local(v)) for k, v in kept.items())


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    fully_shard(model)
    return model


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()


@pytest.mark.ranks(1, 2, 3)
def test_distributed_checkpoint_of_fsdp2_is_bitwise() -> None:
    for flatten in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        arguments: dict[str, Any] = {"lr": 1e-2, "warmup": 3, "weight_decay": 0.1}
        model = _model()
        optimizer = dreamer_v3(model, **arguments)
        _train(model, optimizer, range(4))
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        _train(model, optimizer, range(4, 8))

        again = _model()
        with torch.no_grad():
            for name, parameter in again.named_parameters():
                parameter.copy_(weights[name])
        resumed = dreamer_v3(again, **arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            set_optimizer_state_dict(again, resumed, saved, options=options)
        assert resumed.param_groups[0]["updates"] == 4
        _train(again, resumed, range(4, 8))
        for one, two in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(local(one), local(two))


@pytest.mark.ranks(2)
def test_a_clipper_attached_to_it_acts_first() -> None:
    values = whole()
    model = shard("fsdp2", values)
    optimizer = dreamer_v3(model.named(), lr=1e-2, warmup=0)
    GradClipper(model.named(), policies.global_norm(1.0)).attach(optimizer)
    model.set_gradients(values.gradients)
    optimizer.step()
    want = expected({"name": "global_norm", "max_norm": 1.0}, values.gradients, values.weights)
    chain = Chain(values.weights, **for_chain({"lr": 1e-2}))
    chain.step(want.gradients)
    compare(model, chain)
    assert optimizer.report is not None
    assert optimizer.report.total_norm.item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.ranks(2)
def test_ranks_that_disagree_are_told() -> None:
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = dreamer_v3(model, agc=0.1 * (1 + dist.get_rank()))
    with pytest.raises(distclip.RankMismatchError, match=r"clip=0\.2"):
        optimizer.step()
