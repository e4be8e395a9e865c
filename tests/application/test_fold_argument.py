"""Folding through the ``grad_scaler`` of a step, as apex and Transformer Engine have it.

Neither is installed: a stand-in has their signature and does what their source does with it.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distclip import ClipReport, GradClipper, policies
from distclip.engine.acting import Acting


class FusedAdam(torch.optim.Optimizer):
    """As theirs: multiplies by the inverse scale, writes that back, heeds what is not finite."""

    def __init__(self, params: Any, capturable: bool = True) -> None:
        self.capturable = capturable
        if capturable:
            self._step_supports_amp_scaling = True
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            device = group["params"][0].device
            found = torch.zeros(1, device=device)
            scale = torch.ones(1, device=device)
            if self.capturable and grad_scaler is not None:
                found = grad_scaler._check_inf_per_device(self)[device]
                scale = grad_scaler._get_scale_async()
            inverse = scale.double().reciprocal().float()
            for parameter in group["params"]:
                if parameter.grad is not None and not bool(found):
                    parameter.grad.mul_(inverse.to(parameter.grad.dtype))
                    parameter.sub_(group["lr"] * parameter.grad)


FusedAdam.__module__ = "apex.optimizers.fused_adam"


def made(capturable: bool = True) -> tuple[nn.Linear, FusedAdam]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, FusedAdam(model.parameters(), capturable)


def backward(model: nn.Module, factor: float = 1.0) -> Tensor:
    model.zero_grad()
    loss: Tensor = (model(torch.arange(3.0)) * factor).square().sum()
    return loss


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors distclip has multiplied itself."""
    found: list[int] = []
    on = Acting.on

    def counted(self: Acting, gradients: Any, *args: Any) -> None:
        found.append(len(gradients))
        on(self, gradients, *args)

    monkeypatch.setattr(Acting, "on", counted)
    return found


def attached(model: nn.Module, optimizer: FusedAdam, **options: Any) -> list[ClipReport]:
    reports: list[ClipReport] = []
    clipper = GradClipper(
        model,
        policies.global_norm(0.5),
        sinks=[lambda _, report: reports.append(report)],
        **options,
    )
    clipper.attach(optimizer)
    return reports


@pytest.mark.parametrize("capturable", [True, False])
def test_the_kernel_multiplies_if_it_can(capturable: bool, scaled: list[int]) -> None:
    model, optimizer = made(capturable)
    other, its = made(capturable)
    attached(model, optimizer)
    attached(other, its, fold=False)
    for _ in range(2):
        for each in (model, other):
            backward(each).backward()
        optimizer.step()
        its.step()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-7)
    assert len(scaled) == (2 if capturable else 4)


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
@pytest.mark.parametrize("fold", [True, False])
def test_under_a_scaler_norms_are_of_unscaled_gradients(fold: bool) -> None:
    model, optimizer = made()
    reports = attached(model, optimizer, fold=fold)
    plain, its = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        backward(plain).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        its.step()
        scaler.scale(backward(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert reports[-1].total_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        for one, two in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
def test_an_overflow_is_the_scalers() -> None:
    model, optimizer = made()
    reports = attached(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.scale(backward(model, math.inf)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert len(reports) == 1
    assert all(map(torch.equal, model.parameters(), before))
    assert scaler.get_scale() == 512.0
