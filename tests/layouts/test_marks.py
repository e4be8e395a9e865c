"""The marks that DeepSpeed MoE and Megatron leave on parameters."""

import math
import sys
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip import GradClipper, policies
from tests.layouts.declared import expert_mesh

SECONDS = 60


@pytest.mark.ranks(2, 4, timeout=SECONDS)
@pytest.mark.parametrize("framework", ["deepspeed", "megatron"])
def test_marks_of_frameworks(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for where the framework is loaded (here: a stand-in for it), else refused by name."""
    for loaded in ("deepspeed.utils.groups", "megatron.core.parallel_state"):  # by other tests
        monkeypatch.delitem(sys.modules, loaded, raising=False)
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
