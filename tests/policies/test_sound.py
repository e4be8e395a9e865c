"""Policies of a third party that lack a member, or have one of another form than is asked for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from distclip import ConfigurationError, GradClipper, from_config, policies
from distclip.policies import Needs, Policy, Scale, Skip

ONE = torch.ones((), dtype=torch.float64)
MISSING: Any = object()
NAME = r"`name` is {}; give the class one: name: ClassVar\[str\]"
STATE = {"init": lambda self, parameters: {"a": ONE}}


def scaling(**body: Any) -> type[Policy]:
    whole = {
        "name": "mine",
        "needs": property(lambda self: Needs.of(gradients=[2.0])),
        "update": lambda self, statistics, state: ([Scale(ONE)], state),
    }
    return made(policies.ScalingPolicy, whole | body)


def unit(**body: Any) -> type[Policy]:
    whole = {
        "name": "mine",
        "unit_dims": lambda self, parameter: (0,) if parameter.shape else (),
        "unit_coefficients": lambda self, gradients, weights: torch.ones_like(gradients),
    }
    return made(policies.UnitPolicy, whole | body)


def clamping(**body: Any) -> type[Policy]:
    return made(policies.ClampingPolicy, {"name": "mine"} | body)


def made(base: type, body: dict[str, Any]) -> type[Policy]:
    kept = {key: value for key, value in body.items() if value is not MISSING}
    return dataclass(frozen=True)(type("Mine", (base,), kept))


def returning(*actions: Any) -> dict[str, Any]:
    return {"update": lambda self, statistics, state: ([*actions], state)}


def to(new: Any) -> dict[str, Any]:
    """A policy that takes its state to another."""
    return STATE | {"update": lambda self, statistics, state: ([], new)}


def needing(needs: Any) -> type[Policy]:
    return scaling(needs=property(needs))


UPDATE = r"it has to be a method \(statistics, state\) that returns \(actions, state\)"
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "no name": (lambda: scaling(name=MISSING)(), NAME.format("missing")),
    "no name, no dataclass": (
        lambda: type("Mine", (policies.ScalingPolicy,), returning())(),
        NAME.format("missing"),
    ),
    "name of a number": (lambda: scaling(name=3)(), NAME.format("3")),
    "name by a method": (lambda: scaling(name=lambda self: "mine")(), NAME.format("<bound.*>")),
    "name as a field": (
        lambda: scaling(__annotations__={"name": str, "size": float}, size=1.0)(2.0),  # type: ignore[call-arg]
        NAME.format("2.0") + r".*without ClassVar it is an argument",
    ),
    "needs as a method": (lambda: scaling(needs=lambda self: Needs())(), "`needs` is.*a property"),
    "needs as a list": (lambda: needing(lambda self: [2.0])(), r"`needs` is \[2.0\]"),
    "needs forgotten": (lambda: needing(lambda self: None)(), "`needs` is None"),
    "needs of one order": (
        lambda: needing(lambda self: Needs.of(gradients=2.0))(),  # type: ignore[arg-type]
        "`needs` raised TypeError: .*float.*Needs.of",
    ),
    "needs, no order": (lambda: needing(lambda self: Needs(2.0))(), "`needs` is Needs"),  # type: ignore[arg-type]
    "needs, order 0": (lambda: needing(lambda self: Needs.of(weights=[0]))(), "orders > 0"),
    "needs, order NaN": (lambda: needing(lambda self: Needs.of(gradients=[math.nan]))(), "> 0"),
    "update is none": (lambda: scaling(update=None)(), "`update` raised TypeError.*" + UPDATE),
    "update of one argument": (lambda: scaling(update=lambda self, s: ((), {}))(), UPDATE),
    "update without init": (
        lambda: scaling(update=lambda self, statistics, state: ([Scale(state["mean"])], state))(),
        "`update` raised KeyError: 'mean', before the first step",
    ),
    "init forgets": (lambda: scaling(init=lambda self, p: None)(), "`init` returned None"),
    "init of numbers": (lambda: scaling(init=lambda self, p: {"a": 1.0})(), "a dict of tensors"),
    "init is no method": (lambda: scaling(init={"a": ONE})(), "`init` raised TypeError"),
    "state forgotten": (lambda: scaling(**to(None))(), "the state None, and was given {'a'"),
    "state, other keys": (lambda: scaling(**to({"b": ONE}))(), "`update` returned the state {'b'"),
    "state, a number": (lambda: scaling(**to({"a": 1.0}))(), "the keys, shapes and dtypes"),
    "state, other shape": (lambda: scaling(**to({"a": torch.ones(2)}))(), "keys, shapes"),
    "state, other dtype": (lambda: scaling(**to({"a": ONE.float()}))(), "keys, shapes and dtypes"),
    "per_parameter is a text": (lambda: scaling(per_parameter="a")(), "`per_parameter` is 'a'"),
    "per_parameter of no key": (
        lambda: scaling(per_parameter=frozenset({"b"}), **STATE)(),
        "`init` returned.*per_parameter",
    ),
    "per_parameter of another shape": (
        lambda: scaling(per_parameter=frozenset({"a"}), **STATE)(),
        "one entry per parameter",
    ),
    "memory_fields is a text": (lambda: scaling(memory_fields="a")(), "`memory_fields` is 'a'"),
    "memory_fields of no field": (
        lambda: scaling(memory_fields=frozenset({"decay"}))(),
        "a set of fields of the class",
    ),
    "counts_nonfinite is a text": (lambda: scaling(counts_nonfinite="no")(), "True or False"),
    "coefficients for others": (lambda: scaling(**returning(Scale(torch.ones(7))))(), UPDATE),
    "coefficients in a row": (lambda: scaling(**returning(Scale(torch.ones(1, 2))))(), UPDATE),
    "threshold of each": (lambda: scaling(**returning(Scale(ONE, torch.ones(2))))(), "0-dim"),
    "flag is a bool": (lambda: scaling(**returning(Skip(True)))(), r"Skip\(flag=True\)"),  # type: ignore[arg-type]
    "flag of each": (lambda: scaling(**returning(Skip(torch.ones(2) > 0)))(), "0-dim bool tensor"),
    "flag is a number": (lambda: scaling(**returning(Skip(ONE)))(), "0-dim bool tensor"),
    "dims are a number": (
        lambda: unit(unit_dims=lambda self, p: 0)(),
        r"`unit_dims` returned 0 for 'weight' of shape \[2, 3\]; .*a tuple",
    ),
    "dims are forgotten": (lambda: unit(unit_dims=lambda self, p: None)(), "returned None"),
    "dims that are not there": (
        lambda: unit(unit_dims=lambda self, p: (0,))(),
        r"`unit_dims` returned \(0,\) for 'scale' of shape \[\]",
    ),
    "dims from behind": (lambda: unit(unit_dims=lambda self, p: (-1,))(), "all >= 0"),
    "dims twice": (lambda: unit(unit_dims=lambda self, p: (0, 0))(), "different dims"),
    "dims are floats": (lambda: unit(unit_dims=lambda self, p: (0.0,))(), "a tuple"),
    "dims are no method": (lambda: unit(unit_dims=(0,))(), "`unit_dims` raised TypeError"),
    "units forgotten": (lambda: unit(unit_coefficients=lambda self, g, w: None)(), "returned None"),
    "units, other shape": (
        lambda: unit(unit_coefficients=lambda self, g, w: g[1:])(),
        "their shape",
    ),
    "norm_type as a method": (lambda: unit(norm_type=lambda self: 2.0)(), "`norm_type` is <bound"),
    "norm_type is 0": (lambda: unit(norm_type=0)(), "`norm_type` is 0; .*> 0"),
    "norm_type is a text": (lambda: unit(norm_type="inf")(), "math.inf"),
    "threshold is a text": (
        lambda: unit(threshold="1")(),
        "`threshold` is '1'; .*a number or None",
    ),
    "bound as a method": (lambda: clamping(bound=lambda self: 1.0)(), "`bound` must be a number"),
    "bound misspelled": (lambda: clamping(bounds=1.0)(), "defines neither `bound`"),
    "bound without a state": (
        lambda: clamping(update_bound=lambda self, statistics, state: ONE)(),
        r"`update_bound` raised TypeError.*returns \(bound, state\)",
    ),
    "a class": (lambda: scaling(), r"must be a policy .*make one of the class: Mine\(\.\.\.\)"),
}


def model() -> nn.Module:
    module = nn.Linear(3, 2)
    module.scale = nn.Parameter(torch.ones(()))
    return module


@pytest.mark.parametrize("label", CASES)
def test_what_a_policy_lacks_is_named_before_the_first_step(label: str) -> None:
    make, message = CASES[label]
    with pytest.raises(ConfigurationError, match=message):
        GradClipper(model(), make())
    with pytest.raises(ConfigurationError, match=message):  # within others too
        GradClipper(model(), policies.by_name({"*": policies.chain(make())}))


@pytest.mark.parametrize("made_of", [policies.by_name, policies.by_part])
@pytest.mark.parametrize("given", ["*.bias", policies.measure(), policies.AGC, {3: None}, None])
def test_policies_side_by_side_are_a_mapping(made_of: Any, given: Any) -> None:
    message = r"expected a mapping of texts .*bias': None|a part of a model is a text"
    with pytest.raises(ConfigurationError, match=message):
        made_of(given)


@pytest.mark.parametrize(
    ("given", "mend"),
    [
        (policies.AGC, r"write policies.agc\(\.\.\.\)"),
        (policies.measure(), r"a policy itself goes to GradClipper\(model, policy\)"),
        (nn.Linear(2, 2), r"the model comes first .*from_config\(configuration, model\)"),
    ],
)
def test_what_is_no_configuration_is_named(given: Any, mend: str) -> None:
    with pytest.raises(ConfigurationError, match=mend):
        from_config(given, nn.Linear(2, 2))


@pytest.mark.parametrize("member", ["needs", "per_parameter"])
def test_a_ladder_looks_at_its_spikes(member: str) -> None:
    with pytest.raises(ConfigurationError, match=f"Mine: `{member}` is None"):
        policies.ladder(scaling(**{member: None})())


@pytest.mark.parametrize("registering", [scaling(name=MISSING), scaling(name="")])
def test_a_class_without_a_name_is_not_registered(registering: type[Policy]) -> None:
    with pytest.raises(ConfigurationError, match=r"Mine: `name` is .*ClassVar"):
        policies.register(registering)


def test_what_a_policy_may_leave_out() -> None:
    for policy in (scaling(needs=Needs())(), clamping(bound=1.0)(), unit(threshold=1)()):
        module = nn.Linear(3, 2)
        module(torch.ones(1, 3)).sum().backward()
        report = GradClipper(module, policy).clip_()
        assert not report.skipped, policy


class Plain(policies.ScalingPolicy):
    """No dataclass."""

    name = "plain"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def update(self, statistics: Any, state: Any) -> Any:
        return [Scale(self.factor * ONE)], state


@pytest.mark.ranks(1, 2)
def test_ranks_agree_on_a_policy_that_is_no_dataclass() -> None:
    assert repr(Plain(0.5)) == "Plain(factor=0.5)"
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    GradClipper([("w", weight)], Plain(0.5)).clip_()
    assert weight.grad.tolist() == [0.5, 0.5]
