"""200 steps of every policy with a memory, under every sharding, against the oracle; and resuming.

Decisions are compared: coefficients, thresholds, skips, and every element now and then.
"""

import dataclasses
import functools
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from distclip import GradClipper, StateError
from distclip.policies import AutoClip
from distclip.testing import Expected, assert_rounded, expected, run_on_ranks
from tests.engine.test_matrix import build
from tests.helpers.ranks import everyones
from tests.sharded import Whole, shard, whole

STEPS = 200
LAYOUTS = {2: ["plain", "fsdp2", "fsdp1", "fsdp1_orig", "tp"], 3: ["fsdp2"], 4: ["hsdp"]}
"""By the number of ranks; ``plain`` is DDP."""

COUNTED = {"name": "autoclip", "percentile": 60.0}
AUTOCLIP = {"name": "autoclip", "percentile": 60.0, "window": 50}
ZCLIP = {"name": "zclip", "max_norm": None}
ADAGC = {"name": "adagc", "warmup_steps": 40, "lambda_abs": 40.0}
SKIP = {
    "name": "skip_spikes",
    "window": 32,
    "min_history": 16,
    "max_consecutive": 3,
    "loss": True,
    "clip_sigma": 1.0,
}
STABLE = {"name": "norm_stabilizer"}
GROUPS = {
    "name": "group_ema",
    "low_mult": 0.9,
    "max_up_scale": 1.5,
    "high_mult": 1.2,
    "high_late": 1.05,
    "late_start": 40,
    "late_stop": 120,
}
FIXED = {"name": "skip_norm", "max_norm": 2000.0, "clip_norm": 60.0}
LADDER = {"name": "ladder", "spikes": FIXED, "clips": 2, "skips": 9, "calm": 30}
POLICIES: dict[str, Any] = {
    "autoclip": COUNTED,
    "autoclip window": AUTOCLIP,
    "zclip": ZCLIP,
    "adagc": ADAGC,
    "skip_spikes": SKIP,
    "norm_stabilizer": STABLE,
    "group_ema": GROUPS,
    "chain": [SKIP, LADDER, GROUPS, AUTOCLIP, ADAGC, {"name": "global_norm", "max_norm": 30.0}],
    "each": {
        "by_name": {"e*": COUNTED, "conv*": AUTOCLIP, "wide*": ZCLIP, "scalar": SKIP, "f*": STABLE},
        "default": ADAGC,
    },
}
TOGETHER = ["chain", "each"]
"""Every policy on parameters of its own, and one after another: two clippers instead of five."""


def scripted(values: Whole, step: int) -> tuple[dict[str, Any], float]:
    """Gradients and loss of a step: a drift, noise by parameter, spikes, a NaN, a missing one."""
    random = torch.Generator().manual_seed(step)
    drift = 1.0 + 0.3 * math.sin(step / 20)
    spike = 1000.0 if step in (60, 61, 150, 151, 152, 153, 154) else 1.0
    gradients: dict[str, Any] = {}
    for name, gradient in values.gradients.items():
        noise = 0.8 + 0.4 * torch.rand((), generator=random).item()
        missing = gradient is None or (name == "one" and step % 7 == 3)
        gradients[name] = None if missing else gradient * (drift * spike * noise)
    if step == 70:
        gradients["fc.bias"] = gradients["fc.bias"].clone()
        gradients["fc.bias"][2] = math.nan
    return gradients, 50.0 if step == 100 else 2.0 + 0.1 * math.sin(step)


def decisions(report: Any) -> list[float]:
    return [
        float(report.skipped),
        report.threshold.double().item(),
        *dict(sorted(report.parameter_coefficients.items())).values(),
    ]


def follow(
    clipper: GradClipper, model: Any, values: Whole, start: int, stop: int, ranks_differ: bool
) -> list[list[float]]:
    taken = []
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(start, stop):
        gradients, loss = scripted(values, step)
        model.set_gradients(gradients)
        # Ranks see different batches: only the mean of their losses is that of the whole.
        offset = (rank - (world - 1) / 2) if ranks_differ else 0.0
        clipper.observe(loss + offset)
        taken.append(decisions(clipper.clip_()))
    return taken


@functools.cache
def told(label: str) -> list[Expected]:
    """The oracle's trajectory; of the gradients only those of every 25th step are kept."""
    values, memory, told = whole(), {}, []  # type: ignore[var-annotated]
    for step in range(STEPS):
        gradients, loss = scripted(values, step)
        options: dict[str, Any] = {"on_nonfinite": "skip", "memory": memory, "loss": loss}
        want = expected(POLICIES[label], gradients, values.weights, **options)
        told.append(want if step % 25 == 0 else dataclasses.replace(want, gradients={}))
    return told


def check(label: str, layout: str, values: Whole) -> None:
    """All decisions of a run, and every element now and then."""
    configuration = POLICIES[label]
    model = shard(layout, values)
    clipper = GradClipper(model.named(), build(configuration), on_nonfinite="skip")
    clipped = 0
    for step, want in enumerate(told(label)):
        gradients, loss = scripted(values, step)
        model.set_gradients(gradients)
        report = clipper.clip_(loss=loss)
        where = f"{label}, {layout}, step {step}"
        assert bool(report.skipped) == want.skipped, where
        if not want.skipped and not math.isnan(want.threshold) and label != "each":
            tolerance = AutoClip.relative_error if label == "autoclip" else 1e-6
            assert report.threshold.item() == pytest.approx(want.threshold, rel=tolerance), where
        sketched = {name for name in gradients if label == "autoclip" or name.startswith("e")}
        sketched = sketched if label in ("autoclip", "each") else set()
        for name, coefficient in report.parameter_coefficients.items():
            one = float(want.coefficients[name])
            tolerance = AutoClip.relative_error if name in sketched else 1e-6
            if gradients[name] is not None:
                assert math.isclose(coefficient, one, rel_tol=tolerance), f"{where}, {name}"
                clipped += one < 1
        for name, local, part in model.beside(want.gradients) if step % 25 == 0 else ():
            if part is not None and local is not None and name not in sketched:
                assert_rounded(local, part, coefficient_error=3e-7, name=name)
    skipping = "skip_spikes" in str(configuration)
    assert sum(want.skipped for want in told(label)) >= (6 if skipping else 1), label
    assert clipped or label == "skip_spikes", label


@pytest.mark.ranks(1)
def test_each_policy_follows_the_oracle() -> None:
    for label in POLICIES:
        check(label, "plain", whole())


@pytest.mark.ranks(2, 3, 4, timeout=180)
def test_the_same_trajectory_under_every_sharding(world_size: int) -> None:
    for layout in LAYOUTS[world_size]:
        for label in TOGETHER:
            check(label, layout, whole())


@pytest.mark.ranks(2, 3)
def test_pipeline_stages_remember_together(world_size: int) -> None:
    """Each rank has a layer of its own; what is remembered is that of the whole model, on all."""
    configuration = [{**SKIP, "loss": False}, {**ADAGC, "warmup_steps": 10}, AUTOCLIP]
    names = [f"{rank}.weight" for rank in range(world_size)]
    stage = torch.nn.ModuleDict({str(dist.get_rank()): torch.nn.Linear(4, 3, bias=False)})
    (mine,) = stage.parameters()
    clipper = GradClipper([stage], build(configuration))
    memory: dict[str, Any] = {}
    weights = {name: np.ones((3, 4)) for name in names}
    for step in range(60):
        random = torch.Generator().manual_seed(step)
        factor = 1000.0 if step in (40, 41) else 1.0
        table = {name: torch.randn(3, 4, generator=random) * factor for name in names}
        mine.grad = table[f"{dist.get_rank()}.weight"].clone()
        report = clipper.clip_()
        want = expected(configuration, table, weights, memory=memory)
        assert bool(report.skipped) == want.skipped == (step in (40, 41))
        part = want.gradients[f"{dist.get_rank()}.weight"]
        assert part is not None
        assert_rounded(mine.grad, part, coefficient_error=1e-6, name=str(step))
    # One process that holds the whole model goes on from there.
    whole_model = [(name, torch.nn.Parameter(torch.ones(3, 4))) for name in names]
    states = everyones(clipper.state_dict())
    assert all(alike(state, states[0]) for state in states)
    alone = GradClipper(whole_model, build(configuration))
    alone.load_state_dict(states[0])
    assert alike(alone.state_dict(), states[0])


# ---- stopping and going on -------------------------------------------------------------------

Run = dict[str, list[list[float]]]
Saved = dict[str, bytes]


def run(layout: str, start: int, stop: int, saved: Saved | None = None) -> tuple[Run, Saved]:
    """Decisions by policy, from ``saved`` states on; and the states at step 100."""
    values = whole()
    taken: Run = {}
    states: Saved = {}
    for label in TOGETHER:
        model = shard(layout, values)
        clipper = GradClipper(model.named(), build(POLICIES[label]), on_nonfinite="skip")
        if saved is not None:
            clipper.load_state_dict(torch.load(io.BytesIO(saved[label]), weights_only=True))
        taken[label] = follow(clipper, model, values, start, min(stop, 100), False)
        file = io.BytesIO()
        torch.save(clipper.state_dict(), file)
        states[label] = file.getvalue()
        taken[label] += follow(clipper, model, values, max(start, 100), stop, False)
    return taken, states


def bits(decided: list[list[float]]) -> list[list[str]]:
    return [[value.hex() for value in step] for step in decided]


def assert_same_decisions(run: Run, other: Run) -> None:
    """The same skips and the same parameters clipped; coefficients to 1e-6.

    The norm of a float32 gradient that is cut otherwise differs by some 5e-9, since its parts are
    summed in another order.
    """
    for label, steps in run.items():
        for one, two in zip(steps, other[label], strict=True):
            assert one[0] == two[0], label
            assert [c < 1 for c in one[2:]] == [c < 1 for c in two[2:]], label
            assert one == pytest.approx(two, rel=1e-6, nan_ok=True), label


def test_four_ranks_stop_and_any_number_goes_on_with_the_same_decisions() -> None:
    unbroken, saved = run_on_ranks(run, 4, "fsdp2", 0, STEPS, timeout=180)[0]
    rest = {label: steps[100:] for label, steps in unbroken.items()}
    for label, steps in rest.items():
        assert any(step[0] for step in steps), label
        assert sum(min(step[2:]) < 1 for step in steps) > 50, label
    same, _ = run_on_ranks(run, 4, "fsdp2", 100, STEPS, saved, timeout=180)[0]
    assert {k: bits(v) for k, v in same.items()} == {k: bits(v) for k, v in rest.items()}
    for ranks, layout in [(2, "fsdp2"), (2, "tp"), (4, "fsdp1"), (1, "plain")]:
        other, _ = run_on_ranks(run, ranks, layout, 100, STEPS, saved, timeout=180)[0]
        assert_same_decisions(other, rest)
    # This can fail: without what was remembered the decisions are others.
    forgetful, _ = run_on_ranks(run, 1, "plain", 100, STEPS, timeout=180)[0]
    with pytest.raises(AssertionError):
        assert_same_decisions(forgetful, rest)


def test_one_rank_stops_and_four_go_on_with_the_same_decisions() -> None:
    unbroken, saved = run_on_ranks(run, 1, "plain", 0, STEPS, timeout=180)[0]
    more, _ = run_on_ranks(run, 4, "tp", 100, STEPS, saved, timeout=180)[0]
    assert_same_decisions(more, {label: steps[100:] for label, steps in unbroken.items()})


@pytest.mark.ranks(2)
def test_through_distributed_checkpoint(tmp_path: Path) -> None:
    values = whole()
    for number, label in enumerate(TOGETHER):
        configuration = POLICIES[label]
        model = shard("fsdp2", values)
        clipper = GradClipper(model.named(), build(configuration), on_nonfinite="skip")
        follow(clipper, model, values, 0, 30, True)
        folder = str(tmp_path / str(number))
        dcp.save({"clipper": clipper}, checkpoint_id=folder)
        other = shard("hsdp", values)
        fresh = GradClipper(other.named(), build(configuration), on_nonfinite="skip")
        dcp.load({"clipper": fresh}, checkpoint_id=folder)
        assert alike(fresh.state_dict(), clipper.state_dict()), label
        a = follow(clipper, model, values, 30, 64, True)
        b = follow(fresh, other, values, 30, 64, True)
        assert bits(a) == bits(b), label


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return bool(one == other)


def clipper_for(policy: Any, shapes: dict[str, tuple[int, ...]]) -> GradClipper:
    named = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    return GradClipper(named, build(policy))


def test_a_state_of_something_else_is_refused_by_what_differs() -> None:
    clipper = clipper_for(ADAGC, {"a": (2,), "b": (3,)})
    clipper.clip_()
    state: Any = clipper.state_dict()
    with pytest.raises(StateError, match=r"belongs to AdaGC.* clipper's policy is AutoClip"):
        clipper_for(AUTOCLIP, {"a": (2,), "b": (3,)}).load_state_dict(state)
    with pytest.raises(StateError, match=r"another model; parameters missing: 'c', .*cted: 'b'"):
        clipper_for(ADAGC, {"a": (2,), "c": (3,)}).load_state_dict(state)
    with pytest.raises(StateError, match=r"'b' has shape \[4\].* where it has \[3\]"):
        clipper_for(ADAGC, {"a": (2,), "b": (4,)}).load_state_dict(state)
    with pytest.raises(StateError, match="its version is 7"):
        clipper.load_state_dict({**state, "version": 7})
    with pytest.raises(StateError, match="'step' must be an integer"):
        clipper.load_state_dict({**state, "step": True})
    # A state without a checksum, as they were: nothing else would see that it was changed by hand.
    old = {**state, "version": 1, "policy": repr(clipper.policy)}
    clipper.load_state_dict(old)
    part = old["states"][""]
    gone = {**part, "by_parameter": {**part["by_parameter"], "gamma": {"a": torch.ones(())}}}
    with pytest.raises(StateError, match="missing: 'b'"):
        clipper.load_state_dict({**old, "states": {"": gone}})
    thick = {**part, "shared": {"steps": torch.ones(2)}}
    with pytest.raises(StateError, match=r"'steps' must be a tensor of shape \[\]"):
        clipper.load_state_dict({**old, "states": {"": thick}})
    assert alike(clipper.state_dict(), state)  # as it was


def test_a_state_finds_its_parameters_by_name() -> None:
    clipper = clipper_for(ADAGC, {"a": (2,), "b": (3,)})
    clipper.clip_()
    other = clipper_for(ADAGC, {"b": (3,), "a": (2,)})
    other.load_state_dict(clipper.state_dict())
    gamma: Any = other.state_dict()["states"]
    gamma = gamma[""]["by_parameter"]["gamma"]
    assert gamma["b"] > gamma["a"]


def test_a_checkpoint_from_before_distclip_loads_with_a_warning() -> None:
    clipper = clipper_for(ADAGC, {"a": (2,)})
    before = clipper.state_dict()
    with pytest.warns(UserWarning, match="no state of distclip"):
        clipper.load_state_dict({})
    assert alike(clipper.state_dict(), before)
