"""``distclip run``: a training script under a clipping policy, without a change to the script."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

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
    script: Annotated[str, typer.Argument(help="Script, or module with -m.", show_default=False)],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="Passed to it as they are.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help=f"YAML or JSON; otherwise ${CONFIG_VARIABLE}, or the section of a DeepSpeed JSON.",
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Real gloo ranks on CPU.")] = False,
    module: Annotated[bool, typer.Option("-m", help="Run a module, as python -m does.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Hold the first steps against gathered tensors.")
    ] = False,
    check_steps: Annotated[int, typer.Option(min=1, help="How many steps --check checks.")] = 3,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No line at the first step and at the end.")
    ] = False,
) -> None:
    """Run a training script under a clipping policy, alone or under any launcher.

    torchrun --nproc_per_node 8 -m distclip run --config policy.yaml train.py --lr 0.1

    accelerate launch ... -m distclip run --config policy.yaml train.py --lr 0.1

    Any torch script, without a change: plain PyTorch (DDP, FSDP), Accelerate, the Trainer,
    Lightning, DeepSpeed. Each update is clipped once, by the policy.
    """
    from distclip.tools.launch.running import prepare

    if config is None and os.environ.get(CONFIG_VARIABLE):
        config = Path(os.environ[CONFIG_VARIABLE])
    program = Script(script, [*context.obj, *(arguments or ())], module=module)
    pending.append(
        prepare(program, config, cpu=cpu, check_steps=check_steps if check else None, quiet=quiet)
    )
