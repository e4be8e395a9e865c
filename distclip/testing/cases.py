"""The cases of the matrix: every layout, policy and dtype that is held against the oracle.

Policies are in the words of a configuration, which the oracle and the library both read.
"""

from __future__ import annotations

import math
from typing import Any

MATRIX_LAYOUTS: dict[str, str] = {
    "plain": "whole on every rank: one process, DDP",
    "fsdp2": "fully_shard over all ranks",
    "hsdp": "fully_shard over a 2-D mesh: sharded, and replicated",
    "tp": "tensor parallel: cut by rows, by columns, replicated",
    "replicate": "DTensors, whole on every rank",
    "fsdp2_tp": "fully_shard over tensor parallel parameters (strided shards)",
    "mixed": "plain tensors, all ranks and sub-meshes, in one model",
    "experts": "fully_shard, experts on a mesh of their own, experts of each rank's own; some idle",
    "fsdp1": "FullyShardedDataParallel, FULL_SHARD, the optimizer sees flat parameters",
    "fsdp1_orig": "the same with use_orig_params=True",
    "fsdp1_hybrid": "the same with HYBRID_SHARD: sharded, and replicated",
    "fsdp1_mixed": "FULL_SHARD, SHARD_GRAD_OP and NO_SHARD in one model, nested",
}
"""Every layout that :func:`distclip.testing.models.sharded.shard` makes, in words."""

DTYPES = ("float32", "bfloat16", "float16", "mixed")
"""``mixed``: the three others in turn, one a parameter."""

POLICIES: dict[str, Any] = {
    "measure": {"name": "measure"},
    "global": {"name": "global_norm", "max_norm": 1.0},
    "global loose": {"name": "global_norm", "max_norm": 1e4},
    "global p=0.5": {"name": "global_norm", "max_norm": 1.0, "norm_type": 0.5},
    "global p=1": {"name": "global_norm", "max_norm": 1.0, "norm_type": 1.0},
    "global p=3": {"name": "global_norm", "max_norm": 1.0, "norm_type": 3.0},
    "global p=12": {"name": "global_norm", "max_norm": 1.0, "norm_type": 12.0},
    "global p=inf": {"name": "global_norm", "max_norm": 1.0, "norm_type": math.inf},
    "value": {"name": "value", "clip_value": 0.5},
    "parameter": {"name": "parameter_norm", "max_norm": 1.0},
    "parameter p=inf": {"name": "parameter_norm", "max_norm": 0.5, "norm_type": math.inf},
    "block rms": {"name": "block_rms", "threshold": 0.5},
    "agc": {"name": "agc", "clip_factor": 0.1},
    "agc strict": {"name": "agc", "clip_factor": 0.001},
    "agc tensor": {"name": "agc", "clip_factor": 0.1, "unit": "tensor"},
    "agc p=1": {"name": "agc", "clip_factor": 0.1, "norm_type": 1.0},
    "agc experts": {"name": "agc", "clip_factor": 0.1, "unit_dims": {"experts.*": [0, 1]}},
    "agc columns": {"name": "agc", "clip_factor": 0.1, "unit_dims": {"*.weight": [1]}},
    "dreamer": {"name": "dreamer_agc"},
    # A step of each here; their trajectories are in tests/engine/test_trajectory.py.
    "autoclip": {"name": "autoclip", "window": 100},
    "zclip": {"name": "zclip"},
    "adagc": {"name": "adagc"},
    "skip spikes": {"name": "skip_spikes"},
    "running max": {"name": "running_max"},
    "norm stabilizer": {"name": "norm_stabilizer"},
    "group ema": {"name": "group_ema"},
    "skip norm": {"name": "skip_norm", "max_norm": 1.0, "clip_norm": 0.5},
    "skip norm loose": {"name": "skip_norm", "max_norm": 1e4, "norm_type": 3.0, "clip_norm": 1.0},
    "ladder": {
        "name": "ladder",
        "spikes": {"name": "skip_norm", "max_norm": 1.0, "clip_norm": 0.5},
        "clips": 1,
    },
    "norm gate": [
        {"name": "norm_gate", "part": "fc*", "max_norm": 50.0},
        {"name": "global_norm", "max_norm": 1.0},
    ],
    "chain scales": [
        {"name": "global_norm", "max_norm": 5.0},
        {"name": "parameter_norm", "max_norm": 1.0},
        {"name": "block_rms", "threshold": 0.1},
        {"name": "global_norm", "max_norm": 0.5, "norm_type": 1.0},
    ],
    "chain agc, global": [
        {"name": "agc", "clip_factor": 0.1},
        {"name": "global_norm", "max_norm": 0.5},
    ],
    "chain global, agc": [
        {"name": "global_norm", "max_norm": 5.0, "norm_type": math.inf},
        {"name": "agc", "clip_factor": 0.01},
        {"name": "dreamer_agc", "clip": 0.005},
    ],
    "chain agc twice": [
        {"name": "agc", "clip_factor": 0.1},
        {"name": "agc", "clip_factor": 0.05, "unit_dims": {"experts.*": [0, 1]}},
        {"name": "global_norm", "max_norm": 0.1},
    ],
    "chain agc orders": [
        {"name": "agc", "clip_factor": 0.2, "norm_type": math.inf},
        {"name": "agc", "clip_factor": 0.1},
        {"name": "agc", "clip_factor": 0.1, "norm_type": 1.0, "unit": "tensor"},
        {"name": "global_norm", "max_norm": 0.5},
    ],
    "chain value first": [
        {"name": "value", "clip_value": 0.5},
        {"name": "agc", "clip_factor": 0.1},
        {"name": "global_norm", "max_norm": 0.5},
    ],
    "chain value between": [
        {"name": "global_norm", "max_norm": 5.0},
        {"name": "value", "clip_value": 0.05},
        {"name": "parameter_norm", "max_norm": 0.1},
    ],
    "by name": {
        "by_name": {
            "*.bias": None,
            "embed*": {"name": "value", "clip_value": 0.1},
            "conv*": [
                {"name": "global_norm", "max_norm": 0.5},
                {"name": "value", "clip_value": 0.1},
            ],
        },
        "default": {"name": "agc", "clip_factor": 0.1},
    },
    "by part": {
        "by_part": {
            "kind=vector, not kind=expert": None,
            "kind=embedding or name=conv*": {"name": "global_norm", "max_norm": 0.5},
            "kind=expert": {"name": "agc", "clip_factor": 0.05, "unit_dims": {"experts.*": [0, 1]}},
            "kind=matrix|lora": {"name": "parameter_norm", "max_norm": 0.7},
        },
        "default": {"name": "block_rms", "threshold": 0.3},
    },
    "expert aware": {"name": "expert_aware", "max_norm": 1.0, "expert_max_norm": 0.1},
    "by name in a chain": [
        {"by_name": {"fc*": {"name": "agc", "clip_factor": 0.05}}, "default": None},
        {"name": "global_norm", "max_norm": 1.0},
    ],
}

ROUNDINGS = {"chain value first": 2, "by name": 2, "chain value between": 3, "chain agc twice": 3}
"""How often an element is rounded: once, but a clamp rounds its bound to the dtype, and a second
pass scales (by norms of rounded elements) what the first one has rounded."""
