"""States of a run, and its spike score."""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distclip.errors import ConfigurationError
from distclip.monitor import States
from distclip.monitor.states import MOST_LINES, judged, spike_score

NOISE = np.exp(0.2 * np.random.default_rng(0).standard_normal(2000))


def states_of(norms: Any, **bounds: Any) -> list[str]:
    states = States(**bounds)
    return [states.judge(step, float(norm)) for step, norm in enumerate(norms)]


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1.0, 500.0, 1e6])
def test_a_run_is_judged_by_its_own_size(size: float) -> None:
    found = states_of(size * NOISE[:1000])
    assert set(found[30:]) == {"normal"}


def test_before_there_is_a_history_the_bounds_decide() -> None:
    assert states_of([0.5, 5.0, 50.0]) == ["normal"] * 3
    assert states_of([500.0, 0.001]) == ["exploding", "vanishing"]
    assert states_of([50.0, 0.1], normal=(1, 10), exploding=20, vanishing=0.5) == [
        "exploding", "vanishing",
    ]  # fmt: skip


def test_a_spike_is_a_spike_and_not_an_explosion() -> None:
    norms = NOISE[:400].copy()
    norms[[200, 300]] = 8.0, 4000.0
    found = states_of(norms)
    assert [step for step, state in enumerate(found) if state != "normal"] == [200, 300]
    assert found[200] == found[300] == "spike"


def test_norms_that_stay_large_explode_and_fast_or_slowly() -> None:
    sudden = np.concatenate([NOISE[:300], 4000.0 * NOISE[300:400]])
    found = states_of(sudden)
    assert found[299:304] == ["normal", *["spike"] * 4]
    assert set(found[304:]) == {"exploding"}
    slow = NOISE * np.geomspace(2.0, 2000.0, len(NOISE))
    found = states_of(slow)
    assert found[-1] == "exploding"
    assert set(found[30:1000]) == {"normal"}


def test_vanishing() -> None:
    found = states_of(np.concatenate([NOISE[:300], 1e-4 * NOISE[300:400]]))
    assert set(found[300:]) == {"vanishing"}
    assert states_of([1.0, 0.0])[-1] == "vanishing"
    # A run that converges gets smaller gradients, and nothing is wrong with it.
    assert set(states_of(NOISE[:1000] * np.geomspace(5.0, 0.05, 1000))) == {"normal"}


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_nonfinite_does_not_enter_the_history(norm: float) -> None:
    norms = [*NOISE[:100], *[norm] * 200, *NOISE[100:200]]
    found = states_of(norms)
    assert found == ["normal"] * 100 + ["nonfinite"] * 200 + ["normal"] * 100
    assert States().judge(0, 1.0, nonfinite=True) == "nonfinite"


def test_a_change_is_one_line_and_asking_again_is_none(caplog: pytest.LogCaptureFixture) -> None:
    states = States()
    for step, norm in enumerate([*NOISE[:50], math.nan, math.nan, *NOISE[50:60]]):
        for _ in range(3):  # by three sinks
            states.judge(step, float(norm))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert told[0].startswith("gradients at step 50: nonfinite (norm nan, usual so far 0.9")
    assert told[1].startswith("gradients at step 52: normal (norm ")


def test_a_restless_run_does_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "distclip.monitor")
    states = States()
    for step in range(1000):
        states.judge(step, math.nan if step % 2 else 1.0)
    assert len(caplog.records) == MOST_LINES
    assert "further changes" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    "bounds",
    [{"normal": (10, 1)}, {"vanishing": 2.0}, {"exploding": 5.0}, {"vanishing": 0.0},
     {"exploding": math.inf}],
)  # fmt: skip
def test_bounds_out_of_order(bounds: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="expected 0 < vanishing <= normal"):
        States(**bounds)


def test_a_recorded_run_is_judged_alike_and_quietly(caplog: pytest.LogCaptureFixture) -> None:
    norms = np.concatenate([NOISE[:300], [900.0, math.nan], 1e-4 * NOISE[:20]])
    bad = np.isnan(norms)
    assert judged(norms, bad) == states_of(norms)
    caplog.clear()
    judged(norms, bad)
    assert not caplog.records


# ---- the spike score, against a loop that says the definition ----------------------------------


def by_definition(values: list[float], window: int, sigma: float) -> float:
    known: list[float] = []
    spikes = 0
    for value in values:
        if not math.isfinite(value):
            spikes += 1
            continue
        before = known[-window:]
        if len(before) >= 10:
            mean = math.fsum(before) / len(before)
            variance = math.fsum((b - mean) ** 2 for b in before) / len(before)
            spikes += abs(value - mean) >= sigma * math.sqrt(variance) > 0.0
        known.append(value)
    return 100.0 * spikes / len(values)


def planted() -> list[float]:
    values = NOISE.copy()
    values[[50, 700, 1300, 1301, 1900]] = 10.0, 30.0, 40.0, 1e3, 9.0
    values[[60, 1400]] = math.nan, math.inf
    return values.tolist()


@pytest.mark.parametrize("window", [100, 1000, 5000])
@pytest.mark.parametrize("change", [lambda v: v, lambda v: 1e200 * v, lambda v: 1e-200 * v])
def test_spike_score(window: int, change: Callable[[float], float]) -> None:
    values = planted()
    expected = by_definition(values, window, 7.0)
    assert 0.2 < expected < 0.5
    assert spike_score(np.array([change(v) for v in values]), window) == pytest.approx(expected)


def test_spike_score_of_little() -> None:
    assert math.isnan(spike_score(np.array([])))
    assert spike_score(np.ones(50)) == 0.0
    assert spike_score(np.array([1.0] * 5 + [math.nan] * 5)) == 50.0
