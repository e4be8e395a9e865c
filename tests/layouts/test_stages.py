"""Pipeline stages: each rank holds other parameters. A real schedule, FSDP2 inside."""

import logging
import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

import distclip
from distclip import GradClipper, policies
from tests.helpers.watching import REDUCTION, watch
from tests.sharded import mesh_of

SECONDS = 60


def layers() -> nn.ModuleList:
    torch.manual_seed(3)
    return nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 6, generator=generator)


def alone(policy: Any, steps: int) -> tuple[dict[str, Tensor], list[float]]:
    model = layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    norms: list[float] = []
    clipper = GradClipper(model, policy, process_group=_myself())
    clipper.sinks = (lambda _, report: norms.append(report.total_norm.item()),)
    clipper.attach(optimizer)
    for step in range(steps):
        value, target = batch(step)
        for layer in model:
            value = layer(value)
        nn.functional.mse_loss(value, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters()), norms


def _myself() -> Any:
    found = None
    for rank in range(dist.get_world_size()):
        group = dist.new_group([rank])
        found = group if rank == dist.get_rank() else found
    return found


@pytest.mark.ranks(4, timeout=150)
@pytest.mark.parametrize("kind", ["1F1B", "interleaved"])
def test_a_pipeline_with_fsdp2_trains_as_one_process(kind: str) -> None:
    """2 stages x 2 shards, 20 steps of a real schedule, to the same weights (fp32, 1e-6)."""
    policy = policies.chain(policies.agc(0.05), policies.global_norm(0.05))
    want, norms = alone(policy, 20)
    mesh = mesh_of((2, 2), ("pp", "dp"))
    place, group = mesh["pp"].get_local_rank(), mesh["pp"].get_group()
    whole = layers()
    numbers = [[0, 1], [2, 3]][place] if kind == "1F1B" else [place, place + 2]
    parts: list[nn.Module] = []
    for chunk in [numbers] if kind == "1F1B" else [[n] for n in numbers]:
        part = nn.Sequential()
        for number in chunk:
            part.add_module(str(number), whole[number])
        fully_shard(part, mesh=mesh["dp"])
        parts.append(part)
    stages = [
        PipelineStage(part, place + 2 * i, 2 * len(parts), torch.device("cpu"), group=group)
        for i, part in enumerate(parts)
    ]
    loss = nn.functional.mse_loss
    schedule: Any = (
        Schedule1F1B(stages[0], 4, loss_fn=loss)
        if kind == "1F1B"
        else ScheduleInterleaved1F1B(stages, 4, loss_fn=loss)
    )
    optimizer = torch.optim.SGD(
        [p for part in parts for p in part.parameters()], lr=0.5, momentum=0.9
    )
    found: list[float] = []
    clipper = GradClipper(
        parts, policy, sinks=[lambda _, report: found.append(report.total_norm.item())]
    )
    assert set(clipper.names) == set(want)
    clipper.attach(optimizer)
    for step in range(20):
        value, target = batch(step)
        half = slice(0, 8)  # the same rows on both shards: FSDP2 takes the mean
        if place == 0:
            schedule.step(value[half])
        if place == 1:
            schedule.step(target=target[half])
        with watch() as seen:
            optimizer.step()
        assert seen.collective_names == [REDUCTION]
        optimizer.zero_grad()
    assert found == pytest.approx(norms, rel=1e-5)
    for part in parts:
        for name, parameter in part.named_parameters():
            torch.testing.assert_close(
                parameter.full_tensor(), want[name].detach(), rtol=1e-6, atol=1e-6
            )


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
def test_tied_across_stages_and_a_stage_without_parameters() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    stage = nn.Module()
    if rank != 1:
        stage.register_parameter(f"own{rank}", nn.Parameter(torch.ones(3)))
    if rank in (0, world - 1) and rank != 1:
        stage.register_parameter("tied", nn.Parameter(torch.ones(4)))
    for p in stage.parameters():
        p.grad = torch.full_like(p, 2.0)
    truth = math.sqrt(4 * (3 * (world - 1) + 4))
    report = GradClipper([stage], policies.global_norm(1.0)).clip_()
    assert report.total_norm.item() == pytest.approx(truth, rel=1e-6)
    for p in stage.parameters():
        torch.testing.assert_close(p.grad, torch.full_like(p, 2.0 / (truth + 1e-6)))


@pytest.mark.ranks(2, 3, timeout=SECONDS)
@pytest.mark.parametrize("when", ["built", "attached"])
def test_group_norm_knows_the_groups_of_other_stages(when: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    stage = nn.ParameterDict(
        {f"{kind}{rank}": nn.Parameter(torch.ones(2)) for kind in ("decayed", "free")}
    )
    optimizer = torch.optim.SGD([{"params": [p]} for p in stage.values()], lr=1.0)
    for kind, size in (("decayed", 3.0), ("free", 0.1)):
        stage[f"{kind}{rank}"].grad = torch.full((2,), size)
    policy = policies.group_norm(1.0)
    clipper = GradClipper([stage], policy, optimizer=optimizer if when == "built" else None)
    if when == "attached":
        clipper.attach(optimizer)
    clipper.clip_()
    total = 3.0 * math.sqrt(2 * world)
    assert stage[f"free{rank}"].grad is not None
    assert stage[f"free{rank}"].grad.tolist() == pytest.approx([0.1, 0.1])
    assert stage[f"decayed{rank}"].grad.tolist() == pytest.approx([3.0 / total] * 2)


@pytest.mark.ranks(2, timeout=SECONDS)
def test_a_tied_parameter_in_other_groups_is_refused() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    rank = dist.get_rank()
    stage = nn.ParameterDict({"tied": p, f"own{rank}": q})
    order = [p, q] if rank else [q, p]
    optimizer = torch.optim.SGD([{"params": [each]} for each in order], lr=1.0)
    with pytest.raises(distclip.RankMismatchError, match="'tied' is in optimizer"):
        GradClipper([stage], policies.group_norm(1.0), optimizer=optimizer)


@pytest.mark.ranks(1, 2, timeout=20)
def test_parameters_that_came_later() -> None:
    """Also where only one rank has them: its peers would wait for it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if world > 1:
        fully_shard(model, mesh=mesh_of((world,), ("dp",)))
    clipper = GradClipper(model, policies.global_norm(1.0))
    model(torch.ones(2, 4)).sum().backward()
    clipper.clip_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = clipper.attach(optimizer)
    optimizer.step()
    if rank == world - 1:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(7))]})
    kind = distclip.DistclipError
    with pytest.raises(kind, match=r"\[7\] in the optimizer" if rank == world - 1 else "another"):
        optimizer.step()
    handle.remove()
    clipper = GradClipper(model, policies.global_norm(1.0))
    if rank == world - 1:
        model[0].register_parameter("lora_a", nn.Parameter(torch.ones(2)))
    with pytest.raises(kind, match="'0.lora_a'" if rank == world - 1 else "another rank"):
        clipper.clip_()


def test_changes_that_bring_no_parameter_are_no_matter() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    clipper = GradClipper(model, policies.global_norm(1.0))
    model.append(nn.Tanh())
    model[0].register_parameter("none", None)
    model[0].register_parameter("again", model[0].weight)
    clipper.clip_()
    assert clipper._session.watched.newcomers(clipper._session.known) == []


def test_row_30_an_optimizer_in_backward_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import _apply_optimizer_in_backward

    model = nn.Linear(3, 2)
    clipper = GradClipper(model, policies.global_norm(1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distclip.clip_grad_norm_(model.parameters(), 1.0)
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    for call in (
        lambda: GradClipper(model, policies.global_norm(1.0)),
        lambda: clipper.attach(optimizer),
        lambda: distclip.clip_grad_norm_(model.parameters(), 1.0),
    ):
        with pytest.raises(distclip.UnsupportedGradientError, match=r"'(0|weight)' is stepped"):
            call()


@pytest.mark.ranks(2, 3, timeout=SECONDS)
def test_zero_redundancy_optimizer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(0)
    model, twin = nn.Linear(5, 3), nn.Linear(5, 3)
    twin.load_state_dict(model.state_dict())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.9
    )
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    policy = policies.global_norm(0.5)
    reports: list[float] = []
    GradClipper(
        model, policy, sinks=[lambda _, report: reports.append(report.total_norm.item())]
    ).attach(optimizer)
    for _ in range(3):
        for each in (model, twin):
            each.zero_grad()
            each(torch.ones(4, 5)).square().sum().backward()
        distclip.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        plain.step()
    assert len(reports) == 3
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.ranks(1, 2, 3)
def test_a_pattern_for_nothing_is_mentioned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one rank, and not where the parameters of another stage match."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    stage = nn.Module()
    stage.register_parameter(f"own{rank}", nn.Parameter(torch.ones(3)))
    for p in stage.parameters():
        p.grad = torch.ones_like(p)
    inner = policies.by_name({"*.inner": None, "own*": policies.measure()})
    policy = policies.chain(
        policies.by_name({f"own{last}": None, "head.*": None}, default=policies.global_norm(1.0)),
        policies.by_name({}, default=inner),
    )
    told: list[str] = []
    logger = logging.getLogger("distclip")
    monkeypatch.setattr(logger, "warning", lambda text, *given: told.append(text % given))
    clipper = GradClipper([stage], policy)
    clipper.clip_()
    for p in stage.parameters():
        p.grad = torch.ones_like(p)
    clipper.clip_()
    if rank == 0:
        (message,) = told
        assert "no parameter's name matches 'head.*', '*.inner'" in message
        assert f"none of the {last + 1} parameters here (own0" in message
    else:
        assert told == []
    assert repr(clipper) == f"GradClipper({policy!r}, {last + 1} parameters)"
    assert repr(clipper.clip_()).startswith("<ClipReport: norm ")


def test_what_is_no_optimizer_is_refused() -> None:
    model = nn.Linear(2, 2)
    wrong: Any = model
    with pytest.raises(distclip.ConfigurationError, match=r"the optimizer .* got a Linear"):
        GradClipper(model, policies.global_norm(1.0)).attach(wrong)


@pytest.mark.ranks(3)
def test_the_first_of_a_group_without_rank_0_mentions_a_pattern(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # By all ranks: one that only its members make cannot be made again on these ranks (torch 2.13).
    made = dist.new_group([1, 2])
    group = made if dist.get_rank() else None
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("distclip"), "warning", lambda *given: told.append("x"))
    if group is not None:
        stage = nn.ParameterDict({f"own{dist.get_rank()}": nn.Parameter(torch.ones(3))})
        policy = policies.by_name({"head.*": None}, default=policies.global_norm(1.0))
        GradClipper([stage], policy, process_group=group)
    assert len(told) == (dist.get_rank() == 1)
