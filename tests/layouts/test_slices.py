"""Plain tensors that are declared as slices of one tensor."""

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
from torch.distributed.tensor import DTensor, Shard

import distclip
from distclip import GradClipper, policies
from distclip.testing import assert_rounded, expected
from tests.engine.test_matrix import POLICIES, build
from tests.helpers.shards import local
from tests.layouts.declared import cut, randn
from tests.sharded import mesh_of

SECONDS = 60


SIZES = {"even": None, "uneven": (7, 2, 9, 6), "one is empty": (24, 0, 0, 0)}


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
        mine = cut(whole, dim, sizes)[rank].clone()
        if kind == "plain":
            return mine
        size, stride = whole.shape, whole.stride()
        return DTensor.from_local(mine, mesh, [Shard(dim)], shape=size, stride=stride)

    labels = ("global", "agc", "parameter", "value", "block rms", "zclip")
    for label, sizes in itertools.product(labels, SIZES.values()):
        p = nn.Parameter(part(weight, sizes))
        p.grad = part(gradient, sizes)
        q = nn.Parameter(torch.ones(3))
        q.grad = torch.full((3,), 2.0)
        if kind == "plain":
            distclip.declare_sharded(p, dist.group.WORLD, dim=dim)
        want = expected(POLICIES[label], {"w": gradient, "q": q.grad}, {"w": weight, "q": q})
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
            want = expected(document, {"w": gradient}, {"w": weight})
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
    document = {"name": "agc", "clip_factor": 0.01}
    want = expected(document, {"w": gradient}, {"w": np.ones((5, 4))})
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
