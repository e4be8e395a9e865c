"""The catalogue of defects in peers, one number each: what must hold here.

Where the peer is torch itself, the test first shows that torch still has the defect, so that a
comparison which has lost its object says so.
"""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_ as torch_clip_grad_norm_
from torch.nn.utils import get_total_norm as torch_get_total_norm

import distclip
from distclip import GradClipper, policies
from tests.helpers.field import parameter, randn, still_a_defect
from tests.sharded import mesh_of, shard, whole

REPLICATING = ["hsdp", "tp", "replicate", "fsdp2_tp", "mixed"]


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


def _present(gradients: dict[str, Tensor | None]) -> list[Tensor]:
    return [g for g in gradients.values() if g is not None]
