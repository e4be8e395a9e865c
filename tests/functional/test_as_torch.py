"""The drop-ins on plain tensors: what torch does, and whatever torch takes."""

import math

import pytest
import torch
from torch import nn

import distclip
from distclip.errors import ConfigurationError
from distclip.testing import assert_rounded
from tests.functional.drawn import gradients, parameter, plain, randn


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
