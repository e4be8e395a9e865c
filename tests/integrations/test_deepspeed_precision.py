"""bf16 and fp16 under DeepSpeed: what is clipped, and which steps are skipped by whom."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed")


import torch

import distclip
from tests.engine.test_matrix import build
from tests.integrations.engines import (
    VERSION,
    Replay,
    backward,
    close,
    engine_of,
    gradients_of,
    json_of,
    weights_of,
)
from tests.integrations.test_deepspeed import POLICIES

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
STATIC = {"fp16": {"loss_scale": 8.0}}
GROWING = {"fp16": {"loss_scale_window": 2, "initial_scale_power": 4}}

# name of the wrapper, stage, JSON
WHOLE = "FP16_UnfusedOptimizer" if VERSION >= (0, 18) else "BF16_Optimizer"
SUMS = "FP16_UnfusedOptimizer" if VERSION == (0, 18) else "BF16_Optimizer"
KINDS: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "bf16 stage 0": (WHOLE, 0, "bf16", {}),
    "bf16 stage 1": ("DeepSpeedZeroOptimizer", 1, "bf16", {}),
    "bf16 stage 1, fp32 sums": (SUMS, 1, "bf16", FP32_ACCUMULATION),
    "bf16 stage 2": ("DeepSpeedZeroOptimizer", 2, "bf16", {}),
    "bf16 stage 2, fp32 sums": ("DeepSpeedZeroOptimizer", 2, "bf16", FP32_ACCUMULATION),
    "bf16 stage 3": ("DeepSpeedZeroOptimizer_Stage3", 3, "bf16", {}),
    "fp16 stage 1, static": ("DeepSpeedZeroOptimizer", 1, "fp16", STATIC),
    "fp16 stage 1": ("DeepSpeedZeroOptimizer", 1, "fp16", GROWING),
    "fp16 stage 2": ("DeepSpeedZeroOptimizer", 2, "fp16", GROWING),
    "fp16 stage 3, static": ("DeepSpeedZeroOptimizer_Stage3", 3, "fp16", STATIC),
    "fp16 stage 3": ("DeepSpeedZeroOptimizer_Stage3", 3, "fp16", GROWING),
}


ROUNDED = {"chain": 2}
"""How often an element is rounded to the model's dtype: a clamp behind a scaling takes a second
measurement, and what comes before it is done to the gradients as they are."""

EVERYWHERE = ("bf16 stage 1, fp32 sums", "bf16 stage 3", "fp16 stage 2", "fp16 stage 3")


def replay(
    policy: Any, engine: Any, steps: int, *, groups: bool = False, roundoff: float = 0.0
) -> None:
    """Norms of the gradients that the engine holds, to 1e-6; weights to the rounding of a step."""
    handle = distclip.deepspeed.attach(engine, build(policy))
    mirror = Replay(policy, engine, groups=groups)
    clipped = False
    for number in range(steps):
        backward(engine, number)
        held = gradients_of(engine)
        engine.step()
        want = mirror.step(held)
        report = handle.last_report
        assert report is not None
        for name, norm in report.parameter_norms.items():
            assert norm == pytest.approx(want.parameter_norms[name], rel=1e-6), (number, name)
        assert float(engine.get_global_grad_norm()) == pytest.approx(want.total_norm, rel=1e-6)
        assert engine.was_step_applied()
        clipped |= want.clipped_norm < 0.9 * want.total_norm
        bound = mirror.bound(number + 1, roundoff)
        for name, weight in weights_of(engine).items():
            error = float((weight - mirror.weights()[name]).abs().max())
            assert error <= bound, (number, name, error, bound)
    assert clipped


@pytest.mark.ranks(2, 3, 4, timeout=300)
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_every_policy(kind: str, world_size: int) -> None:
    unit = torch.finfo(DTYPES[kind]).eps / 2
    for label, (wrapper, stage, precision, options) in KINDS.items():
        if precision != kind:
            continue
        if world_size != 3 and label not in EVERYWHERE:
            continue
        everything = world_size == 3 and label in EVERYWHERE
        for policy in POLICIES if everything else ("agc",):
            engine = engine_of(json_of(stage, kind, **options), groups=policy == "group")
            try:
                assert type(engine.optimizer).__name__ == wrapper
                before = float(getattr(engine.optimizer, "loss_scale", 1.0))
                roundoff = ROUNDED.get(policy, 0) * unit
                replay(POLICIES[policy], engine, 5, groups=policy == "group", roundoff=roundoff)
                if options is GROWING:
                    assert engine.optimizer.loss_scale > before  # a step that grew is among them
            except Exception as error:
                raise AssertionError(f"{label}, policy {policy!r}: {error}") from error
            finally:
                close(engine)
