"""Gradients that are what they were at the step before are measured with fewer questions."""

import contextlib
import dataclasses
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
from distclip.engine import walk
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


@contextlib.contextmanager
def counting() -> Iterator[list[int]]:
    """Counts the measurements that ask all questions."""
    counted, measure = [0], walk.measure_locally

    def counting_measure(*args: Any, **kwargs: Any) -> Any:
        counted[0] += 1
        return measure(*args, **kwargs)

    with mock.patch.object(walk, "measure_locally", counting_measure):
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
def test_it_gives_what_measuring_anew_gives(kind: str, mode: str) -> None:
    """Reports, gradients and memory, to the last bit, at every step of a run."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    for layout in LAYOUTS[world]:
        for name, policy in POLICIES.items():
            anew = compare(whole(kind), layout, policy, mode)
            assert (sum(anew) <= 7) == (name != "cube"), (layout, name, anew)


def compare(values: Whole, layout: str, policy: Policy, mode: Any) -> list[int]:
    """How often each step of a run was measured anew by a clipper that may do without."""
    models = shard(layout, values), shard(layout, values)
    clippers = [GradClipper(model.named(), policy, on_nonfinite=mode) for model in models]
    clippers[1]._session.program.__dict__["is_simple"] = False
    anew = []
    for step in range(STEPS):
        outcomes: list[object] = []
        for model, clipper in zip(models, clippers, strict=True):
            model.set_gradients(scripted(values, step))
            with counting() as counted:
                try:
                    outcomes.append(told(clipper.clip_()))
                except NonFiniteGradientError as error:
                    outcomes.append(str(error))
            anew += counted
        assert repr(outcomes[0]) == repr(outcomes[1]), step
        assert bits(clippers[0]) == bits(clippers[1]), step
        assert memory(clippers[0]) == memory(clippers[1]), step
    assert anew[1::2] == [1] * STEPS
    return anew[::2]


@pytest.mark.parametrize("name", ["norm", "largest", "clamp"])
def test_tensors_that_are_measured_in_parts(name: str) -> None:
    torch.manual_seed(0)
    shapes = ((PART + 7,), (2, PART), *[(3,)] * 200)
    given = [torch.randn(shape) for shape in shapes]
    both = [[nn.Parameter(each.clone()) for each in given] for _ in range(2)]
    clippers = [GradClipper(parameters, POLICIES[name]) for parameters in both]
    clippers[1]._session.program.__dict__["is_simple"] = False
    for step in range(4):
        outcomes = []
        for parameters, clipper in zip(both, clippers, strict=True):
            for parameter, gradient in zip(parameters, given, strict=True):
                parameter.grad = gradient * (1.0 + step)
            with counting() as anew:
                outcomes.append(repr(told(clipper.clip_())))
        assert outcomes[0] == outcomes[1]
        assert bits(clippers[0]) == bits(clippers[1])
    assert anew == [1]  # by the second


def sharded_model(values: Whole) -> tuple[Sharded, GradClipper]:
    """After steps that were alike, so that the next one is measured with fewer questions."""
    model = shard("fsdp2", values)
    clipper = GradClipper(model.named(), policies.global_norm(30.0))
    for step in range(3):
        model.set_gradients(scripted(values, step))
        with counting() as anew:
            clipper.clip_()
    assert anew == [0]
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
def test_a_rank_measures_an_unusual_gradient_anew_while_the_others_do_not(
    odd: Callable[[Any], None], error: type[DistclipError] | None
) -> None:
    """All issue the same collectives, and raise together."""
    values = whole()
    model, clipper = sharded_model(values)
    if is_odd():
        odd(model.parameters["fc.weight"])
    before = bits(clipper)
    with counting() as anew:
        if error is None:
            norm = clipper.clip_().total_norm
        else:
            with pytest.raises(error):
                clipper.clip_()
            assert bits(clipper) == before
    assert anew == [1 if is_odd() and odd is not of_nan else 0]
    if error is None:
        given = [g for g in scripted(values, 3).values() if g is not None]
        expected = math.sqrt(sum(float(g.double().square().sum()) for g in given))
        assert norm.item() == pytest.approx(expected, rel=1e-6)
    for step in (3, 4):  # the odd rank looks once more whether all is usual
        model.set_gradients(scripted(values, step))
        with counting() as anew:
            clipper.clip_()
    assert anew == [0]


@pytest.mark.ranks(2)
def test_ranks_that_no_longer_agree_hear_of_it() -> None:
    _, clipper = sharded_model(whole())
    if is_odd():
        clipper._session.step += 1
    before = bits(clipper)
    with counting() as anew, pytest.raises(RankMismatchError, match="step"):
        clipper.clip_()
    assert anew == [0]
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
        with counting() as anew:
            report = clipper.clip_()
        assert report.total_norm.item() == pytest.approx(step * math.sqrt(6), rel=1e-6)
        assert anew == [1] or step == 0


@pytest.mark.ranks(2)
def test_parameters_that_come_later_are_refused_on_all_ranks() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fully_shard(module, mesh=mesh_of((2,), ("dp",)))
    clipper = GradClipper(module, policies.global_norm(1.0))

    def step() -> list[int]:
        with counting() as anew:
            module(torch.ones(5, 3)).sum().backward()
            clipper.clip_()
        return anew

    assert [step() for _ in range(4)][-1] == [0]
    if is_odd():
        module.late = nn.Linear(2, 2)
    with pytest.raises(DistclipError, match="came" if is_odd() else "another rank"):
        step()


def test_losses_scales_and_looks_are_not_left_out() -> None:
    """What a step is asked for beside its policy is done, after steps that asked for no more."""
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


def test_a_function_finds_what_has_changed() -> None:
    parameters = [nn.Parameter(torch.ones(n)) for n in (3, 5)]
    for step in range(6):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, float(step))
        if step == 4:
            parameters[1].grad = parameters[0].grad.new_zeros(10)[::2] + step  # type: ignore[union-attr]
        with counting() as anew:
            norm = clip_grad_norm_(parameters, 1e6)
        assert norm.item() == pytest.approx(step * math.sqrt(8), rel=1e-6)
        assert anew[0] == 0 or step < 3
    parameters[0].grad = parameters[0].data
    with counting() as anew, pytest.raises(UnsupportedGradientError, match="share memory"):
        clip_grad_norm_(parameters, 1e6)
    assert anew == [1]


def test_a_gradient_that_is_new_is_looked_at_closely_though_another_like_it_was_there() -> None:
    pairs = [("first", nn.Parameter(torch.ones(4))), ("second", nn.Parameter(torch.ones(4)))]
    clipper = GradClipper(pairs, policies.global_norm(1.0))
    for _ in range(4):
        pairs[1][1].grad = torch.ones(4)
        with counting() as anew:
            clipper.clip_()
    assert anew == [0]
    first = pairs[0][1]
    first.grad, pairs[1][1].grad = torch.ones(4), None
    first.grad.resize_(2, 2)
    with pytest.raises(UnsupportedGradientError, match="'first' has the shape"):
        clipper.clip_()


def test_weights_that_came_to_lie_where_a_gradient_was_are_not_clipped() -> None:
    """Though in between a step was refused, whose look at where weights lie counts from then on."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    clipper = GradClipper([("first", first), ("second", second)], policies.global_norm(1.0))
    for parameter in (first, second):
        parameter.grad = torch.ones(3)
    for _ in range(4):
        clipper.clip_()
    usual = second.grad
    assert first.grad is not None
    first.data, second.grad = first.grad.data, torch.ones(6)[::2]
    for gradient in (second.grad, usual):
        second.grad = gradient
        with pytest.raises(UnsupportedGradientError, match="share memory"):
            clipper.clip_()


def test_what_is_not_measured_for_the_report_stays_unknown() -> None:
    """The norms that a policy of other parameters reads are of another order than the report's."""
    policy = policies.by_name({"other": policies.global_norm(1.0, 1.0)}, policies.global_norm(1.0))
    parameter = nn.Parameter(torch.ones(4))
    clipper = GradClipper([("weight", parameter)], policy, norms=False, on_nonfinite="pass")
    found = set()
    for _ in range(4):
        parameter.grad = torch.ones(4)
        found.add(repr(told(clipper.clip_())))
    assert len(found) == 1


class Halved(policies.ScalingPolicy):
    """Clips by half of the norms that it is given; may change what it was given in place."""

    name = "halved"
    needs = policies.Needs.of(gradients=[2.0])

    def __init__(self, *, in_place: bool) -> None:
        self.in_place = in_place

    def update(self, statistics: Any, state: Any) -> Any:
        halves = {p: norms * 0.5 for p, norms in statistics.gradients.items()}
        statistics = dataclasses.replace(statistics, gradients=halves)
        if self.in_place:
            statistics.total_norm().mul_(7.0)
        return policies.global_norm(1.0).update(statistics, state)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_policy_may_do_as_it_likes_with_its_statistics(in_place: bool) -> None:
    parameter = nn.Parameter(torch.ones(4))
    clipper = GradClipper([("weight", parameter)], Halved(in_place=in_place))
    for _ in range(4):
        parameter.grad = torch.full((4,), 5.0)  # of norm 10
        report = clipper.clip_()
        assert report.total_norm.item() == 10.0
        assert parameter.grad.norm().item() == pytest.approx(2.0, rel=1e-5)
