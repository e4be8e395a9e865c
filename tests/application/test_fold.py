"""The coefficient folded into a fused step: the same result, without the pass that multiplies."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from distclip import ClipReport, ConfigurationError, GradClipper, clipper, policies
from distclip.application import folded
from distclip.testing import expected
from tests.engine.test_matrix import POLICIES, build
from tests.helpers.watching import loops, watch
from tests.sharded import shard, whole

# eps is large: with a small one Adam does not notice a coefficient.
KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (Adam, {"lr": 0.1, "eps": 1.0, "amsgrad": True, "weight_decay": 0.1}),
    "adamw": (AdamW, {"lr": 0.1, "eps": 1.0, "weight_decay": 0.1}),
    "adamw maximize": (AdamW, {"lr": 0.1, "eps": 1.0, "maximize": True}),
    "sgd": (SGD, {"lr": 0.1}),
    "sgd momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adagrad": (Adagrad, {"lr": 0.1, "eps": 1.0}),
}
MAX_NORM = 0.3
FOLDED = {"measure", "global", "global loose", "global p=0.5", "global p=1", "global p=3",
          "global p=12", "global p=inf", "autoclip", "zclip", "by name in a chain"}  # fmt: skip
"""Policies with one coefficient for everything; the last names what this model has not."""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The divisor of each step that was folded."""
    divisors: list[float] = []
    tell = folded.tell

    def noted(optimizer: Any, name: str, value: Tensor) -> None:
        assert name == "grad_scale"
        assert value.dtype == torch.float32
        assert value.dim() == 0
        divisors.append(value.item())
        tell(optimizer, name, value)

    monkeypatch.setattr(folded, "tell", noted)
    return divisors


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))


def gradients_of(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def give(model: nn.Module, step: int, factor: float = 1.0) -> None:
    for name, gradient in gradients_of(model, step).items():
        parameter = model.get_parameter(name)
        parameter.grad = (gradient * factor).to(parameter.dtype)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    listed = list(model.parameters())
    return [{"params": listed[:1]}, {"params": listed[1:], "lr": 0.02}]


class Reference:
    """The same training in float64 with torch's plainest step, clipped by the oracle."""

    def __init__(self, name: str, max_norm: float = MAX_NORM) -> None:
        kind, options = KINDS[name]
        self.model = model_of().double()
        self.optimizer = kind(groups(self.model), foreach=False, **options)  # type: ignore[call-arg]
        self.policy = {"name": "global_norm", "max_norm": max_norm}

    def step(self, step: int) -> dict[str, Tensor]:
        gradients = {name: g.double() for name, g in gradients_of(self.model, step).items()}
        weights = {name: p.detach().numpy() for name, p in self.model.named_parameters()}
        want = expected(self.policy, {n: g.numpy() for n, g in gradients.items()}, weights)
        clipped = {name: torch.as_tensor(g) for name, g in want.gradients.items()}
        for name, gradient in clipped.items():
            self.model.get_parameter(name).grad = gradient.clone()
        self.optimizer.step()
        return clipped


def same(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q.double(), rtol=2e-6, atol=2e-7)


def clean(optimizer: Any) -> bool:
    return not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def fused(name: str, model: nn.Module) -> Any:
    kind, options = KINDS[name]
    return kind(groups(model), fused=True, **options)  # type: ignore[call-arg]


# ---- the same result -----------------------------------------------------------------------------


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
        for step in range(30):  # autoclip and zclip want some to go by
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
            gradients, weights = values.arrays()
            want = expected(POLICIES["global"], gradients, weights)
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
            for name, gradient in model.local_gradients():
                wanted = want.gradients[name]
                assert (gradient is None) == (wanted is None) or gradient is None
                if gradient is None or gradient.numel() == 0:
                    continue
                part = torch.as_tensor(wanted).flatten()[model.elements[name]]
                rounding = 1e-6 if kind == "float32" else 2.0**-8
                torch.testing.assert_close(gradient.double(), part, rtol=rounding, atol=1e-9)
                if name not in model.parameters:  # flat
                    continue
                # The step itself, by AdamW's formula, with the gradient before it is rounded.
                weight = torch.as_tensor(weights[name]).flatten()[model.elements[name]]
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


# ---- where it must not ---------------------------------------------------------------------------


class OwnStep(AdamW):
    """May look at the gradients before it calls torch's step."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class SameStep(AdamW):
    """Changes something else."""


def two_groups(model: nn.Module, first: bool, second: bool) -> Any:
    made: Any = groups(model)
    for group, flag in zip(made, (first, second), strict=True):
        group["fused"] = flag
    return AdamW(made, lr=0.1, eps=1.0, fused=True)


def with_stranger(model: nn.Module, gradient: bool) -> Any:
    stranger = nn.Parameter(torch.ones(3))
    stranger.grad = torch.ones(3) if gradient else None
    return AdamW([*model.parameters(), stranger], lr=0.1, eps=1.0, fused=True)


def without_last(model: nn.Module, gradient: bool) -> Any:
    listed = list(model.parameters())
    optimizer = AdamW(listed[:-1], lr=0.1, eps=1.0, fused=True)
    if not gradient:
        listed[-1].requires_grad_(False)
    return optimizer


MAKERS: dict[str, tuple[Callable[[nn.Module], Any], bool]] = {
    "fused": (lambda m: AdamW(m.parameters(), lr=0.1, eps=1.0, fused=True), True),
    "subclass": (lambda m: SameStep(m.parameters(), lr=0.1, eps=1.0, fused=True), True),
    "a step of its own": (lambda m: OwnStep(m.parameters(), lr=0.1, eps=1.0, fused=True), False),
    "foreach": (lambda m: AdamW(m.parameters(), lr=0.1, eps=1.0, foreach=True), False),
    "single": (lambda m: AdamW(m.parameters(), lr=0.1, eps=1.0, foreach=False), False),
    "not known": (lambda m: torch.optim.NAdam(m.parameters(), lr=0.1, eps=1.0), False),
    "mixed groups": (lambda m: two_groups(m, True, False), False),
    "both groups": (lambda m: two_groups(m, True, True), True),
    "stranger": (lambda m: with_stranger(m, True), False),
    "stranger at rest": (lambda m: with_stranger(m, False), True),
    "left out": (lambda m: without_last(m, True), False),
    "left out, frozen": (lambda m: without_last(m, False), True),
}


@pytest.mark.parametrize("name", MAKERS)
def test_it_falls_back_where_the_kernel_would_do_more_or_less(name: str, told: list[float]) -> None:
    make, folds = MAKERS[name]
    model = model_of()
    optimizer = make(model)
    gradients = gradients_of(model, 0)
    give(model, 0)
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            parameter.grad = None
            gradients.pop(parameter_name)
    arrays = {n: g.double().numpy() for n, g in gradients.items()}
    policy = {"name": "global_norm", "max_norm": MAX_NORM}
    want = expected(policy, arrays, arrays)
    GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)
    optimizer.step()
    assert len(told) == folds
    for parameter_name in gradients:
        found = model.get_parameter(parameter_name).grad
        assert found is not None
        wanted = torch.as_tensor(want.gradients[parameter_name])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-9)
    for parameter in optimizer.param_groups[0]["params"]:
        if parameter.grad is not None and id(parameter) not in set(map(id, model.parameters())):
            assert parameter.grad.tolist() == [1.0] * 3  # a stranger is left alone


@pytest.mark.parametrize("place", [-1, 0], ids=["a stranger's place", "a known one's"])
def test_parameters_that_are_exchanged_later_are_refused(told: list[float], place: int) -> None:
    """They are no parameters of the clipper's, and would be multiplied or stepped unclipped."""
    model = model_of()
    optimizer = with_stranger(model, False)
    GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)
    give(model, 0)
    optimizer.step()
    before = len(told)
    exchanged = nn.Parameter(torch.ones(2))
    exchanged.grad = torch.ones(2)
    optimizer.param_groups[0]["params"][place] = exchanged
    give(model, 1)
    with pytest.raises(ConfigurationError, match=r"came \(or was replaced\)"):
        optimizer.step()
    assert len(told) == before
    assert exchanged.tolist() == exchanged.grad.tolist() == [1.0, 1.0]


def test_what_somebody_else_has_set_since_is_left_alone() -> None:
    optimizer = fused("adamw", model_of())
    folded.tell(optimizer, "grad_scale", torch.tensor(2.0))
    optimizer.grad_scale = theirs = torch.tensor(3.0)
    folded.take_back(optimizer)
    assert optimizer.grad_scale is theirs


def test_doubles_are_clipped_in_place_with_their_own_precision(told: list[float]) -> None:
    model, reference = model_of().double(), Reference("adamw")
    optimizer = fused("adamw", model)
    GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)
    give(model, 0)
    optimizer.step()
    reference.step(0)
    assert told == []
    for p, q in zip(model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_who_looks_between_clipping_and_step_sees_clipped_gradients(
    told: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    optimizer = fused("adamw", model)
    norms = []

    def look(*_: Any) -> None:
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())

    before = optimizer.register_step_pre_hook(look)
    handle = GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)
    give(model, 0)
    optimizer.step()
    assert len(told) == 1  # a hook that comes first sees what backward left
    assert norms.pop() > 1
    before.remove()
    after = optimizer.register_step_pre_hook(look)
    give(model, 1)
    optimizer.step()
    assert len(told) == 1
    assert norms.pop() == pytest.approx(MAX_NORM, rel=1e-5)
    after.remove()

    class Looking(clipper.Watcher):
        def after(self, clipper: GradClipper, report: ClipReport) -> None:
            look()

    monkeypatch.setattr(clipper, "watchers", [Looking()])
    give(model, 2)
    optimizer.step()
    assert len(told) == 1
    assert norms.pop() == pytest.approx(MAX_NORM, rel=1e-5)
    handle.remove()


def test_a_call_by_hand_clips_at_once(told: list[float]) -> None:
    model = model_of()
    fused("adamw", model)
    give(model, 0)
    GradClipper(model, policies.global_norm(MAX_NORM)).clip_()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert norm.item() == pytest.approx(MAX_NORM, rel=1e-5)
    assert told == []


def test_it_can_be_switched_off(told: list[float]) -> None:
    model = model_of()
    optimizer = fused("adamw", model)
    GradClipper(model, policies.global_norm(MAX_NORM), fold=False).attach(optimizer)
    give(model, 0)
    optimizer.step()
    assert told == []
    with pytest.raises(ConfigurationError, match="fold must be True or False"):
        GradClipper(model, policies.global_norm(1.0), fold="yes")  # type: ignore[arg-type]


def test_a_coefficient_of_one_tells_nothing(told: list[float]) -> None:
    model, plain = model_of(), model_of()
    one, other = fused("adamw", model), fused("adamw", plain)
    GradClipper(model, policies.global_norm(1e6)).attach(one)
    for step in range(2):
        give(model, step)
        give(plain, step)
        one.step()
        other.step()
    assert told == []
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


# ---- the ends of float32 -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e18, 3e37])
@pytest.mark.parametrize("max_norm", [0.0, 1e-30, 1e-6, 1.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_tiny_coefficients(size: float, max_norm: float, scaled: bool) -> None:
    found = []
    for fold in (True, False):
        parameter = nn.Parameter(torch.zeros(3))
        parameter.grad = torch.tensor([1.0, -2.0, 0.5]) * size
        optimizer: Any = SGD([parameter], lr=1.0, fused=True)
        GradClipper([parameter], policies.global_norm(max_norm), fold=fold).attach(optimizer)
        if scaled:
            optimizer.grad_scale = theirs = torch.tensor(4.0)
        optimizer.step()
        if scaled:
            assert optimizer.grad_scale is theirs
        found.append(parameter.detach())
    # In place, float32 loses bits below 1e-38 that the quotient keeps.
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-37)


def test_the_divisor_on_a_device_stays_finite() -> None:
    """Where no number is read: as 0-dim tensors, here of the host."""

    def divisor(coefficient: float, scale: float | None = None) -> float:
        given = None if scale is None else torch.tensor(scale)
        made = folded.divisor_of(torch.tensor(coefficient, dtype=torch.float64), given)
        assert made is not None
        assert made.dtype == torch.float32
        assert made.dim() == 0
        return made.item()

    largest = torch.finfo(torch.float32).max
    assert divisor(0.25) == 4.0
    assert divisor(0.25, 1024.0) == 4096.0
    assert divisor(1.0) == 1.0
    assert divisor(0.0) == math.inf  # gradients become 0, those that are inf or NaN become NaN
    assert divisor(1e-300) == largest
    assert divisor(1e-30, 65536.0) == pytest.approx(6.5536e34)
    assert divisor(1e-36, 65536.0) == largest
    assert math.isnan(divisor(math.nan))
    for coefficient in (1e-40, 0.0, math.nan, 1e39):
        assert folded.divisor_of(coefficient, None) is None


def test_a_number_on_another_device_than_the_parameters_is_not_folded() -> None:
    """CPU offload: torch copies it to the host without waiting for it."""
    optimizer = fused("adamw", model_of())
    step = folded.FusedStep(optimizer, None, False)
    assert not step.multiply(torch.ones((), dtype=torch.float64, device="meta"))
    assert step.multiply(torch.ones((), dtype=torch.float64))
    folded.take_back(optimizer)
    assert clean(optimizer)


# ---- steps that are not made ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd momentum", "adagrad"])
def test_a_skipped_step_leaves_everything(name: str, told: list[float]) -> None:
    model, reference = model_of(), Reference(name)
    optimizer = fused(name, model)
    GradClipper(model, policies.global_norm(MAX_NORM), on_nonfinite="skip").attach(optimizer)
    for step in range(4):
        give(model, step)
        if step in (0, 2):
            model[0].weight.grad[0, 0] = math.nan  # type: ignore[index]
        optimizer.step()
        if step not in (0, 2):
            reference.step(step)
    assert len(told) == 2
    same(model, reference.model)


def test_zero_and_pass_do_folded_what_they_do_in_place() -> None:
    for mode in ("zero", "pass"):
        made = []
        for fold in (True, False):
            model = model_of()
            optimizer = fused("adamw", model)
            GradClipper(
                model,
                policies.global_norm(MAX_NORM),
                on_nonfinite=mode,  # type: ignore[arg-type]
                fold=fold,
            ).attach(optimizer)
            for step in range(2):
                give(model, step)
                if step:
                    model[0].weight.grad[0, 0] = math.nan  # type: ignore[index]
                optimizer.step()
            made.append([p.detach() for p in model.parameters()])
        for p, q in zip(*made, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7, equal_nan=True)
        assert torch.isfinite(made[0][0]).all() == (mode == "zero")


def test_a_step_that_raises_is_history_at_the_next(
    told: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference = model_of(), Reference("adamw")
    optimizer = fused("adamw", model)
    handle = GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)

    def out_of_luck(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    for _ in range(2):
        give(model, 9)
        with monkeypatch.context() as broken:
            broken.setattr(sys.modules["torch.optim.adam"], "adam", out_of_luck)
            with pytest.raises(RuntimeError, match="out of luck"):
                optimizer.step()
    give(model, 0)
    optimizer.step()
    # `_init_group` of the steps that raised has made moments of zeros, and no more.
    reference.step(0)
    same(model, reference.model)
    assert clean(optimizer)
    assert len(told) == 3
    give(model, 1)
    with monkeypatch.context() as broken:
        broken.setattr(sys.modules["torch.optim.adam"], "adam", out_of_luck)
        with pytest.raises(RuntimeError, match="out of luck"):
            optimizer.step()
    assert not clean(optimizer)
    handle.remove()
    assert clean(optimizer)


def test_a_sink_that_raises_leaves_no_divisor_for_others(told: list[float]) -> None:
    model = model_of()
    optimizer = fused("adamw", model)

    def full(step: int, report: ClipReport) -> None:
        raise OSError("disk full")

    handle = GradClipper(model, policies.global_norm(MAX_NORM), sinks=[full]).attach(optimizer)
    give(model, 0)
    with pytest.raises(OSError, match="disk full"):
        optimizer.step()
    assert len(told) == 1
    assert clean(optimizer)
    handle.remove()


@pytest.mark.parametrize("scaled", [False, True])
def test_two_clippers_on_one_optimizer_multiply_one_after_the_other(
    scaled: bool, told: list[float]
) -> None:
    model, reference = model_of(), Reference("adamw", MAX_NORM / 2)
    optimizer = fused("adamw", model)
    seen: list[float] = []
    first, second = (
        GradClipper(
            model,
            policies.global_norm(MAX_NORM * factor),
            sinks=[lambda _, report: seen.append(report.total_norm.item())],
        )
        for factor in (1.0, 0.5)
    )
    first.attach(optimizer)
    with pytest.warns(UserWarning, match="one after the other"):
        second.attach(optimizer)
    for step in range(2):
        if scaled:
            optimizer.grad_scale = theirs = torch.tensor(8.0)
        give(model, step, 8.0 if scaled else 1.0)
        optimizer.step()
        if scaled:
            assert optimizer.grad_scale is theirs
            del optimizer.grad_scale
        reference.step(step)
        assert clean(optimizer)
    assert len(told) == 4
    assert seen[1::2] == pytest.approx([MAX_NORM] * 2, rel=1e-5)
    same(model, reference.model)


def test_closures(told: list[float]) -> None:
    model, reference = model_of(), Reference("adamw")
    optimizer = fused("adamw", model)
    handle = GradClipper(model, policies.global_norm(MAX_NORM)).attach(optimizer)
    for step in range(2):
        assert optimizer.step(lambda step=step: give(model, step)) is None
        reference.step(step)
    assert len(told) == 2
    assert clean(optimizer)
    same(model, reference.model)
    handle.remove()
    give(model, 2)
    optimizer.step()
    assert len(told) == 2
