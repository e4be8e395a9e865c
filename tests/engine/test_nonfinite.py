"""NaN and inf under each mode, and steps that are really skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import distclip
from distclip import ClipReport, GradClipper, policies
from distclip.application import stepping
from distclip.policies import Action, Needs, ParameterInfo, Policy, Scale, Skip, State, Statistics
from distclip.testing import expected
from tests.engine.test_matrix import build
from tests.helpers.watching import bits, same_bits
from tests.sharded import Sharded, Whole, shard, whole

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
BAD = ("fc.weight", "norm.gain")
"""One element of each is made non-finite: on one rank's shard only."""


def poisoned(bad: float, seed: int = 0) -> Whole:
    values = whole(seed=seed)
    for name in BAD:
        gradient = values.gradients[name]
        assert gradient is not None
        gradient.view(-1)[-1] = bad
    return values


def all_bits(model: Sharded) -> list[Tensor | None]:
    return [bits(gradient) for _, gradient in model.local_gradients()]


def agree(text: str) -> None:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, text)
    assert set(everybody) == {text}


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
            want = expected(configuration, *values.arrays(), on_nonfinite="zero")
            report = GradClipper(model.named(), build(configuration), on_nonfinite="zero").clip_()
            assert sorted(report.nonfinite) == sorted(BAD), label
            assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6), label
            assert report.clipped_norm.item() == pytest.approx(want.clipped_norm, rel=1e-6)
            for name, gradient in model.local_gradients():
                whole_gradient = want.gradients[name]
                if whole_gradient is None:
                    assert gradient is None
                    continue
                assert gradient is not None
                part = whole_gradient.reshape(-1)[model.elements[name].numpy()]
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


class CountingScale(Policy):
    """Halves every gradient and keeps a sum of norms: a policy with a memory."""

    name = "counting"

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[2.0])

    def init(self, parameters: list[ParameterInfo]) -> State:  # type: ignore[override]
        return {"sum": torch.zeros((), dtype=torch.float64), "steps": torch.zeros(())}

    def update(self, statistics: Statistics, state: State) -> tuple[list[Action], State]:
        norms = statistics.gradient_norms(2.0)
        new = {"sum": state["sum"] + statistics.total_norm(), "steps": state["steps"] + 1}
        return [Scale(torch.full_like(norms, 0.5))], new

    def __repr__(self) -> str:
        return "CountingScale()"


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


# ---- attach: what a skipped step leaves alone ----


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def fused_sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True)


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


def fused_adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True)


def foreach_adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, foreach=True)


OPTIMIZERS = [sgd, fused_sgd, adamw, fused_adamw, foreach_adamw]


def small() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def backward(model: nn.Module, factor: float = 1.0) -> Tensor:
    model.zero_grad()
    loss: Tensor = (model(torch.arange(3.0)) * factor).square().sum()
    loss.backward()
    return loss


def everything(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Parameters and optimizer state: momentum, moments, step counters."""
    state = [value for per in optimizer.state.values() for value in per.values()]
    tensors = [value for value in state if isinstance(value, Tensor)]
    return [value.detach().clone() for value in (*model.parameters(), *tensors)]


def unchanged(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_a_skipped_step_changes_nothing(make: Callable[..., Optimizer], first: bool) -> None:
    model = small()
    optimizer = make(model.parameters())
    GradClipper(model, policies.global_norm(1.0), on_nonfinite="skip").attach(optimizer)
    if not first:
        backward(model)
        optimizer.step()
    before = everything(model, optimizer)
    backward(model, math.nan)
    gradients = [bits(p.grad) for p in model.parameters()]
    optimizer.step()
    assert unchanged(everything(model, optimizer), before)
    assert all(map(same_bits, gradients, (bits(p.grad) for p in model.parameters())))
    backward(model)
    optimizer.step()
    assert not unchanged(everything(model, optimizer), before)


class Decided(Policy):
    """Skips the steps whose numbers it is given."""

    name = "decided"

    def __init__(self, *steps: int) -> None:
        self.steps = torch.tensor(steps)

    def __repr__(self) -> str:
        return f"Decided({self.steps.tolist()})"

    def init(self, parameters: Any) -> State:
        return {"step": torch.zeros(())}

    def update(self, statistics: Statistics, state: State) -> tuple[list[Action], State]:
        flag = (self.steps == state["step"]).any()
        return [Skip(flag)], {"step": state["step"] + 1}


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_policy_that_skips_is_as_if_the_step_had_not_been(
    make: Callable[..., Optimizer],
) -> None:
    skipping, without = small(), small()
    one, other = make(skipping.parameters()), make(without.parameters())
    GradClipper(skipping, Decided(0, 2)).attach(one)
    for step in range(4):
        backward(skipping, 1.0 + step)
        one.step()
        if step not in (0, 2):
            backward(without, 1.0 + step)
            other.step()
    assert unchanged(everything(skipping, one), everything(without, other))


@pytest.mark.parametrize("made", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_fused_kernel_is_told_by_found_inf(
    made: type[Optimizer], scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator no flag is read: the kernel gets it. Here the CPU's kernel does."""
    monkeypatch.setattr(stepping, "reads_on_host", lambda flag: False)
    model = small()
    optimizer = made(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)  # type: ignore[call-arg]
    skip = torch.tensor(False)

    class Decision:
        leave_out = skip

    told: list[bool | Tensor] = []
    stepping.StepHandle(optimizer, lambda scale, found, coming: Decision, told.append)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)

    def step() -> None:
        model.zero_grad()
        scaler.scale(model(torch.arange(3.0)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert not hasattr(optimizer, "found_inf")

    step()
    before = everything(model, optimizer)
    skip.fill_(True)
    step()
    assert unchanged(everything(model, optimizer), before)
    assert all(p.grad is not None for p in model.parameters())
    skip.fill_(False)
    step()
    assert not unchanged(everything(model, optimizer), before)
    assert len(told) == 3
    assert all(isinstance(flag, Tensor) for flag in told)


def test_found_inf_is_not_left_to_kernels_that_do_not_heed_it() -> None:
    parameters = list(small().parameters())
    assert stepping.skips_by_found_inf(fused_adamw(parameters))
    for make in (sgd, fused_sgd, adamw, foreach_adamw):
        assert not stepping.skips_by_found_inf(make(parameters))


def test_after_remove_the_optimizer_steps_as_before() -> None:
    model = small()
    optimizer = sgd(model.parameters())
    reports: list[ClipReport] = []
    clipper = GradClipper(
        model, policies.global_norm(1e-3), sinks=[lambda _, report: reports.append(report)]
    )
    handle = clipper.attach(optimizer)
    backward(model)
    optimizer.step()
    handle.remove()
    handle.remove()
    backward(model)
    gradients = [bits(p.grad) for p in model.parameters()]
    optimizer.step()
    assert len(reports) == 1
    assert all(map(same_bits, gradients, (bits(p.grad) for p in model.parameters())))


class Raising(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("out of luck")


def test_remove_gives_back_the_gradients_of_a_step_that_raised() -> None:
    model = small()
    optimizer = Raising(model.parameters(), lr=0.1)
    clipper = GradClipper(model, policies.global_norm(1.0), on_nonfinite="skip")
    handle = clipper.attach(optimizer)
    backward(model, math.inf)
    gradients = [p.grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step()
    handle.remove()
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_after_a_step_that_raised_new_gradients_are_not_replaced_by_old_ones() -> None:
    model = small()
    optimizer = Raising(model.parameters(), lr=0.1)
    reports: list[ClipReport] = []
    GradClipper(
        model,
        policies.measure(),
        on_nonfinite="skip",
        sinks=[lambda _, report: reports.append(report)],
    ).attach(optimizer)
    for factor in (math.inf, 1.0):
        backward(model, factor)
        with pytest.raises(RuntimeError, match="out of luck"):
            optimizer.step()
    assert [bool(report.skipped) for report in reports] == [True, False]


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_with_a_closure_its_gradients_are_clipped(how: str) -> None:
    one, other = small(), small()
    clipped, by_hand = sgd(one.parameters()), sgd(other.parameters())
    GradClipper(one, policies.global_norm(1e-2)).attach(clipped)
    for _ in range(2):
        closure = lambda: backward(one)  # noqa: E731
        loss = clipped.step(closure) if how == "positional" else clipped.step(closure=closure)
        want = backward(other)
        distclip.clip_grad_norm_(other.parameters(), 1e-2)
        by_hand.step()
        torch.testing.assert_close(loss, want)
    assert unchanged(everything(one, clipped), everything(other, by_hand))


def test_a_closure_that_gives_nan_skips_the_step() -> None:
    model = small()
    optimizer = adamw(model.parameters())
    GradClipper(model, policies.measure(), on_nonfinite="skip").attach(optimizer)
    optimizer.step(lambda: backward(model).item())
    before = everything(model, optimizer)
    optimizer.step(lambda: backward(model, math.nan).item())
    assert unchanged(everything(model, optimizer), before)
    assert all(p.grad is not None for p in model.parameters())


def test_every_evaluation_of_lbfgs_is_clipped() -> None:
    model = small()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    norms: list[float] = []
    GradClipper(
        model, policies.global_norm(0.5), sinks=[lambda _, r: norms.append(r.clipped_norm.item())]
    ).attach(optimizer)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return backward(model)

    optimizer.step(closure)
    assert len(norms) == evaluations > 1
    assert max(norms) <= 0.5 + 1e-6


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
