"""200 steps of every policy with a memory, under every sharding, against the oracle; and resuming.

Decisions are compared: coefficients, thresholds, skips, and every element now and then.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from distclip import GradClipper, StateError
from distclip.policies import AutoClip
from distclip.testing import assert_rounded, expected, run_on_ranks
from tests.core.test_matrix import build
from tests.sharded import Whole, shard, whole

LAYOUTS = ["plain", "fsdp2", "hsdp", "tp"]
STEPS = 200

AUTOCLIP = {"name": "autoclip", "percentile": 60.0, "window": 50}
ADAGC = {"name": "adagc", "warmup_steps": 40, "lambda_abs": 40.0}
SKIP = {"name": "skip_spikes", "window": 32, "min_history": 16, "max_consecutive": 3}
POLICIES: dict[str, Any] = {
    "autoclip": {"name": "autoclip", "percentile": 60.0},
    "autoclip window": AUTOCLIP,
    "zclip": {"name": "zclip", "max_norm": None},
    "adagc": ADAGC,
    "skip_spikes": {**SKIP, "loss": True},
    "chain": [SKIP, AUTOCLIP, ADAGC, {"name": "global_norm", "max_norm": 30.0}],
    "by name": {
        "by_name": {"*.bias": None, "fc*": ADAGC, "conv*": AUTOCLIP},
        "default": {"name": "zclip", "max_norm": None, "warmup_steps": 10},
    },
}


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
        *report.parameter_coefficients.values(),
    ]


def follow(
    clipper: GradClipper, model: Any, values: Whole, start: int, stop: int, ranks_differ: bool
) -> list[list[float]]:
    taken = []
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    for step in range(start, stop):
        gradients, loss = scripted(values, step)
        model.set_gradients(gradients)
        # Ranks see different batches: only the mean of their losses is that of the whole.
        offset = (rank - (world - 1) / 2) if ranks_differ else 0.0
        clipper.observe(loss + offset)
        taken.append(decisions(clipper.clip_()))
    return taken


def check(label: str, layout: str, values: Whole) -> None:
    configuration = POLICIES[label]
    model = shard(layout, values)
    clipper = GradClipper(model.named(), build(configuration), on_nonfinite="skip")
    tolerance = AutoClip.relative_error * 1.01 if label == "autoclip" else 1e-6
    memory: dict[str, Any] = {}
    _, weights = values.arrays()
    for step in range(STEPS):
        gradients, loss = scripted(values, step)
        arrays = {n: None if g is None else g.double().numpy() for n, g in gradients.items()}
        want = expected(
            configuration, arrays, weights, on_nonfinite="skip", memory=memory, loss=loss
        )
        model.set_gradients(gradients)
        report = clipper.clip_(loss=loss)
        where = f"{label}, step {step}"
        assert bool(report.skipped) == want.skipped, where
        shown = report.threshold.item()
        if not want.skipped and "name" in configuration and not math.isnan(want.threshold):
            assert shown == pytest.approx(want.threshold, rel=tolerance), where
        for name, coefficient in report.parameter_coefficients.items():
            one = float(want.coefficients[name])
            if gradients[name] is not None:
                assert coefficient == pytest.approx(one, rel=tolerance), f"{where}, {name}"
        if step % 25 or label == "autoclip":
            continue
        for name, local in model.local_gradients():
            full = want.gradients[name]
            if full is not None and local is not None:
                part = full.reshape(-1)[model.elements[name].numpy()]
                assert_rounded(local, part, coefficient_error=3e-7, name=name)


@pytest.mark.ranks(1, 3, 4, timeout=240)
def test_the_same_trajectory_everywhere(world_size: int) -> None:
    values = whole()
    layouts = {1: ["plain"], 3: ["fsdp2"], 4: LAYOUTS}[world_size]
    labels = ["chain", "by name"] if world_size == 3 else list(POLICIES)
    for layout in layouts:
        for label in labels:
            check(label, layout, values)


# ---- stopping and going on -------------------------------------------------------------------


def half_of_a_run(layout: str, start: int, stop: int, saved: dict[str, bytes] | None) -> Any:
    """Decisions and states by policy, from ``saved`` states on."""
    values = whole()
    taken, states = {}, {}
    for label, configuration in POLICIES.items():
        model = shard(layout, values)
        clipper = GradClipper(model.named(), build(configuration), on_nonfinite="skip")
        if saved is not None:
            clipper.load_state_dict(torch.load(io.BytesIO(saved[label]), weights_only=True))
        taken[label] = follow(clipper, model, values, start, stop, False)
        file = io.BytesIO()
        torch.save(clipper.state_dict(), file)
        states[label] = file.getvalue()
    return taken, states


def bits(decided: list[list[float]]) -> list[list[str]]:
    return [[value.hex() for value in step] for step in decided]


def test_four_ranks_stop_and_two_go_on_with_the_same_decisions() -> None:
    whole_run, _ = run_on_ranks(half_of_a_run, 4, "fsdp2", 0, STEPS, None, timeout=240)[0]
    first, saved = run_on_ranks(half_of_a_run, 4, "fsdp2", 0, 100, None, timeout=240)[0]
    same, _ = run_on_ranks(half_of_a_run, 4, "fsdp2", 100, STEPS, saved, timeout=240)[0]
    fewer, _ = run_on_ranks(half_of_a_run, 2, "tp", 100, STEPS, saved, timeout=240)[0]
    for label in POLICIES:
        assert bits(first[label]) == bits(whole_run[label][:100]), label
        assert bits(same[label]) == bits(whole_run[label][100:]), label  # bitwise
        assert any(step[0] or min(step[2:]) < 1 for step in same[label]), label
        for one, other in zip(fewer[label], same[label], strict=True):
            # The norms of float32 gradients cut otherwise differ by some 5e-9.
            assert one[0] == other[0], label
            assert one == pytest.approx(other, rel=1e-7, nan_ok=True), label


@pytest.mark.ranks(2)
def test_through_distributed_checkpoint(tmp_path: Path) -> None:
    values = whole()
    for number, (label, configuration) in enumerate(POLICIES.items()):
        model = shard("fsdp2", values)
        clipper = GradClipper(model.named(), build(configuration), on_nonfinite="skip")
        follow(clipper, model, values, 0, 30, True)
        folder = str(tmp_path / str(number))
        dcp.save({"clipper": clipper}, checkpoint_id=folder)
        other = shard("hsdp", values)
        fresh = GradClipper(other.named(), build(configuration), on_nonfinite="skip")
        dcp.load({"clipper": fresh}, checkpoint_id=folder)
        assert alike(fresh.state_dict(), clipper.state_dict()), label
        a = follow(clipper, model, values, 30, 75, True)
        b = follow(fresh, other, values, 30, 75, True)
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
    with pytest.raises(StateError, match="version 7"):
        clipper.load_state_dict({**state, "version": 7})
    with pytest.raises(StateError, match="'step' must be an integer"):
        clipper.load_state_dict({**state, "step": True})
    part = state["states"][""]
    gone = {**part, "by_parameter": {**part["by_parameter"], "gamma": {"a": torch.ones(())}}}
    with pytest.raises(StateError, match="missing: 'b'"):
        clipper.load_state_dict({**state, "states": {"": gone}})
    thick = {**part, "shared": {"steps": torch.ones(2)}}
    with pytest.raises(StateError, match=r"'steps' must be a tensor of shape \[\]"):
        clipper.load_state_dict({**state, "states": {"": thick}})
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
