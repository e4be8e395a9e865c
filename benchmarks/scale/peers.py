"""What the peers' clipping sends, traced in the same way; each where it can be imported."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.scale import tracing
from benchmarks.scale.tracing import Collective, Named, trace
from distclip import GradClipper, clip_grad_norm_, policies

LOOSE = 1e9
"""A threshold that never clips."""


@dataclass(frozen=True)
class Peer:
    """One way to clip.

    Attributes:
        collectives: of one call.
        ops: dispatched to torch's kernels in one call, collectives among them.
        parameters: how many it clipped.
        version: of the library.
    """

    name: str
    collectives: tuple[Collective, ...]
    ops: int
    parameters: int
    version: str


def _measure(name: str, function: Callable[[], object], parameters: int, version: str) -> Peer:
    function()
    with trace() as seen:
        function()
    return Peer(name, tuple(seen.collectives), seen.ops, parameters, version)


def _tiny(layers: int) -> list[tracing.Weight]:
    """As many parameters as a Llama of so many layers, and next to no elements."""
    return tracing.llama(layers, 16, 16, 16, 16)


def on_dtensors(ranks: int, layout: str, layers: int = 32) -> list[Peer]:
    """torch, torchtitan and distclip, on the same DTensors."""
    found = []
    with tracing.world(ranks):
        named: Named = tracing.sharded(_tiny(layers), layout, tracing.mesh_of(layout, ranks))
        listed = [parameter for _, parameter in named]
        count, ours = len(listed), f"distclip, {layout}"
        ways: dict[str, Callable[[], object]] = {
            ours: GradClipper(named, policies.global_norm(LOOSE)).clip_,
            f"distclip clip_grad_norm_, {layout}": lambda: clip_grad_norm_(listed, LOOSE),
            f"torch clip_grad_norm_, {layout}": lambda: torch.nn.utils.clip_grad_norm_(
                listed, LOOSE
            ),
        }
        for name, way in ways.items():
            found.append(_measure(name, way, count, torch.__version__))
        if importlib.util.find_spec("torchtitan"):
            found.append(_torchtitan(f"torchtitan, {layout}", listed, None))
    return found


def torchtitan_pipeline(ranks: int, stages: int = 8, layers: int = 32) -> list[Peer]:
    """torchtitan's function on one of several pipeline stages, and distclip's."""
    if not importlib.util.find_spec("torchtitan"):
        return []
    with tracing.world(ranks):
        mesh = init_device_mesh("cpu", (stages, ranks // stages), mesh_dim_names=("pp", "fsdp"))
        named = tracing.sharded(_tiny(layers // stages), "fsdp2", mesh["fsdp"])
        listed = [parameter for _, parameter in named]
        return [_torchtitan("torchtitan, fsdp2 in 8 pipeline stages", listed, mesh["pp"])]


def _torchtitan(name: str, listed: list[nn.Parameter], pp_mesh: Any) -> Peer:
    from importlib.metadata import version

    from torchtitan.distributed.utils import clip_grad_norm_ as titan

    return _measure(
        name, lambda: titan(listed, LOOSE, pp_mesh=pp_mesh), len(listed), version("torchtitan")
    )


def fsdp1(ranks: int, layers: int = 32) -> Peer:
    """``FullyShardedDataParallel.clip_grad_norm_``."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with tracing.world(ranks):
        inner = nn.Sequential(*[nn.Linear(16, 16) for _ in range(layers)])
        model = FullyShardedDataParallel(inner, use_orig_params=True, device_id=torch.device("cpu"))
        model(torch.ones(1, 16)).sum().backward()
        return _measure(
            "FSDP1's clip_grad_norm_",
            lambda: model.clip_grad_norm_(LOOSE),
            2 * layers,
            torch.__version__,
        )


def deepspeed(ranks: int, stage: int) -> Peer | None:
    """What a step of a ZeRO engine sends but for the gathering of parameters; None without it."""
    if not importlib.util.find_spec("deepspeed"):
        return None
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="localhost",
        MASTER_PORT="29511",
        DS_ACCELERATOR="cpu",
    )
    with tracing.world(ranks):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters()),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": stage},
                "gradient_clipping": 1.0,
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": True},
            },
            dist_init_required=False,
        )
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 8, dtype=torch.bfloat16)).sum())
            with trace() as seen:
                engine.step()
        sent = tuple(each for each in seen.collectives if "allgather" not in each.op)
        # The ops are those of the whole step, so they are not given.
        return Peer(f"DeepSpeed ZeRO-{stage}, bf16", sent, 0, 8, deepspeed.__version__)


GROUPS: dict[str, Callable[[int], list[Peer]]] = {
    "fsdp2": lambda ranks: on_dtensors(ranks, "fsdp2"),
    "hsdp": lambda ranks: on_dtensors(ranks, "hsdp"),
    "fsdp2_tp": lambda ranks: on_dtensors(ranks, "fsdp2_tp"),
    "pipeline": torchtitan_pipeline,
    "fsdp1": lambda ranks: [fsdp1(ranks)],
    "zero1": lambda ranks: [peer for peer in [deepspeed(ranks, 1)] if peer],
    "zero3": lambda ranks: [peer for peer in [deepspeed(ranks, 3)] if peer],
}

if __name__ == "__main__":
    # One group a process: DeepSpeed and FSDP1 keep groups in globals. The last line is the result.
    warnings.simplefilter("ignore")
    print(json.dumps([asdict(peer) for peer in GROUPS[sys.argv[1]](int(sys.argv[2]))]))
