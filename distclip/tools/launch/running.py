"""Behind ``distclip run``: a training script is prepared for clipping, and then run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from distclip import clipper
from distclip import config as configuration
from distclip.common.environment import CONFIG_VARIABLE
from distclip.errors import ConfigurationError, DistclipError
from distclip.integrations import hooks
from distclip.tools.launch import accelerate_cpu
from distclip.tools.launch.leaving import let_gloo_finish
from distclip.tools.launch.narration import Narration
from distclip.tools.launch.script import Script

if TYPE_CHECKING:
    from distclip.tools.check import StepCheck


def prepare(
    program: Script,
    path: Path | None,
    *,
    cpu: bool,
    check_steps: int | None,
    quiet: bool = False,
) -> Callable[[], None]:
    """Check everything that can be known before the script runs, and install the integrations.

    Args:
        program: the script.
        path: the configuration; None to take it from a DeepSpeed JSON.
        cpu: whether to give an Accelerate launch real ranks on CPU.
        check_steps: how many steps to hold against gathered tensors; None for no check.
        quiet: no line at the first step and at the end.

    Returns:
        A function that runs the script and exits as it does.

    Raises:
        DistclipError: no configuration, or one that cannot be meant; a script that is not there.
    """
    program.check()
    if path is None and not names_deepspeed(program):
        raise ConfigurationError(
            f"run: no configuration; give --config policy.yaml before the script, or set "
            f"{CONFIG_VARIABLE}=policy.yaml in the environment (for DeepSpeed it may also be the "
            f'"distclip" section of its JSON)'
        )
    program.prepare()
    loaded = None if path is None else configuration.load(path)
    if path is not None:
        # Absolute, for a script that changes its directory and for processes that it starts.
        os.environ[CONFIG_VARIABLE] = str(path.absolute())
    prepare_cpu(cpu)
    hooks.install(loaded)
    accelerate_cpu.watch_accelerators()
    checking = None if check_steps is None else _check(check_steps)

    def start() -> None:
        narration = None if quiet else Narration()
        code = program.run()
        if narration is not None:
            narration.conclude()
        if code in (None, 0):
            warn_if_idle()
            if checking is not None:
                checking.conclude()
        let_gloo_finish()
        sys.exit(code)

    return start


def _check(steps: int) -> StepCheck:
    from distclip.tools.check import StepCheck  # with the testing kit, which no other run needs

    return StepCheck(steps).install()


def names_deepspeed(program: Script) -> bool:
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


def prepare_cpu(cpu: bool) -> None:
    """Give Accelerate real gloo ranks on CPU, where ``cpu`` or the environment asks for it."""
    if cpu:  # ranks of this machine: a store of theirs is nobody else's
        from distclip.testing.ranks import loopback

        loopback.listen_on_loopback()
    try:
        accelerate_cpu.become_cpu_rank(cpu=cpu)
    except ImportError as error:
        if find_spec("deepspeed") is not None:  # needs no Accelerate to have its ranks
            return
        raise DistclipError(
            f"run: --cpu gives ranks to Accelerate, which cannot be imported ({error}); "
            f"pip install 'distclip[accelerate]', or leave --cpu away for a script that "
            f"initialises its own process group"
        ) from None


def warn_if_idle() -> None:
    """Warn if the script ended and no integration ever clipped."""
    if hooks.activated or clipper.in_use or os.environ.get("RANK", "0") != "0":
        return
    frameworks = {n: m for n, m in hooks.INTEGRATIONS.items() if n != "torch_scripts"}
    seen = [n for n, modules in frameworks.items() if any(m in sys.modules for m in modules)]
    if seen:
        why = f"{' and '.join(seen)} was imported, but no optimizer was prepared with it, and none"
    else:
        why = "no optimizer"
    why += " of torch.optim has stepped"
    print(
        f"distclip: warning: run clipped nothing: {why}. Unless the script clips with distclip "
        f"itself, add `distclip.from_config(os.environ[{CONFIG_VARIABLE!r}], model)"
        f".attach(optimizer)`",
        file=sys.stderr,
        flush=True,
    )
