"""bf16 and fp16 under DeepSpeed: what is clipped, and which steps are skipped by whom."""

from typing import Any

import pytest

pytest.importorskip("deepspeed")


import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distclip
from distclip.kernels import changing
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


class Multiplications(TorchDispatchMode):
    """Counts multiplications of whole partitions, by torch and by distclip."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        inner = engine.optimizer.optimizer
        owners = [p for group in inner.param_groups for p in group["params"]]
        owners = owners or engine.optimizer.fp32_partitioned_groups_flat
        self.numels = {owner.numel() for owner in owners}
        self.count = 0
        scale_ = changing.scale_

        def counted(tensors: Any, *args: Any) -> None:
            before = self.count
            scale_(tensors, *args)
            self.count = before + len(tensors)  # also where that is made of operations of torch

        monkeypatch.setattr(changing, "scale_", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mul_.Scalar, torch.ops.aten.mul_.Tensor):
            self.count += args[0].numel() in self.numels
        return func(*args, **(kwargs or {}))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_the_factor_and_the_loss_scale_are_multiplied_at_once(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    static = {"fp16": {"loss_scale": 1000.0}}  # no power of two
    for kind, options, max_norm, times in (
        ("fp32", {}, 1e9, 0),  # stage 3 of DeepSpeed multiplies by 1
        ("fp16", static, 0.1, 1),
        ("fp32", {}, 1e-41, 1 if stage == 2 else 2),  # a number of which float32 has few digits
    ):
        engine = engine_of(json_of(stage, kind, **options))
        distclip.deepspeed.attach(engine, distclip.policies.global_norm(max_norm))
        backward(engine, 0)
        with monkeypatch.context() as patched, Multiplications(engine, patched) as counted:
            engine.step()
        assert counted.count == times, (kind, max_norm)
        close(engine)


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
