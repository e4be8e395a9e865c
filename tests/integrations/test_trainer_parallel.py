"""Models that transformers itself shards when it loads them, under the Trainer.

``from_pretrained(distributed_config=...)``: tensor parallelism by the model's own plan, experts,
FSDP2, replicas of it, and mixes of these on meshes of their own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("transformers.distributed.mixin", reason="transformers below 5.20")

import distclip
from tests.integrations.test_trainer import close

pytestmark = pytest.mark.filterwarnings("ignore")

POLICY: list[dict[str, Any]] = [
    {"name": "agc", "clip_factor": 0.5, "unit_dims": {"*.experts.*": [0, 1]}},
    {"name": "adagc", "warmup_steps": 2},
    {"name": "global_norm", "max_norm": 0.4},
]
UPDATES = 10

# Ranks that train on the same batch, and which part of the model is whole on each rank.
LAYOUTS: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    2: {
        "tensor parallel": ("dense", {"tp_size": 2, "tp_plan": "auto"}),
        "tensor parallel, experts cut inside": ("moe", {"tp_size": 2}),
        "tensor and expert parallel": ("moe", {"tp_size": 2, "ep_size": 2}),
        "FSDP2, expert parallel": ("moe", {"fsdp_size": 2, "ep_size": 2}),
    },
    4: {
        "FSDP2, tensor parallel": ("dense", {"fsdp_size": 2, "tp_size": 2}),
        "three meshes": ("moe", {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}),
        "HSDP, expert parallel": (
            "moe",
            {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
        ),
    },
}


def make(kind: str) -> Any:
    """Qwen3: the norms of its heads have partial gradients, which transformers sums."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {
        "vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "use_cache": False,
        "max_position_embeddings": 16, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "dense":
        return Qwen3ForCausalLM(Qwen3Config(**sizes))
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))


@pytest.mark.ranks(2, 4, timeout=300)
def test_weights_and_logged_norms_are_those_of_one_process(tmp_path: Path, world_size: int) -> None:
    from transformers.distributed import DistributedConfig

    from tests.integrations.trainers import ROWS, norms_of, reference, train, trainer_of, weights_of

    wanted = {kind: reference(POLICY, UPDATES, make(kind)) for kind in ("dense", "moe")}
    for label, (kind, sizes) in LAYOUTS[world_size].items():
        home = tmp_path / kind
        if dist.get_rank() == 0:
            make(kind).save_pretrained(home)
        dist.barrier()
        config = DistributedConfig(**sizes)
        model = type(make(kind)).from_pretrained(
            home, distributed_config=config, dtype=torch.float32
        )
        callback = distclip.transformers.ClipCallback({"policy": POLICY})
        # In one micro-batch: transformers 5.23 itself, under tensor parallelism, sums the gradients
        # of head norms over the ranks once per micro-batch, those of earlier ones included.
        trainer = trainer_of(
            tmp_path,
            "loaded",
            [callback],
            updates=UPDATES,
            made=model,
            per_device_train_batch_size=ROWS // config.dp_size,
            gradient_accumulation_steps=1,
        )
        train(trainer)
        want, norms = wanted[kind]
        assert norms_of(trainer) == pytest.approx(norms, rel=1e-5), label
        try:
            close(weights_of(trainer), want, 1e-5)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from error
        assert callback.last_report is not None
        assert callback.last_report.coefficient < 0.9
