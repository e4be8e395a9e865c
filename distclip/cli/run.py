"""``distclip run``: a training script under a clipping policy, without a change to the script."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distclip import clipper
from distclip import config as configuration
from distclip.errors import ConfigurationError, DistclipError
from distclip.integrations import hooks
from distclip.tools.launch.leaving import let_gloo_finish
from distclip.tools.launch.script import Script

if TYPE_CHECKING:
    from distclip.tools.check import StepCheck

ENVIRONMENT = "DISTCLIP_CONFIG"

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
            help=f"YAML or JSON; otherwise ${ENVIRONMENT}, or the section of a DeepSpeed JSON.",
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Real gloo ranks on CPU.")] = False,
    module: Annotated[bool, typer.Option("-m", help="Run a module, as python -m does.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Hold the first steps against gathered tensors.")
    ] = False,
    check_steps: Annotated[int, typer.Option(min=1, help="How many steps --check checks.")] = 3,
) -> None:
    """Run a training script under a clipping policy, alone or under any launcher.

    accelerate launch ... -m distclip run --config policy.yaml train.py --lr 0.1
    """
    path = _path(config)
    program = Script(script, [*context.obj, *(arguments or ())], module=module)
    program.check()
    if path is None and not _names_deepspeed(program):
        raise ConfigurationError(
            f"run: no configuration; give --config policy.yaml before the script, or set "
            f"{ENVIRONMENT}=policy.yaml in the environment (for DeepSpeed it may also be the "
            f'"distclip" section of its JSON)'
        )
    program.prepare()
    loaded = None if path is None else configuration.load(path)
    if path is not None:
        # Absolute, for a script that changes its directory and for processes that it starts.
        os.environ[ENVIRONMENT] = str(path.absolute())
    _prepare_cpu(cpu)
    hooks.install(loaded)
    checking = _check(check_steps) if check else None

    def start() -> None:
        code = program.run()
        if code in (None, 0):
            _warn_if_idle()
            if checking is not None:
                checking.conclude()
        let_gloo_finish()
        sys.exit(code)

    pending.append(start)


def _check(steps: int) -> StepCheck:
    from distclip.tools.check import StepCheck  # with the testing kit, which no other run needs

    return StepCheck(steps).install()


def _path(option: Path | None) -> Path | None:
    if option is not None:
        return option
    return Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None


def _names_deepspeed(program: Script) -> bool:
    """Whether a run without a configuration may find one in a DeepSpeed JSON.

    The engine itself refuses a JSON without one; this spares other users to learn so late of an
    option that they forgot.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes"):
        return True
    words = [program.target, *program.arguments]
    if any("deepspeed" in word.lower() for word in words):
        return True
    try:
        return not program.module and b"deepspeed" in Path(program.target).read_bytes()
    except OSError:  # a folder, or nothing: `check` tells
        return False


def _prepare_cpu(cpu: bool) -> None:
    from distclip.integrations import accelerate_cpu

    if cpu:  # ranks of this machine: a store of theirs is nobody else's
        from distclip.testing.ranks import loopback

        loopback.install()
    try:
        accelerate_cpu.install(cpu=cpu)
    except ImportError as error:
        if find_spec("deepspeed") is not None:  # needs no Accelerate to have its ranks
            return
        raise DistclipError(
            f"run: --cpu gives ranks to Accelerate, which cannot be imported ({error}); "
            f"pip install 'distclip[accelerate]', or leave --cpu away for a script that "
            f"initialises its own process group"
        ) from None


def _warn_if_idle() -> None:
    """Say so if the script came to its end and no integration ever clipped."""
    if hooks.activated or clipper.in_use or os.environ.get("RANK", "0") != "0":
        return
    seen = [name for name, module in hooks.INTEGRATIONS.items() if module in sys.modules]
    if seen:
        why = f"{' and '.join(seen)} was imported, but no optimizer was prepared with it"
    else:
        why = (
            "the script uses no framework that distclip takes up by itself "
            f"({', '.join(hooks.INTEGRATIONS)})"
        )
    typer.echo(
        f"distclip: warning: run clipped nothing: {why}. Unless the script clips with distclip "
        f"itself, add `distclip.from_config(os.environ[{ENVIRONMENT!r}], model).attach(optimizer)`",
        err=True,
    )
