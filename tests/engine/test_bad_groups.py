"""Process groups that are closed, foreign, or do not hold the model."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

import distclip
from distclip import (
    GradClipper,
    ProcessGroupError,
    policies,
)
from tests.engine.bad_input import plain, refused, sharded
from tests.helpers.watching import bits, same_bits
from tests.sharded import mesh_of

SECONDS = 20
"""A hang is a failure, and not a long wait."""


@pytest.mark.ranks(2, 3, timeout=SECONDS)
def test_a_group_without_this_rank() -> None:
    group: Any = dist.new_group([0])
    if dist.get_rank() == 0:
        GradClipper([("a", plain(2))], policies.measure(), process_group=group).clip_()
        distclip.clip_grad_norm_([plain(2)], 1.0, pipeline_group=group)
    else:
        for call in (
            lambda: GradClipper([("a", plain(2))], policies.measure(), process_group=group),
            lambda: distclip.clip_grad_norm_([plain(2)], 1.0, pipeline_group=group),
            lambda: distclip.get_total_norm([plain(2)], pipeline_group=group),
        ):
            with pytest.raises(ProcessGroupError, match="not a member"):
                call()
    dist.barrier()


@pytest.mark.ranks(2, timeout=SECONDS)
def test_something_that_is_no_group() -> None:
    mesh: Any = mesh_of((2,), ("x",))
    p = plain(2)
    refused(
        lambda: GradClipper([("a", p)], policies.measure(), process_group=mesh),
        ProcessGroupError,
        "get_group",
    )
    refused(
        lambda: distclip.clip_grad_norm_([p], 1.0, pipeline_group=mesh),
        ProcessGroupError,
        "get_group",
    )


@pytest.mark.ranks(2, timeout=SECONDS)
def test_a_closed_group() -> None:
    group = dist.new_group([0, 1])
    assert group is not None
    p = sharded(4, 3)
    clipper = GradClipper([("a", p)], policies.global_norm(1.0), process_group=group)
    clipper.clip_()
    before = bits(p.grad)
    dist.destroy_process_group(group)
    refused(clipper.clip_, ProcessGroupError, "destroyed")
    refused(
        lambda: GradClipper([("a", p)], policies.measure(), process_group=group),
        ProcessGroupError,
        "destroyed",
    )
    refused(
        lambda: distclip.clip_grad_norm_([p], 1.0, pipeline_group=group),
        ProcessGroupError,
        "destroyed",
    )
    assert same_bits(before, bits(p.grad))


@pytest.mark.ranks(4, timeout=SECONDS)
def test_a_group_that_does_not_hold_the_whole_model() -> None:
    p = sharded(8, 3)
    half = dist.new_group([0, 1]), dist.new_group([2, 3])
    mine = half[dist.get_rank() // 2]
    refused(
        lambda: GradClipper([("w", p)], policies.measure(), process_group=mine),
        ProcessGroupError,
        "'w'",
        "ranks 0, 1, 2, 3",
    )


@pytest.mark.ranks(4, timeout=SECONDS)
def test_a_rank_outside_of_every_mesh_has_no_part_in_the_norm() -> None:
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", [0, 1])
    local = torch.full((2, 3), 2.0) if dist.get_rank() < 2 else torch.empty(0)
    p = nn.Parameter(
        DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 3)), stride=(3, 1)
        )
    )
    p.grad = p.detach().clone() if dist.get_rank() < 2 else None
    if dist.get_rank() < 2:
        norm = distclip.clip_grad_norm_([p], 1.0)
        assert norm.item() == pytest.approx(math.sqrt(48))
    else:
        with pytest.raises(ProcessGroupError, match="in no device mesh"):
            distclip.clip_grad_norm_([p], 1.0)
    dist.barrier()
