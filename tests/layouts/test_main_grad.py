"""Gradients that Megatron keeps in ``parameter.main_grad``, in place of ``.grad``."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import GradClipper, policies
from distclip.optim import LaProp
from distclip.testing import expected
from tests.helpers.main_grad import accumulate

DOCUMENTS: dict[str, Any] = {
    "global_norm": {"name": "global_norm", "max_norm": 0.1},
    "value": {"name": "value", "clip_value": 0.05},
    "agc": {"name": "agc", "clip_factor": 0.01},
}
POLICIES: dict[str, Any] = {
    "global_norm": policies.global_norm(0.1),
    "value": policies.value(0.05),
    "agc": policies.agc(0.01),
}
FUNCTIONS: dict[str, Any] = {
    "global_norm": lambda ps: distclip.clip_grad_norm_(ps, 0.1),
    "value": lambda ps: distclip.clip_grad_value_(ps, 0.05),
    "agc": lambda ps: distclip.clip_grad_agc_(ps, 0.01),
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Buffered:
    """As Megatron's DistributedDataParallel: float32 views of one buffer, filled by hooks."""

    def __init__(self, parameters: list[Any]) -> None:
        self.buffer = torch.zeros(sum(p.numel() for p in parameters))
        offset = 0
        for parameter in parameters:
            stop = offset + parameter.numel()
            parameter.main_grad = self.buffer[offset:stop].view(parameter.shape)
            parameter.register_post_accumulate_grad_hook(accumulate)
            offset = stop


def trained(*, before: bool) -> tuple[dict[str, Any], Any]:
    """bfloat16 weights of which two micro-batches have left gradients, and one without any."""
    named: dict[str, Any] = {
        "w": nn.Parameter(randn(5, 4, seed=1).bfloat16()),
        "b": nn.Parameter(randn(5, seed=2).bfloat16()),
        "idle": nn.Parameter(randn(3, seed=3).bfloat16()),
    }
    made = GradClipper(named, policies.measure()) if before else None
    Buffered(list(named.values()))
    for seed in (4, 5):
        x = randn(6, 4, seed=seed).bfloat16()
        nn.functional.linear(x, named["w"], named["b"]).square().sum().backward()
    return named, made


def truth(named: dict[str, Any], document: Any) -> Any:
    return expected(document, {name: p.main_grad for name, p in named.items()}, named)


def check(named: dict[str, Any], want: Any) -> None:
    for name, parameter in named.items():
        assert parameter.grad is None
        assert parameter.main_grad.dtype is torch.float32
        found = parameter.main_grad.double().numpy()
        np.testing.assert_allclose(found, want.gradients[name], rtol=2e-6, atol=1e-9)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("policy", POLICIES)
def test_main_gradients_are_measured_and_clipped(policy: str) -> None:
    named, _ = trained(before=False)
    want = truth(named, DOCUMENTS[policy])
    report = GradClipper(named, POLICIES[policy]).clip_()
    assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
    check(named, want)
    named, _ = trained(before=False)
    total = FUNCTIONS[policy](named.values())
    assert total is None or total.item() == pytest.approx(want.total_norm, rel=1e-6)
    check(named, want)


@pytest.mark.ranks(1, 2)
def test_a_clipper_that_was_built_before_the_buffer_finds_them() -> None:
    named, clipper = trained(before=True)
    want = truth(named, {"name": "measure"})
    assert clipper.clip_().total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
    norms = distclip.grad_norms(named)
    assert norms["w"].item() == pytest.approx(want.parameter_norms["w"], rel=1e-6)
    assert norms["idle"].item() == 0.0


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("dim", [0, 1])
def test_main_gradients_of_declared_slices(dim: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    weight, gradient = randn(6, 12, seed=1), randn(6, 12, seed=2)
    parameter: Any = nn.Parameter(weight.chunk(world, dim)[rank].bfloat16())
    parameter.main_grad = gradient.chunk(world, dim)[rank].clone()
    distclip.declare_sharded(parameter, dist.group.WORLD, dim=dim)  # type: ignore[arg-type]
    want = expected(DOCUMENTS["agc"], {"w": gradient}, {"w": weight.bfloat16()})
    report = GradClipper([("w", parameter)], POLICIES["agc"]).clip_()
    assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
    full = torch.from_numpy(want.gradients["w"]).chunk(world, dim)[rank].numpy()
    np.testing.assert_allclose(parameter.main_grad.double().numpy(), full, rtol=2e-6, atol=1e-9)


def test_a_gradient_beside_a_main_gradient_is_refused() -> None:
    named, _ = trained(before=False)
    named["w"].grad = torch.ones_like(named["w"])
    kept = {name: p.main_grad.clone() for name, p in named.items()}
    for act in (
        lambda: GradClipper(named, POLICIES["global_norm"]).clip_(),
        lambda: FUNCTIONS["value"](named),
    ):
        with pytest.raises(
            distclip.UnsupportedGradientError, match=r"in \.grad and in \.main_grad"
        ):
            act()
        assert all(torch.equal(p.main_grad, kept[name]) for name, p in named.items())
    for parameter in named.values():
        del parameter.main_grad
    assert distclip.clip_grad_norm_(named, 1e9).item() == pytest.approx(20**0.5)


def test_a_fused_step_is_not_left_to_multiply_what_it_does_not_read() -> None:
    named, _ = trained(before=False)
    want = truth(named, DOCUMENTS["global_norm"])
    optimizer = torch.optim.AdamW(named.values(), lr=0.1, fused=True)
    GradClipper(named, POLICIES["global_norm"]).attach(optimizer)
    optimizer.step()
    check(named, want)


def test_laprop_steps_from_grad_alone() -> None:
    named, _ = trained(before=False)
    before = {name: p.detach().clone() for name, p in named.items()}
    LaProp(named, lr=0.1).step()
    assert all(torch.equal(p, before[name]) for name, p in named.items())


def test_a_main_gradient_that_changes_after_a_clip_by_hand_is_clipped_by_the_step() -> None:
    parameter = nn.Parameter(torch.ones(4))
    parameter.main_grad = torch.full((4,), 5.0)  # type: ignore[attr-defined]
    clipper = GradClipper([parameter], policies.global_norm(1.0))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    clipper.attach(optimizer)
    with pytest.warns(UserWarning, match="clip_\\(\\) is called too"):
        clipper.clip_()
    parameter.main_grad.fill_(10.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert parameter.main_grad.norm().item() == pytest.approx(1.0, rel=1e-4)  # type: ignore[attr-defined]
