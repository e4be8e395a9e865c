"""Plain tensors that are not replicas: experts and slices, declared or marked."""

import functools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distclip
from distclip import GradClipper, policies
from distclip.testing import assert_rounded, expected
from tests.engine.test_matrix import POLICIES, ROUNDINGS, build
from tests.helpers.shares import share
from tests.helpers.watching import REDUCTION, watch
from tests.layouts.declared import expert_mesh, randn
from tests.sharded import mesh_of

SECONDS = 60


def values(places: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and gradient of every tensor of the whole model, by its name in the table."""
    shapes = {"dense.weight": (7, 5), "dense.bias": (7,)}
    for place in range(places):
        shapes |= {
            f"moe.0.weight@{place}": (4, 3),
            f"moe.0.bias@{place}": (4,),
            f"moe.stacked@{place}": (2, 3, 4),
        }
    return {
        name: (
            randn(*shape, seed=number) * 0.5,
            randn(*shape, seed=100 + number) * 10.0 ** (number % 3 - 1),
        )
        for number, (name, shape) in enumerate(shapes.items())
    }


def model(mesh: Any, known: dict[str, tuple[Tensor, Tensor]], *, idle: bool = False) -> dict:
    """This rank's parameters, by plain names: FSDP2 dense ones, and its own experts."""
    place = mesh["ep"].get_local_rank()
    dense = nn.Module()
    dense.weight = nn.Parameter(known["dense.weight"][0])
    dense.bias = nn.Parameter(known["dense.bias"][0])
    fully_shard(dense, mesh=mesh_of((dist.get_world_size(),), ("dp",)))
    found: dict[str, Tensor] = {}
    for name, parameter in dense.named_parameters():
        assert isinstance(parameter, DTensor)
        found[f"dense.{name}"] = parameter
        full = known[f"dense.{name}"][1].clone()  # torch 2.9 gives a view of it
        parameter.grad = torch.distributed.tensor.distribute_tensor(
            full, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    for name, (weight, gradient) in known.items():
        base, _, at = name.partition("@")
        if at and int(at) == place:
            found[base] = nn.Parameter(weight.clone())
            found[base].grad = None if idle and place == 1 else gradient.clone()
            distclip.declare_sharded(found[base], mesh["ep"].get_group())
    return found


@pytest.mark.ranks(2, 3, 4, timeout=120)
@pytest.mark.parametrize("idle", [False, True])
def test_every_policy_on_declared_experts(idle: bool, world_size: int) -> None:
    """FSDP2 beside them; counted once over their replicas; named apart; one all-reduce."""
    mesh = expert_mesh()
    known = values(mesh["ep"].size())
    gradients: dict[str, Any] = {
        name: None if idle and name.endswith("@1") else gradient
        for name, (_, gradient) in known.items()
    }
    weights = {name: weight for name, (weight, _) in known.items()}
    for label, configuration in share(POLICIES, world_size, idle, of=2).items():
        words = _expert_words(configuration)
        mine = model(mesh, known, idle=idle)
        # The oracle's patterns know no places.
        want = expected(_placed(words), gradients, weights)
        clipper = GradClipper(mine.items(), build(words))
        with watch() as seen:
            report = clipper.clip_()
        assert set(seen.collective_names) == {REDUCTION}, label
        if label in ("global", "agc", "parameter"):
            assert seen.collective_names == [REDUCTION]
        assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6), label
        assert set(report.parameter_norms) == set(known)
        for name, norm in report.parameter_norms.items():
            assert norm == pytest.approx(want.parameter_norms[name], rel=1e-6), (label, name)
        place = mesh["ep"].get_local_rank()
        for name, parameter in mine.items():
            full = want.gradients[name if name.startswith("dense") else f"{name}@{place}"]
            if full is None:
                assert parameter.grad is None
                continue
            grad = parameter.grad
            got = grad.full_tensor() if isinstance(grad, DTensor) else grad
            assert_rounded(
                got, full, ulps=ROUNDINGS.get(label, 1), coefficient_error=3e-7, name=name
            )


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
@pytest.mark.parametrize("idle", [False, True])
def test_stacked_experts_on_a_mesh_of_their_own(idle: bool) -> None:
    """Nothing beside them: `[E, out, in]` over a sub-mesh, its replicas counted once."""
    mesh = expert_mesh()["ep"]
    place, shape = mesh.get_local_rank(), (2 * mesh.size() - 1, 3, 5)
    cut = functools.partial(
        torch.distributed.tensor.distribute_tensor,
        device_mesh=mesh,
        placements=[torch.distributed.tensor.Shard(0)],
        src_data_rank=None,
    )
    weight, gradient = randn(*shape, seed=1), randn(*shape, seed=2)
    if idle:
        gradient[2:4] = 0.0  # of place 1
    for label, words in POLICIES.items():
        p = nn.Parameter(cut(weight.clone()))

        def give(p: nn.Parameter = p) -> list[nn.Parameter]:
            p.grad = None if idle and place == 1 else cut(gradient.clone())
            return [p]

        want = expected(words, {"experts.weight": gradient}, {"experts.weight": weight})

        def check(p: nn.Parameter, full: Any, label: str = label) -> None:
            if idle and place == 1:
                assert p.grad is None
                return
            mine = torch.from_numpy(full).chunk(mesh.size())[place]
            assert isinstance(p.grad, DTensor)
            ulps = ROUNDINGS.get(label, 1)
            assert_rounded(p.grad.to_local(), mine.numpy(), ulps=ulps, coefficient_error=3e-7)

        clipper = GradClipper([("experts.weight", p)], build(words), verify_replicas="never")
        give()
        with watch() as seen:
            report = clipper.clip_()
        assert set(seen.collective_names) == {REDUCTION}, label
        assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6), label
        check(p, want.gradients["experts.weight"])
        if label == "global":
            norm = distclip.clip_grad_norm_(give(), 1.0)
            assert norm.item() == pytest.approx(want.total_norm, rel=1e-6)
            check(p, want.gradients["experts.weight"])


def _expert_words(configuration: Any) -> Any:
    text = repr(configuration).replace("experts.*", "*.stacked").replace("conv*", "moe.0*")
    return eval(text, {"inf": math.inf})


def _placed(words: Any) -> Any:
    text = repr(words).replace("*.stacked'", "*.stacked@*'").replace("*.bias'", "*.bias*'")
    text = text.replace("*.weight'", "*.weight*'")
    return eval(text, {"inf": math.inf})


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
def test_the_functions_know_declared_experts() -> None:
    mesh = expert_mesh()
    known = values(mesh["ep"].size())
    truth = math.sqrt(sum(g.double().norm().item() ** 2 for _, g in known.values()))
    mine = model(mesh, known)
    norm = distclip.clip_grad_norm_(mine.values(), 0.5)
    assert norm.item() == pytest.approx(truth, rel=1e-6)
    place = mesh["ep"].get_local_rank()
    torch.testing.assert_close(
        mine["moe.stacked"].grad, known[f"moe.stacked@{place}"][1] * 0.5 / (truth + 1e-6)
    )
    mine = model(mesh, known)
    norms = distclip.grad_norms(mine.items())
    assert set(norms) == set(known)
    for name, norm in norms.items():
        assert norm.item() == pytest.approx(known[name][1].double().norm().item(), rel=1e-6)
    gradients = {name: gradient for name, (_, gradient) in known.items()}
    weights = {name: weight for name, (weight, _) in known.items()}
    want = expected({"name": "agc", "clip_factor": 0.1}, gradients, weights)
    norm = distclip.clip_grad_agc_(mine.values(), 0.1)
    assert norm.item() == pytest.approx(truth, rel=1e-6)
    for name in ("moe.0.weight", "moe.0.bias", "moe.stacked"):
        assert_rounded(
            mine[name].grad,
            want.gradients[f"{name}@{place}"],
            ulps=1,
            coefficient_error=3e-7,
            name=name,
        )


@pytest.mark.ranks(2, 3, timeout=SECONDS)
def test_an_embedding_that_the_last_stage_has_a_copy_of() -> None:
    """Megatron's `shared`: left out of joint norms; under another name refused by a GradClipper."""
    world, rank = dist.get_world_size(), dist.get_rank()
    weight = nn.Parameter(torch.ones(5, 2))
    weight.grad = torch.full((5, 2), 3.0)  # the pipeline has summed both stages' gradients
    weight.tensor_model_parallel = False
    own = nn.Parameter(torch.ones(4))
    own.grad = torch.full((4,), 2.0)
    stage = nn.Module()
    stage.register_parameter(f"own{rank}", own)
    if rank in (0, world - 1):
        stage.register_parameter("embedding" if rank == 0 else "output", weight)
    weight.shared = rank == world - 1
    truth = math.sqrt(10 * 9 + 4 * 4 * world)
    norm = distclip.clip_grad_norm_(stage.parameters(), 1.0, pipeline_group=dist.group.WORLD)
    assert norm.item() == pytest.approx(truth, rel=1e-6)
    torch.testing.assert_close(
        weight.grad, torch.full((5, 2), 3.0 if 0 < rank < world - 1 else 3.0 / (truth + 1e-6))
    )
    with pytest.raises(distclip.UnsupportedGradientError, match=r"'output' on rank .* shared"):
        GradClipper([stage], policies.global_norm(1.0))
    dist.barrier()
    if rank == world - 1:
        del stage.output
        stage.embedding = weight
    for p in stage.parameters():
        p.grad = torch.full_like(p, 3.0 if p is weight else 2.0)
    report = GradClipper([stage], policies.agc(1e-3)).clip_()
    assert report.total_norm.item() == pytest.approx(truth, rel=1e-6)
    if rank in (0, world - 1):
        torch.testing.assert_close(weight.grad, torch.full((5, 2), 1e-3))


@pytest.mark.ranks(2, timeout=SECONDS)
def test_declarations_that_cannot_be_meant() -> None:
    group: Any = dist.group.WORLD
    p = nn.Parameter(torch.ones(3, 2))
    for dim in (2, -3, True):
        with pytest.raises(distclip.ConfigurationError, match="does not fit"):
            distclip.declare_sharded(p, group, dim=dim)
    with pytest.raises(distclip.ProcessGroupError, match="get_group"):
        distclip.declare_sharded(p, mesh_of((2,), ("x",)))  # type: ignore[arg-type]
    only: Any = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(distclip.ProcessGroupError, match="with this rank"):
            distclip.declare_sharded(p, only)
    cut = nn.Parameter(
        torch.distributed.tensor.distribute_tensor(torch.ones(2), mesh_of((2,), ("x",)))
    )
    with pytest.raises(distclip.ConfigurationError, match="placements"):
        distclip.declare_sharded(cut, group)
    # Declared on one rank only: all ranks hear of it.
    if dist.get_rank() == 0:
        distclip.declare_sharded(p, group)
    with pytest.raises(distclip.RankMismatchError, match="'w"):
        GradClipper([("w", p)], policies.measure())


class Moe(nn.Module):
    """A dense layer, then experts, of which every token visits all."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.dense = nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(experts))


@pytest.mark.ranks(2, 4, timeout=SECONDS)
def test_experts_beside_fsdp2_train_as_one_process() -> None:
    """20 steps, to the same weights (fp32, 1e-6)."""
    mesh = expert_mesh()
    place, group = mesh["ep"].get_local_rank(), mesh["ep"].get_group()
    whole, mine = Moe(2), Moe(2)
    fully_shard(mine.dense, mesh=mesh_of((dist.get_world_size(),), ("dp",)))
    mine.experts = nn.ModuleList([mine.experts[place]])
    for p in mine.experts.parameters():
        distclip.declare_sharded(p, group)
    policy = policies.chain(policies.agc(0.05), policies.global_norm(0.05))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m in (whole, mine)]
    # The whole model is every rank's own: alone in a group of one.
    alone: Any = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
    GradClipper(whole, policy, process_group=alone).attach(optimizers[0])
    clipper = GradClipper(mine, policy)
    clipper.attach(optimizers[1])
    assert {"experts.0.weight@0", "experts.0.weight@1"} <= set(clipper.names)
    for step in range(20):
        value, target = randn(8, 6, seed=step), randn(8, 6, seed=1000 + step)
        hidden = whole.dense(value).tanh()
        nn.functional.mse_loss(sum(e(hidden) for e in whole.experts), target).backward()
        hidden = mine.dense(value).tanh()
        # An all-reduce of the outputs forward, and of the gradient of their input backward.
        shared = hidden.detach().requires_grad_()
        out = mine.experts[0](shared)
        total = out.detach().clone()
        dist.all_reduce(total, group=group)
        total.requires_grad_()
        nn.functional.mse_loss(total, target).backward()
        out.backward(total.grad)
        assert shared.grad is not None
        dist.all_reduce(shared.grad, group=group)
        hidden.backward(shared.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, p in mine.dense.named_parameters():
        want = whole.dense.get_parameter(name)
        torch.testing.assert_close(p.full_tensor(), want.detach(), rtol=1e-6, atol=1e-6)
    for name, p in mine.experts[0].named_parameters():
        want = whole.experts[place].get_parameter(name)
        torch.testing.assert_close(p.detach(), want.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.ranks(1, 2, 3, 4, timeout=SECONDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_other_dtypes_empty_and_tiny_shards(dtype: torch.dtype) -> None:
    """Float64 and complex, sharded; no elements; one element on four ranks; frozen; LoRA."""
    world = dist.get_world_size()
    shapes = {"w": (5, 3), "empty": (0, 3), "one": (1,), "frozen": (4,)}
    pairs, total = [], 0.0
    for number, (name, shape) in enumerate(shapes.items()):
        gradient = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(number))
        p: Tensor = nn.Parameter(torch.ones(shape, dtype=dtype), requires_grad=name != "frozen")
        if world > 1:
            cut = mesh_of((world,), ("x",))
            place = [torch.distributed.tensor.Shard(0)]
            distribute = torch.distributed.tensor.distribute_tensor
            p = nn.Parameter(
                distribute(p.detach(), cut, place, src_data_rank=None),
                requires_grad=name != "frozen",
            )
            gradient_here: Tensor = distribute(gradient, cut, place, src_data_rank=None)
        else:
            gradient_here = gradient
        if name != "frozen":
            p.grad = gradient_here
            total += gradient.abs().double().square().sum().item()
        pairs.append((name, p))
    for policy in (policies.agc(0.1), policies.parameter_norm(0.5), policies.global_norm(1e9)):
        report = GradClipper(pairs, policies.chain(policies.measure(), policy)).clip_()
        if policy.name == "agc":
            assert report.total_norm.item() == pytest.approx(math.sqrt(total), rel=1e-6)
    assert report.total_norm.item() <= math.sqrt(2 * 0.5**2) * (1 + 1e-6)


def test_names_are_clean_under_compile_and_checkpointing() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    compile_ = functools.partial(torch.compile, backend="eager")
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), compile_(nn.Linear(2, 2)))
    names = GradClipper(compile_(model), policies.measure()).names
    assert names == ("0.weight", "0.bias", "1.weight", "1.bias")
