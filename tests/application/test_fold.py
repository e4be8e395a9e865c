"""The coefficient folded into a fused step: the same result, without the pass that multiplies."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, Adam, AdamW

from distclip import ClipReport, GradClipper, policies
from distclip.application import folded
from distclip.kernels.host import compiler
from distclip.testing import expected
from tests.application.folding import KINDS, Reference, clean, fused, give, model_of, same
from tests.engine.test_matrix import POLICIES, build
from tests.helpers.watching import loops, watch
from tests.sharded import shard, whole

MAX_NORM = 0.3


FOLDED = {"measure", "global", "global loose", "global p=0.5", "global p=1", "global p=3",
          "global p=12", "global p=inf", "skip norm loose", "autoclip", "zclip",
          "by name in a chain", "norm gate", "ladder", "expert aware"}  # fmt: skip
"""Policies with one coefficient for everything; the last names what this model has not."""


@pytest.mark.parametrize("name", KINDS)
def test_a_folded_step_is_a_clipped_step(name: str, told: list[float]) -> None:
    model, reference = model_of(), Reference(name)
    optimizer = fused(name, model)
    reports: list[ClipReport] = []
    GradClipper(
        model, policies.global_norm(MAX_NORM), sinks=[lambda _, report: reports.append(report)]
    ).attach(optimizer)
    for step in range(4):
        give(model, step)
        with watch() as seen, loops() as looped:
            optimizer.step()
        want = reference.step(step)
        for parameter_name, gradient in want.items():  # as it is after clipping in place
            found = model.get_parameter(parameter_name).grad
            assert found is not None
            torch.testing.assert_close(found.double(), gradient, rtol=1e-6, atol=1e-9)
        assert not any("mul_" in op and "foreach" in op for op in seen.ops)
        assert not looped["loop scale"]
        report = reports[-1]
        assert report.clipped_norm.item() == pytest.approx(MAX_NORM, rel=1e-5)
        assert told[-1] == pytest.approx(1 / report.coefficient.item(), rel=1e-6)
        assert clean(optimizer)
        assert "grad_scale" not in repr(optimizer.state_dict())
        copy.deepcopy(optimizer)
        assert clean(pickle.loads(pickle.dumps(optimizer)))
    assert len(told) == 4
    same(model, reference.model)


def test_without_folding_there_is_a_pass_and_with_it_none() -> None:
    """The counter sees the pass where there is one."""
    if not compiler.compiled_kinds():
        pytest.skip("the compiled loops, which are counted, are switched off")
    counted = {}
    for fold in (True, False):
        model = model_of()
        optimizer = fused("adamw", model)
        GradClipper(model, policies.global_norm(MAX_NORM), fold=fold).attach(optimizer)
        give(model, 0)
        with watch() as seen, loops() as looped:
            optimizer.step()
        counted[fold] = looped["loop scale"]
        assert sum("_fused_adamw_" in op for op in seen.ops) >= 1
    assert counted == {True: 0, False: 1}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled by the script"])
def test_under_a_gradient_scaler(name: str, unscaled: bool, told: list[float]) -> None:
    """With overflows; not in momentum's first step: torch leaves its buffer uninitialised then."""
    model, reference = model_of(), Reference(name)
    optimizer = fused(name, model)
    GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    bad = {3} if "momentum" in name else {0, 3}
    scales = []
    for step in range(6):
        give(model, step, scaler.get_scale())
        scaler.scale(torch.zeros(()))  # what tells it that there is a backward
        if step in bad:
            model[0].weight.grad[0, 0] = math.inf  # type: ignore[index]
        if unscaled:
            scaler.unscale_(optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert clean(optimizer)
        if step in bad:
            assert all(map(torch.equal, before, model.parameters()))
        else:
            want = reference.step(step)
            found = model[0].weight.grad
            torch.testing.assert_close(found.double(), want["0.weight"], rtol=1e-6, atol=1e-9)
    same(model, reference.model)
    assert len(told) == 6 - len(bad)
    assert scales[3] == scales[2] / 2
    assert scales[5] == 2 * scales[4]


@pytest.mark.parametrize("label", POLICIES)
def test_each_policy_does_folded_what_it_does_in_place(label: str, told: list[float]) -> None:
    made = []
    for fold in (True, False):
        model = model_of()
        optimizer = fused("adamw", model)
        reports: list[ClipReport] = []
        GradClipper(
            model,
            build(POLICIES[label]),
            fold=fold,
            sinks=[lambda _, report, seen=reports: seen.append(report)],  # type: ignore[misc]
        ).attach(optimizer)
        # autoclip and zclip want some to go by; a ladder asks for a rewind after 7 spikes
        for step in range(7 if label == "ladder" else 30):
            give(model, step, 10.0 if step > 27 else 1.0)
            optimizer.step()
        made.append((model, [r.clipped_norm.item() for r in reports]))
        told_now = len(told)
    same(made[0][0], made[1][0])
    assert made[0][1] == pytest.approx(made[1][1], rel=1e-6, nan_ok=True)
    assert (told_now > 0) == (label in FOLDED - {"measure", "global loose"})


@pytest.mark.ranks(1, 2, 3, 4)
def test_on_shards() -> None:
    """Empty shards, uneven ones, a parameter without gradient."""
    tells = folded.tell
    for layout in ("plain", "fsdp2", "hsdp", "fsdp1_orig"):
        for kind in ("float32", "bfloat16"):
            values = whole(kind)
            model = shard(layout, values)
            values = model.values or values
            want = expected(POLICIES["global"], values.gradients, values.weights)
            model.set_gradients(values.gradients)
            calls: list[float] = []

            def noted(optimizer: Any, name: str, value: Tensor, calls: list[float] = calls) -> None:
                calls.append(value.item())
                tells(optimizer, name, value)

            optimizer = AdamW(list(model.parameters.values()), lr=1e-2, eps=1.0, fused=True)
            GradClipper(model.named(), build(POLICIES["global"])).attach(optimizer)
            folded.tell = noted
            try:
                optimizer.step()
            finally:
                folded.tell = tells
            assert len(calls) == 1, layout
            for name, gradient, wanted in model.beside(want.gradients):
                assert (gradient is None) == (wanted is None) or gradient is None
                if gradient is None or gradient.numel() == 0:
                    continue
                part = torch.as_tensor(wanted)
                rounding = 1e-6 if kind == "float32" else 2.0**-8
                torch.testing.assert_close(gradient.double(), part, rtol=rounding, atol=1e-9)
                if name not in model.parameters:  # flat
                    continue
                # The step itself, by AdamW's formula, with the gradient before it is rounded.
                weight = values.weights[name].double().flatten()[model.elements[name]]
                moved = weight * (1 - 1e-4) - 1e-2 * part / (part.abs() + 1.0)
                now = model.parameters[name].detach()
                now = now.to_local() if isinstance(now, DTensor) else now
                if kind == "float32" and now.shape == part.shape:
                    torch.testing.assert_close(now.double(), moved, rtol=1e-6, atol=1e-6)


@pytest.mark.ranks(2)
def test_fused_sgd_of_dtensors_is_left_to_torch() -> None:
    """Whatever torch makes of it, it is not asked to divide as well."""
    values = whole()
    model = shard("fsdp2", values)
    model.set_gradients(values.gradients)
    for kind in (SGD, Adagrad):
        optimizer = kind(list(model.parameters.values()), lr=0.1, fused=True)
        scope = folded.Scope(list(model.parameters.values()))
        assert not scope.suits(optimizer)
    assert scope.suits(Adam(list(model.parameters.values()), fused=True))


def test_of_bf16_gradients_the_step_sees_more_than_rounded_ones(told: list[float]) -> None:
    errors = {}
    for fold in (True, False):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
        parameter.grad = torch.randn(4096).bfloat16()
        exact = parameter.grad.double()
        exact *= 1.0 / (exact.norm() + 1e-6)
        optimizer = SGD([parameter], lr=1.0, fused=True)
        GradClipper([parameter], policies.global_norm(1.0), fold=fold).attach(optimizer)
        optimizer.step()
        errors[fold] = (parameter.detach().double() + exact).abs().mean().item()
    assert len(told) == 1
    assert errors[True] <= errors[False]
