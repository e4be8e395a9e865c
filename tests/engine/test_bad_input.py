"""What cannot be done right is refused: by name, on all ranks, before a gradient changes."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD

import distclip
from distclip import (
    ConfigurationError,
    DistclipError,
    GradClipper,
    ProcessGroupError,
    RankMismatchError,
    UnsupportedGradientError,
    policies,
)
from tests.engine.bad_input import plain, refused, sharded
from tests.helpers.ranks import everyones
from tests.sharded import mesh_of

SECONDS = 20
"""A hang is a failure, and not a long wait."""


@pytest.mark.parametrize("bad", [-1.0, math.nan, -math.inf, "1.0", None, True])
def test_a_threshold_that_cannot_be_meant(bad: Any) -> None:
    for make in (
        policies.global_norm,
        policies.parameter_norm,
        policies.group_norm,
        policies.value,
        policies.block_rms,
        policies.agc,
        policies.dreamer_agc,
    ):
        shown = "NaN" if bad != bad else repr(bad)
        refused(lambda make=make: make(bad), ConfigurationError, make.name, shown)
    p = plain(3)
    for call in (
        lambda: distclip.clip_grad_norm_([p], bad),
        lambda: distclip.clip_grad_value_([p], bad),
        lambda: distclip.clip_grad_agc_([p], bad),
    ):
        refused(call, ConfigurationError)
    assert p.grad is not None
    assert p.grad.tolist() == [9.0] * 3


@pytest.mark.parametrize("bad", [0, -2.0, math.nan, "2", None])
def test_a_norm_order_that_is_none(bad: Any) -> None:
    for make in (policies.global_norm, policies.parameter_norm, policies.group_norm):
        refused(lambda make=make: make(1.0, norm_type=bad), ConfigurationError, "norm_type")
    refused(lambda: policies.measure(bad), ConfigurationError, "norm_type")
    p = plain(3)
    refused(lambda: distclip.clip_grad_norm_([p], 1.0, bad), ConfigurationError, "norm_type")
    refused(lambda: distclip.get_total_norm([p], bad), ConfigurationError, "norm_type")
    refused(lambda: distclip.grad_norms([("p", p)], bad), ConfigurationError, "norm_type")


@pytest.mark.parametrize("bad", [0.0, -1e-3, math.nan, math.inf])
def test_a_floor_that_is_none(bad: float) -> None:
    refused(lambda: policies.agc(0.1, eps=bad), ConfigurationError, "eps")
    refused(lambda: policies.dreamer_agc(0.1, pmin=bad), ConfigurationError, "pmin")
    refused(lambda: distclip.clip_grad_agc_([plain(3)], 0.1, eps=bad), ConfigurationError, "eps")
    for make in (policies.agc, policies.dreamer_agc, policies.block_rms):
        refused(lambda make=make: make(bad), ConfigurationError, make.name)


def test_units_that_there_are_not() -> None:
    refused(lambda: policies.agc(unit="column"), ConfigurationError, "'column'")  # type: ignore[arg-type]
    refused(lambda: policies.agc(unit_dims={"w": "01"}), ConfigurationError, "unit_dims['w']")
    refused(lambda: policies.agc(unit_dims={"w": [0.5]}), ConfigurationError, "unit_dims['w']")  # type: ignore[list-item]
    policy = policies.agc(unit_dims={"w": (0, 2)})
    refused(lambda: GradClipper([("w", plain(3, 2))], policy), ConfigurationError, "'w'", "[3, 2]")


def test_compositions_of_something_else() -> None:
    refused(policies.chain, ConfigurationError, "at least one")
    refused(lambda: policies.chain(policies.value(1.0), None), ConfigurationError, "chain")  # type: ignore[arg-type]
    refused(lambda: policies.by_name({"*": 1.0}), ConfigurationError, "by_name['*']")  # type: ignore[dict-item]
    refused(
        lambda: policies.by_name({}, default="agc"),  # type: ignore[arg-type]
        ConfigurationError,
        "default",
        "'agc'",
    )


@pytest.mark.ranks(1, 2, timeout=SECONDS)
def test_arguments_of_the_clipper() -> None:
    model = nn.Linear(2, 2)
    refused(lambda: GradClipper(model, 1.0), ConfigurationError, "policies.global_norm", "1.0")  # type: ignore[arg-type]
    refused(lambda: GradClipper(model, policies.GlobalNorm), ConfigurationError)  # type: ignore[arg-type]
    measure: Any = policies.measure()
    refused(lambda: GradClipper(measure, model), ConfigurationError, "got Linear; the model comes")  # type: ignore[arg-type]
    refused(lambda: GradClipper(model, measure, optimizer="adam"), ConfigurationError, "got a str")  # type: ignore[arg-type]
    nothing: Any = [None]
    refused(lambda: GradClipper(model, measure, optimizer=nothing), ConfigurationError, "NoneType")
    for sinks in ("clip.jsonl", ["clip.jsonl"], 3, [print, None]):
        refused(
            lambda sinks=sinks: GradClipper(model, measure, sinks=sinks),
            ConfigurationError,
            "sinks: expected callables sink(step, report)",
        )
    for mode in ("skp", None, True):
        refused(
            lambda mode=mode: GradClipper(model, policies.measure(), on_nonfinite=mode),
            ConfigurationError,
            "on_nonfinite",
            repr(mode),
            "'skip'",
        )


@pytest.mark.ranks(1, 2, timeout=SECONDS)
def test_targets_that_are_none() -> None:
    model = nn.Linear(2, 2)
    measure = policies.measure()
    optimizer: Any = SGD(model.parameters(), lr=0.1)
    groups = optimizer.param_groups
    refused(lambda: GradClipper(optimizer, measure), ConfigurationError, "SGD; give the model here")
    refused(lambda: GradClipper(groups, measure), ConfigurationError, "parameter groups")  # type: ignore[arg-type]
    for target in (3, None, [3], [model, plain(2)], [("w", 1)]):
        refused(lambda target=target: GradClipper(target, measure), ConfigurationError, "expected")
    pairs = [("w", plain(2)), ("w", plain(2))]
    refused(lambda: GradClipper(pairs, measure), ConfigurationError, "'w'", "distinct")
    refused(lambda: distclip.grad_norms(pairs), ConfigurationError, "'w'", "distinct")
    refused(
        lambda: distclip.clip_grad_norm_(model, 1.0),  # type: ignore[arg-type]
        ConfigurationError,
        "module.parameters()",
    )


@pytest.mark.ranks(1, 2, timeout=SECONDS)
def test_meta_tensors() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    refused(lambda: GradClipper(model, policies.measure()), ConfigurationError, "'weight'", "meta")
    model.weight.grad = torch.empty(2, 2, device="meta")
    for call in (
        lambda: distclip.clip_grad_norm_(model.parameters(), 1.0),
        lambda: distclip.clip_grad_agc_(model.parameters(), 1.0),
        lambda: distclip.clip_grad_value_(model.parameters(), 1.0),
    ):
        refused(call, ConfigurationError, "'0'", "meta")
    gradient = model.weight.grad
    refused(lambda: distclip.get_total_norm([gradient]), UnsupportedGradientError, "meta")


@pytest.mark.ranks(2, 3, timeout=SECONDS)
def test_other_parameters_on_another_rank() -> None:
    odd = dist.get_rank() == 1
    pairs = [("a", plain(2)), *([] if odd else [("b", plain(2))])]
    message = refused(
        lambda: GradClipper(pairs, policies.measure()), RankMismatchError, "rank 1 lacks 'b'"
    )
    assert len(set(everyones(message))) == 1
    listed = [] if odd else [plain(2)]
    refused(lambda: GradClipper(listed, policies.measure()), RankMismatchError, "'0'", "rank 1")


@pytest.mark.ranks(2, 3, timeout=SECONDS)
def test_the_same_name_with_another_shape_dtype_or_sharding() -> None:
    odd = dist.get_rank() == 1
    shape = (3,) if odd else (2,)
    measure = policies.measure()
    for modules in (False, True):
        one = nn.ParameterDict({"a": plain(*shape)})
        target: Any = [one] if modules else one
        refused(lambda target=target: GradClipper(target, measure), RankMismatchError, "'a'", "[3]")
    half = nn.Parameter(torch.ones(2, dtype=torch.float16 if odd else torch.float32))
    refused(lambda: GradClipper([("a", half)], measure), RankMismatchError, "float16", "float32")
    mixed = sharded(2) if not odd else plain(2)
    if odd:
        mesh_of((dist.get_world_size(),), ("x",))  # making a mesh takes all ranks
    refused(lambda: GradClipper([("a", mixed)], measure), RankMismatchError, "'a'", "plain")


@pytest.mark.ranks(2, 3, timeout=SECONDS)
def test_another_policy_or_option_on_another_rank() -> None:
    odd = dist.get_rank() == 1
    model = [("a", plain(2))]
    policy = policies.global_norm(2.0 if odd else 1.0)
    refused(lambda: GradClipper(model, policy), RankMismatchError, "max_norm=2.0", "max_norm=1.0")
    mode: Any = "skip" if odd else "error"
    refused(
        lambda: GradClipper(model, policies.measure(), on_nonfinite=mode),
        RankMismatchError,
        "'skip'",
        "rank 1",
    )
    refused(
        lambda: GradClipper(model, policies.measure(), norms=odd), RankMismatchError, "norms=False"
    )


@pytest.mark.ranks(2, 3, timeout=SECONDS)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (None, "expected a module"),
        ([("w", nn.Parameter(torch.ones(2))), ("w", nn.Parameter(torch.ones(2)))], "distinct"),
        ([("w", nn.Parameter(torch.empty(2, device="meta")))], "meta"),
    ],
    ids=["no target", "one name twice", "meta"],
)
def test_one_ranks_mistake_is_told_to_all(bad: Any, words: str) -> None:
    """Or the others would wait for the rank that has raised."""
    mine = bad if dist.get_rank() == 1 else [("w", plain(2))]
    kind = ConfigurationError if dist.get_rank() == 1 else RankMismatchError
    message = refused(lambda: GradClipper(mine, policies.measure()), kind, words)
    assert ("rank 1" in message) == (dist.get_rank() != 1)


def test_the_exceptions_are_what_their_tree_says() -> None:
    for kind, builtin in (
        (ConfigurationError, ValueError),
        (UnsupportedGradientError, TypeError),
        (RankMismatchError, RuntimeError),
        (ProcessGroupError, RuntimeError),
        (distclip.StateError, ValueError),
        (distclip.NonFiniteGradientError, RuntimeError),
    ):
        assert issubclass(kind, DistclipError)
        assert issubclass(kind, builtin)
        assert kind.__name__ in (distclip.errors.__doc__ or "")


def test_a_clipper_is_attached_once_and_to_its_own_parameters() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = GradClipper(model, policies.global_norm(1.0))
    with pytest.raises(ConfigurationError, match="none of this GradClipper's parameters"):
        clipper.attach(torch.optim.SGD(other.parameters(), lr=0.1))
    handle = clipper.attach(optimizer)
    with pytest.raises(ConfigurationError, match="attached already"):
        clipper.attach(optimizer)
    handle.remove()
    clipper.attach(optimizer).remove()


class Nested(torch.optim.SGD):
    """Torch runs the step hooks of a class and of its base: twice for one update."""

    def step(self, closure: object = None) -> object:  # type: ignore[override]
        return super().step(closure)


def test_an_optimizer_that_calls_its_base_clips_once() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # so that torch hooks both classes
    model = nn.Linear(3, 2)
    optimizer = Nested(model.parameters(), lr=0.1)
    seen: list[int] = []
    clipper = GradClipper(
        model, policies.global_norm(1.0), sinks=[lambda step, report: seen.append(step)]
    )
    clipper.attach(optimizer)
    for _ in range(3):
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
    assert seen == [0, 1, 2]


def test_complex_parameters_cannot_be_clamped() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(ConfigurationError, match="'w' is complex"):
        GradClipper([("w", p)], policies.value(1.0))
    GradClipper([("w", p)], policies.global_norm(1.0)).clip_()


@pytest.mark.parametrize("numel", [10, 5000])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_a_bound_beyond_the_dtype_clamps_nothing(dtype: torch.dtype, numel: int) -> None:
    """torch refuses such a bound. Under a loss scale, too, fp16 comes there soon."""
    largest = torch.finfo(dtype).max
    gradient = torch.zeros(numel, dtype=dtype)
    gradient[:2] = torch.tensor([largest, -3.0], dtype=torch.float64).to(dtype)
    for bound in (2.0 * largest, 1e39 if dtype is not torch.float64 else math.inf):
        for scale in (1.0, 2.0**14):
            p = nn.Parameter(torch.zeros(numel, dtype=dtype))
            p.grad = gradient.clone()
            clipper = GradClipper([("w", p)], policies.value(bound / scale))
            report = clipper.clip_before_step(torch.tensor(scale))
            assert torch.equal(p.grad, gradient)
            assert report.total_norm.item() == pytest.approx(largest / scale, rel=1e-6)
            assert report.clipped_fraction.item() == 0.0
        distclip.clip_grad_value_([p], bound)
        assert torch.equal(p.grad, gradient)
    p.grad[2] = math.inf
    GradClipper([("w", p)], policies.value(2.0 * largest), on_nonfinite="pass").clip_()
    assert p.grad[2].item() == math.inf  # as 2 * largest is in this dtype
