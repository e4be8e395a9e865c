"""The drop-ins over a group whose members hold different parameters."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distclip
from distclip import policies
from distclip.application import notices
from distclip.errors import ConfigurationError
from distclip.testing import assert_rounded
from tests.functional.drawn import gradients, parameter, randn
from tests.sharded import mesh_of


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 7.0, math.inf])
def test_pipeline_stages_of_plain_tensors(norm_type: float) -> None:
    """As many parameters as the rank's number and one, of different shapes and dtypes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dtypes = [torch.float32, torch.bfloat16, torch.float64]

    def stage(rank: int) -> list[nn.Parameter]:
        return [
            parameter(
                torch.ones(rank + 2, 3, dtype=dtypes[rank]),
                randn(rank + 2, 3, seed=10 * rank + i).to(dtypes[rank]),
            )
            for i in range(rank + 1)
        ]

    everything = [g.double().flatten() for r in range(world) for g in gradients(stage(r))]
    truth = torch.linalg.vector_norm(torch.cat(everything), norm_type).item()
    mine = stage(rank)
    before = [g.double().clone() for g in gradients(mine)]
    group = dist.group.WORLD
    norm = distclip.get_total_norm(gradients(mine), norm_type, pipeline_group=group)
    assert norm.item() == pytest.approx(truth, rel=1e-6)
    norm = distclip.clip_grad_norm_(mine, 0.5, norm_type, pipeline_group=group)
    assert norm.item() == pytest.approx(truth, rel=1e-6)
    for have, old in zip(gradients(mine), before, strict=True):
        want = old * 0.5 / (truth + 1e-6)
        assert_rounded(have, want.numpy(), coefficient_error=1e-6)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("members", ["all ranks", "one of each stage"])
def test_pipeline_stages_that_are_sharded_themselves(members: str) -> None:
    """Two stages, each over two ranks. The group spans the stages, or all their ranks."""
    grid = mesh_of((2, 2), ("stage", "shard"))
    stage = grid["stage"].get_local_rank()
    group = dist.group.WORLD if members == "all ranks" else grid["stage"].get_group()
    shape = (5, 3) if stage else (4, 2)
    count = stage + 1

    def cut_here(tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor.clone(), grid["shard"], [Shard(0)], src_data_rank=None)

    def parameters() -> list[nn.Parameter]:
        return [
            parameter(cut_here(torch.ones(shape)), cut_here(randn(*shape, seed=stage + i)))
            for i in range(count)
        ]

    parts = [randn(4, 2), randn(5, 3, seed=1), randn(5, 3, seed=2)]
    truth = math.sqrt(sum(part.double().square().sum().item() for part in parts))
    mine = parameters()
    norm = distclip.clip_grad_norm_(mine, 0.5, pipeline_group=group)
    assert norm.item() == pytest.approx(truth, rel=1e-6)
    assert isinstance(mine[0].grad, DTensor)
    want = randn(*shape, seed=stage) * (0.5 / (truth + 1e-6))
    torch.testing.assert_close(mine[0].grad.full_tensor(), want)
    # AGC acts within the stage; only the norm that it returns is everybody's.
    mine, alone = parameters(), [parameter(torch.ones(shape), randn(*shape, seed=stage))]
    norm = distclip.clip_grad_agc_(mine, 0.1, pipeline_group=group)
    assert norm.item() == pytest.approx(truth, rel=1e-6)
    distclip.clip_grad_agc_(alone, 0.1)
    assert isinstance(mine[0].grad, DTensor)
    assert alone[0].grad is not None
    torch.testing.assert_close(mine[0].grad.full_tensor(), alone[0].grad)


@pytest.mark.ranks(2)
def test_agc_of_stages_does_not_mix_their_vectors() -> None:
    rank = dist.get_rank()
    p = parameter(torch.full((3,), 1.0 + 9.0 * rank), torch.full((3,), 5.0))
    distclip.clip_grad_agc_([p], 0.1, pipeline_group=dist.group.WORLD)
    assert p.grad is not None
    torch.testing.assert_close(p.grad, torch.full((3,), 0.1 * (1.0 + 9.0 * rank)))


@pytest.mark.ranks(4)
def test_grad_norms_of_stages_are_each_stages_own() -> None:
    """Two stages of different sizes, each sharded over two ranks."""
    grid = mesh_of((2, 2), ("stage", "shard"))
    stage = grid["stage"].get_local_rank()
    whole = {f"w{i}": randn(5 + stage, 3, seed=10 * stage + i) for i in range(stage + 1)}
    pairs = []
    for name, value in whole.items():
        sharded = distribute_tensor(value.clone(), grid["shard"], [Shard(0)], src_data_rank=None)
        pairs.append((name, nn.Parameter(sharded)))
        pairs[-1][1].grad = sharded.clone()
    norms = distclip.grad_norms(pairs, pipeline_group=dist.group.WORLD)
    assert set(norms) == set(whole)
    for name, value in whole.items():
        truth = torch.linalg.vector_norm(value.double()).item()
        assert norms[name].item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.ranks(2)
def test_the_former_name_of_the_pipeline_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_former", set())
    group = dist.group.WORLD
    tensors = [torch.full((4,), 1.0 + dist.get_rank())]
    with pytest.warns(FutureWarning, match="pipeline_group"):
        norm = distclip.get_total_norm(tensors, process_group=group)
    assert norm.item() == pytest.approx(math.sqrt(4 + 16))
    assert norm.item() == distclip.get_total_norm(tensors, process_group=group).item()  # no more
    assert norm.item() == distclip.get_total_norm(tensors, pipeline_group=group).item()
    with pytest.raises(ConfigurationError, match="two names for one thing"):
        distclip.get_total_norm(tensors, pipeline_group=group, process_group=group)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("way", ["two norms", "clipper"])
def test_tables_of_each_rank_beside_replicated_layers(way: str) -> None:
    """As torchrec has them: plain tensors, of another number and other shapes on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def tables_of(rank: int) -> dict[str, nn.Parameter]:
        shapes = [(5 + rank, 3), (2, 4)][: 1 + rank]
        return {
            f"table_{rank}_{n}": parameter(torch.ones(shape), randn(*shape, seed=10 * rank + n))
            for n, shape in enumerate(shapes)
        }

    dense = {"weight": parameter(torch.ones(3, 2), randn(3, 2, seed=99))}
    mine = tables_of(rank)
    everything = [g for r in range(world) for g in gradients(list(tables_of(r).values()))]
    everything += gradients(list(dense.values()))
    truth = torch.cat([g.double().flatten() for g in everything]).norm().item()
    before = {name: p.grad.clone() for name, p in {**mine, **dense}.items()}  # type: ignore[union-attr]
    if way == "clipper":
        model = nn.Module()
        for name, each in {**mine, **dense}.items():
            model.register_parameter(name, each)
        clipper = distclip.GradClipper([model], policies.global_norm(0.5))
        norm = clipper.clip_().total_norm
    else:
        listed = [*mine.values(), *dense.values()]
        sharded = distclip.get_total_norm(
            gradients(list(mine.values())), pipeline_group=dist.group.WORLD
        )
        replicated = distclip.get_total_norm(gradients(list(dense.values())))
        norm = torch.linalg.vector_norm(torch.stack([sharded, replicated]))
        distclip.clip_grads_with_norm_(listed, 0.5, norm)
    assert norm.item() == pytest.approx(truth, rel=1e-6)
    for name, each in {**mine, **dense}.items():
        want = before[name].double() * 0.5 / (truth + 1e-6)
        assert each.grad is not None
        assert_rounded(each.grad, want.numpy(), coefficient_error=1e-6, name=name)
