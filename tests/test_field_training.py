"""Rows 19 to 29 of docs/field.md: units, scalers, plans, ranks without parameters, cost."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_ as torch_clip_grad_norm_
from torch.nn.utils import get_total_norm as torch_get_total_norm

import distclip
from distclip import GradClipper, policies
from tests.helpers.field import parameter, randn, still_a_defect
from tests.helpers.watching import watch
from tests.sharded import mesh_of


def test_row_19_a_zero_initialised_weight_trains_under_agc() -> None:
    p = nn.Parameter(torch.zeros(4, 3))
    p.grad = torch.ones(4, 3)
    distclip.clip_grad_agc_([p], clip_factor=0.01, eps=1e-3)
    row = p.grad.double().norm(dim=1)
    torch.testing.assert_close(row, torch.full((4,), 0.01 * 1e-3, dtype=torch.float64))
    for eps in (0.0, -1e-3, math.nan, math.inf):
        with pytest.raises(distclip.ConfigurationError, match="eps"):
            policies.agc(0.01, eps=eps)


def test_row_20_units_are_output_rows() -> None:
    weight, gradient = torch.ones(3, 2), torch.zeros(3, 2)
    gradient[1] = torch.tensor([30.0, 40.0])
    p = nn.Parameter(weight)
    p.grad = gradient.clone()
    distclip.clip_grad_agc_([p], clip_factor=0.5)
    want = torch.zeros(3, 2)
    want[1] = torch.tensor([0.6, 0.8]) * 0.5 * math.sqrt(2)
    torch.testing.assert_close(p.grad, want)


@pytest.mark.parametrize("shape", [(6,), (), (1,)])
def test_row_20_a_vector_or_scalar_is_one_unit(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.ones(shape))
    p.grad = torch.full(shape, 7.0)
    distclip.clip_grad_agc_([p], clip_factor=0.1)
    limit = 0.1 * math.sqrt(max(1, math.prod(shape)))
    assert p.grad.double().norm().item() == pytest.approx(limit, rel=1e-6)


def test_row_20_unit_dims_can_be_given_by_name() -> None:
    weight = torch.ones(2, 3, 4)  # experts, out, in
    policy = policies.agc(0.1, unit_dims={"*.experts": (0, 1)})
    p = nn.Parameter(weight)
    p.grad = torch.full((2, 3, 4), 5.0)
    p.grad[1, 2] = 0.01
    GradClipper([("moe.experts", p)], policy).clip_()
    norms = p.grad.double().norm(dim=2)
    want = torch.full((2, 3), 0.2, dtype=torch.float64)
    want[1, 2] = 0.02
    torch.testing.assert_close(norms, want, rtol=1e-6, atol=0)


class Scaled:
    """A small model whose gradients a GradScaler scales; steps with the optimizer given."""

    def __init__(self, optimizer: str, *, fused: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
        momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
        self.optimizer = make(
            self.model.parameters(), lr=0.1, weight_decay=0.1, fused=fused, **momentum
        )
        self.reports: list[distclip.ClipReport] = []
        clipper = GradClipper(
            self.model, POLICY_24, sinks=[lambda _, report: self.reports.append(report)]
        )
        clipper.attach(self.optimizer)

    def backward(self, scaler: torch.amp.GradScaler | None, seed: int) -> None:
        self.optimizer.zero_grad()
        loss = self.model(randn(5, 4, seed=seed)).square().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


POLICY_24 = policies.chain(policies.global_norm(0.5), policies.agc(0.05), policies.value(0.02))


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_row_24_a_gradient_scaler_does_not_change_the_result(
    optimizer: str, fused: bool, unscale_first: bool
) -> None:
    plain, scaled = (Scaled(optimizer, fused=fused) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(4):
        plain.backward(None, step)
        plain.optimizer.step()
        scaled.backward(scaler, step)
        if unscale_first:
            scaler.unscale_(scaled.optimizer)
        scaler.step(scaled.optimizer)
        scaler.update()
    for mine, theirs in zip(scaled.reports, plain.reports, strict=True):
        torch.testing.assert_close(mine.total_norm, theirs.total_norm, rtol=1e-6, atol=0)
        torch.testing.assert_close(mine.coefficient, theirs.coefficient, rtol=1e-5, atol=0)
        assert mine.coefficient.item() < 1.0
    for one, other in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_row_24_without_distclip_a_fused_step_is_clipped_by_scaled_norms() -> None:
    """Why: the hooks of a fused optimizer run while the gradients are still scaled."""
    seen = []
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch_get_total_norm([p.grad for p in model.parameters()]))
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loss = model(torch.ones(1, 2)).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    still_a_defect(seen[0].item() > 1000.0, "shows the hooks scaled gradients")


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_row_24_an_infinite_step_is_left_to_the_scaler(
    optimizer: str, fused: bool, unscale_first: bool
) -> None:
    run = Scaled(optimizer, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    run.backward(scaler, 0)
    scaler.step(run.optimizer)
    scaler.update()
    before = run.parameters()
    state = [
        {key: value.clone() for key, value in per.items() if isinstance(value, Tensor)}
        for per in run.optimizer.state.values()
    ]
    run.backward(scaler, 1)
    bad = run.model[0].weight.grad
    assert bad is not None
    bad[0, 0] = math.inf
    if unscale_first:
        scaler.unscale_(run.optimizer)
    scaler.step(run.optimizer)  # raises nothing, though on_nonfinite is "error"
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    for one, other in zip(run.parameters(), before, strict=True):
        assert torch.equal(one, other)
    for old, per in zip(state, run.optimizer.state.values(), strict=True):
        for key, value in old.items():
            assert torch.equal(value, per[key]), key
    run.backward(scaler, 2)
    scaler.step(run.optimizer)
    assert any(
        not torch.equal(one, other) for one, other in zip(run.parameters(), before, strict=True)
    )


def test_row_25_an_infinite_threshold_measures_and_changes_nothing() -> None:
    theirs = parameter(torch.tensor([3.0, math.inf]))
    torch_clip_grad_norm_([theirs], math.inf)
    assert theirs.grad is not None
    still_a_defect(bool(theirs.grad.isnan().any()), "divides infinity by infinity")
    for values in ([3.0, 4.0], [3.0, math.inf], [math.nan, 1.0]):
        ours = parameter(torch.tensor(values))
        norm = distclip.clip_grad_norm_([ours], math.inf)
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, torch.tensor(values), equal_nan=True)
        truth = torch.tensor(values).norm()
        torch.testing.assert_close(norm, truth, equal_nan=True)


def test_row_25_a_negative_threshold_is_refused() -> None:
    theirs = parameter(torch.tensor([3.0, 4.0]))
    torch_clip_grad_norm_([theirs], -1.0)
    assert theirs.grad is not None
    still_a_defect(bool((theirs.grad < 0).all()), "flips signs under a negative threshold")
    ours = parameter(torch.tensor([3.0, 4.0]))
    for bad in (-1.0, math.nan, -math.inf):
        with pytest.raises(distclip.ConfigurationError, match="max_norm"):
            distclip.clip_grad_norm_([ours], bad)
    assert ours.grad is not None
    assert ours.grad.tolist() == [3.0, 4.0]


@pytest.mark.ranks(2, 3, 4, timeout=20)
def test_row_27_the_plan_comes_from_parameters_not_from_gradients() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = mesh_of((world,), ("x",))
    policy = policies.chain(policies.agc(0.1), policies.global_norm(0.5, math.inf))
    parameters = {
        f"p{i}": nn.Parameter(distribute_tensor(torch.ones(world * 2, 3), mesh, [Shard(i % 2)]))
        for i in range(4)
    }
    clipper = GradClipper(parameters.items(), policy)
    for step in range(4):  # other gradients at each step, others on each rank
        counted = 0
        for i, p in enumerate(parameters.values()):
            p.grad = None
            if (i + step + rank) % 3:
                p.grad = distribute_tensor(
                    torch.ones(world * 2, 3), mesh, [Shard(i % 2)], src_data_rank=None
                )
                counted += p.grad.to_local().numel()
        norm = clipper.clip_().total_norm
        assert norm.item() == pytest.approx(math.sqrt(_total(counted)))


def _total(count: int) -> int:
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total.item())


@pytest.mark.ranks(2, 3, timeout=20)
def test_row_28_a_rank_without_parameters_takes_part() -> None:
    stage: nn.Module = nn.Identity() if dist.get_rank() == 1 else nn.Linear(3, 2)
    for p in stage.parameters():
        p.grad = torch.full_like(p, 2.0)
    holders = dist.get_world_size() - 1
    # Stages of different ranks have different names, or they would be replicas.
    named = nn.ModuleDict({f"stage{dist.get_rank()}": stage})
    report = GradClipper([named], policies.global_norm(1.0)).clip_()
    assert report.total_norm.item() == pytest.approx(2.0 * math.sqrt(8 * holders))
    assert len(report.parameter_norms) == 2 * holders


@pytest.mark.ranks(2, 3, timeout=20)
def test_row_28_an_empty_list_takes_part() -> None:
    listed = [] if dist.get_rank() == 1 else [parameter(torch.full((4,), 2.0)) for _ in range(3)]
    holders = dist.get_world_size() - 1
    group = dist.group.WORLD
    norm = distclip.clip_grad_norm_(listed, 1.0, pipeline_group=group)
    assert norm.item() == pytest.approx(math.sqrt(3 * holders * 16))
    for p in listed:
        assert p.grad is not None
        torch.testing.assert_close(p.grad, torch.full((4,), 2.0 / (norm.item() + 1e-6)))
    grads = [p.grad for p in listed if p.grad is not None]
    largest = distclip.get_total_norm(grads, math.inf, pipeline_group=group)
    assert largest.item() == pytest.approx(2.0 / (norm.item() + 1e-6))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("clip", ["global", "agc", "value", "chain"])
def test_row_29_ops_grow_linearly_and_none_is_a_dtensor_op(clip: str) -> None:
    policy = {
        "global": policies.global_norm(1e-3),
        "agc": policies.agc(1e-4),
        "value": policies.value(1e-3),
        "chain": policies.chain(policies.global_norm(1e-3), policies.parameter_norm(1e-4)),
    }[clip]
    mesh = mesh_of((2,), ("x",))
    counts = []
    for size in (50, 100, 200):
        parameters = [
            (f"p{i}", nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])))
            for i in range(size)
        ]
        for _, p in parameters:
            p.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
        clipper = GradClipper(parameters, policy)
        clipper.clip_()
        with watch() as seen:
            clipper.clip_()
        assert not seen.dtensor_ops
        counts.append(seen.ops.total())
    small, middle, large = counts
    assert large - middle <= 2.05 * (middle - small) + 20
    assert large <= 100 * 200


@pytest.mark.ranks(2)
def test_row_29_torch_dispatches_every_op_through_dtensor() -> None:
    mesh = mesh_of((2,), ("x",))
    parameters = [
        nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])) for _ in range(3)
    ]
    for p in parameters:
        p.grad = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
    with watch() as seen:
        torch_clip_grad_norm_(parameters, 1.0)
    still_a_defect(seen.dtensor_ops.total() > 0, "clips through DTensor dispatch")
