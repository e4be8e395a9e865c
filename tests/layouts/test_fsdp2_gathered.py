"""FSDP2 between a forward and the next backward: the modules hold gathered parameters then."""

import copy
import itertools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import distclip
from distclip import GradClipper, policies
from distclip.layouts import fsdp2
from distclip.optim import LaProp, dreamer_v3
from distclip.testing import expected
from tests.sharded import mesh_of

CLIP = {"name": "global_norm", "max_norm": 0.1}


def plain() -> nn.Sequential:
    torch.manual_seed(3)
    inner = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
    return nn.Sequential(inner, nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :3] * 4).square().mean()


def batch() -> Tensor:
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(7))


def mine() -> Tensor:
    return batch().chunk(dist.get_world_size())[dist.get_rank()]


def sharded(situation: str) -> nn.Module:
    """Inner modules with states of their own, and parameters that only the root has."""
    model = plain()
    mesh = mesh_of((dist.get_world_size(),), ("dp",))
    if situation == "over tensor parallelism":
        grid = mesh_of((1, dist.get_world_size()), ("dp", "tp"))
        whole = {name: ColwiseParallel(output_layouts=Replicate()) for name in ("0.0", "1", "3")}
        parallelize_module(model, grid["tp"], whole)
        mesh = grid["dp"]
    reshard: Any = False if situation == "never sharded after a forward" else None
    if situation == "sharded over fewer after a forward":
        reshard = dist.get_world_size() // 2
    fully_shard(model[0], mesh=mesh, reshard_after_forward=reshard)
    fully_shard([model[1], model[2]], mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


SITUATIONS = [
    "a forward",
    "never sharded after a forward",
    "not sharded after backward",
    "unshard()",
    "two backwards",
]


def begin(situation: str) -> tuple[nn.Module, list[Tensor]]:
    """A model with gathered parameters to be, and those that an optimizer steps."""
    model = sharded(situation)
    return model, list(model.parameters())


def bring_about(model: nn.Module, situation: str) -> None:
    """Gradients, and gathered parameters."""
    x = batch() if situation == "over tensor parallelism" else mine()
    assert isinstance(model, FSDPModule)
    if situation == "not sharded after backward":
        model.set_reshard_after_backward(False)
    loss(model, x).backward()
    if situation == "two backwards":
        loss(model, x).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= 2
    if situation == "unshard()":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
    elif situation != "not sharded after backward":
        with torch.no_grad():
            model(x)


def truth(policy: Any = CLIP) -> Any:
    model = plain()
    loss(model, batch()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return expected(policy, gradients, dict(model.named_parameters()))


def found(parameters: list[Tensor]) -> list[np.ndarray]:
    return [p.grad.full_tensor().double().numpy() for p in parameters]  # type: ignore[union-attr]


def check(parameters: list[Tensor], total: float | None, policy: Any = CLIP) -> None:
    want = truth(policy)
    if total is not None:
        assert total == pytest.approx(want.total_norm, rel=1e-5)
    for gradient, wanted in zip(found(parameters), want.gradients.values(), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-7)


def clip(target: Callable[[nn.Module], Any]) -> Callable[[nn.Module], float]:
    return lambda model: (
        GradClipper(target(model), policies.global_norm(0.1)).clip_().total_norm.item()
    )


ENTRIES: dict[str, Callable[[nn.Module], float]] = {
    "module": clip(lambda model: model),
    "list of modules": clip(lambda model: [model]),
    "parameters": clip(lambda model: model.parameters()),
    "pairs": clip(lambda model: list(model.named_parameters())),
    "gathered and sharded together": clip(
        lambda model: [*model.parameters(), *fsdp2.sharded(model.parameters())]
    ),
    "clip_grad_norm_": lambda model: distclip.clip_grad_norm_(model.parameters(), 0.1).item(),
    "clip_grad_norm_, twice": lambda model: (
        distclip.clip_grad_norm_(model.parameters(), 1e9),
        distclip.clip_grad_norm_(model.parameters(), 0.1).item(),
    )[1],
}


def is_gathered(model: nn.Module) -> list[bool]:
    return [p is not q for p, q in zip(model.parameters(), fsdp2.sharded(model.parameters()))]  # noqa: B905


@pytest.mark.ranks(1, 2, 3)
def test_every_target_means_the_sharded_parameters() -> None:
    for situation, entry in itertools.product(SITUATIONS, ENTRIES.values()):
        model, parameters = begin(situation)
        bring_about(model, situation)
        assert any(is_gathered(model))
        check(parameters, entry(model))
        assert any(is_gathered(model))


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.filterwarnings("ignore:overlap=True has no effect")
def test_a_clipper_sees_the_same_parameters_at_every_step() -> None:
    """Built before any forward, or after one; gathered at some steps and sharded at others."""
    for situation, overlap, late in itertools.product(SITUATIONS, (False, True), (False, True)):
        model, parameters = begin(situation)
        if late:
            with torch.no_grad():
                model(mine())
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        reports: list[Any] = []
        sinks = [lambda _, report, to=reports: to.append(report)]
        policy = policies.global_norm(0.1)
        clipper = GradClipper(model, policy, overlap=overlap, sinks=sinks)
        clipper.attach(optimizer)
        assert all(isinstance(parameter, DTensor) for parameter in clipper.here.values())
        for step in range(3):
            if step == 1:
                loss(model, mine()).backward()
            else:
                bring_about(model, situation)
            optimizer.step()
            check(parameters, reports[step].total_norm.item())
            optimizer.zero_grad()


@pytest.mark.ranks(1, 2, 3)
def test_the_other_functions_and_policies_of_weights() -> None:
    agc = {"name": "agc", "clip_factor": 0.01}
    ways: list[tuple[Callable[[Any], Any], Any]] = [
        (lambda m: distclip.clip_grad_agc_(m.parameters()).item(), agc),
        (lambda m: GradClipper(m, policies.agc()).clip_().total_norm.item(), agc),
        (
            lambda m: distclip.clip_grad_value_(m.parameters(), 0.01),
            {"name": "value", "clip_value": 0.01},
        ),
    ]
    for situation, (act, policy) in itertools.product(SITUATIONS, ways):
        model, parameters = begin(situation)
        bring_about(model, situation)
        total = act(model)
        check(parameters, total, policy)
        for target in (model, list(model.named_parameters())):
            norms = distclip.grad_norms(target)
            want = {n: np.linalg.norm(g) for n, g in truth(policy).gradients.items()}
            assert {n: v.item() for n, v in norms.items()} == pytest.approx(want, rel=1e-4)


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("make", [LaProp, dreamer_v3], ids=lambda make: make.__name__)
def test_an_optimizer_made_of_gathered_parameters_steps_the_sharded_ones(make: Any) -> None:
    def step(model: nn.Module, target: Any) -> None:
        optimizer = make(target, lr=0.1, warmup=0, **({"agc": 0.3} if make is LaProp else {}))
        loss(model, mine()).backward()
        with torch.no_grad():
            model(mine())
        optimizer.step()

    for late in (lambda model: model, lambda model: list(model.parameters())):
        weights = []
        for gathered in (False, True):
            model, parameters = begin("a forward")
            if gathered:
                with torch.no_grad():
                    model(mine())
                assert any(is_gathered(model))
            step(model, late(model))
            weights.append([p.detach().full_tensor() for p in parameters])  # type: ignore[attr-defined]
        assert all(map(torch.equal, *weights))
        assert not torch.equal(weights[0][0], next(plain().parameters()))


@pytest.mark.ranks(1, 2)
def test_a_torch_optimizer_of_gathered_parameters_is_refused() -> None:
    model, parameters = begin("a forward")
    with torch.no_grad():
        model(mine())
    mixed = list(model.parameters())
    assert any(map(operator.is_, mixed, parameters))
    with pytest.raises(distclip.ConfigurationError, match="had gathered for a forward"):
        GradClipper(model, policies.measure()).attach(torch.optim.SGD(mixed, lr=0.1))


@pytest.mark.ranks(2)
def test_gathered_over_tensor_parallelism() -> None:
    """Their gathered parameters are DTensors, on the mesh of tensor parallelism alone."""
    for entry in ENTRIES.values():
        model, parameters = begin("over tensor parallelism")
        bring_about(model, "over tensor parallelism")
        assert any(is_gathered(model))
        check(parameters, entry(model))


@pytest.mark.ranks(4)
def test_sharded_over_fewer_ranks_after_a_forward() -> None:
    for entry in ENTRIES.values():
        model, parameters = begin("sharded over fewer after a forward")
        bring_about(model, "sharded over fewer after a forward")
        assert sum(is_gathered(model)) > 2
        check(parameters, entry(model))


@pytest.mark.ranks(2)
def test_a_newcomer_is_found_while_others_are_gathered() -> None:
    model, _ = begin("a forward")
    clipper = GradClipper(model, policies.global_norm(0.1))
    bring_about(model, "a forward")
    clipper.clip_()
    model[1].register_parameter("adapter", nn.Parameter(torch.ones(2)))  # type: ignore[index]
    with pytest.raises(distclip.ConfigurationError, match=r"'1\.adapter' came"):
        clipper.clip_()


@pytest.mark.ranks(2)
def test_a_function_follows_parameters_that_are_replaced() -> None:
    """Loading with ``assign=True`` gives FSDP2 other sharded parameters; its gathered ones stay."""
    model, before = begin("a forward")
    bring_about(model, "a forward")
    gathered = list(model.parameters())[-2:]
    assert gathered[0] is not before[-2]
    distclip.clip_grad_norm_(gathered, 0.1)
    assert isinstance(model, FSDPModule)
    model.reshard()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    now = list(model.parameters())[-2:]
    assert now[0] is not before[-2]
    for parameter in now:
        parameter.grad = parameter.detach() * 0 + 2.0
    size = sum(parameter.numel() for parameter in now)
    assert distclip.clip_grad_norm_(gathered, 1.0).item() == pytest.approx(2 * size**0.5)
    assert distclip.clip_grad_norm_(gathered, 1.0).item() == pytest.approx(1.0, rel=1e-4)
