"""Norms measured during backward: right whatever happens between backward and clip, and early."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from distclip import GradClipper, policies
from distclip.kernels import measuring
from distclip.statistics import early
from tests.engine.test_matrix import POLICIES, build
from tests.helpers.shares import share
from tests.helpers.watching import watch
from tests.sharded import mesh_of
from tests.statistics.overlapping import (
    LOOSE,
    TIGHT,
    Model,
    backward,
    clip_and_check,
    full,
    gradients_of,
    make,
    oracle,
    same_on_all_ranks,
    used,
    warm,
)

CLAMPING = {"value", "value zero", "chain value first", "by name"}


@pytest.mark.ranks(1, 2, 3)
def test_every_policy(world_size: int) -> None:
    """Early for all but those that clamp before they measure; orders of any kind."""
    for label, document in share(POLICIES, world_size, of=2).items():
        try:
            model, memory = make(), {}  # type: ignore[var-annotated]
            clipper = GradClipper(model, build(document), overlap=True, on_nonfinite="pass")
            for number in range(3):
                model.zero_grad()
                backward(model, number)
                before = gradients_of(model)
                want = oracle(document, model, before, memory=memory)
                report = clipper.clip_()
                assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
                for name, gradient in gradients_of(model).items():
                    if gradient is not None:
                        np.testing.assert_allclose(
                            gradient.numpy(), want.gradients[name], rtol=2e-6, atol=1e-9
                        )
                same_on_all_ranks(report)
                if clipper._session.program.passes[0].survey.request.bounds:
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

    monkeypatch.setattr(early.measuring, "norms", counted)
    backward(model, 1)
    assert sorted(calls) == [2, 2, 3]  # body, middle, and the root's embed and head
    clip_and_check(clipper, model, early=7)


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
