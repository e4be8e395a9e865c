"""Norms measured during FSDP2's backward: the same as at the clip, and never those of before."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from distclip import (
    ConfigurationError,
    GradClipper,
    NonFiniteGradientError,
    RankMismatchError,
    policies,
)
from distclip.application import inplace
from distclip.statistics import local, overlap
from distclip.testing import expected
from tests.core.test_matrix import POLICIES, build

GLOBAL = {"name": "global_norm", "max_norm": 0.05}


class Net(nn.Module):
    """Uneven shapes, a branch that may rest, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, 16)
        self.norm = nn.LayerNorm(16)
        self.branch = nn.Linear(16, 16)
        self.last = nn.Linear(16, 5)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        hidden = self.norm(self.first(x).tanh()) * self.scale
        if branch:
            hidden = hidden + self.branch(hidden).tanh()
        return self.last(hidden)


def sharded(mesh: DeviceMesh | None = None, **options: Any) -> Net:
    model = Net()
    for module in (model.first, model.branch, model.last):
        fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def backward(model: nn.Module, seed: int = 0, scale: float = 1.0, **options: Any) -> None:
    """Every rank has data of its own."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    loss = model(torch.randn(3, 7, generator=generator), **options).float().square().mean()
    (loss * scale).backward()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clipper_of(model: nn.Module, configuration: Any = GLOBAL, **options: Any) -> GradClipper:
    """One that has seen a backward, and so knows how many gradients each module has."""
    clipper = GradClipper(model, build(configuration), overlap=True, **options)
    backward(model)
    clipper.gradients_changed()
    model.zero_grad()
    return clipper


def gradients_of(model: nn.Module) -> dict[str, Any]:
    return {
        name: None if p.grad is None else whole(p.grad).double().numpy().copy()
        for name, p in model.named_parameters()
    }


def weights_of(model: nn.Module) -> dict[str, Any]:
    return {name: whole(p).double().numpy() for name, p in model.named_parameters()}


def check(
    clipper: GradClipper, model: nn.Module, early: int, configuration: Any = GLOBAL, **options: Any
) -> None:
    """Clip, hold norms and gradients against the oracle, and count what came early."""
    want = expected(configuration, gradients_of(model), weights_of(model), **options)
    report = clipper.clip_()
    assert clipper._early is not None
    assert clipper._early.used == early
    assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
    assert report.clipped_norm.item() == pytest.approx(want.clipped_norm, rel=1e-6)
    norms = dict(report.parameter_norms)
    assert norms == pytest.approx(want.parameter_norms, rel=1e-6, abs=0.0)
    coefficients = [None] * dist.get_world_size()
    dist.all_gather_object(coefficients, report.coefficient.item())
    assert len(set(coefficients)) == 1
    for name, gradient in gradients_of(model).items():
        wanted = want.gradients[name]
        assert (gradient is None) == (wanted is None), name
        if wanted is not None:
            tensor = torch.from_numpy(gradient)
            torch.testing.assert_close(tensor, torch.from_numpy(wanted), rtol=1e-6, atol=1e-12)


def count(model: nn.Module) -> int:
    """Of the parameters with a part on this rank. An empty shard is a piece too."""
    return sum(p.grad is not None for p in model.parameters())


EARLY = [label for label in POLICIES if label not in (
    "global p=0.5", "global p=3", "global p=12", "value", "agc experts", "agc columns",
)]  # fmt: skip


def fits(label: str) -> bool:
    """Whether the policy is one for this model, and measures nothing that has to wait."""
    return not any(word in repr(POLICIES[label]) for word in ("'value'", "unit_dims", "group_norm"))


@pytest.mark.ranks(1, 2, 3, 4)
def test_every_policy() -> None:
    model = sharded()
    for label in filter(fits, EARLY):
        clipper = clipper_of(model, POLICIES[label])
        backward(model)
        try:
            check(clipper, model, len(list(model.parameters())), POLICIES[label])
        except Exception as error:
            raise AssertionError(f"policy {label!r}: {error}") from error


@pytest.mark.ranks(2)
@pytest.mark.parametrize("configuration", [
    {"name": "value", "clip_value": 1e-3},
    {"name": "global_norm", "max_norm": 0.01, "norm_type": 3.0},
])  # fmt: skip
def test_what_cannot_come_early_is_measured_at_the_clip(configuration: Any) -> None:
    model = sharded()
    clipper = GradClipper(model, build(configuration), overlap=True)
    backward(model)
    check(clipper, model, 0, configuration)
    model.zero_grad()
    backward(model, 1)
    with pytest.warns(UserWarning, match="measured at the clip"):
        check(clipper, model, 0, configuration)


@pytest.mark.ranks(2, 3)
def test_step_after_step() -> None:
    model = sharded()
    clipper = clipper_of(model)
    for step in range(4):
        model.zero_grad()
        backward(model, step)
        check(clipper, model, 9)
        check(clipper, model, 0)  # clipped by now, so measured again


@pytest.mark.ranks(1, 2)
def test_what_was_clipped_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where kernels multiply behind torch's back, and nobody may look at the samples."""

    def scale(tensors: Any, coefficients: Tensor) -> None:
        for tensor, coefficient in zip(tensors, coefficients.tolist(), strict=True):
            tensor.numpy()[...] *= coefficient

    monkeypatch.setattr(inplace, "scale_", scale)
    monkeypatch.setattr(overlap.Known, "edited", lambda self, present: torch.zeros(1).double())
    model = sharded()
    clipper = clipper_of(model)
    backward(model)
    check(clipper, model, 9)
    check(clipper, model, 0)


@pytest.mark.ranks(1, 2)
def test_a_later_pass_measures_for_itself() -> None:
    configuration = [
        {"name": "agc", "clip_factor": 1e-3},
        {"name": "value", "clip_value": 1e-4},
        {"name": "global_norm", "max_norm": 1e-4},
    ]
    model = sharded()
    clipper = clipper_of(model, configuration)
    backward(model)
    check(clipper, model, 9, configuration)


@pytest.mark.ranks(2, 3)
def test_accumulation_with_synchronisation_each_time() -> None:
    model = sharded()
    clipper = clipper_of(model)
    for step in range(2):
        model.zero_grad()
        for micro in range(3):
            backward(model, 10 * step + micro)
        check(clipper, model, 9)


@pytest.mark.ranks(2, 3)
def test_accumulation_without_synchronisation() -> None:
    model = sharded()
    clipper = clipper_of(model)
    for step in range(2):
        model.zero_grad()
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            backward(model, 10 * step + micro)
            if micro < 2:
                assert not clipper._early._entries
                assert not clipper._early._pending
        check(clipper, model, 9)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_parameters_that_rest(set_to_none: bool) -> None:
    """Their norms of the step before are not used, though nothing was clipped in between."""
    model = sharded()
    clipper = clipper_of(model)
    for step in range(2):
        backward(model, 4 * step)
        model.zero_grad(set_to_none=set_to_none)
        backward(model, 4 * step + 1, branch=False)
        check(clipper, model, 7)
        model.zero_grad(set_to_none=set_to_none)
        backward(model, 4 * step + 2)
        check(clipper, model, 9)
        model.zero_grad(set_to_none=set_to_none)


@pytest.mark.ranks(4)
def test_hybrid_sharding() -> None:
    model = sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
    clipper = clipper_of(model)
    # Replicas of a copy that is counted elsewhere are not measured.
    early = 9 if dist.get_rank() < 2 else 0
    for step in range(2):
        model.zero_grad()
        backward(model, step)
        check(clipper, model, early)
    # Without the all-reduce over replicas there are no gradients, and no hooks.
    model.zero_grad()
    model.set_requires_all_reduce(False)
    backward(model, 3)
    assert not clipper._early._entries
    model.set_requires_all_reduce(True)
    backward(model, 4)
    check(clipper, model, early)


@pytest.mark.ranks(4)
def test_hybrid_sharding_by_rows() -> None:
    """Rows that are decided on by each rank are measured by each rank."""
    configuration = {"name": "agc", "clip_factor": 1e-3}
    model = sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
    clipper = clipper_of(model, configuration)
    backward(model)
    want = 9 if dist.get_rank() < 2 else 3
    check(clipper, model, want, configuration)


@pytest.mark.ranks(1, 2)
def test_bf16_with_float32_reduction() -> None:
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(mp_policy=mixed)
    clipper = clipper_of(model)
    for step in range(2):
        model.zero_grad()
        backward(model, step)
        check(clipper, model, 9)


@pytest.mark.ranks(4)
def test_over_tensor_parallelism() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 5))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, mesh["model"], plan)
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh["data"])
    clipper = GradClipper(model, policies.global_norm(0.05), overlap=True)
    for step in range(2):
        model.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + mesh["data"].get_local_rank())
        model(torch.randn(3, 7, generator=generator)).square().mean().backward()
        want = expected(GLOBAL, gradients_of(model), weights_of(model))
        report = clipper.clip_()
        assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
        # The bias of the second is on both ranks of a tensor-parallel pair, and counted on one.
        counted = 4 if mesh["model"].get_local_rank() == 0 else 3
        assert clipper._early.used == (counted if step else counted - 2)


def in_place(change: Callable[[Tensor], object]) -> Callable[[nn.Module], None]:
    def edit(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                change(parameter.grad)

    return edit


def replaced(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.grad * 2.0


def replaced_alike(model: nn.Module) -> None:
    """By others of the same counters, and the same first, middle and last element."""
    for parameter in model.parameters():
        values = parameter.grad.to_local().clone()
        if values.numel() > 4:
            values = torch.where(torch.arange(values.numel()).view(values.shape) == 1, 5.0, values)
        values.mul_(1.0)  # counted, as FSDP2's own writing is
        placements = parameter.grad.placements
        parameter.grad = DTensor.from_local(
            values, parameter.device_mesh, placements, run_check=False,
            shape=parameter.shape, stride=parameter.stride(),
        )  # fmt: skip


def of_one(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("branch.weight").grad.mul_(3.0)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


EDITS: dict[str, tuple[Callable[[Any], object], int]] = {
    "in place": (in_place(lambda g: g.mul_(2.0)), 0),
    "in place, the shard": (in_place(lambda g: g.to_local().mul_(2.0)), 0),
    "replaced": (replaced, 0),
    "replaced by some that look alike": (replaced_alike, 0),
    "replaced shard": (in_place(lambda g: setattr(g, "_local_tensor", g.to_local() * 2.0)), 0),
    "one of them": (of_one, 8),
    "many at once": (lambda m: torch._foreach_mul_(gradients(m), 2.0), 0),
    "shards of many at once": (
        lambda m: torch._foreach_mul_([g.to_local() for g in gradients(m)], 2.0), 0,
    ),
    "behind autograd's back": (in_place(lambda g: g.data.mul_(2.0)), 0),
    "torch's clipping": (lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e-3), 0),
    "many set to 0": (lambda m: torch._foreach_zero_(gradients(m)), 0),
    "said so": (lambda m: None, 9),
}  # fmt: skip


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_edited_after_backward(kind: str, mode: Any) -> None:
    edit, early = EDITS[kind]
    model = sharded()
    clipper = clipper_of(model, on_nonfinite=mode)
    for step in range(2):
        model.zero_grad()
        backward(model, step)
        edit(model)
        check(clipper, model, early)


@pytest.mark.ranks(2)
def test_edited_on_one_rank() -> None:
    """All ranks measure again, or none: the reduction is repeated together."""
    model = sharded()
    clipper = clipper_of(model)
    backward(model)
    if dist.get_rank() == 1:
        torch._foreach_mul_([p.grad.to_local().data for p in model.parameters()], 2.0)
    check(clipper, model, 0)


@pytest.mark.ranks(2)
def test_said_to_be_changed() -> None:
    model = sharded()
    clipper = clipper_of(model)
    backward(model)
    clipper.gradients_changed()
    check(clipper, model, 0)
    GradClipper(model, policies.global_norm(0.05)).gradients_changed()


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_grad_scaler(explicit: bool, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that is not fused: the scaler divides gradients between backward and step."""
    # Also where nobody may look at the samples, as on a GPU that is not waited for.
    monkeypatch.setattr(overlap.Known, "edited", lambda self, present: torch.zeros(1).double())
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reports: list[Any] = []
    clipper = clipper_of(
        model, on_nonfinite=mode,
        sinks=[lambda step, report: reports.append(report)],
    )  # fmt: skip
    clipper.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    backward(model)
    want = expected(GLOBAL, gradients_of(model), weights_of(model))
    model.zero_grad()
    backward(model, scale=1024.0)
    if explicit:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert reports[0].total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)


@pytest.mark.ranks(1, 2)
def test_grad_scaler_and_a_fused_optimizer() -> None:
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    reports: list[Any] = []
    clipper = clipper_of(
        model,
        sinks=[lambda step, report: reports.append(report)],
    )  # fmt: skip
    clipper.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for step in range(2):
        model.zero_grad()
        backward(model, step)
        want = expected(GLOBAL, gradients_of(model), weights_of(model))
        model.zero_grad()
        backward(model, step, scale=1024.0)
        scaler.step(optimizer)
        scaler.update(1024.0)
        assert clipper._early.used == 9
        assert reports[step].total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite(bad: float) -> None:
    model = sharded()
    clipper = clipper_of(model)
    backward(model, scale=bad)
    with pytest.raises(NonFiniteGradientError, match=r"first\.weight"):
        clipper.clip_()
    assert clipper._early.used == 9
    model.zero_grad()
    backward(model)
    check(clipper, model, 9)


@pytest.mark.ranks(2)
def test_parameters_that_fsdp2_does_not_manage() -> None:
    """Their hooks are autograd's, before the user reduces the gradients of plain parameters."""
    model = Net()
    ignored = [model.scale, model.last.weight, model.last.bias]
    for module in (model.first, model.branch):
        fully_shard(module)
    fully_shard(model, ignored_params=set(ignored))
    clipper = clipper_of(model)
    for step in range(2):
        model.zero_grad()
        backward(model, step)
        for parameter in ignored:
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(dist.get_world_size())
        check(clipper, model, 6)


@pytest.mark.ranks(2)
def test_hooks_that_autograd_calls_are_not_trusted() -> None:
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(0)]))
    clipper = GradClipper([weight], policies.global_norm(0.05), overlap=True)
    for step in range(2):
        weight.grad = None
        weight.square().sum().backward()
        assert not clipper._early._entries
        assert not clipper._early._pending
        with pytest.warns(UserWarning, match="overlap=True") if step else Quiet():
            report = clipper.clip_()
        want = torch.linalg.vector_norm(2.0 * torch.arange(12.0)).item()
        assert report.total_norm.item() == pytest.approx(want, rel=1e-6)
    with Quiet():  # told once
        clipper.clip_()


class Quiet(warnings.catch_warnings):
    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("error")
        return entered


@pytest.mark.ranks(1, 2)
def test_the_gradients_of_a_module_are_measured_together() -> None:
    calls: list[int] = []
    norms = local.norms

    def noted(tensors: Any, *rest: Any, **options: Any) -> Tensor:
        calls.append(sum(tensor is not None for tensor in tensors))
        return norms(tensors, *rest, **options)

    model = sharded()
    clipper = GradClipper(model, policies.global_norm(1e9), overlap=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "norms", noted)
        for step in range(3):
            model.zero_grad()
            calls.clear()
            backward(model, step)
            # At first it is not known when the last module's last gradient has come.
            assert calls == ([2, 2, 3] if step == 0 else [2, 2, 3, 2])
            clipper.clip_()
            assert clipper._early.used == (7 if step == 0 else 9)
            assert calls[3:] == ([2] if step == 0 else [2, 0])


@pytest.mark.ranks(2)
def test_a_failure_during_backward_is_met_at_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharded()
    clipper = clipper_of(model)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(overlap.Early, "_measure", fail)
        backward(model)
    check(clipper, model, 0)


@pytest.mark.ranks(1)
def test_hooks_end_with_their_clipper() -> None:
    model = sharded()
    listed = list(model.parameters())
    clipper = GradClipper(model, policies.global_norm(1e9), overlap=True)
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in listed)
    optimizer = torch.optim.SGD(listed, lr=0.1)
    clipper.attach(optimizer)  # compiled anew
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in listed)
    other = GradClipper(model, policies.agc(0.01), overlap=True)
    backward(model)
    assert len(clipper._early._entries) + len(clipper._early._pending) == 9
    assert len(other._early._entries) + len(other._early._pending) == 9
    clipper._attached.remove()
    del clipper
    gc.collect()
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in listed)
    del other
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in listed)


@pytest.mark.ranks(1)
def test_gradients_are_not_kept() -> None:
    model = sharded()
    clipper = clipper_of(model)
    backward(model)
    assert len(clipper._early._entries) == 9
    kept = [weakref.ref(parameter.grad.to_local()) for parameter in model.parameters()]
    model.zero_grad()
    gc.collect()
    assert not any(each() is not None for each in kept)


@pytest.mark.ranks(2)
def test_ranks_that_differ_are_told() -> None:
    model = sharded()
    with pytest.raises(RankMismatchError, match="overlap"):
        GradClipper(model, policies.global_norm(1.0), overlap=dist.get_rank() == 0)


def test_not_a_bool() -> None:
    with pytest.raises(ConfigurationError, match="overlap must be True or False, got 1"):
        GradClipper(nn.Linear(2, 2), policies.measure(), overlap=1)  # type: ignore[arg-type]


def test_without_ranks_all_is_measured_at_the_clip() -> None:
    model = nn.Linear(2, 2)
    clipper = GradClipper(model, policies.global_norm(0.1), overlap=True)
    model(torch.ones(2)).sum().backward()
    clipper.clip_()
    assert not isinstance(model, FSDPModule)
    with pytest.warns(UserWarning, match="overlap=True"):
        clipper.clip_()
