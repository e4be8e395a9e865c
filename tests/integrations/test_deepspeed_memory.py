"""Policies with a memory under ZeRO 0 to 3, against the oracle in one process."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed")

import distclip
from tests.core.test_matrix import build
from tests.integrations.engines import Reference, close, engine_of, json_of, step, weights_of

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, SPIKE = 12, 8
POLICIES: dict[str, Any] = {
    "autoclip": {"name": "autoclip", "percentile": 40.0, "window": 5},
    "zclip": {"name": "zclip", "z_thresh": 1.0, "warmup_steps": 4, "max_norm": None},
    "adagc": {"name": "adagc", "lambda_rel": 1.0, "warmup_steps": 3},
    "skip_spikes": {"name": "skip_spikes", "window": 8, "min_history": 4, "loss": True},
}


@pytest.mark.ranks(2, 4, timeout=240)
def test_decisions_and_weights_are_those_of_one_process() -> None:
    for stage in range(4):
        for label, policy in POLICIES.items():
            engine = engine_of(json_of(stage))
            handle = distclip.deepspeed.attach(engine, build(policy))
            reference = Reference(policy)
            acted = 0
            for number in range(STEPS):
                times = 50.0 if number == SPIKE else 1.0
                step(engine, number, times=times)
                want, report = reference.train(number, times=times), handle.last_report
                where = stage, label, number
                assert bool(report.skipped) == want.skipped, where
                assert float(report.coefficient) == pytest.approx(want.coefficient, rel=1e-5), where
                assert float(report.total_norm) == pytest.approx(want.total_norm, rel=2e-6), where
                acted += want.skipped or want.coefficient < 0.99
                if number == SPIKE:
                    assert want.skipped or want.coefficient < 0.5, where
            assert acted >= (1 if label == "skip_spikes" else 2), (stage, label)
            assert engine.skipped_steps == (label == "skip_spikes"), (stage, label)
            whole = reference.weights()
            for name, weight in weights_of(engine).items():
                error = float((weight - whole[name]).abs().max())
                bound = 2e-6 * max(1.0, float(whole[name].abs().max()))
                assert error <= bound, (stage, label, name, error)
            close(engine)
