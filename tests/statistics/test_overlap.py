"""Norms measured during backward: right whatever happens between backward and clip, and early."""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from distclip import ClipReport, ConfigurationError, GradClipper, NonFiniteGradientError, policies
from distclip.kernels import measuring
from distclip.statistics import overlap as overlapping
from distclip.testing import expected
from tests.engine.test_matrix import POLICIES, build
from tests.helpers.watching import watch
from tests.sharded import mesh_of

GROUPS = ("body", "middle", "spare")
"""Sharded for themselves; the rest belongs to the root."""
TIGHT = {"name": "global_norm", "max_norm": 0.01}
LOOSE = {"name": "global_norm", "max_norm": 1e6}


class Model(nn.Module):
    """Uneven shards, and empty ones on 4 ranks; ``spare`` is used where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 32)
        self.middle = nn.Linear(32, 32)
        self.spare = nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens: Tensor, spare: bool = False) -> Tensor:
        x = torch.tanh(self.body(self.embed(tokens)))
        x = torch.tanh(self.middle(x))
        return self.head(self.spare(x) if spare else x)


def make(mesh: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Model()
    mesh = mesh_of((dist.get_world_size(),), ("dp",)) if mesh is None else mesh
    for name in GROUPS:
        fully_shard(getattr(model, name), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def loss_of(model: nn.Module, number: int, spare: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
    return model(torch.randint(11, (9,), generator=generator), spare).float().square().mean()


def backward(model: nn.Module, number: int, spare: bool = False, factor: float = 1.0) -> None:
    (loss_of(model, number, spare) * factor).backward()


def full(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: full(p.grad) for name, p in model.named_parameters()}
    return {name: None if g is None else g.detach().double().clone() for name, g in found.items()}


def oracle(document: Any, model: nn.Module, gradients: dict[str, Tensor | None]) -> Any:
    weights = {name: full(p.detach()).double().numpy() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    return expected(
        document, {n: None if g is None else g.numpy() for n, g in gradients.items()}, weights
    )


def same_on_all_ranks(report: ClipReport) -> None:
    mine = report.coefficient.double().numpy().tobytes()
    everybodys: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, mine)
    assert set(everybodys) == {mine}


def clip_and_check(
    clipper: GradClipper, model: nn.Module, document: Any = TIGHT, early: int | None = None
) -> ClipReport:
    """Clip, and hold the result to the oracle, given the gradients as they were just before."""
    before = gradients_of(model)
    want = oracle(document, model, before)
    report = clipper.clip_()
    compare(report, want, model)
    if early is not None:
        assert clipper.measured_early == early
    return report


def compare(report: ClipReport, want: Any, model: nn.Module) -> None:
    assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
    for name, norm in want.parameter_norms.items():
        assert report.parameter_norms[name] == pytest.approx(norm, rel=1e-6, abs=1e-30), name
    for name, gradient in gradients_of(model).items():
        wanted = want.gradients[name]
        assert (gradient is None) == (wanted is None), name
        if gradient is not None:
            np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-6, atol=1e-12)
    same_on_all_ranks(report)


def used(model: nn.Module, spare: bool = False) -> int:
    return sum(spare or "spare" not in name for name, _ in model.named_parameters())


def warm(model: nn.Module, *, spare: bool = False, document: Any = TIGHT) -> GradClipper:
    """A clipper that has seen one step, and so knows how many gradients come together."""
    clipper = GradClipper(model, build(document), overlap=True)
    backward(model, 0, spare)
    clip_and_check(clipper, model, document, early=0)
    model.zero_grad()
    return clipper


def hooks_on(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())  # type: ignore[attr-defined]


# ---- right, and early ----------------------------------------------------------------------------

CLAMPING = {"value", "value zero", "chain value first", "by name"}


@pytest.mark.ranks(1, 2, 3)
def test_every_policy() -> None:
    """Early for all but those that clamp before they measure; orders of any kind."""
    for label, document in POLICIES.items():
        try:
            model, memory = make(), {}  # type: ignore[var-annotated]
            clipper = GradClipper(model, build(document), overlap=True, on_nonfinite="pass")
            for number in range(3):
                model.zero_grad()
                backward(model, number)
                before = gradients_of(model)
                weights = {
                    n: full(p.detach()).double().numpy() for n, p in model.named_parameters()
                }  # type: ignore[union-attr]
                arrays = {n: None if g is None else g.numpy() for n, g in before.items()}
                want = expected(document, arrays, weights, memory=memory)
                report = clipper.clip_()
                assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
                for name, gradient in gradients_of(model).items():
                    if gradient is not None:
                        np.testing.assert_allclose(
                            gradient.numpy(), want.gradients[name], rtol=2e-6, atol=1e-9
                        )
                same_on_all_ranks(report)
                if clipper._program.passes[0].request.bounds:
                    assert label in CLAMPING
                    assert clipper.measured_early == 0
                elif number:
                    assert clipper.measured_early == used(model)
        except Exception as error:
            raise AssertionError(f"policy {label!r}: {error}") from error


@pytest.mark.ranks(2)
def test_the_same_as_without() -> None:
    for document in (TIGHT, {"name": "agc", "clip_factor": 0.01}):
        models = [make(), make()]
        clippers = [
            GradClipper(model, build(document), overlap=overlap)
            for model, overlap in zip(models, (True, False), strict=True)
        ]
        for number in range(4):
            reports = []
            for model, clipper in zip(models, clippers, strict=True):
                model.zero_grad()
                backward(model, number)
                reports.append(clipper.clip_())
            one, other = reports
            assert one.total_norm.item() == pytest.approx(other.total_norm.item(), rel=1e-6)
            assert one.coefficient.item() == pytest.approx(other.coefficient.item(), rel=1e-6)
            same_on_all_ranks(one)
        assert [clipper.measured_early for clipper in clippers] == [used(models[0]), 0]


@pytest.mark.ranks(2)
def test_the_clip_reads_no_gradient_and_sends_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without clipping: the norms are there, the all-reduce is the same."""
    model = make()
    clipper = warm(model, document=LOOSE)
    plain = GradClipper(model, build(LOOSE))
    seen = {}
    read: list[int] = []
    norms = measuring.norms

    def counted(tensors: Any, *args: Any, **options: Any) -> Tensor:
        read[-1] += sum(each is not None for each in tensors)
        return norms(tensors, *args, **options)

    backward(model, 1)
    monkeypatch.setattr(measuring, "norms", counted)
    for name, each in (("early", clipper), ("late", plain), ("late again", plain)):
        read.append(0)
        with watch() as seen[name]:
            each.clip_()
    assert clipper.measured_early == used(model)
    assert seen["early"].collectives == seen["late again"].collectives
    assert read == [0, used(model), used(model)]


@pytest.mark.ranks(2)
def test_one_measurement_for_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    clipper = warm(model)
    calls: list[int] = []
    norms = measuring.norms

    def counted(tensors: Any, *args: Any, **options: Any) -> Tensor:
        calls.append(sum(each is not None for each in tensors))
        return norms(tensors, *args, **options)

    monkeypatch.setattr(overlapping.measuring, "norms", counted)
    backward(model, 1)
    assert sorted(calls) == [2, 2, 3]  # body, middle, and the root's embed and head
    clip_and_check(clipper, model, early=7)


# ---- accumulation --------------------------------------------------------------------------------


@pytest.mark.ranks(1, 2, 3)
def test_accumulation_without_synchronisation() -> None:
    model = make()
    clipper = warm(model)
    for number in (1, 2):
        model.zero_grad()
        model.set_requires_gradient_sync(False)
        backward(model, number)
        assert all(p.grad is None for p in model.parameters())
        model.set_requires_gradient_sync(True)
        backward(model, 10 + number)
        clip_and_check(clipper, model, early=used(model))


@pytest.mark.ranks(1, 2, 3)
def test_accumulation_with_synchronisation() -> None:
    """The hook is called for each micro-batch, with the sum so far: the last one counts."""
    model = make()
    clipper = warm(model)
    for number in (1, 2):
        model.zero_grad()
        for micro in range(3):
            backward(model, 10 * number + micro)
        clip_and_check(clipper, model, early=used(model))


@pytest.mark.ranks(2)
def test_accumulation_where_one_micro_batch_uses_less() -> None:
    model = make()
    clipper = warm(model, spare=True)
    backward(model, 1, spare=True)
    backward(model, 2)
    # What the second has not touched is still what the first left.
    clip_and_check(clipper, model, early=used(model, spare=True))


# ---- unused parameters ---------------------------------------------------------------------------


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_norm_of_the_step_before_is_never_used(set_to_none: bool) -> None:
    model = make()
    clipper = warm(model, spare=True)
    for number, spare in enumerate((True, False, True, True, False, False), start=1):
        model.zero_grad(set_to_none=set_to_none)
        backward(model, number, spare)
        clip_and_check(clipper, model)
        # FSDP2 calls in another order where a module was not used; what it still calls comes early.
        assert clipper.measured_early >= used(model) - 3


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_nor_one_of_a_step_that_was_not_clipped(set_to_none: bool) -> None:
    model = make()
    clipper = warm(model, spare=True)
    backward(model, 1, spare=True)
    model.zero_grad(set_to_none=set_to_none)
    backward(model, 2)
    assert any(name.startswith("spare") for name, _ in model.named_parameters())
    clip_and_check(clipper, model, early=used(model))


@pytest.mark.ranks(2)
def test_zeroed_where_no_version_shows_it() -> None:
    """As the last, by ``torch._foreach_zero_``, which leaves no version on DTensors."""
    model = make()
    clipper = warm(model, spare=True)
    backward(model, 1, spare=True)
    torch._foreach_zero_([p.grad for p in model.parameters()])
    backward(model, 2)
    clip_and_check(clipper, model)


@pytest.mark.ranks(2)
def test_a_second_clip_measures_again() -> None:
    for document in (TIGHT, LOOSE):
        model = make()
        clipper = warm(model, document=document)
        backward(model, 1)
        clip_and_check(clipper, model, document, early=used(model))
        clip_and_check(clipper, model, document, early=0)


# ---- meshes and precisions -----------------------------------------------------------------------


@pytest.mark.ranks(2, 4)
def test_hsdp() -> None:
    """Replicas count once: those of coordinate 0 measure."""
    world = dist.get_world_size()
    mesh = mesh_of((2, world // 2), ("replicate", "shard"))
    counts = []
    for document in (TIGHT, {"name": "agc", "clip_factor": 0.01}):
        model = make(mesh)
        clipper = warm(model, document=document)
        for number in (1, 2):
            model.zero_grad()
            backward(model, number)
            clip_and_check(clipper, model, document)
        counts.append(clipper.measured_early)
    assert counts[0] == (used(model) if mesh.get_coordinate()[0] == 0 else 0)


@pytest.mark.ranks(2, 3)
def test_mixed_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = make(mp_policy=policy)
    clipper = warm(model, spare=True)
    for number in (1, 2):
        model.zero_grad()
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1)
            backward(model, 10 * number + micro, spare=True)
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        clip_and_check(clipper, model, early=used(model, spare=True))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = Model().to(dtype)
    fully_shard(model, mesh=mesh_of((dist.get_world_size(),), ("dp",)))
    clipper = GradClipper(model, policies.measure(), overlap=True)
    for number in range(2):
        model.zero_grad()
        backward(model, number)
        clip_and_check(clipper, model, {"name": "measure"}, early=number * used(model))


@pytest.mark.ranks(2, 4)
def test_over_tensor_parallelism() -> None:
    world = dist.get_world_size()
    mesh = mesh_of((world // 2, 2), ("dp", "tp"))
    torch.manual_seed(0)
    model: Any = Model()
    plan = {"body": ColwiseParallel(), "middle": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    # The others are plain, and so replicas on the tensor-parallel ranks: leave them out.
    for name in ("body", "middle"):
        fully_shard(getattr(model, name), mesh=mesh["dp"])
    for name in ("embed", "spare", "head"):
        getattr(model, name).requires_grad_(False)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    clipper = GradClipper(trained, build(TIGHT), overlap=True)
    for number in range(4):
        for _, p in trained:
            p.grad = None
        generator = torch.Generator().manual_seed(10 * number + mesh.get_coordinate()[0])
        model(torch.randint(11, (9,), generator=generator)).square().mean().backward()
        before = {n: full(p.grad).double() for n, p in trained}  # type: ignore[union-attr]
        total = torch.stack([g.norm() for g in before.values()]).norm().item()
        report = clipper.clip_()
        assert report.total_norm.item() == pytest.approx(total, rel=1e-6)
        same_on_all_ranks(report)
        if number:
            counted = sum(p.share > 0 for p in clipper.plan.pieces)
            assert clipper.measured_early == counted > 0


# ---- changed between backward and clip -----------------------------------------------------------


@torch.no_grad()
def _no_grad(edit: Callable[[], Any]) -> None:
    edit()


def _unscale(model: nn.Module) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))


def _grads(model: nn.Module) -> list[Any]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _locals(model: nn.Module) -> list[Tensor]:
    return [each.to_local() for each in _grads(model)]


def _set(parameter: Any, gradient: Any) -> None:
    parameter.grad = gradient


def _rewrapped(parameter: Any, shard: Tensor) -> None:
    parameter.grad = DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


EDITS: dict[str, Callable[[Any], Any]] = {
    # torch counts these
    "grad.mul_": lambda m: m.body.weight.grad.mul_(3),
    "no_grad, grad.mul_": lambda m: _no_grad(lambda: m.body.weight.grad.mul_(3)),
    "grad.detach().mul_": lambda m: m.body.weight.grad.detach().mul_(3),
    "grad.clamp_": lambda m: m.body.weight.grad.clamp_(-1e-3, 1e-3),
    "grad.copy_": lambda m: m.body.weight.grad.copy_(m.body.weight.grad * 3),
    "to_local().mul_": lambda m: m.body.weight.grad.to_local().mul_(3),
    "no_grad, to_local().mul_": lambda m: _no_grad(lambda: m.body.weight.grad.to_local().mul_(3)),
    "one local element": lambda m: _one_element(m.body.weight.grad.to_local()),
    "foreach, local tensors": lambda m: torch._foreach_mul_(_locals(m), 3.0),
    # replaced
    "grad = ...": lambda m: _set(m.body.weight, m.body.weight.grad * 3),
    "grad = None": lambda m: _set(m.body.weight, None),
    "grad = DTensor of a copy": lambda m: _rewrapped(
        m.body.weight, m.body.weight.grad.to_local() * 3
    ),
    "local.data = ...": lambda m: setattr(
        m.body.weight.grad._local_tensor, "data", m.body.weight.grad._local_tensor * 3
    ),
    # torch does not count these; samples show them
    "foreach, DTensors": lambda m: torch._foreach_mul_(_grads(m), 3.0),
    "foreach, some DTensors": lambda m: torch._foreach_mul_([m.head.bias.grad], 3.0),
    "GradScaler.unscale_": _unscale,
    "torch clip_grad_norm_": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e-3),
    "torch clip_grad_value_": lambda m: nn.utils.clip_grad_value_(m.parameters(), 1e-4),
    ".data.mul_": lambda m: m.body.weight.grad.data.mul_(3),
    "to_local().data.mul_": lambda m: m.body.weight.grad.to_local().data.mul_(3),
    "numpy": lambda m: [each.numpy().__imul__(3) for each in _locals(m)],
    "all_reduce": lambda m: dist.all_reduce(m.body.weight.grad.to_local()[:8]),
}


def _one_element(shard: Tensor) -> None:
    if shard.numel():
        shard.view(-1)[5] += 1.0


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("edit", EDITS)
def test_changed_gradients_are_measured_again(edit: str) -> None:
    model = make()
    clipper = warm(model)
    backward(model, 1)
    norms = {n: None if g is None else g.norm() for n, g in gradients_of(model).items()}
    EDITS[edit](model)
    changed = {n: None if g is None else g.norm() for n, g in gradients_of(model).items()}
    if dist.get_world_size() > 1 or edit != "all_reduce":
        assert norms != changed
    clip_and_check(clipper, model)
    model.zero_grad()
    backward(model, 2)
    clip_and_check(clipper, model, early=used(model))


@pytest.mark.ranks(2)
def test_what_shows_in_one_group_leaves_the_others_early() -> None:
    model = make()
    clipper = warm(model)
    backward(model, 1)
    model.body.weight.grad.mul_(3)
    clip_and_check(clipper, model, early=used(model) - 2)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("way", ["both", "shard", "wrapper"])
def test_another_tensor_with_the_same_samples(way: str) -> None:
    """Neither address, nor versions, nor samples tell: only that it is another tensor."""
    model = make()
    clipper = warm(model)
    backward(model, 1)
    gradient = model.body.weight.grad
    shard = gradient.to_local()
    unsampled(shard.data).add_(5.0)
    twin = shard.data
    while twin._version < shard._version:
        twin.add_(0.0)
    if way == "both":
        _rewrapped(model.body.weight, twin)
    elif way == "shard":
        gradient._local_tensor = twin
    else:
        model.body.weight.grad = DTensor(
            gradient._local_tensor, gradient._spec, requires_grad=False
        )
    replaced = model.body.weight.grad
    assert replaced._version == gradient._version
    assert replaced._local_tensor._version == shard._version
    assert replaced._local_tensor.data_ptr() == shard.data_ptr()
    clip_and_check(clipper, model, early=used(model) - 2)


@pytest.mark.ranks(2)
def test_an_element_that_only_its_version_tells_of() -> None:
    for changed in (lambda g: g.to_local(), lambda g: None):
        model = make()
        clipper = warm(model)
        backward(model, 1)
        gradient = model.body.weight.grad
        shard = changed(gradient)
        if shard is not None:  # counted on the local tensor
            unsampled(shard).add_(5.0)
        else:  # on the DTensor only
            keep = torch.ones_like(gradient)
            unsampled(keep.to_local()).add_(5.0)
            gradient.mul_(keep)
        clip_and_check(clipper, model, early=used(model) - 2)


@pytest.mark.ranks(2)
def test_what_cannot_be_seen() -> None:
    """As docs/overlap.md says: an uncounted change that misses all samples. Not without overlap."""
    model = make()
    clipper, plain = warm(model, document=LOOSE), GradClipper(model, build(LOOSE))
    backward(model, 1)
    unsampled(model.body.weight.grad.to_local().data).add_(5.0)
    stale, right = clipper.clip_().total_norm.item(), plain.clip_().total_norm.item()
    assert right > 5.0 > stale


def unsampled(shard: Tensor) -> Tensor:
    """The second of the elements of a contiguous tensor; the first is a sample."""
    assert shard.numel() >= 2 * overlapping.SAMPLES
    return shard.view(-1)[1:2]


@pytest.mark.ranks(2)
def test_an_uncounted_change_that_shows_in_one_group_only() -> None:
    """Who changes one so may have changed the others so: none of them is trusted."""
    model = make()
    clipper = warm(model)
    backward(model, 1)
    unsampled(model.body.weight.grad.to_local().data).add_(5.0)
    model.middle.weight.grad.data.mul_(3)
    clip_and_check(clipper, model, early=0)


@pytest.mark.ranks(2)
def test_gradients_that_samples_cannot_vouch_for() -> None:
    """All samples are zero: multiplied or not, they would look the same."""
    model = make()
    clipper = warm(model, document=LOOSE)
    for _ in range(2):
        model.zero_grad()
        (model(torch.zeros(9, dtype=torch.long)) * 0.0).sum().backward()
        clip_and_check(clipper, model, LOOSE, early=0)


# ---- gradient scalers ----------------------------------------------------------------------------


@pytest.mark.ranks(2)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_under_a_gradient_scaler(fused: bool, unscaled: bool) -> None:
    """Attached. A fused optimizer is given scaled gradients: their norms come early."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused, foreach=not fused)
    reports: list[ClipReport] = []
    clipper = GradClipper(
        model, build(TIGHT), overlap=True, sinks=[lambda _, report: reports.append(report)]
    )
    clipper.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, number)).backward()
        scale = scaler.get_scale()
        want = oracle(
            TIGHT,
            model,
            {n: None if g is None else g / scale for n, g in gradients_of(model).items()},
        )
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert reports[-1].total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
        assert reports[-1].coefficient.item() == pytest.approx(want.coefficient, rel=1e-5)
        early = fused and not unscaled and number > 0
        assert clipper.measured_early == (used(model) if early else 0)


@pytest.mark.ranks(2)
def test_an_overflow_under_a_gradient_scaler() -> None:
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    GradClipper(model, build(TIGHT), overlap=True).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        optimizer.zero_grad()
        factor = math.inf if number == 2 else 1.0
        before = [p.detach().to_local().clone() for p in model.parameters()]
        scaler.scale(loss_of(model, number) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        after = [p.detach().to_local() for p in model.parameters()]
        assert all(map(torch.equal, before, after)) == (number == 2)


# ---- what FSDP2 does not manage ------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_ignored_parameters() -> None:
    """Plain tensors in an FSDP2 model: the user reduces them after backward."""
    torch.manual_seed(0)
    model: Any = Model()
    mesh = mesh_of((dist.get_world_size(),), ("dp",))
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=set(model.middle.parameters()))
    clipper = GradClipper(model, build(TIGHT), overlap=True)
    for number in range(3):
        model.zero_grad()
        backward(model, number)
        for p in model.middle.parameters():
            dist.all_reduce(p.grad, op=dist.ReduceOp.SUM)
        clip_and_check(clipper, model, early=5 if number else 0)


@pytest.mark.ranks(2)
def test_tensor_parallel_parameters_beside_fsdp2() -> None:
    """DTensors whose hooks autograd calls, before anything is known to be reduced."""
    torch.manual_seed(0)
    model: Any = Model()
    mesh = mesh_of((dist.get_world_size(),), ("dp",))
    parallelize_module(model, mesh, {"body": ColwiseParallel(), "middle": RowwiseParallel()})
    fully_shard(model.head, mesh=mesh)
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith(("embed", "spare"))]
    clipper = GradClipper(named, build(TIGHT), overlap=True)
    assert len(clipper._early._handles) == 6  # type: ignore[union-attr]
    for number in range(3):
        model.zero_grad()
        model(torch.arange(9)).square().mean().backward()
        before = torch.stack([full(p.grad).double().norm() for _, p in named])  # type: ignore[union-attr]
        report = clipper.clip_()
        assert report.total_norm.item() == pytest.approx(before.norm().item(), rel=1e-6)
        same_on_all_ranks(report)
        assert clipper.measured_early == (2 if number else 0)


@pytest.mark.ranks(2)
def test_a_loss_that_reads_sharded_weights() -> None:
    """Autograd adds to the gradient itself, before or after FSDP2 does."""
    model = make()
    clipper = warm(model)
    for number in (1, 2):
        model.zero_grad()
        decay = sum(p.square().sum().full_tensor() for p in model.body.parameters())
        (loss_of(model, number) + 0.1 * decay).backward()
        clip_and_check(clipper, model)


@pytest.mark.ranks(1, 2)
def test_without_fsdp2_it_warns_and_clips() -> None:
    torch.manual_seed(0)
    model = Model()
    with pytest.warns(UserWarning, match="overlap=True has no effect here"):
        clipper = GradClipper(model, build(TIGHT), overlap=True)
    assert hooks_on(model) == 0
    for _ in range(3):
        model.zero_grad()
        model(torch.arange(9)).square().mean().backward()
        clip_and_check(clipper, model, early=0)


@pytest.mark.ranks(2)
def test_with_dtensors_but_without_fsdp2_it_warns_once() -> None:
    torch.manual_seed(0)
    model: Any = Model()
    parallelize_module(
        model,
        mesh_of((dist.get_world_size(),), ("dp",)),
        {"body": ColwiseParallel(), "middle": RowwiseParallel()},
    )
    named = [*model.body.named_parameters("body"), *model.middle.named_parameters("middle")]
    clipper = GradClipper(named, build(TIGHT), overlap=True)
    found = []
    for _ in range(4):
        model.zero_grad()
        model(torch.arange(9)).square().mean().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clipper.clip_()
        found.append(["no effect" in str(each.message) for each in caught])
    assert found == [[], [True], [], []]


# ---- hooks ---------------------------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_hooks_go_with_the_clipper() -> None:
    model = make()
    gc.collect()
    gc.disable()  # no cycle may be needed for it
    try:
        clipper = warm(model)
        assert hooks_on(model) == len(list(model.parameters()))
        gone = weakref.ref(clipper._early)  # type: ignore[arg-type]
        del clipper
        assert gone() is None
        assert hooks_on(model) == 0
    finally:
        gc.enable()
    backward(model, 1)


@pytest.mark.ranks(2)
def test_hooks_of_an_attached_clipper() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradClipper(model, build(TIGHT), overlap=True).attach(optimizer)
    gc.collect()
    assert hooks_on(model) == len(list(model.parameters()))
    del optimizer
    gc.collect()
    assert hooks_on(model) == 0


@pytest.mark.ranks(2)
def test_hooks_keep_no_model_alive() -> None:
    model = make()
    clipper = warm(model)
    early, parameter = clipper._early, weakref.ref(model.head.bias)
    del clipper, model
    gc.collect()
    assert parameter() is None
    assert early is not None


@pytest.mark.ranks(2)
def test_close() -> None:
    model = make()
    clipper = warm(model)
    backward(model, 1)
    clipper.close()
    clipper.close()
    assert hooks_on(model) == 0
    clip_and_check(clipper, model, early=0)
    GradClipper(model, build(TIGHT)).close()


@pytest.mark.ranks(2)
def test_a_second_clipper_of_the_same_parameters() -> None:
    model = make()
    first = warm(model)
    second = warm(model, document={"name": "agc", "clip_factor": 0.01})
    assert hooks_on(model) == 2 * len(list(model.parameters()))
    backward(model, 1)
    clip_and_check(first, model, early=used(model))
    clip_and_check(second, model, {"name": "agc", "clip_factor": 0.01}, early=0)  # changed by first
    del first
    model.zero_grad()
    backward(model, 2)
    clip_and_check(second, model, {"name": "agc", "clip_factor": 0.01}, early=used(model))


@pytest.mark.ranks(2)
def test_a_collection_inside_a_hook_removes_nothing_there() -> None:
    """A dropped clipper in a cycle, collected while FSDP2 walks over the hooks."""
    model = make()
    clipper = warm(model)
    other = GradClipper(model, build(TIGHT), overlap=True)
    other.loop = other  # type: ignore[attr-defined]
    early = clipper._early
    note = early.note  # type: ignore[union-attr]

    def collecting(position: int) -> None:
        gc.collect()
        note(position)

    early.note = collecting  # type: ignore[union-attr, method-assign]
    gc.disable()
    try:
        del other
        backward(model, 1)
    finally:
        gc.enable()
    clip_and_check(clipper, model, early=used(model))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("where", ["backward", "clip"])
def test_an_error_in_measuring_early_hangs_nobody(where: str, monkeypatch: Any) -> None:
    """On rank 0 only. It goes on without; the other rank still measures early."""
    model = make()
    clipper = warm(model)
    broken = dist.get_rank() == 0

    def fails(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory, say")

    if broken:
        name = "_measure" if where == "backward" else "_untouched"
        monkeypatch.setattr(clipper._early, name, fails)
    backward(model, 1)
    context: Any = contextlib.nullcontext()
    if broken:
        context = pytest.warns(UserWarning, match="RuntimeError: out of memory, say")
    with context:
        clip_and_check(clipper, model, early=None)
    model.zero_grad()
    backward(model, 2)
    clip_and_check(clipper, model, early=0 if broken else used(model))
    assert hooks_on(model) == (0 if broken else len(list(model.parameters())))


@pytest.mark.ranks(2)
def test_hooks_of_the_user_beside_it() -> None:
    """One before and one after, that change what they see."""
    model = make()
    before = model.body.bias.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))
    clipper = warm(model)
    after = model.middle.bias.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))
    for number in (1, 2):
        model.zero_grad()
        backward(model, number)
        clip_and_check(clipper, model)
    before.remove()
    after.remove()
    model.zero_grad()
    backward(model, 3)
    clip_and_check(clipper, model, early=used(model))


# ---- the rest of a clipper -----------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_non_finite_gradients() -> None:
    model = make()
    clipper = warm(model)
    with torch.no_grad():
        bias = model.head.bias.to_local().clone()
    backward(model, 1)
    if dist.get_rank() == 0:
        model.head.bias.grad.to_local()[0] = math.nan
    with pytest.raises(NonFiniteGradientError, match=r"head\.bias"):
        clipper.clip_()
    model.zero_grad()
    (loss_of(model, 2) * math.inf).backward()  # this one early, but its samples are not comparable
    with pytest.raises(NonFiniteGradientError):
        clipper.clip_()
    model.zero_grad()
    backward(model, 3)
    clip_and_check(clipper, model, early=used(model))
    assert torch.equal(bias, model.head.bias.to_local().detach())


@pytest.mark.ranks(2)
def test_training_attached_is_that_without() -> None:
    """Folded and not; the policy's memory and its state are the same, and load into one another."""
    for fused in (False, True):
        trained = []
        for overlap in (True, False):
            model = make()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
            clipper = GradClipper(model, policies.autoclip(50.0), overlap=overlap)
            clipper.attach(optimizer)
            for number in range(6):
                optimizer.zero_grad()
                backward(model, number)
                optimizer.step()
            assert clipper.measured_early == (used(model) if overlap else 0)
            trained.append((model, clipper))
        (one, first), (other, second) = trained
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.to_local(), q.to_local(), rtol=1e-6, atol=1e-7)
        state = first.state_dict()
        assert state.keys() == second.state_dict().keys()
        second.load_state_dict(state)
        backward(one, 7)
        first.load_state_dict(state)
        clip = first.clip_()
        assert torch.isfinite(clip.total_norm)
        del first, second, trained
        gc.collect()


@pytest.mark.ranks(2)
def test_the_first_pass_of_several() -> None:
    """A later pass measures what the first has made of the gradients."""
    document = [
        {"name": "global_norm", "max_norm": 0.01},
        {"name": "value", "clip_value": 1e-4},
        {"name": "global_norm", "max_norm": 1e-3},
    ]
    model = make()
    clipper = GradClipper(model, build(document), overlap=True)
    assert len(clipper._program.passes) == 2
    for number in range(3):
        model.zero_grad()
        backward(model, number)
        want = oracle(document, model, gradients_of(model))
        clipper.clip_()
        for name, gradient in gradients_of(model).items():
            if gradient is not None:
                np.testing.assert_allclose(
                    gradient.numpy(), want.gradients[name], rtol=1e-5, atol=1e-10
                )
        assert clipper.measured_early == (used(model) if number else 0)


@pytest.mark.ranks(2)
def test_attached_between_backward_and_step() -> None:
    """The optimizer's groups change what is measured: what came before does not count."""
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clipper = GradClipper(
        model, policies.group_norm(0.01, norm_type=1.0), optimizer=optimizer, overlap=True
    )
    for number in range(2):
        model.zero_grad()
        backward(model, number)
        clipper.clip_()
    assert clipper.measured_early == used(model)
    model.zero_grad()
    backward(model, 3)
    clipper.attach(optimizer)
    optimizer.step()
    assert clipper.measured_early == 0


@pytest.mark.ranks(1)
def test_arguments() -> None:
    with pytest.raises(ConfigurationError, match="overlap must be True or False, got 'yes'"):
        GradClipper(nn.Linear(2, 2), policies.measure(), overlap="yes")  # type: ignore[arg-type]


@pytest.mark.ranks(2)
def test_the_model_is_sharded_as_it_says() -> None:
    model = make()
    managed = [name for name, each in model.named_modules() if isinstance(each, FSDPModule)]
    assert sorted(managed) == ["", *sorted(GROUPS)]


@pytest.mark.parametrize("numels", [[1], [0, 3], [7, 8, 9], [100_000, 3], [3_000_000]])
def test_samples(numels: list[int]) -> None:
    """Of every gradient some, of a large one few, none outside."""
    offsets = [0]
    for numel in numels[:-1]:
        offsets.append(offsets[-1] + numel + 5)
    places = overlapping._places(offsets, numels, torch.device("cpu")).tolist()
    for offset, numel in zip(offsets, numels, strict=True):
        mine = [each for each in places if offset <= each < offset + numel]
        assert len(mine) >= min(numel, overlapping.SAMPLES)
        assert len(mine) <= numel / overlapping.SPACING + 2 * overlapping.SAMPLES
    assert len(places) == len({*places})
    assert all(any(o <= e < o + n for o, n in zip(offsets, numels, strict=True)) for e in places)
