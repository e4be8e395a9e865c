"""The catalogue of defects in peers, one number each: what must hold here.

Where the peer is torch itself, the test first shows that torch still has the defect, so that a
comparison which has lost its object says so.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_ as torch_clip_grad_norm_
from torch.nn.utils import get_total_norm as torch_get_total_norm

import distclip
from distclip import GradClipper, policies
from tests.helpers.watching import watch
from tests.sharded import mesh_of, shard, whole

REPLICATING = ["hsdp", "tp", "replicate", "fsdp2_tp", "mixed"]


def still_a_defect(happens: bool, what: str) -> None:
    assert happens, f"torch {torch.__version__} no longer {what}: the comparison can go"


def parameter(gradient: Tensor) -> nn.Parameter:
    result = nn.Parameter(torch.ones_like(gradient))
    result.grad = gradient.clone()
    return result


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(norm: Tensor, truth: float) -> float:
    return abs(norm.double().item() / truth - 1.0)


def gather(values: Tensor) -> list[Tensor]:
    everybody = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, values)
    return everybody


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("numel", [1, 7, 255, 1000, 1025, 70_000])
def test_row_01_a_norm_is_as_exact_as_float64_in_any_dtype(dtype: torch.dtype, numel: int) -> None:
    gradient = (randn(numel) * 2.7).to(dtype)
    truth = gradient.double().norm().item()
    norm = distclip.get_total_norm([gradient])
    assert norm.dtype is torch.float32
    assert relative(norm, truth) <= 1e-6


def test_row_01_torch_gives_a_bf16_norm() -> None:
    gradient = (randn(1000) * 2.7).bfloat16()
    error = relative(torch_get_total_norm([gradient]), gradient.double().norm().item())
    still_a_defect(error > 1e-3, "rounds the norm of bf16 gradients to bf16")


@pytest.mark.parametrize(
    ("value", "dtype"), [(6e4, torch.float16), (3e19, torch.float32), (1e200, torch.float64)]
)
def test_row_02_finite_gradients_never_overflow(value: float, dtype: torch.dtype) -> None:
    theirs, ours = (parameter(torch.full((4,), value, dtype=dtype)) for _ in range(2))
    torch_clip_grad_norm_([theirs], 1.0)
    assert theirs.grad is not None
    assert ours.grad is not None
    still_a_defect(bool((theirs.grad == 0).all()), "turns large gradients into zeros")
    truth = 2.0 * torch.tensor(value, dtype=dtype).item()
    assert relative(distclip.clip_grad_norm_([ours], 1.0), truth) <= 1e-6
    torch.testing.assert_close(ours.grad, torch.full((4,), 0.5, dtype=dtype))


def test_row_02_tiny_gradients_never_underflow() -> None:
    tiny = torch.full((10_000,), 1e-30)
    still_a_defect(torch_get_total_norm([tiny]).item() == 0.0, "loses small gradients")
    assert relative(distclip.get_total_norm([tiny]), tiny.double().norm().item()) <= 1e-6


def test_row_02_a_policy_sees_norms_whose_squares_overflow() -> None:
    """Of float64 gradients the square of a norm may leave float64, and the norm itself not."""
    named = [(name, parameter(torch.full((1,), value, dtype=torch.float64)))
             for name, value in (("a", 3e200), ("b", 4e200))]  # fmt: skip
    report = GradClipper(named, policies.global_norm(1.0)).clip_()
    assert report.coefficient.item() == pytest.approx(2e-201, rel=1e-12)
    assert [p.grad.item() for _, p in named if p.grad is not None] == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("thousands", [32_000, 100_000])
def test_row_03_a_large_fp32_norm_is_exact(thousands: int) -> None:
    block = randn(1000)
    gradient = block.repeat(thousands)
    truth = block.double().norm().item() * math.sqrt(thousands)
    error = relative(torch_get_total_norm([gradient]), truth)
    still_a_defect(error > 1e-3, "sums fp32 norms in one long chain")
    assert relative(distclip.get_total_norm([gradient]), truth) <= 1e-6


def test_row_04_one_infinity_does_not_spoil_the_gradients() -> None:
    theirs, ours = (parameter(torch.tensor([1.0, math.inf])) for _ in range(2))
    torch_clip_grad_norm_([theirs], 1.0)
    assert theirs.grad is not None
    still_a_defect(bool(theirs.grad.isnan().any()), "makes NaN of an infinite gradient")
    with pytest.raises(distclip.NonFiniteGradientError, match="'w'"):
        GradClipper([("w", ours)], policies.global_norm(1.0)).clip_()
    assert ours.grad is not None
    assert ours.grad.tolist() == [1.0, math.inf]


@pytest.mark.ranks(2)
def test_row_05_plain_gradients_and_dtensors_mix() -> None:
    def model() -> list[Tensor]:
        result: list[Tensor] = []
        whole_mesh = mesh_of((2,), ("x",))
        for weight, placement in ((randn(3, 4), None), (randn(4, 4), Shard(0))):
            p: Tensor = nn.Parameter(weight)
            p.grad = weight.clone()
            if placement is not None:
                p = nn.Parameter(distribute_tensor(weight, whole_mesh, [placement]))
                p.grad = distribute_tensor(weight, whole_mesh, [placement])
            result.append(p)
        return result

    truth = math.hypot(randn(3, 4).double().norm(), randn(4, 4).double().norm())
    for foreach in (None, False):
        try:
            torch_clip_grad_norm_(model(), 1.0, foreach=foreach)
        except RuntimeError:
            continue
        still_a_defect(False, "refuses a mix of DTensor and plain gradients")
    ours = model()
    assert relative(distclip.clip_grad_norm_(ours, 1.0), truth) <= 1e-6
    assert ours[0].grad is not None
    torch.testing.assert_close(ours[0].grad, randn(3, 4) / (truth + 1e-6))
    assert isinstance(ours[1].grad, DTensor)
    torch.testing.assert_close(ours[1].grad.full_tensor(), randn(4, 4) / (truth + 1e-6))


@pytest.mark.ranks(4)
def test_row_05_meshes_mix() -> None:
    values = whole()
    model = shard("mixed", values)
    model.set_gradients(values.gradients)
    truth = math.sqrt(sum(g.double().norm().item() ** 2 for g in _present(values.gradients)))
    try:
        torch_clip_grad_norm_(list(model.parameters.values()), 1.0)
    except RuntimeError:
        pass
    else:
        still_a_defect(False, "refuses gradients on different meshes")
    model.set_gradients(values.gradients)
    parameters = list(model.parameters.values())
    assert relative(distclip.clip_grad_norm_(parameters, 1.0), truth) <= 1e-6


@pytest.mark.ranks(2, timeout=20)
def test_row_05_what_is_refused_is_refused_before_a_gradient_changes() -> None:
    mesh = mesh_of((2,), ("x",))
    good = parameter(torch.full((3,), 9.0))
    bad = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    bad.grad = torch.ones(4)  # type: ignore[assignment]
    with pytest.raises(distclip.UnsupportedGradientError, match="'1' is a DTensor"):
        distclip.clip_grad_norm_([good, bad], 1.0)
    assert good.grad is not None
    assert good.grad.tolist() == [9.0] * 3


@pytest.mark.ranks(2, 3, timeout=20)
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("how", ["clipper", "function"])
def test_row_06_a_gradient_missing_on_one_rank(norm_type: float, how: str) -> None:
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    full = randn(7, 3)
    first = nn.Parameter(distribute_tensor(torch.ones(7, 3), mesh, [Shard(0)]))
    second = nn.Parameter(distribute_tensor(torch.ones(7, 3), mesh, [Shard(0)]))
    first.grad = distribute_tensor(full, mesh, [Shard(0)])
    if dist.get_rank() != 1:
        second.grad = distribute_tensor(full * 2, mesh, [Shard(0)], src_data_rank=None)
    owner = torch.arange(7) // -(-7 // dist.get_world_size())
    there = (full * 2)[owner != 1].double()
    parts = torch.stack([full.double().norm(p=norm_type), there.norm(p=norm_type)])
    truth = torch.linalg.vector_norm(parts, norm_type).item()
    if how == "function":
        norm = distclip.clip_grad_norm_([first, second], 0.5, norm_type)
    else:
        clipper = GradClipper([("a", first), ("b", second)], policies.global_norm(0.5, norm_type))
        norm = clipper.clip_().total_norm
    assert relative(norm, truth) <= 1e-6


@pytest.mark.ranks(3, 4, timeout=20)
def test_row_06_an_empty_shard_has_no_largest_element_and_nobody_hangs() -> None:
    with pytest.raises(RuntimeError):  # on the empty rank only: the others would wait for it
        torch.linalg.vector_norm(torch.empty(0), math.inf)
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    p = nn.Parameter(distribute_tensor(torch.ones(2), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.tensor([3.0, -5.0]), mesh, [Shard(0)])
    assert (p.to_local().numel() == 0) == (dist.get_rank() >= 2)
    assert distclip.clip_grad_norm_([p], 1.0, math.inf).item() == 5.0


def test_row_07_a_parameter_listed_twice_counts_and_scales_once() -> None:
    theirs, ours = (parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    still_a_defect(
        torch_clip_grad_norm_([theirs, theirs], 1.0).item() > 7.0, "counts a parameter twice"
    )
    assert distclip.clip_grad_norm_([ours, ours], 1.0).item() == pytest.approx(5.0)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, torch.tensor([0.6, 0.8]))


def test_row_07_tied_weights_count_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    model["embed"].weight.grad = torch.ones(4, 3)
    report = GradClipper(model, policies.global_norm(1.0)).clip_()
    assert report.total_norm.item() == pytest.approx(math.sqrt(12))
    assert list(report.parameter_norms) == ["embed.weight"]
    # Also where the two names come from different modules of a list.
    listed = [model["embed"], model["head"]]
    assert GradClipper(listed, policies.measure()).clip_().total_norm.item() == pytest.approx(1.0)


@pytest.mark.ranks(3, 4)
@pytest.mark.parametrize("layout", REPLICATING)
def test_row_08_all_ranks_hold_bitwise_the_same_coefficients(layout: str) -> None:
    values = whole(seed=3)
    for policy in (policies.global_norm(0.1), policies.agc(0.01), policies.global_norm(1.0, 3.0)):
        model = shard(layout, values)
        model.set_gradients(values.gradients)
        report = GradClipper(model.named(), policy).clip_()
        mine = torch.tensor(
            [
                report.total_norm.item(),
                report.clipped_norm.item(),
                report.coefficient.item(),
                *report.parameter_norms.values(),
                *report.parameter_coefficients.values(),
            ],
            dtype=torch.float64,
        ).view(torch.int64)
        assert all(torch.equal(other, mine) for other in gather(mine))


@pytest.mark.parametrize("seed", range(4))
def test_row_12_the_norm_after_clipping_is_the_threshold_in_bf16(seed: int) -> None:
    # A coefficient far from a power of two: near one, bf16 rounds every product back alike.
    gradient = (randn(4096, seed=seed) * 1.3).bfloat16()
    ours = parameter(gradient)
    distclip.clip_grad_norm_([ours], 1.0)
    assert ours.grad is not None
    assert ours.grad.double().norm().item() == pytest.approx(1.0, abs=3e-4)


def test_row_12_torch_rounds_the_coefficient_to_bf16() -> None:
    errors = []
    for seed in range(8):
        theirs = parameter((randn(4096, seed=seed) * 1.3).bfloat16())
        torch_clip_grad_norm_([theirs], 1.0)
        assert theirs.grad is not None
        errors.append(abs(theirs.grad.double().norm().item() - 1.0))
    still_a_defect(max(errors) > 1.5e-3, "rounds the coefficient to bf16")


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("layout", REPLICATING)
def test_row_13_replicas_count_once(layout: str) -> None:
    values = whole(seed=1)
    model = shard(layout, values)
    model.set_gradients(values.gradients)
    local = [g.double() for _, g in model.local_gradients() if g is not None]
    naive = torch.stack([(g * g).sum() for g in local]).sum()
    dist.all_reduce(naive)  # what a sum over all ranks gives when replicas are not told apart
    truth = math.sqrt(sum(g.double().norm().item() ** 2 for g in _present(values.gradients)))
    report = GradClipper(model.named(), policies.global_norm(1.0)).clip_()
    assert relative(report.total_norm, truth) <= 1e-6
    if dist.get_world_size() == 4 or layout in ("tp", "replicate"):
        assert naive.sqrt().item() > truth * (1 + 1e-4)


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
    norm = distclip.clip_grad_norm_(listed, 1.0, process_group=group)
    assert norm.item() == pytest.approx(math.sqrt(3 * holders * 16))
    for p in listed:
        assert p.grad is not None
        torch.testing.assert_close(p.grad, torch.full((4,), 2.0 / (norm.item() + 1e-6)))
    grads = [p.grad for p in listed if p.grad is not None]
    largest = distclip.get_total_norm(grads, math.inf, process_group=group)
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


def _present(gradients: dict[str, Tensor | None]) -> list[Tensor]:
    return [g for g in gradients.values() if g is not None]
