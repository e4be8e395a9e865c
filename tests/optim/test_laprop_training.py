"""LaProp in a training loop: groups, schedulers, scalers, skips, Accelerate."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import GradClipper, policies
from distclip.optim import LaProp, dreamer_v3
from tests.optim.chain import Chain
from tests.optim.laprop import follows, give, gradients, make, same, train


def test_groups_have_their_own_options() -> None:
    model = make()
    names = list(model)
    chains = []
    options: list[dict[str, Any]] = [
        {"lr": 1e-2, "agc": 0.01, "warmup": 2},
        {"lr": 3e-2, "agc": 0.0, "betas": (0.5, 0.9), "weight_decay": 0.1},
    ]
    halves = [names[:3], names[3:]]
    optimizer = LaProp(
        [
            {"params": [(n, model[n]) for n in half], **option}
            for half, option in zip(halves, options, strict=True)
        ],
        eps=1e-20,
        decay_mask=["*.weight"],
    )
    for half, option in zip(halves, options, strict=True):
        option = dict(option)
        b1, b2 = option.pop("betas", (0.9, 0.999))
        part = {n: model[n] for n in half}
        chains.append(Chain(part, b1=b1, b2=b2, **option))
    for step in range(4):
        values = gradients(step)
        give(model, values)
        optimizer.step()
        for half, chain in zip(halves, chains, strict=True):
            chain.step({n: values[n] for n in half})
    for half, chain in zip(halves, chains, strict=True):
        follows({n: model[n] for n in half}, chain)
    assert optimizer.report is not None
    assert optimizer.report.parameter_coefficients["group0.fc.weight"] < 1
    assert optimizer.report.parameter_coefficients["group1.big.weight"] == 1


def test_a_group_that_is_added_is_clipped_and_warms_up_by_itself() -> None:
    model = make()
    names = list(model)
    optimizer = dreamer_v3([model[n] for n in names[:2]], lr=1e-2, warmup=2)
    train(model, optimizer, range(3))
    optimizer.add_param_group({"params": [model[n] for n in names[2:]], "lr": 2e-2})
    assert optimizer.learning_rates() == [1e-2, 0.0]
    added = {n: model[n] for n in names[2:]}
    chain = Chain(added, lr=2e-2, warmup=2)
    for step in range(3, 6):
        values = gradients(step)
        give(model, values)
        optimizer.step()
        chain.step({n: values[n] for n in added})
    follows(added, chain)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model[names[0]]]})


def test_changed_options_take_effect() -> None:
    model = make()
    optimizer = LaProp(model.items(), lr=1e-2)
    train(model, optimizer, range(1))
    assert optimizer.report is None
    optimizer.param_groups[0].update(agc=0.01, weight_decay=0.1)
    chain = Chain(model, lr=1e-2, agc=0.01, weight_decay=0.1, eps=1e-15)
    chain.t = dict.fromkeys(chain.t, 1)
    for name, parameter in model.items():
        chain.m[name] = optimizer.state[parameter]["exp_avg"].double().numpy()
        chain.v[name] = optimizer.state[parameter]["exp_avg_sq"].double().numpy()
    train(model, optimizer, range(1, 2))
    chain.step(gradients(1))
    follows(model, chain)


def test_closure_scheduler_and_scaler() -> None:
    torch.manual_seed(0)
    fc = nn.Linear(4, 2)
    twin = copy.deepcopy(fc)
    x = torch.randn(8, 4)
    optimizer = dreamer_v3(fc, lr=0.1, warmup=0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = fc(x).square().mean()
        loss.backward()
        return loss

    losses = []
    for number in range(3):
        assert optimizer.learning_rates() == [pytest.approx(0.1 * 0.5**number)]
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[2] < losses[0]

    other = dreamer_v3(twin, lr=0.1, warmup=0)
    scheduler = torch.optim.lr_scheduler.StepLR(other, 1, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        other.zero_grad()
        scaler.scale(twin(x).square().mean()).backward()
        scaler.step(other)
        scaler.update()
        scheduler.step()
    torch.testing.assert_close(twin.weight, fc.weight, rtol=1e-6, atol=1e-7)
    # An overflow is the scaler's to drop, and no error.
    before = twin.weight.detach().clone()
    scaler.scale(twin(x).square().mean()).backward()
    twin.bias.grad[0] = torch.inf
    scaler.step(other)
    assert torch.equal(twin.weight, before)


def test_nonfinite_gradients() -> None:
    for mode in ("error", "skip", "zero"):
        for agc in (0.3, 0.0):
            model = make()
            optimizer = dreamer_v3(model.items(), lr=1e-2, warmup=0, agc=agc, on_nonfinite=mode)
            before = {n: p.detach().clone() for n, p in model.items()}
            give(model, gradients(0))
            model["fc.bias"].grad[0] = torch.nan
            if mode == "error":
                with pytest.raises(distclip.NonFiniteGradientError, match=r"'fc\.bias'"):
                    optimizer.step()
            else:
                optimizer.step()
            if mode == "zero":
                assert torch.equal(model["fc.bias"], before["fc.bias"])
                assert not torch.equal(model["fc.weight"], before["fc.weight"])
            else:
                assert same(model, before)
                assert not optimizer.state


def test_a_skip_of_an_attached_clipper_leaves_counters_alone() -> None:
    model = make()
    optimizer = LaProp(model.items(), lr=1e-2, warmup=5)
    train(model, optimizer, range(2))
    GradClipper(model.items(), policies.measure(), on_nonfinite="skip").attach(optimizer)
    give(model, gradients(2))
    model["fc.bias"].grad[0] = torch.nan
    before = {n: p.detach().clone() for n, p in model.items()}
    optimizer.step()
    assert same(model, before)
    assert optimizer.param_groups[0]["updates"] == 2
    assert optimizer.state[model["fc.bias"]]["step"] == 2


def test_under_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        prepared, optimizer = accelerator.prepare(model, dreamer_v3(model, lr=0.1, warmup=0))
        other = dreamer_v3(twin, lr=0.1, warmup=0)
        for _ in range(3):
            accelerator.backward(prepared(torch.ones(4, 3)).square().sum())
            optimizer.step()
            optimizer.zero_grad()
            twin(torch.ones(4, 3)).square().sum().backward()
            other.step()
            other.zero_grad()
        assert torch.equal(model.weight, twin.weight)
    finally:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
