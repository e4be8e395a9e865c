"""The drop-ins: what torch does on plain fp32 tensors, and what is right beyond them."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip import policies
from distclip.application import notices
from distclip.errors import ConfigurationError
from distclip.testing import assert_rounded
from tests.helpers.watching import watch
from tests.sharded import mesh_of, shard, whole


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def plain(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    parameters = []
    for number, shape in enumerate([(7, 5), (5,), (), (3, 2, 4), (0, 3)]):
        p = nn.Parameter(randn(*shape, seed=seed + number).to(dtype))
        p.grad = randn(*shape, seed=100 + seed + number, scale=3.0).to(dtype)
        parameters.append(p)
    parameters.append(nn.Parameter(torch.ones(2, dtype=dtype)))  # without a gradient
    return parameters


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def cut(tensor: Tensor, *placements: object) -> DTensor:
    """Over all ranks in a row."""
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    tensor = tensor.clone()  # torch 2.9 gives a view of it
    return distribute_tensor(tensor, mesh, placements or [Shard(0)], src_data_rank=None)  # type: ignore[arg-type]


def parameter(weight: Tensor, gradient: Tensor) -> nn.Parameter:
    result = nn.Parameter(weight)
    result.grad = gradient
    return result


# ---- as torch ----


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, math.inf, 2, "inf"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1000.0, 1])
def test_clip_grad_norm_equals_torch(norm_type: float, max_norm: float) -> None:
    ours, theirs = plain(), plain()
    theirs_nonempty = [p for p in theirs if p.numel()]  # torch raises on an empty inf-norm
    norm = distclip.clip_grad_norm_(ours, max_norm, norm_type)
    want = torch.nn.utils.clip_grad_norm_(theirs_nonempty, max_norm, float(norm_type))
    torch.testing.assert_close(norm, want, rtol=1e-6, atol=0.0)
    assert norm.shape == ()
    for one, other in zip(gradients(ours), gradients(theirs), strict=True):
        assert_rounded(one, other.double().numpy(), ulps=1.0, coefficient_error=1e-6)


@pytest.mark.parametrize("clip_value", [0.0, 0.7, math.inf])
def test_clip_grad_value_equals_torch_bit_for_bit(clip_value: float) -> None:
    ours, theirs = plain(), plain()
    assert distclip.clip_grad_value_(ours, clip_value) is None  # type: ignore[func-returns-value]
    torch.nn.utils.clip_grad_value_(theirs, clip_value)
    assert all(map(torch.equal, gradients(ours), gradients(theirs)))


def test_where_nothing_is_clipped_every_bit_stays() -> None:
    ours, theirs = plain(), plain()
    distclip.clip_grad_norm_(ours, 1e6)
    distclip.clip_grad_agc_(ours, 1e6)
    assert all(map(torch.equal, gradients(ours), gradients(theirs)))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_get_total_norm_equals_torch(norm_type: float) -> None:
    tensors = [randn(5, 3), randn(4, seed=1).requires_grad_()]
    norm = distclip.get_total_norm(tensors, norm_type)
    want = torch.nn.utils.get_total_norm(tensors, norm_type)
    torch.testing.assert_close(norm, want.detach(), rtol=1e-6, atol=0.0)
    assert not norm.requires_grad


@pytest.mark.parametrize("total", [0.0, 0.3, 50.0, math.inf])
def test_clip_grads_with_norm_equals_torch(total: float) -> None:
    for norm in (total, torch.tensor(total), torch.tensor(total, dtype=torch.float64)):
        ours, theirs = plain(), plain()
        assert distclip.clip_grads_with_norm_(ours, 1.5, norm) is None  # type: ignore[func-returns-value]
        torch.nn.utils.clip_grads_with_norm_(theirs, 1.5, torch.as_tensor(norm))
        for one, other in zip(gradients(ours), gradients(theirs), strict=True):
            assert_rounded(one, other.double().numpy(), ulps=1.0, coefficient_error=1e-6)


def test_clip_grads_with_norm_refuses_what_is_no_norm() -> None:
    parameters = plain()
    before = [gradient.clone() for gradient in gradients(parameters)]
    with pytest.raises(ConfigurationError, match=r"one number, got a tensor of shape \[2\]"):
        distclip.clip_grads_with_norm_(parameters, 1.0, torch.ones(2))
    with pytest.raises(ConfigurationError, match="max_norm"):
        distclip.clip_grads_with_norm_(parameters, -1.0, 1.0)
    assert all(map(torch.equal, gradients(parameters), before))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "mixed"])
def test_a_norm_and_then_a_clip_with_it_as_one_clip(layout: str) -> None:
    """As torchtitan does: the norm first, joined over stages by the caller, then the scaling."""
    values = whole(seed=5)
    sharded, alone = shard(layout, values), shard(layout, values)
    for model in (sharded, alone):
        model.set_gradients(values.gradients)
    parameters = list(sharded.parameters.values())
    total = distclip.get_total_norm([p.grad for p in parameters if p.grad is not None])
    distclip.clip_grads_with_norm_(parameters, 0.01, total)
    assert distclip.clip_grad_norm_(alone.parameters.values(), 0.01).item() == total.item()
    for (name, one), (_, other) in zip(
        sharded.local_gradients(), alone.local_gradients(), strict=True
    ):
        if one is not None and other is not None:
            assert_rounded(one, other.double().numpy(), ulps=1.0, coefficient_error=1e-6, name=name)


@pytest.mark.ranks(2)
def test_clip_grads_with_norm_reduces_partial_gradients_first() -> None:
    mesh = mesh_of((2,), ("x",))
    terms = [randn(4, 3, seed=rank) for rank in range(2)]
    parameter = nn.Parameter(DTensor.from_local(randn(4, 3), mesh, [Replicate()], run_check=False))
    parameter.grad = DTensor.from_local(terms[dist.get_rank()], mesh, [Partial()], run_check=False)
    distclip.clip_grads_with_norm_([parameter], 1.0, DTensor.from_local(torch.tensor(4.0), mesh))
    assert parameter.grad.placements == (Replicate(),)
    assert_rounded(
        parameter.grad.to_local(),
        (sum(terms).double() / (4.0 + 1e-6)).numpy(),  # type: ignore[union-attr]
        ulps=2.0,
        coefficient_error=1e-6,
    )


@pytest.mark.ranks(2)
def test_clip_grads_with_norm_talks_to_nobody() -> None:
    sharded = shard("fsdp2", values := whole(seed=5))
    sharded.set_gradients(values.gradients)
    parameters = list(sharded.parameters.values())
    for _ in range(2):
        with watch() as seen:
            distclip.clip_grads_with_norm_(parameters, 1.0, 2.0)
    assert seen.collectives == []


@pytest.mark.ranks(2)
def test_names_are_the_callers_whatever_was_asked_of_these_parameters_before() -> None:
    pairs = [("first", randn(3).requires_grad_()), ("second", randn(2).requires_grad_())]
    for _, parameter in pairs:
        parameter.grad = torch.ones_like(parameter)
    distclip.clip_grad_norm_([p for _, p in pairs], math.inf, pipeline_group=dist.group.WORLD)
    assert set(distclip.grad_norms(pairs)) == {"first", "second"}
    renamed = [(name.upper(), parameter) for name, parameter in pairs]
    assert set(distclip.grad_norms(renamed)) == {"FIRST", "SECOND"}


@pytest.mark.ranks(1, 2)
def test_gradients_of_an_earlier_call_are_not_measured_again() -> None:
    parameters = plain()
    group = dist.group.WORLD
    for process_group in (None, group, None, group):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        distclip.clip_grad_norm_(parameters, 1e9, pipeline_group=process_group)
    parameters[0].grad = None
    parameters[1].grad = torch.full_like(parameters[1], 2.0)
    left = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
    norm = distclip.clip_grad_norm_(parameters, 1e9)
    assert norm.item() == pytest.approx(math.sqrt(sum(left)), rel=1e-6)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_positional_arguments_are_torchs(foreach: bool | None) -> None:
    assert distclip.clip_grad_norm_(plain(), 1.0, 2.0, False, foreach).item() > 0
    assert distclip.get_total_norm(gradients(plain()), 2.0, False, foreach).item() > 0
    distclip.clip_grad_value_(plain(), 1.0, foreach)


def test_a_single_tensor_a_generator_and_nothing() -> None:
    p = parameter(torch.ones(2), torch.tensor([3.0, 4.0]))
    assert distclip.clip_grad_norm_(p, math.inf).item() == pytest.approx(5.0)
    assert distclip.clip_grad_norm_((q for q in [p]), 1.0).item() == pytest.approx(5.0)
    assert p.grad is not None
    torch.testing.assert_close(p.grad, torch.tensor([0.6, 0.8]))
    distclip.clip_grad_value_(p, 0.1)
    assert p.grad.tolist() == pytest.approx([0.1, 0.1])
    assert distclip.get_total_norm(torch.tensor([3.0, 4.0])).item() == pytest.approx(5.0)
    assert distclip.get_total_norm(t for t in [torch.ones(4)]).item() == pytest.approx(2.0)
    for nothing in ([], [nn.Parameter(torch.ones(2))]):
        norm = distclip.clip_grad_norm_(nothing, 1.0)
        assert (norm.item(), norm.dtype, norm.shape) == (0.0, torch.float32, ())
    assert distclip.get_total_norm([]).item() == 0.0
    assert distclip.grad_norms([]) == {}


@pytest.mark.parametrize(
    ("dtypes", "want"),
    [
        (["float32"], "float32"),
        (["bfloat16"], "float32"),
        (["float16", "bfloat16"], "float32"),
        (["float64"], "float64"),
        (["float32", "float64"], "float64"),
    ],
)
def test_the_dtype_of_a_norm(dtypes: list[str], want: str) -> None:
    parameters = [p for name in dtypes for p in plain(dtype=getattr(torch, name))]
    expected = getattr(torch, want)
    assert distclip.clip_grad_norm_(parameters, 1.0).dtype is expected
    assert distclip.clip_grad_agc_(parameters, 1.0).dtype is expected
    assert distclip.get_total_norm(gradients(parameters)).dtype is expected
    norms = distclip.grad_norms([(str(i), p) for i, p in enumerate(parameters)])
    for norm, p in zip(norms.values(), parameters, strict=True):
        assert norm.dtype is (torch.float64 if p.dtype is torch.float64 else torch.float32)


def test_grad_norms_are_per_parameter_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.grad = torch.full((2, 3), 2.0)
    norms = distclip.grad_norms(model)
    assert list(norms) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert norms["0.weight"].item() == pytest.approx(math.sqrt(24))
    assert norms["0.bias"].item() == 0.0
    assert distclip.grad_norms(model, math.inf)["0.weight"].item() == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_if_nonfinite(bad: float) -> None:
    p = parameter(torch.ones(2), torch.tensor([1.0, bad]))
    with pytest.raises(RuntimeError, match="'0'"):  # as torch: a RuntimeError
        distclip.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    assert p.grad is not None
    assert p.grad[0].item() == 1.0
    with pytest.raises(distclip.NonFiniteGradientError):
        distclip.get_total_norm([p.grad], error_if_nonfinite=True)
    assert not math.isfinite(distclip.get_total_norm([p.grad]).item())


# ---- no state ----


def test_nothing_is_remembered_between_calls() -> None:
    p = parameter(torch.ones(2), torch.tensor([300.0, 400.0]))
    assert distclip.clip_grad_norm_([p], math.inf, math.inf).item() == 400.0
    p.grad = torch.tensor([3.0, 4.0])
    assert distclip.clip_grad_norm_([p], math.inf, math.inf).item() == 4.0
    p.grad = None
    assert distclip.clip_grad_norm_([p], math.inf, math.inf).item() == 0.0


def test_a_parameter_that_changes_is_seen_as_it_is() -> None:
    """``model.double()`` keeps the parameter and changes what it is."""
    p = parameter(torch.ones(2), torch.full((2,), 3.0))
    distclip.clip_grad_norm_([p], 1.0, 7.0)
    p.data = torch.ones(3, dtype=torch.float64)
    p.grad = torch.full((3,), 1e200, dtype=torch.float64)
    assert distclip.clip_grad_norm_([p], 1.0).item() == pytest.approx(math.sqrt(3) * 1e200)
    p.data = torch.ones(4, 2)
    p.grad = torch.full((4, 2), 9.0)
    distclip.clip_grad_agc_([p], 0.1)
    torch.testing.assert_close(p.grad.norm(dim=1), torch.full((4,), 0.1 * math.sqrt(2)))


@pytest.mark.ranks(1, 2)
def test_parameters_are_not_kept_alive() -> None:
    def use() -> list[weakref.ref[Tensor]]:
        parameters: list[Tensor] = [*plain()]
        if dist.get_world_size() > 1:
            parameters.append(parameter(cut(randn(4, 3)), cut(randn(4, 3))))
        distclip.clip_grad_norm_(parameters, 1.0)
        distclip.clip_grad_agc_(parameters, 1.0)
        distclip.clip_grad_value_(parameters, 1.0)
        distclip.grad_norms([(str(i), p) for i, p in enumerate(parameters)])
        distclip.get_total_norm(p.grad for p in parameters if p.grad is not None)
        kept = [weakref.ref(p) for p in parameters]
        return kept + [weakref.ref(p.grad) for p in parameters if p.grad is not None]

    references = use()
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


# ---- sharded ----

CALLS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "norm": lambda listed: distclip.clip_grad_norm_(listed, 1.0),
    "norm p=3": lambda listed: distclip.clip_grad_norm_(listed, 1.0, 3.0),
    "norm p=inf": lambda listed: distclip.clip_grad_norm_(listed, 0.5, math.inf),
    "agc": lambda listed: distclip.clip_grad_agc_(listed, 0.1),
    "agc tensor": lambda listed: distclip.clip_grad_agc_(listed, 0.1, unit="tensor"),
}


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "tp", "replicate", "fsdp2_tp", "mixed"])
def test_dtensors_as_on_one_device(layout: str) -> None:
    values = whole(seed=5)
    sharded = shard(layout, values)
    alone = shard("plain", values)
    for label, call in CALLS.items():
        for model in (sharded, alone):
            model.set_gradients(values.gradients)
        norm, want = (call(list(model.parameters.values())) for model in (sharded, alone))
        assert not isinstance(norm, DTensor)
        torch.testing.assert_close(norm, want, rtol=1e-6, atol=0.0, msg=label)
        for name, gradient in sharded.local_gradients():
            full = alone.parameters[name].grad
            if gradient is not None:
                assert full is not None
                part = full.flatten()[sharded.elements[name]]
                assert_rounded(gradient, part.double().numpy(), coefficient_error=1e-6, name=name)
    sharded.set_gradients(values.gradients)
    norms = distclip.grad_norms(sharded.named())
    for name, norm in norms.items():
        gradient = values.gradients[name]
        truth = 0.0 if gradient is None else gradient.double().norm().item()
        assert norm.item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("axis", ["a", "b"])
def test_a_submesh_alone_is_reduced_over_itself(axis: str) -> None:
    """Here the two rows of the grid hold different values: each rank sees its own mesh's norm."""
    mesh = mesh_of((2, 2), ("a", "b"))[axis]
    other = mesh_of((2, 2), ("a", "b"))["b" if axis == "a" else "a"].get_local_rank()
    full = randn(5, 3, seed=other)
    p = parameter(
        distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)], src_data_rank=None),
        distribute_tensor(full.clone(), mesh, [Shard(0)], src_data_rank=None),
    )
    norm = distclip.clip_grad_norm_([p], 1.0)
    assert norm.item() == pytest.approx(full.double().norm().item(), rel=1e-6)
    assert isinstance(p.grad, DTensor)
    torch.testing.assert_close(p.grad.full_tensor(), full / (norm.item() + 1e-6))


@pytest.mark.ranks(2, 3)
def test_partial_tensors_are_summed_before_they_are_measured() -> None:
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    terms = [randn(4, 3, seed=rank) for rank in range(dist.get_world_size())]
    partial = DTensor.from_local(terms[dist.get_rank()], mesh, [Partial()], run_check=False)
    other = cut(randn(5, 2, seed=9))
    replica = cut(randn(3, seed=10), Replicate())
    norm = distclip.get_total_norm([partial, other, replica, randn(2, seed=11)])
    parts = [torch.stack(terms).sum(0), randn(5, 2, seed=9), randn(3, seed=10), randn(2, seed=11)]
    truth = math.sqrt(sum(part.double().square().sum().item() for part in parts))
    assert norm.item() == pytest.approx(truth, rel=1e-6)
    assert partial.placements == (Partial(),)


@pytest.mark.ranks(2, 3)
def test_error_if_nonfinite_raises_on_all_ranks() -> None:
    bad = cut(torch.ones(6, 2))
    if dist.get_rank() == 1:
        bad.to_local()[0, 0] = math.nan
    p = parameter(cut(torch.ones(6, 2)), bad)
    good = parameter(torch.ones(2), torch.full((2,), 7.0))
    group = dist.group.WORLD
    for call in (
        lambda: distclip.clip_grad_norm_([good, p], 1.0, error_if_nonfinite=True),
        lambda: distclip.get_total_norm([bad], error_if_nonfinite=True),
        lambda: distclip.clip_grad_norm_(
            [good, p], 1.0, error_if_nonfinite=True, pipeline_group=group
        ),
    ):
        with pytest.raises(distclip.NonFiniteGradientError):
            call()
    assert good.grad is not None
    assert good.grad.tolist() == [7.0, 7.0]


# ---- a process group whose members hold different parameters ----


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
def test_a_parameter_that_is_stepped_in_backward_from_now_on_is_noticed() -> None:
    """The drop-ins remember what they know of parameters; this changes it."""
    mesh = mesh_of((2,), ("x",))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    distclip.clip_grad_norm_([p], 1.0)
    setattr(p, "_in_backward_optimizers", [object()])  # noqa: B010 - as torch sets it
    with pytest.raises(distclip.UnsupportedGradientError, match="stepped during backward"):
        distclip.clip_grad_norm_([p], 1.0)


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
