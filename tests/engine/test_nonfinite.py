"""NaN and inf under each mode, and steps that are really skipped."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import distclip
from distclip import GradClipper, policies
from distclip.testing import expected
from tests.engine.nonfinite import BAD, CountingScale, adamw, agree, all_bits, poisoned, unchanged
from tests.engine.test_matrix import build
from tests.helpers.watching import same_bits
from tests.sharded import shard, whole

LAYOUTS = ["plain", "fsdp2", "hsdp", "tp", "fsdp2_tp", "mixed"]


CONFIGURATIONS: dict[str, Any] = {
    "global": {"name": "global_norm", "max_norm": 1.0},
    "global p=inf": {"name": "global_norm", "max_norm": 1.0, "norm_type": math.inf},
    "value": {"name": "value", "clip_value": 0.5},
    "agc": {"name": "agc", "clip_factor": 0.1},
    "chain": [
        {"name": "agc", "clip_factor": 0.1},
        {"name": "value", "clip_value": 0.05},
        {"name": "global_norm", "max_norm": 0.5},
    ],
}


@pytest.mark.ranks(1, 2, 3, 4, timeout=40)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_raises_on_all_ranks_and_leaves_every_bit(layout: str) -> None:
    for label, configuration in CONFIGURATIONS.items():
        for bad in (math.nan, math.inf, -math.inf):
            model = shard(layout, values := poisoned(bad))
            model.set_gradients(values.gradients)
            before = all_bits(model)
            clipper = GradClipper(model.named(), build(configuration), on_nonfinite="error")
            with pytest.raises(distclip.NonFiniteGradientError) as caught:
                clipper.clip_()
            assert sorted(caught.value.parameters) == sorted(BAD), label
            assert all(repr(name) in str(caught.value) for name in BAD)
            agree(str(caught.value))
            assert all(map(same_bits, before, all_bits(model))), label
            # Nothing sticks: the next step is a step like any other.
            model.set_gradients(whole().gradients)
            assert math.isfinite(clipper.clip_().total_norm.item())


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_skip_leaves_every_bit_and_says_so_on_all_ranks(layout: str) -> None:
    for configuration in CONFIGURATIONS.values():
        for bad in (math.nan, math.inf):
            model = shard(layout, values := poisoned(bad))
            model.set_gradients(values.gradients)
            before = all_bits(model)
            clipper = GradClipper(model.named(), build(configuration), on_nonfinite="skip")
            report = clipper.clip_()
            assert bool(report.skipped)
            assert sorted(report.nonfinite) == sorted(BAD)
            assert report.coefficient.item() == 1.0
            assert report.clipped_fraction.item() == 0.0
            assert all(map(same_bits, before, all_bits(model)))
            agree(str(report.to_dict()))
            model.set_gradients(whole().gradients)
            assert not bool(clipper.clip_().skipped)


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_drops_whole_gradients_and_clips_the_rest_by_theirs(layout: str) -> None:
    for label, configuration in CONFIGURATIONS.items():
        for bad in (math.nan, math.inf):
            values = poisoned(bad)
            model = shard(layout, values)
            model.set_gradients(values.gradients)
            want = expected(configuration, values.gradients, values.weights, on_nonfinite="zero")
            report = GradClipper(model.named(), build(configuration), on_nonfinite="zero").clip_()
            assert sorted(report.nonfinite) == sorted(BAD), label
            assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6), label
            assert report.clipped_norm.item() == pytest.approx(want.clipped_norm, rel=1e-6)
            for name, gradient, part in model.beside(want.gradients):
                if part is None:
                    assert gradient is None
                    continue
                assert gradient is not None
                torch.testing.assert_close(
                    gradient.double(), torch.as_tensor(part), rtol=2e-6, atol=1e-12
                )
                if name in BAD:
                    assert (gradient == 0).all()  # and not 0 * nan
            agree(str(report.to_dict()))


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pass_does_what_torch_does_on_one_device(layout: str) -> None:
    for bad in (math.nan, math.inf):
        model = shard(layout, values := poisoned(bad))
        model.set_gradients(values.gradients)
        report = GradClipper(model.named(), policies.global_norm(1.0), on_nonfinite="pass").clip_()
        plain = {n: nn.Parameter(w.clone()) for n, w in values.weights.items()}
        for name, parameter in plain.items():
            gradient = values.gradients[name]
            parameter.grad = None if gradient is None else gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(plain.values(), 1.0)
        torch.testing.assert_close(report.total_norm, norm, equal_nan=True)
        assert sorted(report.nonfinite) == sorted(BAD)
        for name, gradient in model.local_gradients():
            want = plain[name].grad
            if gradient is not None:
                assert want is not None
                torch.testing.assert_close(
                    gradient, want.flatten()[model.elements[name]], equal_nan=True
                )


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("mode", ["skip", "error", "zero"])
def test_a_nonfinite_sample_never_enters_a_state(mode: Any) -> None:
    model = shard("fsdp2", values := whole())
    clipper = GradClipper(model.named(), CountingScale(), on_nonfinite=mode)
    model.set_gradients(values.gradients)
    first = clipper.clip_().total_norm.double()
    model.set_gradients(poisoned(math.nan).gradients)
    try:
        second = clipper.clip_().total_norm.double()
    except distclip.NonFiniteGradientError:
        assert mode == "error"
    states: Any = clipper.state_dict()["states"]
    state = states[""]["shared"]
    counted = first + second if mode == "zero" else first
    torch.testing.assert_close(state["sum"], counted, rtol=1e-6, atol=0.0)
    assert state["steps"].item() == (2 if mode == "zero" else 1)


@pytest.mark.ranks(2, timeout=30)
def test_a_nan_on_one_rank_skips_the_step_on_all() -> None:
    from torch.distributed.fsdp import fully_shard

    from tests.sharded import mesh_of

    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=mesh_of((2,), ("dp",)))
    optimizer = adamw(model.parameters())
    GradClipper(model, policies.global_norm(1.0), on_nonfinite="skip").attach(optimizer)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    before = [p.to_local().clone() for p in model.parameters() if isinstance(p, DTensor)]
    if dist.get_rank() == 1:
        gradient = model.weight.grad
        assert isinstance(gradient, DTensor)
        gradient.to_local()[0, 0] = math.nan
    optimizer.step()
    after = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
    assert unchanged(before, after)
    assert all(state["step"].item() == 1 for state in optimizer.state.values())


@pytest.mark.parametrize("mode", ["error", "skip", "zero", "pass"])
def test_norms_whose_sum_leaves_float64_are_finite(mode: Any) -> None:
    named = [(str(i), nn.Parameter(torch.ones(2, dtype=torch.float64))) for i in range(3)]
    for _, parameter in named:
        parameter.grad = torch.tensor([1.5e308, 0.0], dtype=torch.float64)
    report = GradClipper(named, policies.parameter_norm(1.0), on_nonfinite=mode).clip_()
    assert report.nonfinite == ()
    assert not bool(report.skipped)
    for _, parameter in named:
        assert parameter.grad is not None
        assert parameter.grad.tolist() == pytest.approx([1.0, 0.0])
