"""``distclip run``: a training script under a clipping policy, without a change to the script."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from distclip.cli.kinds import MODULE, SCRIPT_ARGS, SCRIPT_NAME, a_count, a_file
from distclip.common.environment import CONFIG_VARIABLE
from distclip.tools.launch.script import Script

CONTEXT = {"allow_interspersed_args": False}
"""The first argument that is no option is the script; all that follows belongs to the script."""

pending: list[Callable[[], None]] = []
"""What :func:`run` prepared, for the entry point to start once the command line is done."""


def from_launcher(context: typer.Context, local_rank: str | None) -> None:
    """Keep the rank that a launcher wrote before the name of the command."""
    context.obj = [] if local_rank is None else [f"--local_rank={local_rank}"]


def run(
    context: typer.Context,
    script: Annotated[str, SCRIPT_NAME],
    arguments: Annotated[list[str] | None, SCRIPT_ARGS] = None,
    config: Annotated[
        Path | None,
        a_file(
            f"YAML or JSON; otherwise ${CONFIG_VARIABLE}, or a DeepSpeed JSON.", "--config", "-c"
        ),
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Under accelerate launch: gloo ranks on CPU.")
    ] = False,
    module: Annotated[bool, MODULE] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the first steps with a float64 reference.")
    ] = False,
    check_steps: Annotated[int, a_count("Steps that --check compares.")] = 3,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print no line at the first step and at the end.")
    ] = False,
) -> None:
    """Run a training script under a clipping policy.

    distclip run --config policy.yaml train.py --lr 0.1

    torchrun --nproc_per_node 8 -m distclip run -c policy.yaml train.py --lr 0.1

    accelerate launch ... -m distclip run -c policy.yaml train.py --lr 0.1

    The script needs no change: plain PyTorch (DDP, FSDP), Accelerate, the Trainer, Lightning,
    DeepSpeed. Each update is clipped once, by the policy.
    """
    from distclip.tools.launch.running import prepare

    if config is None and os.environ.get(CONFIG_VARIABLE):
        config = Path(os.environ[CONFIG_VARIABLE])
    program = Script(script, [*context.obj, *(arguments or ())], module=module)
    pending.append(
        prepare(program, config, cpu=cpu, check_steps=check_steps if check else None, quiet=quiet)
    )
