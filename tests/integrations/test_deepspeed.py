"""DeepSpeed, ZeRO 0 to 3, against the same training in one process."""

from typing import Any

import pytest

pytest.importorskip("deepspeed")

import distclip
from tests.engine.test_matrix import build
from tests.integrations.engines import (
    Reference,
    json_of,
    opened,
    step,
    weights_of,
)

pytestmark = pytest.mark.filterwarnings("ignore")

GLOBAL = {"name": "global_norm", "max_norm": 0.5}
POLICIES: dict[str, Any] = {
    "global": GLOBAL,
    "value": {"name": "value", "clip_value": 0.05},
    "agc": {"name": "agc", "clip_factor": 0.05},
    "group": {"name": "group_norm", "max_norm": 0.4},
    "chain": [
        {"name": "agc", "clip_factor": 0.1},
        {"name": "value", "clip_value": 0.02},
        {"name": "global_norm", "max_norm": 0.1},
    ],
}


def train(
    policy: Any,
    document: dict[str, Any],
    optimizer: str = "sgd",
    *,
    groups: bool = False,
    micro: int = 1,
    steps: int = 10,
) -> None:
    """Norms at every step and weights after the last, against one process in float64."""
    with opened(document, optimizer, groups=groups) as engine:
        handle = distclip.deepspeed.attach(engine, build(policy))
        reference = Reference(policy, optimizer, groups=groups, micro=micro)
        for number in range(steps):
            step(engine, number, micro)
            want = reference.train(number)
            report = handle.last_report
            assert report is not None
            for name, norm in report.parameter_norms.items():
                error = abs(norm - want.parameter_norms[name])
                assert error <= 1e-6 * want.total_norm, (number, name, norm, error)
            shown = float(engine.get_global_grad_norm())
            assert shown == pytest.approx(want.total_norm, rel=1e-6)
            assert engine.was_step_applied()
        assert engine.skipped_steps == 0
        whole = reference.weights()
        for name, weight in weights_of(engine).items():
            error = float((weight - whole[name]).abs().max())
            assert error <= 1e-6 * max(1.0, float(whole[name].abs().max())), (name, error)


@pytest.mark.ranks(2, 3, 4, timeout=240)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_policy_in_fp32(stage: int, world_size: int) -> None:
    for label, policy in POLICIES.items():
        if world_size != 3 and label != "chain":  # which has three of the others in it
            continue
        try:
            train(policy, json_of(stage), groups=label == "group")
        except Exception as error:
            raise AssertionError(f"policy {label!r}: {error}") from error
