"""How a layout is launched: the commands, one a node, and the environment of the ranks."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distclip.errors import ConfigurationError
from distclip.tools.simulate.task import TASK

SIMULATED_LAYOUTS = {
    "single": "one process, the reference",
    "torchrun": "ranks of torchrun; the script distributes itself",
    "ddp": "Accelerate, DistributedDataParallel",
    "fsdp1": "Accelerate, FullyShardedDataParallel",
    "fsdp2": "Accelerate, fully_shard",
    "zero0": "DeepSpeed through Accelerate, stage 0",
    "zero1": "stage 1: optimizer state sharded",
    "zero2": "stage 2: gradients too",
    "zero3": "stage 3: weights too",
}
"""Layouts that a script can be simulated under: name -> description."""

RANK_MODULE = "distclip.tools.simulate"
LOOPBACK = "distclip.testing.ranks.loopback"
"""Runs a launcher so that its stores listen on the loopback interface only."""
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher around this command would have set."""


@dataclass(frozen=True)
class Launch:
    """How one layout is launched.

    Attributes:
        layout: its name.
        world: how many ranks.
        commands: one a node. ``{address}``, ``{head}`` and ``{interface}`` in the words stand for
            the node's own address, that of node 0, and the name of the network interface.
        environment: of all of it, beside what is inherited.
    """

    layout: str
    world: int
    commands: tuple[tuple[str, ...], ...]
    environment: dict[str, str]


def uses_accelerate(layout: str) -> bool:
    """Whether ``accelerate launch`` starts it."""
    return layout not in ("single", "torchrun")


def check_layout(layout: str) -> None:
    """Refuse a layout, or a number of ranks, that cannot be launched.

    Raises:
        ConfigurationError: names the layout, or the package that is missing and its extra.
    """
    if layout not in SIMULATED_LAYOUTS:
        raise ConfigurationError(
            f"simulate: no layout {layout!r}; there are {', '.join(SIMULATED_LAYOUTS)}"
        )
    needed = {"accelerate": "'distclip[accelerate]'"} if uses_accelerate(layout) else {}
    if layout.startswith("zero"):
        # Accelerate 1.15 looks up the version of transformers as soon as DeepSpeed is asked for.
        needed |= {"deepspeed": "'distclip[deepspeed]'", "transformers": "transformers"}
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ConfigurationError(
                f"simulate: layout {layout!r} needs {package}, which is not installed: "
                f"pip install {extra}"
            )


def launch(
    layout: str, folder: Path, ranks: int, nodes: int = 1, *, group_for_single: bool = False
) -> Launch:
    """The launch of one layout.

    Args:
        layout: one of ``SIMULATED_LAYOUTS``.
        folder: where its task and its Accelerate configuration lie.
        ranks: over all nodes.
        nodes: each with a launcher of its own; divides ``ranks``.
        group_for_single: give the one process of ``single`` a world of 1 to join.
    """
    environment = {TASK: str(folder / "task.json"), "OMP_NUM_THREADS": "1"}
    # Hidden from layouts without Accelerate too: a script may choose its device by itself.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "{interface}"}
    if layout == "single":
        if group_for_single:
            environment |= dict.fromkeys(("RANK", "LOCAL_RANK"), "0")
            environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {"ACCELERATE_USE_CPU": "true"}
        return Launch(layout, 1, ((sys.executable, "-m", RANK_MODULE),), environment)
    port = free_port()
    if layout == "torchrun":
        commands = tuple(_torchrun(ranks, nodes, node, port) for node in range(nodes))
        return Launch(layout, ranks, commands, environment)
    environment |= {"DISTCLIP_CPU": "1"}
    if layout.startswith("zero"):
        environment |= {"DS_ACCELERATOR": "cpu"}
    commands = tuple(_accelerate(layout, folder, ranks, nodes, node, port) for node in range(nodes))
    return Launch(layout, ranks, commands, environment)


def _torchrun(ranks: int, nodes: int, node: int, port: int) -> tuple[str, ...]:
    return (
        sys.executable, "-m", LOOPBACK, "torch.distributed.run",
        "--nnodes", str(nodes), "--nproc-per-node", str(ranks // nodes),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{{head}}:{port}",
        # Said, since torchrun would ask the host's name for its address.
        "--rdzv-conf", f"is_host={int(node == 0)}", "--local-addr", "{address}",
        "--rdzv-id", f"distclip-{port}",
        "-m", RANK_MODULE,
    )  # fmt: skip


def _accelerate(
    layout: str, folder: Path, ranks: int, nodes: int, node: int, port: int
) -> tuple[str, ...]:
    path = folder / f"accelerate{node}.yaml"
    path.write_text(yaml.safe_dump(accelerate_config(layout, ranks, nodes, node), sort_keys=False))
    network = ("--main_process_ip", "{head}", "--main_process_port", str(port))
    return (
        sys.executable, "-m", LOOPBACK, "accelerate.commands.launch", "--config_file", str(path),
        *network, "-m", RANK_MODULE,
    )  # fmt: skip


def accelerate_config(layout: str, ranks: int, nodes: int = 1, node: int = 0) -> dict[str, Any]:
    """What ``accelerate launch`` reads: as ``configs/accelerate/*_cpu.yaml``, and why there."""
    shared: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "use_cpu": True,
        "num_machines": nodes,
        "machine_rank": node,
        "num_processes": ranks,
        "same_network": True,
        "mixed_precision": "no",
    }
    if layout == "ddp":
        return {**shared, "distributed_type": "MULTI_GPU"}
    if layout.startswith("zero"):
        # DeepSpeed's own clipping, 1.0 where the key is missing, would come on top.
        engine: dict[str, Any] = {"zero_stage": int(layout[-1]), "gradient_clipping": 0.0}
        if nodes > 1:
            engine |= {"deepspeed_multinode_launcher": "standard"}
        return {**shared, "distributed_type": "DEEPSPEED", "deepspeed_config": engine}
    sharded = {
        "fsdp_version": int(layout[-1]),
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    }
    if layout == "fsdp1":
        sharded |= {
            "fsdp_sharding_strategy": "FULL_SHARD",
            "fsdp_use_orig_params": True,
            "fsdp_sync_module_states": False,
        }
    else:
        sharded |= {"fsdp_reshard_after_forward": True}
    return {**shared, "distributed_type": "FSDP", "fsdp_config": sharded}


def inherited(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the launches inherit: nothing of a launch that this command itself runs in."""
    environment = os.environ if environment is None else environment
    prefixes = ("ACCELERATE_", "FSDP_", "DISTCLIP_", "TORCHELASTIC_", "DEEPSPEED_")
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(prefixes) and name not in LAUNCHED
    }


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
