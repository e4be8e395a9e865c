"""Steps that are like the one before: what the straight way gives is what the walk gives."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate  # type: ignore[attr-defined]

from distclip import (
    ClipReport,
    DistclipError,
    GradClipper,
    NonFiniteGradientError,
    RankMismatchError,
    UnsupportedGradientError,
    clip_grad_norm_,
    policies,
)
from distclip.engine import straight
from distclip.kernels.host.blocks import PART
from distclip.policies import Policy
from tests.sharded import Sharded, Whole, mesh_of, shard, whole

STEPS = 13
LAYOUTS = {1: ["plain"], 2: ["plain", "fsdp2", "fsdp1", "tp"], 3: ["fsdp2"], 4: ["hsdp"]}
POLICIES: dict[str, Policy] = {
    "norm": policies.global_norm(30.0),
    "one": policies.global_norm(1e4, 1.0),
    "largest": policies.global_norm(1.0, math.inf),
    "cube": policies.global_norm(30.0, 3.0),
    "measure": policies.measure(),
    "each": policies.parameter_norm(10.0),
    "chain": policies.chain(policies.skip_norm(1e5), policies.zclip(), policies.autoclip(50.0)),
    "clamp": policies.value(3.0),
    "clamped": policies.chain(policies.value(5.0), policies.value(4.0), policies.global_norm(9.0)),
    "some": policies.by_name({"e*": None, "fc*": policies.global_norm(3.0)}, policies.adagc()),
}
STRAIGHT = {"norm", "one", "measure", "each", "chain", "clamp", "clamped", "some"}
"""Those that go this way in a group, too: maxima, and other orders than the loops', do not."""


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Counts the steps that are walked, also those that the straight way leaves to the walk."""
    counted, walk = [0], straight.walk

    def counting_walk(*args: Any, **kwargs: Any) -> Any:
        counted[0] += 1
        return walk(*args, **kwargs)

    with mock.patch.object(straight, "walk", counting_walk):
        yield counted


def scripted(values: Whole, step: int) -> dict[str, Tensor | None]:
    """Gradients of a step: a drift, a spike, one missing now and then, NaN and inf."""
    factor = 1e6 if step == 5 else 1.0 + 0.3 * math.sin(step)
    gradients = {n: None if g is None else g * factor for n, g in values.gradients.items()}
    if step == 7:
        gradients["one"] = None
    for bad, value in ((9, math.nan), (11, math.inf)):
        if step == bad:
            gradients["fc.bias"] = torch.full_like(values.weights["fc.bias"], value)
    return gradients


def told(report: ClipReport) -> dict[str, Any]:
    """All that a report says, to the last bit."""
    found = report.to_dict(per_parameter=True)
    return {**found, "total": report.total_norm.double().item(), "left": report.leave_out}


def bits(clipper: GradClipper) -> list[bytes | None]:
    """What is in the memory of every gradient on this rank."""
    shards = [getattr(p.grad, "_local_tensor", p.grad) for p in clipper.here.values()]
    return [
        None if each is None else each.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for each in shards
    ]


def memory(clipper: GradClipper) -> str:
    return repr(clipper.state_dict())


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize(
    ("kind", "mode"),
    [("float32", "error"), ("mixed", "skip"), ("mixed", "zero"), ("float32", "pass")],
)
def test_it_gives_what_the_walk_gives(kind: str, mode: str) -> None:
    """Reports, gradients and memory, to the last bit, at every step of a run."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    for layout in LAYOUTS[world]:
        for name, policy in POLICIES.items():
            walked = compare(whole(kind), layout, policy, mode)
            goes = name in STRAIGHT if layout != "plain" else name != "cube"
            assert (sum(walked) <= 7) == goes, (layout, name, walked)
            assert walked[9] == walked[11] == 1, (layout, name, walked)


def compare(values: Whole, layout: str, policy: Policy, mode: Any) -> list[int]:
    """How often each step of a run was walked by a clipper that may go straight."""
    models = shard(layout, values), shard(layout, values)
    clippers = [GradClipper(model.named(), policy, on_nonfinite=mode) for model in models]
    clippers[1]._session.program.__dict__["is_simple"] = False
    walked = []
    for step in range(STEPS):
        outcomes: list[object] = []
        for model, clipper in zip(models, clippers, strict=True):
            model.set_gradients(scripted(values, step))
            with counting() as counted:
                try:
                    outcomes.append(told(clipper.clip_()))
                except NonFiniteGradientError as error:
                    outcomes.append(str(error))
            walked += counted
        assert repr(outcomes[0]) == repr(outcomes[1]), step
        assert bits(clippers[0]) == bits(clippers[1]), step
        assert memory(clippers[0]) == memory(clippers[1]), step
    assert walked[1::2] == [1] * STEPS
    return walked[::2]


@pytest.mark.parametrize("name", ["norm", "largest", "clamp"])
def test_tensors_that_are_measured_in_parts(name: str) -> None:
    shapes = ((PART + 7,), (5,), (2, PART))
    given = [torch.randn(shape) for shape in shapes]
    both = [[nn.Parameter(each.clone()) for each in given] for _ in range(2)]
    clippers = [GradClipper(parameters, POLICIES[name]) for parameters in both]
    clippers[1]._session.program.__dict__["is_simple"] = False
    for step in range(4):
        outcomes = []
        for parameters, clipper in zip(both, clippers, strict=True):
            for parameter, gradient in zip(parameters, given, strict=True):
                parameter.grad = gradient * (1.0 + step)
            with counting() as walked:
                outcomes.append(repr(told(clipper.clip_())))
        assert outcomes[0] == outcomes[1]
        assert bits(clippers[0]) == bits(clippers[1])
    assert walked == [1]  # by the second


def sharded_model(values: Whole) -> tuple[Sharded, GradClipper]:
    """After steps that were alike, so that the next one goes the straight way."""
    model = shard("fsdp2", values)
    clipper = GradClipper(model.named(), policies.global_norm(30.0))
    for step in range(3):
        model.set_gradients(scripted(values, step))
        with counting() as walked:
            clipper.clip_()
    assert walked == [0]
    model.set_gradients(scripted(values, 3))
    return model, clipper


def is_odd() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def local(parameter: Any) -> Tensor:
    gradient = parameter.grad._local_tensor
    assert isinstance(gradient, Tensor)
    return gradient


def with_local(parameter: Any, part: Tensor) -> None:
    parameter.grad._local_tensor = part


def with_gaps(parameter: Any) -> None:
    part = local(parameter)
    with_local(parameter, torch.stack([part, part], -1)[..., 0])


def of_integers(parameter: Any) -> None:
    with_local(parameter, local(parameter).long())


def of_nan(parameter: Any) -> None:
    local(parameter)[-1] = math.nan


def one_to_another(parameter: Any) -> None:
    with_local(parameter, torch.zeros(1).expand_as(local(parameter)))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize(
    ("odd", "error"),
    [
        (with_gaps, None),
        (of_nan, NonFiniteGradientError),
        (of_integers, UnsupportedGradientError),
        (one_to_another, UnsupportedGradientError),
    ],
)
def test_a_rank_with_an_unusual_gradient_walks_while_the_others_go_straight(
    odd: Callable[[Any], None], error: type[DistclipError] | None
) -> None:
    """All issue the same collectives, raise together, and go straight again afterwards."""
    values = whole()
    model, clipper = sharded_model(values)
    if is_odd():
        odd(model.parameters["fc.weight"])
    before = bits(clipper)
    with counting() as walked:
        if error is None:
            norm = clipper.clip_().total_norm
        else:
            with pytest.raises(error):
                clipper.clip_()
            assert bits(clipper) == before
    assert walked == [1 if error or is_odd() else 0]
    if error is None:
        given = [g for g in scripted(values, 3).values() if g is not None]
        expected = math.sqrt(sum(float(g.double().square().sum()) for g in given))
        assert norm.item() == pytest.approx(expected, rel=1e-6)
    for step in (3, 4):  # the odd rank looks once more whether all is usual
        model.set_gradients(scripted(values, step))
        with counting() as walked:
            clipper.clip_()
    assert walked == [0]


@pytest.mark.ranks(2)
def test_ranks_that_no_longer_agree_hear_of_it_on_the_straight_way() -> None:
    _, clipper = sharded_model(whole())
    if is_odd():
        clipper._session.step += 1
    before = bits(clipper)
    with counting() as walked, pytest.raises(RankMismatchError, match="step"):
        clipper.clip_()
    assert walked == [0]
    assert bits(clipper) == before


@pytest.mark.ranks(2)
def test_ranks_move_gradients_together_though_only_one_has_any_to_move() -> None:
    """A stage under tensor parallelism of its own, whose gradient autograd leaves ``Partial``."""
    mesh = mesh_of((2, 1), ("stage", "tp"))["tp"]
    name = f"stage{dist.get_rank()}"
    weight = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Replicate()], run_check=False))
    clipper = GradClipper([nn.ParameterDict({name: weight})], policies.global_norm(1e6))
    for step in range(5):
        placement = Replicate() if is_odd() else Partial()
        given = torch.full((3,), float(step))
        weight.grad = DTensor.from_local(given, mesh, [placement], run_check=False)
        with counting() as walked:
            report = clipper.clip_()
        assert report.total_norm.item() == pytest.approx(step * math.sqrt(6), rel=1e-6)
        assert walked == [1] or step == 0


@pytest.mark.ranks(2)
def test_parameters_that_come_later_are_refused_on_all_ranks() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fully_shard(module, mesh=mesh_of((2,), ("dp",)))
    clipper = GradClipper(module, policies.global_norm(1.0))

    def step() -> list[int]:
        with counting() as walked:
            module(torch.ones(5, 3)).sum().backward()
            clipper.clip_()
        return walked

    assert [step() for _ in range(4)][-1] == [0]
    if is_odd():
        module.late = nn.Linear(2, 2)
    with pytest.raises(DistclipError, match="came" if is_odd() else "another rank"):
        step()


def test_losses_scales_and_looks_are_not_left_out() -> None:
    """What a step is asked for beside its policy is done, after steps that went straight."""
    parameter = nn.Parameter(torch.ones(4))
    pairs = [("weight", parameter)]

    def after_usual_steps(**options: Any) -> GradClipper:
        clipper = GradClipper(pairs, policies.global_norm(1.0), **options)
        for _ in range(3):
            parameter.grad = torch.ones(4)
            clipper.clip_()
        parameter.grad = torch.ones(4)
        return clipper

    for_ratios = after_usual_steps(ratios=3)
    assert for_ratios.clip_().parameter_ratios == {"weight": 1.0}
    for_exponents = after_usual_steps(exponents=3)
    assert for_exponents.clip_().exponents
    scaled = after_usual_steps()._clip("error", torch.tensor(4.0))
    assert scaled.total_norm.item() == 0.5
    for_later = after_usual_steps()
    for_later._clip("error", None, later=True)
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.ones(4))
    after_usual_steps().clip_()
    assert parameter.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_a_function_goes_straight_and_finds_what_has_changed() -> None:
    parameters = [nn.Parameter(torch.ones(n)) for n in (3, 5)]
    for step in range(6):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, float(step))
        if step == 4:
            parameters[1].grad = parameters[0].grad.new_zeros(10)[::2] + step  # type: ignore[union-attr]
        with counting() as walked:
            norm = clip_grad_norm_(parameters, 1e6)
        assert norm.item() == pytest.approx(step * math.sqrt(8), rel=1e-6)
        assert walked[0] == 0 or step < 3
    parameters[0].grad = parameters[0].data
    with counting() as walked, pytest.raises(UnsupportedGradientError, match="share memory"):
        clip_grad_norm_(parameters, 1e6)
    assert walked == [1]


def test_a_gradient_that_is_new_is_looked_at_closely_though_another_like_it_was_there() -> None:
    pairs = [("first", nn.Parameter(torch.ones(4))), ("second", nn.Parameter(torch.ones(4)))]
    clipper = GradClipper(pairs, policies.global_norm(1.0))
    for _ in range(4):
        pairs[1][1].grad = torch.ones(4)
        with counting() as walked:
            clipper.clip_()
    assert walked == [0]
    first = pairs[0][1]
    first.grad, pairs[1][1].grad = torch.ones(4), None
    first.grad.resize_(2, 2)
    with pytest.raises(UnsupportedGradientError, match="'first' has the shape"):
        clipper.clip_()
