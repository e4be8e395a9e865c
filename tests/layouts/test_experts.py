"""Plain tensors that are not replicas: experts and slices, declared or marked."""

from __future__ import annotations

import functools
import itertools
import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import distclip
from distclip import GradClipper, policies
from distclip.testing import assert_rounded, expected
from tests.engine.test_matrix import POLICIES, ROUNDINGS, build
from tests.helpers.watching import REDUCTION, watch
from tests.sharded import mesh_of

SECONDS = 60


def expert_mesh() -> Any:
    """Expert-data-parallel replicas outside, expert-parallel ranks inside; 2 of them, or 3."""
    world = dist.get_world_size()
    return mesh_of((world // 2, 2) if world % 2 == 0 else (1, world), ("edp", "ep"))


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
        full = known[f"dense.{name}"][1]
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
def test_every_policy_on_declared_experts(idle: bool) -> None:
    """FSDP2 beside them; counted once over their replicas; named apart; one all-reduce."""
    mesh = expert_mesh()
    known = values(mesh["ep"].size())
    gradients: dict[str, Any] = {
        name: None if idle and name.endswith("@1") else gradient.double().numpy()
        for name, (_, gradient) in known.items()
    }
    weights = {name: weight.double().numpy() for name, (weight, _) in known.items()}
    for label, configuration in POLICIES.items():
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

        want = expected(
            words,
            {"experts.weight": gradient.double().numpy()},
            {"experts.weight": weight.double().numpy()},
        )

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
    gradients = {name: g.double().numpy() for name, (_, g) in known.items()}
    weights = {name: w.double().numpy() for name, (w, _) in known.items()}
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


SIZES = {"even": None, "uneven": (7, 2, 9, 6), "one is empty": (24, 0, 0, 0)}


def cut(whole: Tensor, dim: int, sizes: tuple[int, ...] | None) -> list[Tensor]:
    """Slices of a tensor of 24 along ``dim``, one for each rank."""
    world = dist.get_world_size()
    if sizes is None:
        return list(whole.chunk(world, dim))
    return list(whole.split([*sizes[: world - 1], sum(sizes[world - 1 :])], dim))


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", ["plain", "DTensor"])
def test_slices_of_one_tensor(dim: int, kind: str) -> None:
    """Megatron's tensor parallelism: one tensor, rows summed over ranks where they are cut.

    And rows of an embedding that are assigned to ranks by hand.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    weight, gradient = randn(24, 24, seed=1), randn(24, 24, seed=2)
    mesh = mesh_of((world,), ("tp",))

    def part(whole: Tensor, sizes: tuple[int, ...] | None) -> Tensor:
        local = cut(whole, dim, sizes)[rank].clone()
        if kind == "plain":
            return local
        size, stride = whole.shape, whole.stride()
        return DTensor.from_local(local, mesh, [Shard(dim)], shape=size, stride=stride)

    def local(tensor: Any) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    labels = ("global", "agc", "parameter", "value", "block rms", "zclip")
    for label, sizes in itertools.product(labels, SIZES.values()):
        p = nn.Parameter(part(weight, sizes))
        p.grad = part(gradient, sizes)
        q = nn.Parameter(torch.ones(3))
        q.grad = torch.full((3,), 2.0)
        if kind == "plain":
            distclip.declare_sharded(p, dist.group.WORLD, dim=dim)
        want = expected(
            POLICIES[label],
            {"w": gradient.double().numpy(), "q": q.grad.double().numpy()},
            {"w": weight.double().numpy(), "q": q.detach().double().numpy()},
        )
        pairs = [("w", p), ("q", q)]
        clipper = GradClipper(pairs, build(POLICIES[label]), verify_replicas=1)
        assert clipper.parameters[0].shape == (24, 24)
        report = clipper.clip_()
        assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
        full = cut(torch.from_numpy(want.gradients["w"]), dim, sizes)[rank].numpy()
        assert_rounded(local(p.grad), full, ulps=1, coefficient_error=3e-7, name=label)
        for function, again in (
            (lambda ps: distclip.clip_grad_norm_(ps, 0.1), "global"),
            (lambda ps: distclip.clip_grad_agc_(ps, 0.01), "agc"),
            (lambda ps: distclip.clip_grad_agc_(ps, 0.01, unit="tensor"), "tensor"),
        ):
            document = {
                "global": {"name": "global_norm", "max_norm": 0.1},
                "agc": {"name": "agc", "clip_factor": 0.01},
                "tensor": {"name": "agc", "clip_factor": 0.01, "unit": "tensor"},
            }[again]
            if label != "global":
                continue
            p.grad = part(gradient, sizes)
            want = expected(
                document, {"w": gradient.double().numpy()}, {"w": weight.double().numpy()}
            )
            assert function([p]).item() == pytest.approx(want.total_norm, rel=1e-6)
            full = cut(torch.from_numpy(want.gradients["w"]), dim, sizes)[rank].numpy()
            assert_rounded(local(p.grad), full, ulps=1, coefficient_error=3e-7, name=again)


@pytest.mark.ranks(4, timeout=SECONDS)
def test_replicas_of_uneven_slices_that_are_cut_differently() -> None:
    """Two groups of two, each with the whole tensor: it counts once, and the copies compare."""
    mesh = mesh_of((2, 2), ("dp", "tp"))
    group, place = mesh["dp"].get_local_rank(), mesh["tp"].get_local_rank()
    gradient = randn(5, 4, seed=2)
    sizes = [[3, 2], [1, 4]][group]
    p = nn.Parameter(torch.ones(sizes[place], 4))
    p.grad = gradient.split(sizes)[place].clone()
    distclip.declare_sharded(p, mesh["tp"].get_group(), dim=0)
    clipper = GradClipper([("w", p)], policies.agc(0.01))
    want = expected(
        {"name": "agc", "clip_factor": 0.01},
        {"w": gradient.double().numpy()},
        {"w": np.ones((5, 4))},
    )
    assert clipper.clip_().total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
    full = torch.from_numpy(want.gradients["w"]).split(sizes)[place].numpy()
    assert_rounded(p.grad, full, ulps=1, coefficient_error=3e-7)


@pytest.mark.ranks(2, timeout=SECONDS)
def test_slices_that_do_not_make_up_a_tensor() -> None:
    rank, mesh = dist.get_rank(), mesh_of((2,), ("tp",))
    local = torch.ones([4, 2][rank], 4)
    spread = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=torch.Size((5, 4)), stride=(4, 1)
    )
    with pytest.raises(distclip.RankMismatchError, match=r"extent of 5 .* of 4, 2, make up 6"):
        GradClipper([("w", nn.Parameter(spread))], policies.measure())
    p = nn.Parameter(torch.ones([3, 2][rank], [4, 5][rank]))
    distclip.declare_sharded(p, dist.group.WORLD, dim=0)
    with pytest.raises(distclip.RankMismatchError, match=r"\[5, 5\] on rank 1 but .*\[5, 4\]"):
        GradClipper([("w", p)], policies.measure())
    p.grad = torch.ones_like(p)
    with pytest.raises(distclip.RankMismatchError, match=r"'sliced', 5\].*'sliced', 4\]"):
        distclip.clip_grad_norm_([p], 1.0)


@pytest.mark.ranks(4, timeout=SECONDS)
def test_experts_that_are_sliced_too() -> None:
    mesh = mesh_of((2, 2), ("ep", "etp"))
    place, part = (mesh[name].get_local_rank() for name in ("ep", "etp"))
    full = [randn(4, 6, seed=expert) for expert in range(2)]
    p = nn.Parameter(torch.ones(4, 3))
    p.grad = full[place].chunk(2, 1)[part].clone()
    distclip.declare_sharded(p, mesh["ep"].get_group())
    distclip.declare_sharded(p, mesh["etp"].get_group(), dim=1)
    truth = torch.stack(full).double().norm().item()
    report = GradClipper([("e", p)], policies.measure()).clip_()
    assert report.total_norm.item() == pytest.approx(truth, rel=1e-6)
    for expert in range(2):
        norm = full[expert].double().norm().item()
        assert report.parameter_norms[f"e@{expert}"] == pytest.approx(norm, rel=1e-6)
    assert distclip.clip_grad_norm_([p], 1e9).item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.ranks(2, 4, timeout=SECONDS)
@pytest.mark.parametrize("framework", ["deepspeed", "megatron"])
def test_marks_of_frameworks(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for where the framework is loaded (here: a stand-in for it), else refused by name."""
    group = expert_mesh()["ep"].get_group()
    rank = dist.get_rank(group)
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), float(rank + 1))
    p.allreduce = False
    if framework == "deepspeed":
        p.group_name = "ep_size_2"
    for call in (
        lambda: GradClipper([("moe.w", p)], policies.measure()),
        lambda: distclip.clip_grad_norm_([p], 1.0),
    ):
        with pytest.raises((distclip.UnsupportedGradientError, distclip.RankMismatchError)) as e:
            call()
        assert "declare_sharded(parameter, process_group)" in str(e.value)
        dist.barrier()
    stand_in: Any = types.ModuleType("stand_in")
    if framework == "deepspeed":
        stand_in._EXPERT_PARALLEL_GROUP = {"ep_size_2": group}
        monkeypatch.setitem(sys.modules, "deepspeed.utils.groups", stand_in)
    else:
        stand_in.get_expert_model_parallel_group = lambda check_initialized=True: group
        stand_in.get_tensor_model_parallel_group = lambda check_initialized=True: group
        monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", stand_in)
    report = GradClipper([("moe.w", p)], policies.measure()).clip_()
    assert report.total_norm.item() == pytest.approx(math.sqrt(3 * (1 + 4)))
    assert set(report.parameter_norms) == {"moe.w@0", "moe.w@1"}
    if framework == "megatron":
        del p.allreduce
        p.tensor_model_parallel, p.partition_dim = True, 0
        report = GradClipper([("w", p)], policies.measure()).clip_()
        assert report.parameter_norms == {"w": pytest.approx(math.sqrt(3 * (1 + 4)))}


@pytest.mark.ranks(2, 3, timeout=SECONDS)
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_replicated_weights_that_are_marked_as_slices(
    sequence_parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerEngine marks all weights of its Linear, Megatron's "duplicated" ones too."""
    stand_in: Any = types.ModuleType("stand_in")
    stand_in.get_tensor_model_parallel_group = lambda check_initialized=True: dist.group.WORLD
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", stand_in)

    def marked(value: float) -> Any:
        made: Any = nn.Parameter(torch.ones(2, 3))
        made.grad = torch.full((2, 3), value)
        made.tensor_model_parallel, made.partition_dim, made.partition_stride = True, 0, 1
        return made

    sliced, copied = marked(1.0 + dist.get_rank()), marked(5.0)
    copied.sequence_parallel = sequence_parallel
    truth = math.sqrt(6 * (25 + sum((1 + rank) ** 2 for rank in range(dist.get_world_size()))))
    report = GradClipper([("s", sliced), ("c", copied)], policies.measure()).clip_()
    assert report.total_norm.item() == pytest.approx(truth, rel=1e-6)
    assert report.parameter_norms["c"] == pytest.approx(5 * math.sqrt(6), rel=1e-6)
    assert distclip.clip_grad_norm_([sliced, copied], 1e9).item() == pytest.approx(truth, rel=1e-6)
    del copied.sequence_parallel  # now the marks say that it is a slice, and a call believes them
    more = math.sqrt(truth**2 + 6 * 25 * (dist.get_world_size() - 1))
    assert distclip.clip_grad_norm_([sliced, copied], 1e9).item() == pytest.approx(more, rel=1e-6)


@pytest.mark.ranks(2, timeout=SECONDS)
@pytest.mark.parametrize("mark", ["tensor_model_parallel", "model_parallel"])
def test_a_slice_that_does_not_say_of_which_dim(mark: str) -> None:
    """As DeepSpeed AutoTP marks them: it would be taken for a replica."""
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.full((2, 3), 2.0 + dist.get_rank())
    setattr(p, mark, True)
    for call in (
        lambda: GradClipper([("w", p)], policies.measure()),
        lambda: distclip.clip_grad_norm_([p], 1.0),
    ):
        with pytest.raises((distclip.UnsupportedGradientError, distclip.RankMismatchError)) as e:
            call()
        assert "dim=..." in str(e.value)
        dist.barrier()
    distclip.declare_sharded(p, dist.group.WORLD, dim=1)  # type: ignore[arg-type]
    truth = math.sqrt(6 * (4 + 9))
    report = GradClipper([("w", p)], policies.measure()).clip_()
    assert report.parameter_norms == {"w": pytest.approx(truth, rel=1e-6)}
    assert distclip.clip_grad_norm_([p], 1e9).item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("marks", [{"allreduce": False}, {"tensor_model_parallel": True}])
def test_marks_in_one_process_mean_nothing(marks: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 2.0)
    p.__dict__.update(marks)
    assert distclip.clip_grad_norm_([p], 1e9).item() == pytest.approx(math.sqrt(12))
    GradClipper([("w", p)], policies.global_norm(1.0)).clip_()


@pytest.mark.ranks(4, timeout=SECONDS)
def test_slices_of_experts_lie_in_a_group_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron: `expert_tp` says so even where there is no expert parallelism."""
    grid = mesh_of((2, 2), ("ep", "etp"))
    stand_in: Any = types.ModuleType("stand_in")
    stand_in.get_tensor_model_parallel_group = lambda check_initialized=True: dist.group.WORLD
    stand_in.get_expert_tensor_parallel_group = lambda check_initialized=True: grid[
        "etp"
    ].get_group()
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", stand_in)
    p, q = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    for each in (p, q):
        each.tensor_model_parallel, each.partition_dim = True, 0
        each.grad = torch.full((2, 3), 2.0)
    q.expert_tp = True
    report = GradClipper([("w", p), ("e", q)], policies.measure()).clip_()
    assert report.parameter_norms == {
        "w": pytest.approx(math.sqrt(4 * 6 * 4)),
        "e": pytest.approx(math.sqrt(2 * 6 * 4)),
    }


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
    norm = distclip.clip_grad_norm_(stage.parameters(), 1.0, process_group=dist.group.WORLD)
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
    world = dist.get_world_size() if dist.is_initialized() else 1
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
