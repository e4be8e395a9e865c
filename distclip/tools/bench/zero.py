"""DeepSpeed's step with its own clipping and with distclip's, for ``distclip bench zero``."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch

from distclip import policies
from distclip.integrations import deepspeed as integration
from distclip.tools.bench.models import encoder_layers
from distclip.tools.bench.timing import Ways
from distclip.tools.bench.ways import AGC_FACTOR, TIGHT

LAYERS, WIDTH = 8, 256
PRECISION: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
}
"""Name of a dtype -> its part of DeepSpeed's JSON."""


class EngineStep:
    """``engine.step()`` of one engine; the backward before it is not measured."""

    def __init__(self, stage: int, dtype: str, clipping: float) -> None:
        # Would be compiled in the first collective.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        model = encoder_layers((LAYERS, WIDTH), torch.float32)
        self.engine: Any = deepspeed.initialize(
            model=model,
            # As cheap a step as there is, so that clipping shows.
            optimizer=torch.optim.SGD(model.parameters(), lr=1e-6),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": clipping,
                "steps_per_print": 10**9,
                **PRECISION[dtype],
            },
            dist_init_required=False,
        )[0]
        self.batch = torch.randn(1, 4, WIDTH, dtype=next(model.parameters()).dtype)
        self.project = torch.randn(1, 4, WIDTH)

    def before(self) -> None:
        """Leave gradients."""
        self.engine.backward((self.engine(self.batch).float() * self.project).mean())

    def __call__(self) -> None:
        """What is measured."""
        self.engine.step()


def zero_ways(stage: int, dtype: str) -> Ways:
    """One model and optimizer: both clip with a threshold that always clips; and no clipping."""
    ours = EngineStep(stage, dtype, 0.0)
    integration.attach(ours.engine, policies.global_norm(TIGHT))
    adaptive = EngineStep(stage, dtype, 0.0)
    integration.attach(adaptive.engine, policies.agc(AGC_FACTOR))
    return {
        "DeepSpeed's own clipping": EngineStep(stage, dtype, TIGHT),
        "distclip global_norm": ours,
        "distclip agc": adaptive,
        "no clipping, DeepSpeed measures": EngineStep(stage, dtype, 0.0),
    }
