"""The three kinds of policies: what each may define, and clamping by a bound of one's own state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias

import pytest
import torch
from torch import nn

from distclip import ConfigurationError, GradClipper, policies
from distclip.policies import Needs, RunningMax, Scale
from distclip.testing import assert_rounded, expected
from tests.engine.test_matrix import build
from tests.helpers.ranks import everyones
from tests.sharded import shard, whole

ONE = torch.ones((), dtype=torch.float64)

# ---- what a class may define -----------------------------------------------------------------

MAKERS: dict[str, tuple[type, dict[str, Any], str]] = {
    "scaling, bound": (
        policies.ScalingPolicy,
        {"bound": 1.0},
        r"Wrong is a scaling policy and defines `bound`.*ClampingPolicy",
    ),
    "old style, bound": (
        policies.Policy,
        {"bound": property(lambda self: 1.0), "update": lambda self, *a: ((), {})},
        r"Wrong is a scaling policy and defines `bound`.*ClampingPolicy",
    ),
    "scaling, field": (
        policies.ScalingPolicy,
        {"__annotations__": {"bound": float}},
        r"defines `bound`",
    ),
    "scaling, units": (
        policies.ScalingPolicy,
        {"unit_coefficients": lambda self, g, w: g},
        r"defines `unit_coefficients`.*UnitPolicy",
    ),
    "clamping, update": (
        policies.ClampingPolicy,
        {"bound": 1.0, "update": lambda self, *a: ((), {})},
        r"Wrong is a clamping policy and defines `update`.*ScalingPolicy",
    ),
    "clamping, both": (
        policies.ClampingPolicy,
        {"bound": 1.0, "update_bound": lambda self, *a: (ONE, {})},
        r"both `bound`.*and `update_bound`",
    ),
    "clamping, memory of a number": (
        policies.ClampingPolicy,
        {"bound": 1.0, "init": lambda self, infos: {}},
        r"defines `init`, which has no effect without `update_bound`",
    ),
    "clamping, units": (
        policies.ClampingPolicy,
        {"bound": 1.0, "unit_dims": lambda self, info: ()},
        r"defines `unit_dims`.*UnitPolicy",
    ),
    **{
        f"unit, {member}": (
            policies.UnitPolicy,
            {member: lambda self, *a: None},
            rf"Wrong is a per-unit policy and defines `{member}`.*{mend}",
        )
        for member, mend in [
            ("update", "ScalingPolicy"),
            ("init", "ScalingPolicy"),
            ("bound", "ClampingPolicy"),
            ("update_bound", "ClampingPolicy"),
            ("needs", "`norm_type`"),
        ]
    },
    "inherited": (policies.AGC, {"update": lambda self, *a: ((), {})}, "defines `update`"),
}


@pytest.mark.parametrize("label", MAKERS)
def test_a_class_with_a_member_of_another_kind_is_refused(label: str) -> None:
    base, body, message = MAKERS[label]
    with pytest.raises(ConfigurationError, match=message):
        type("Wrong", (base,), {"name": "wrong", **body})


def test_a_member_from_a_mixin_is_refused_too() -> None:
    mixin = type("Mixin", (), {"update": lambda self, *a: ((), {})})
    with pytest.raises(ConfigurationError, match=r"per-unit policy and defines `update`"):
        type("Wrong", (mixin, policies.UnitPolicy), {})
    with pytest.raises(ConfigurationError, match=r"UnitPolicy and ScalingPolicy.*one kind"):
        type("Wrong", (policies.UnitPolicy, policies.ScalingPolicy), {})


class Nothing(policies.Policy):
    name = "nothing"


class Unbounded(policies.ClampingPolicy):
    name = "unbounded"


@dataclass(frozen=True)
class Bounded(policies.ClampingPolicy):
    bound: Any = 1.0
    name: ClassVar[str] = "bounded"


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Nothing, "its class defines no `update`"),
        (Unbounded, "defines neither `bound`"),
        (lambda: Bounded(-1.0), "must be a number >= 0"),
        (lambda: Bounded(math.nan), "must be a number >= 0"),
        (lambda: Bounded(torch.ones(())), "must be a number >= 0"),
        (lambda: Bounded("1"), "must be a number >= 0"),
    ],
)
def test_a_policy_that_decides_nothing_is_refused_by_the_clipper(
    factory: Callable[[], policies.Policy], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GradClipper(nn.Linear(2, 2), policies.chain(policies.measure(), factory()))


@dataclass(frozen=True)
class Limited(policies.AutoClip):
    at_most: Annotated[int, policies.Limit("even", whole=True, minimum=2)] | None = None


@dataclass(frozen=True)
class Unresolved(policies.ClampingPolicy):
    bound: Nowhere = 1.0  # type: ignore[name-defined]  # noqa: F821
    name: ClassVar[str] = "unresolved"


@dataclass(frozen=True)
class Forward(policies.ClampingPolicy):
    bound: Later  # of which there is nothing yet when the class is made
    name: ClassVar[str] = "forward"


Later: TypeAlias = Annotated[float, policies.Limit("even", minimum=2)]


def test_limits_of_fields_are_checked() -> None:
    limited = Limited(50, at_most=4.0)  # type: ignore[arg-type]
    assert (limited.at_most, limited.window) == (4, None)
    assert isinstance(limited.at_most, int)
    for arguments, message in (
        ({"at_most": 1}, "at_most must be even, got 1"),
        ({"at_most": math.inf}, "at_most must be even"),
        ({"at_most": True}, "at_most must be a number, got True"),
        ({"percentile": 101}, "percentile must be 0 to 100"),  # a field of its base
        ({"percentile": None}, "percentile must be a number, got None"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Limited(**arguments)  # type: ignore[arg-type]
    assert Unresolved().bound == 1.0
    with pytest.raises(ConfigurationError, match="bound must be even"):
        Forward(1)
    assert policies.global_norm("inf") == policies.global_norm(math.inf)  # type: ignore[arg-type]


def test_a_field_is_a_bound() -> None:
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([-2.0, 0.5, 3.0])
    GradClipper([("w", weight)], Bounded()).clip_()
    assert weight.grad.tolist() == [-1.0, 0.5, 1.0]


class Old(policies.Policy):
    """As policies were written before there were kinds."""

    name = "old"

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[2.0])

    def init(self, parameters: Any) -> Any:
        return {"steps": torch.zeros((), dtype=torch.int64)}

    def update(self, statistics: Any, state: Any) -> Any:
        return [Scale(0.5 / statistics.total_norm())], {"steps": state["steps"] + 1}


def test_a_subclass_of_policy_scales_as_before() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    clipper = GradClipper([("w", weight)], policies.chain(Old(), policies.value(0.35)))
    clipper.clip_()
    assert weight.grad.tolist() == pytest.approx([0.3, 0.35])
    assert clipper._session.states["0"]["steps"] == 1


# ---- what is returned ------------------------------------------------------------------------


@dataclass(frozen=True)
class Clamps(policies.ScalingPolicy):
    name: ClassVar[str] = "clamps"

    def update(self, statistics: Any, state: Any) -> Any:
        return [policies.Clamp(0.1), Scale(0.5 * ONE)], state


@dataclass(frozen=True)
class Undeclared(policies.ScalingPolicy):
    name: ClassVar[str] = "undeclared"

    def update(self, statistics: Any, state: Any) -> Any:
        return [Scale(statistics.gradient_norms(3.0))], state


@dataclass(frozen=True)
class Returns(policies.ScalingPolicy):
    """Returns what it is given."""

    what: Any = None
    name: ClassVar[str] = "returns"

    def update(self, statistics: Any, state: Any) -> Any:
        return self.what


class Shaped(RunningMax):
    def update_bound(self, statistics: Any, state: Any) -> Any:
        return torch.ones(7, dtype=torch.float64), state


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Clamps(), r"returned Clamp\(bound=0.1\).*policies.ClampingPolicy"),
        (Undeclared(), r"order 3.0 are not among the policy's needs.*gradients=\[3.0\]"),
        (Returns(ONE), r"update must return \(actions, state\)"),
        (Returns((Scale(ONE), {})), r"update must return \(actions, state\)"),
        (Returns(([Scale(0.5)], {})), r"Scale\(0.5\); coefficients must be a float64 tensor"),  # type: ignore[arg-type]
        (Shaped(), r"a 0-dim tensor, or one of shape \[\d+\].*got shape \[7\]"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_wrong_decision_is_an_error_before_the_first_step(
    policy: policies.Policy, message: str, late: bool
) -> None:
    values = whole()
    model = shard("fsdp2", values)
    model.set_gradients(values.gradients)
    before = [None if g is None else g.clone() for _, g in model.local_gradients()]
    if late:
        between = (policies.global_norm(0.1), policies.value(1e-3), policies.global_norm(1e-3))
        policy = policies.chain(*between, policy)
    with pytest.raises(ConfigurationError, match=message):
        GradClipper(model.named(), policy)
    for (name, gradient), want in zip(model.local_gradients(), before, strict=True):
        if gradient is not None and want is not None:
            assert torch.equal(gradient, want), name
    everyones(message)  # nobody is left behind in a collective


# ---- a bound of its own state ----------------------------------------------------------------

RUNNING = {"name": "running_max", "theta": 0.75}
CHAINS: dict[str, Any] = {
    "alone": RUNNING,
    "before": [RUNNING, {"name": "global_norm", "max_norm": 2.0}],
    "after": [{"name": "global_norm", "max_norm": 2.0}, RUNNING],
    "between": [
        {"name": "value", "clip_value": 0.8},
        {"name": "agc", "clip_factor": 0.5},
        RUNNING,
        {"name": "parameter_norm", "max_norm": 0.7},
        {"name": "value", "clip_value": 0.2},
    ],
    "twice": [RUNNING, {"name": "running_max", "theta": 0.5}],
    "by name": {"by_name": {"fc*": RUNNING}, "default": [{"name": "agc"}, RUNNING]},
}


def scripted(values: Any, step: int) -> dict[str, Any]:
    factor = 1.0 + 0.5 * (step % 3) + (5.0 if step in (4, 9) else 0.0)
    gradients = {n: None if g is None else factor * g for n, g in values.gradients.items()}
    if step == 6:
        gradients["fc.bias"] = gradients["fc.bias"].clone()
        gradients["fc.bias"][1] = math.inf
    return gradients


def follow(layout: str, chain: str, *, scale: float | None = None) -> None:
    configuration = CHAINS[chain]
    values = whole()
    model = shard(layout, values)
    clipper = GradClipper(model.named(), build(configuration), on_nonfinite="skip")
    memory: dict[str, Any] = {}
    clamped = 0.0
    for step in range(12):
        gradients = scripted(values, step)
        times = 1.0 if scale is None else scale
        model.set_gradients({n: None if g is None else g * times for n, g in gradients.items()})
        loss_scale = None if scale is None else torch.tensor(scale)
        report = clipper.clip_before_step(loss_scale)
        want = expected(
            configuration, gradients, values.weights, on_nonfinite="skip", memory=memory
        )
        where = f"{chain}, {layout}, step {step}"
        assert bool(report.skipped) == want.skipped == (step == 6), where
        if not want.skipped:
            assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6), where
            clamped += report.clipped_fraction.item()
        for name, local, part in model.beside(want.gradients):
            if part is not None and local is not None and not want.skipped:
                have = local if scale is None else local / scale
                assert_rounded(have, part, ulps=3, coefficient_error=1e-6, name=f"{where}, {name}")
        if step == 7:  # another clipper goes on from its checkpoint
            file = io.BytesIO()
            torch.save(clipper.state_dict(), file)
            clipper = GradClipper(model.named(), build(configuration), on_nonfinite="skip")
            file.seek(0)
            clipper.load_state_dict(torch.load(file, weights_only=True))
    assert clamped > 0


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("layout", ["plain", "fsdp2", "mixed"])
def test_a_running_maximum_clamps_as_the_oracle(layout: str) -> None:
    for chain in CHAINS:
        follow(layout, chain)


@pytest.mark.ranks(1, 2)
def test_a_running_maximum_under_a_loss_scale() -> None:
    for chain in CHAINS:
        follow("fsdp2", chain, scale=1024.0)


def test_norms_behind_a_running_maximum_are_measured_again() -> None:
    def passes(*parts: policies.Policy) -> int:
        return len(GradClipper(nn.Linear(3, 2), policies.chain(*parts))._session.program.passes)

    running, norm = RunningMax(), policies.global_norm(1.0)
    assert passes(norm, running) == 1
    assert passes(running, norm) == passes(norm, running, norm) == 2
    assert passes(running, policies.value(1.0)) == 1


@pytest.mark.parametrize("bound", [math.nan, -1.0, math.inf])
def test_a_bound_that_is_none_clamps_nothing(bound: float) -> None:
    class Fixed(RunningMax):
        def update_bound(self, statistics: Any, state: Any) -> Any:
            return bound * ONE, state

    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([-2.0, 0.5, 3.0])
    GradClipper([("w", weight)], Fixed()).clip_()
    assert weight.grad.tolist() == [-2.0, 0.5, 3.0]
