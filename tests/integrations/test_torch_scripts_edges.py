"""Plain torch scripts: what is left alone, named, mentioned, refused and restored."""

import logging
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import clip_grad_norm_ as bound_early
from torch.optim import SGD

import distclip
from distclip import policies
from distclip.errors import NonFiniteGradientError, UnsupportedGradientError
from distclip.integrations import charge
from tests.integrations.accelerated import (
    Halve,
    batch,
    loss_of,
    make,
    same,
    sgd,
    whole,
)
from tests.integrations.scripted import (
    by_late_name,
    by_utils,
    by_value,
    running,
)


def test_what_no_optimizer_steps_is_left_to_torch() -> None:
    with running(Halve()):
        image = torch.ones(4, requires_grad=True)
        image.grad = torch.full((4,), 3.0)
        assert nn.utils.clip_grad_norm_([image], 1.5).item() == 6.0
        torch.testing.assert_close(image.grad, torch.full((4,), 0.75))
        nn.utils.clip_grad_value_(image, 0.5)
        torch.testing.assert_close(image.grad, torch.full((4,), 0.5))
        nn.utils.clip_grads_with_norm_(image, 0.25, torch.tensor(1.0))
        torch.testing.assert_close(image.grad, torch.full((4,), 0.125))


def test_an_optimizer_of_another_integration_is_left_alone() -> None:
    model = make()
    with running(Halve()) as scripts:
        stepper = sgd(model)
        handle = distclip.GradClipper(model, policies.measure()).attach(stepper)
        loss_of(model, batch(0)).backward()
        norm = by_utils(model)
        assert norm.item() > 1e-9
        assert nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() < 1e-8
        stepper.step()
        assert scripts.last_report is None
        handle.remove()
        other = sgd(model)
        calls: list[int] = []

        def clip(parameters: list[Tensor]) -> Tensor:
            calls.append(len(parameters))
            return torch.tensor(7.0)

        charge._charges[other] = charge.Charge("framework", clip)
        assert by_utils(stepper and model).item() == 7.0
        by_value(model)
        other.step()
        assert calls == [4, 4]
        assert scripts.last_report is None


def test_an_order_of_its_own_and_a_group_norm() -> None:
    with running({"name": "group_norm", "max_norm": 1e-3}) as scripts:
        model = make()
        stepper = SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
        loss_of(model, batch(0)).backward()
        largest = max(p.grad.abs().max().item() for p in model.parameters())
        found = nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=math.inf)
        assert found.item() == pytest.approx(largest)
        stepper.step()
        norms = [p.grad.norm().item() for p in model.parameters()]
        assert norms == pytest.approx([1e-3] * 4, rel=1e-2)
        assert scripts.last_report.names == (
            "body.weight", "body.bias", "head.weight", "head.bias",
        )  # fmt: skip


def test_names() -> None:
    """Those of the outermost module; without one, those that the optimizer was given."""
    with running(policies.measure()) as scripts:
        outer = nn.ModuleDict({"left": make(), "right": make()})
        frozen = outer["left"].head.bias.requires_grad_(False)
        loss_of(outer["left"], batch(0)).backward()
        sgd(outer["left"]).step()
        assert scripts.last_report.names[0] == "left.body.weight"
        assert len(scripts.last_report.names) == 4
        assert frozen.grad is None
        loose = nn.Parameter(torch.ones(2))
        loose.grad = torch.ones(2)
        first = SGD([("mine", loose)], lr=0.1)
        first.step()
        assert scripts.last_report.names == ("mine",)
        SGD([loose], lr=0.1).step()  # the same parameters: the same clipper, and its memory
        assert scripts.last_report.names == ("mine",)
        assert first.state_dict()["param_groups"][0]["param_names"] == ["mine"]
        bare = nn.Parameter(torch.ones(2))
        bare.grad = torch.ones(2)
        SGD([bare], lr=0.1).step()
        assert scripts.last_report.names == ("group0.0",)


def test_clippers_of_models_that_are_gone_are_forgotten() -> None:
    with running(policies.measure()) as scripts:
        for _ in range(3):
            model = make()
            stepper = sgd(model)
            loss_of(model, batch(0)).backward()
            by_utils(model)
            stepper.step()
            assert len(scripts._clippers.known) == 1
            del model, stepper


def test_a_step_within_backward_is_refused() -> None:
    with running(Halve()):
        model = make()
        steppers = {p: SGD([p], lr=0.1) for p in model.parameters()}
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: steppers[p].step())
        with pytest.raises(UnsupportedGradientError, match="SGD steps during backward"):
            loss_of(model, batch(0)).backward()
        same(whole(model), whole(make()), 0.0)


def test_nonfinite() -> None:
    with running(policies.global_norm(1.0)):
        model = make()
        stepper = sgd(model)
        (loss_of(model, batch(0)) * math.nan).backward()
        with pytest.raises(NonFiniteGradientError, match=r"body\.weight"):
            by_utils(model)
        with pytest.raises(NonFiniteGradientError):
            stepper.step()
    with running({"name": "global_norm", "max_norm": 1.0}, on_nonfinite="skip"):
        stepper = sgd(model)
        assert math.isnan(by_utils(model))
        with pytest.raises(RuntimeError, match="error_if_nonfinite=True"):
            by_late_name(model)
        stepper.step()
    same(whole(model), whole(make()), 0.0)


def test_what_is_mentioned_once(caplog: pytest.LogCaptureFixture) -> None:
    with running(policies.global_norm(1.0)):
        model = make()
        stepper = sgd(model)
        for _ in range(2):
            assert by_utils(model).item() == 0.0
        stepper.step()
        text = caplog.text
        assert text.count("the configured policy is applied in its place") == 1
        assert text.count("none of the 4 parameters has a gradient") == 1
        assert text.count("SGD steps 4 parameters, and none of them has a gradient") == 1
        for number in range(25):
            model.zero_grad()
            loss_of(model, batch(number)).backward()
            by_utils(model)
        assert caplog.text.count("no torch optimizer that has these 4 parameters") == 1
        assert "with no step in between" not in caplog.text


def test_everything_is_restored(caplog: pytest.LogCaptureFixture) -> None:
    names = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_")
    before = [getattr(nn.utils, name) for name in names]
    made = torch.optim.Optimizer.__init__, FullyShardedDataParallel.clip_grad_norm_, bound_early
    caplog.set_level(logging.ERROR)
    with running(Halve()):
        model = make()
        stepper = sgd(model)
        loss_of(model, batch(0)).backward()
        stepper.step()
        assert nn.utils.clip_grad_norm_ is not before[0]
        assert charge.charge_of(stepper) is not None
    assert [getattr(nn.utils, name) for name in names] == before
    assert made == (
        torch.optim.Optimizer.__init__, FullyShardedDataParallel.clip_grad_norm_, bound_early
    )  # fmt: skip
    assert charge.charge_of(stepper) is None
    gradients = [p.grad.clone() for p in model.parameters()]
    stepper.step()
    assert all(map(torch.equal, gradients, [p.grad for p in model.parameters()]))
