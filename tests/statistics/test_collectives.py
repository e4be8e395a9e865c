"""One all-reduce a step, a few kilobytes, for every policy under every sharding."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import GradClipper, policies
from distclip.statistics import collectives
from tests.engine.test_matrix import POLICIES, build
from tests.helpers.shares import share
from tests.helpers.watching import REDUCTION, bits, same_bits, watch
from tests.sharded import mesh_of, shard, whole

SHARDED = ["fsdp2", "hsdp", "tp", "fsdp2_tp", "mixed", "fsdp1", "fsdp1_mixed"]


COUNTS = {
    # A value in the middle, whose outcome the last stage has to measure.
    "chain value between": 2,
    # A max beside sums.
    "chain global, agc": 2,
    "chain agc orders": 2,
    "running max": 2,
    # Other units for the same experts: other statistics, of what the first stage left.
    "chain agc twice": 2,
}
"""Policies that need more than one all-reduce, and why."""


@pytest.mark.ranks(2)
def test_the_watch_sees_collectives_of_any_spelling() -> None:
    """A check must be able to fail."""
    group = dist.group.WORLD
    assert group is not None
    with watch() as seen:
        dist.all_reduce(torch.ones(3))
        dist.all_gather_object([None, None], "x")
        dist.broadcast(torch.ones(1), 0)
        dist.barrier()
        group.allreduce([torch.ones(2)]).wait()
        distribute_tensor(torch.ones(4), mesh_of((2,), ("x",)), [Shard(0)]).full_tensor()
    assert ("allreduce_", 12) in seen.collectives
    assert ("allgather_", 8) in seen.collectives  # the length of the pickled object
    assert seen.collective_names.count("allreduce_") == 2
    kinds = " ".join(seen.collective_names)
    for kind in ("allgather", "broadcast", "barrier", "all_gather_into_tensor"):
        assert kind in kinds, kinds


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("layout", SHARDED)
@pytest.mark.parametrize(("few", "name"), [(8, REDUCTION), (0, "allreduce_")])
def test_one_all_reduce_a_step(
    monkeypatch: pytest.MonkeyPatch, layout: str, few: int, name: str, world_size: int
) -> None:
    """Each policy under each layout: on 2 or on 4 ranks, gathered or reduced."""
    monkeypatch.setattr(collectives, "FEW_RANKS", few)
    case = SHARDED.index(layout), world_size // 2, int(few == 0)
    values = whole()
    model = shard(layout, values)
    for label, configuration in share(POLICIES, *case, of=2).items():
        model.set_gradients(values.gradients)
        clipper = GradClipper(model.named(), build(configuration))
        with watch() as seen:
            clipper.clip_()
        # The replica check of the first step rides along, but no sum can ride on a maximum.
        wanted = COUNTS.get(label, 2 if label.endswith("p=inf") else 1)
        assert seen.collective_names == [name] * wanted, label
        model.set_gradients(values.gradients)
        with watch() as seen:
            report = clipper.clip_()
        assert seen.collective_names == [name] * COUNTS.get(label, 1), label
        with watch() as seen:
            report.to_dict()
            str(report)
            assert report.nonfinite == ()
            assert report.parameter_coefficients
        assert seen.collectives == [], label


@pytest.mark.ranks(2, 3, 4)
def test_gathered_or_reduced_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short messages of a few CPU ranks are gathered and reduced by each; others all-reduced."""
    group = dist.group.WORLD
    assert group is not None
    ranks, rank = dist.get_world_size(), dist.get_rank()
    most = collectives.SHORT // (8 * ranks)
    numbers = torch.rand(ranks, most + 1, generator=torch.Generator().manual_seed(5)).double()
    numbers[0, 3], numbers[-1, 5] = math.inf, math.nan
    for count, few, wanted in (
        (1, 8, "allgather_"),
        (most, 8, "allgather_"),
        (most, ranks - 1, "allreduce_"),
        (most + 1, 8, "allreduce_"),
    ):
        monkeypatch.setattr(collectives, "FEW_RANKS", few)
        mine = numbers[rank, :count].clone()
        with watch() as seen:
            largest = collectives.all_reduce_max(mine, group)
            collectives.all_reduce_sum(mine, group)
        assert seen.collectives == [(wanted, 8 * count)] * 2
        torch.testing.assert_close(mine, numbers[:, :count].sum(0), equal_nan=True)
        assert torch.equal(largest.nan_to_num(-1.0), numbers[:, :count].amax(0).nan_to_num(-1.0))
        matrix = collectives.all_reduce_max(
            numbers[rank, :count, None].expand(-1, 2).clone(), group
        )
        assert same_bits(bits(matrix), bits(largest[:, None].expand(-1, 2)))
        for found in (mine, largest):
            everyones = [torch.empty_like(found) for _ in range(ranks)]
            dist.all_gather(everyones, found)
            assert all(same_bits(bits(one), bits(found)) for one in everyones)


def test_the_order_of_addition_is_that_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not torch's for a dim, which depends on the processor; seen from 5 ranks on."""
    everyones = torch.randn(8, 37, dtype=torch.float64)
    monkeypatch.setattr(collectives, "_everyones", lambda values, group: [*everyones])
    found = torch.empty(37, dtype=torch.float64)
    collectives.all_reduce_sum(found, None)  # type: ignore[arg-type]
    assert found.tolist() == [sum(column) for column in everyones.t().tolist()]


@pytest.mark.ranks(1)
def test_which_groups_have_several_backends() -> None:
    group = dist.group.WORLD
    assert group is not None
    assert not collectives.is_mixed(group)
    mixed = dist.new_group(backend="cpu:gloo,cuda:fake")
    assert collectives.is_mixed(mixed)
    dist.destroy_process_group(mixed)


@pytest.mark.ranks(2)
def test_every_mode_costs_the_same_one() -> None:
    values = whole()
    for mode in ("error", "skip", "zero", "pass"):
        for policy in (policies.global_norm(1.0), policies.agc(0.1), policies.value(0.1)):
            model = shard("fsdp2", values)
            model.set_gradients(values.gradients)
            clipper = GradClipper(model.named(), policy, on_nonfinite=mode)
            with watch() as seen:
                clipper.clip_()
            assert seen.collective_names == [REDUCTION]


@pytest.mark.ranks(2)
def test_what_is_measured_for_the_report_alone_rides_along() -> None:
    values = whole()
    for policy, wanted in (
        (policies.global_norm(1.0), 1),
        (policies.agc(0.1), 1),
        (policies.measure(math.inf), 2),  # counts of exponents are sums, and travel beside maxima
    ):
        model = shard("fsdp2", values)
        clipper = GradClipper(model.named(), policy, ratios=2, exponents=2, verify_replicas="never")
        for calls in (wanted, 1, wanted):
            model.set_gradients(values.gradients)
            with watch() as seen:
                clipper.clip_()
            assert len(seen.collectives) == calls


@pytest.mark.ranks(2)
def test_plain_ddp_communicates_nothing() -> None:
    model = DistributedDataParallel(nn.Linear(5, 3))
    clippers = [GradClipper(model, build(policy)) for policy in POLICIES.values()]
    model(torch.full((2, 5), dist.get_rank() + 1.0)).sum().backward()
    for clipper in clippers:
        with watch() as seen:
            clipper.clip_()
        # The replica check, once: 10 numbers for each of 2 parameters, a flag, and a stamp of two.
        assert seen.collectives == [(REDUCTION, 8 * 23)]
        with watch() as seen:
            clipper.clip_()
        assert seen.collectives == []
    with watch() as seen:
        distclip.clip_grad_norm_(model.parameters(), 0.1)
        distclip.clip_grad_agc_(model.parameters(), 0.1)
        distclip.clip_grad_value_(model.parameters(), 0.1)
    assert seen.collectives == []


def matrices() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)])
    fully_shard(model, mesh=mesh_of((dist.get_world_size(),), ("dp",)))
    model(torch.ones(2, 8)).sum().backward()
    return model


@pytest.mark.ranks(2)
def test_row_agc_of_whole_rows_communicates_nothing_without_a_report() -> None:
    model = matrices()
    whole_rows = GradClipper(model, policies.agc(1e-4), norms=False, on_nonfinite="pass")
    with watch() as seen:
        report = whole_rows.clip_()
    assert seen.collectives == []
    assert math.isnan(report.total_norm.item())
    for p in model.parameters():
        assert p.grad is not None
        limits = 1e-4 * p.to_local().detach().norm(dim=1)
        torch.testing.assert_close(p.grad.to_local().norm(dim=1), limits)
    # What does have to be known on all ranks is still asked.
    for options in ({"norms": True, "on_nonfinite": "pass"}, {"norms": False}):
        clipper = GradClipper(model, policies.agc(1e-4), **options)
        with watch() as seen:
            clipper.clip_()
        assert seen.collective_names == [REDUCTION]
    columns = policies.agc(1e-4, unit_dims={"*": (1,)})
    clipper = GradClipper(model, columns, norms=False, on_nonfinite="pass")
    with watch() as seen:
        clipper.clip_()
    assert seen.collective_names == [REDUCTION]


@pytest.mark.ranks(2)
def test_the_message_is_small() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(24)])
    fully_shard(model, mesh=mesh_of((2,), ("dp",)))
    model(torch.ones(2, 64)).sum().backward()
    sizes = {}
    for label, policy in {
        "global": policies.global_norm(1.0),
        "agc": policies.agc(0.01),
        "dreamer": policies.dreamer_agc(),
        "max": policies.global_norm(1.0, math.inf),
    }.items():
        clipper = GradClipper(model, policy)
        with watch() as seen:
            clipper.clip_()
        ((_, sizes[label]),) = seen.collectives
    parameters = 48
    # One float64 a parameter and a flag.
    # Each with a flag, and the two numbers by which ranks see that they clip by the same rule.
    assert sizes["global"] == 8 * (parameters + 3)
    assert sizes["max"] == 8 * (parameters + 3)
    # Gradient and weight norms.
    assert sizes["dreamer"] == 8 * (2 * parameters + 3)
    # A few kilobytes, though the model has 100,000 elements in 1,560 units.
    assert sizes["agc"] <= 4096


@pytest.mark.ranks(2, 4)
def test_the_functions_cost_one_all_reduce() -> None:
    values = whole()
    for layout in ("fsdp2", "hsdp", "mixed"):
        model = shard(layout, values)
        parameters = list(model.parameters.values())
        for call in (
            lambda listed: distclip.clip_grad_norm_(listed, 1.0),
            lambda listed: distclip.clip_grad_norm_(listed, 1.0, 1.0, error_if_nonfinite=True),
            lambda listed: distclip.clip_grad_agc_(listed, 0.1),
            lambda listed: distclip.get_total_norm(p.grad for p in listed if p.grad is not None),
            lambda listed: distclip.grad_norms([(str(i), p) for i, p in enumerate(listed)]),
        ):
            model.set_gradients(values.gradients)
            call(parameters)  # the first call may have to make a group
            with watch() as seen:
                call(parameters)
            assert seen.collective_names == [REDUCTION]
        distclip.clip_grad_value_(parameters, 0.1)
        with watch() as seen:
            distclip.clip_grad_value_(parameters, 0.1)
        # Where a mesh replicates anything: whether a gradient is Partial.
        replicates = any(
            placement.is_replicate() and size > 1
            for p in parameters
            if isinstance(p, DTensor)
            for placement, size in zip(p.placements, p.device_mesh.shape, strict=True)
        )
        assert seen.collectives == ([(REDUCTION, 8)] if replicates else [])
