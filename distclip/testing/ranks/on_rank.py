"""Fixtures of tests on ranks whose values cannot be sent, and are made on the rank instead."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard


@dataclass(frozen=True, eq=False)
class OnRank:
    """Something to be made on each rank, by ``make(*arguments)``."""

    make: Callable[..., Any]
    arguments: tuple[Any, ...]


def on_rank(make: Callable[..., Any], *arguments: Any) -> Any:
    """The value of a pytest fixture that is made on each rank, before the test runs there.

    ::

        @pytest.fixture
        def model(mesh):
            return on_rank(build_and_shard, mesh)

    Args:
        make: importable, defined in a test module, or local; called on every rank of a test that is
            marked with ``ranks``.
        *arguments: for it. Other values made on the rank may be among them; each is made once.

    Returns:
        A stand-in, for which the test gets what ``make`` returned.
    """
    return OnRank(make, arguments)


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with what is to be made here made, each once, in this order."""
    made: dict[int, Any] = {}

    def value_of(value: Any) -> Any:
        if not isinstance(value, OnRank):
            return value
        if id(value) not in made:
            made[id(value)] = value.make(*map(value_of, value.arguments))
        return made[id(value)]

    return {name: value_of(value) for name, value in values.items()}


def make_mesh() -> DeviceMesh:
    """Over all ranks, its one dim called ``"shard"``."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))


def make_fsdp2(build: Callable[[], nn.Module], mesh: DeviceMesh) -> nn.Module:
    """A model, the same on all ranks, sharded over the mesh."""
    torch.manual_seed(0)
    model = build()
    fully_shard(model, mesh=mesh)
    return model


def make_zero(build: Callable[[], nn.Module], stage: int) -> Any:
    """A model, the same on all ranks, in a DeepSpeed engine that clips nothing."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # The shared-memory op would be compiled at first use, which takes most of a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    model = build()
    document = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=document, dist_init_required=False
    )
    return engine
