"""Whether an ``accelerate launch`` asks for CPU ranks: in the environment, or its command line."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

from distclip.common.foreign import in_one_line
from distclip.errors import ConfigurationError

_logger = logging.getLogger(__name__)

CPU_SWITCH = "DISTCLIP_CPU"
_TRUE = frozenset({"1", "true", "yes", "on", "y", "t"})
_FALSE = frozenset({"", "0", "false", "no", "off", "n", "f"})

# Programs behind which the arguments of a launch stand, as they appear in a command line.
_LAUNCH_PROGRAMS = frozenset(
    {"accelerate", "accelerate_cli.py", "accelerate.commands.accelerate_cli"}
)
_LAUNCH_ONLY_PROGRAMS = frozenset({"accelerate-launch", "accelerate.commands.launch"})


def requested(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this process was asked to be a CPU rank.

    Args:
        environ: the environment of the rank; ``os.environ`` when None.

    Raises:
        ConfigurationError: ``DISTCLIP_CPU`` is neither a yes nor a no.
    """
    environ = os.environ if environ is None else environ
    if CPU_SWITCH in environ:
        return flag(environ, CPU_SWITCH)
    if environ.get("ACCELERATE_USE_CPU", "").strip().lower() in _TRUE:
        return True
    launched = asked_launch() if is_launched_rank(environ) else None
    return launched is not None and launched.use_cpu


@dataclass(frozen=True)
class AskedLaunch:
    """What the command line and the YAML of ``accelerate launch`` say."""

    use_cpu: bool
    num_processes: int
    distributed_type: str
    config_file: str


def flag(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes; refuses what is neither a yes nor a no."""
    value = environ.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ConfigurationError(f"{name}={environ[name]!r} is neither a yes nor a no: set 1 or 0.")


def is_launched_rank(environ: Mapping[str, str]) -> bool:
    """Whether ``accelerate launch`` started this process."""
    # Set by every branch of `accelerate launch`: it spares other programs the look at the parent.
    return "ACCELERATE_MIXED_PRECISION" in environ


@functools.lru_cache(maxsize=1)
def asked_launch() -> AskedLaunch | None:
    """Read the launch that started this process; None when it cannot be known.

    ``use_cpu`` of the YAML reaches no environment variable of the ranks (only Accelerate's
    single-process launcher exports it), so it is read where the launcher read it. Whatever goes
    wrong here means "not asked": :func:`check_ranks` then says what to do.
    """
    try:
        import psutil

        launcher = psutil.Process(os.getppid())
        arguments = _launch_arguments(launcher.cmdline())
        return None if arguments is None else _read_launch(arguments, launcher.cwd())
    except (Exception, SystemExit) as error:  # another program's arguments and files
        _logger.debug("the accelerate launch command could not be read: %r", error)
        return None


def _launch_arguments(command: list[str]) -> list[str] | None:
    """The arguments of ``accelerate launch`` in a process's command line, None if it is not one."""
    for index, word in enumerate(command):
        program = os.path.basename(word).removesuffix(".exe")
        if program in _LAUNCH_ONLY_PROGRAMS:
            return command[index + 1 :]
        if program in _LAUNCH_PROGRAMS and command[index + 1 : index + 2] == ["launch"]:
            return command[index + 2 :]
    return None


def _read_launch(arguments: list[str], folder: str) -> AskedLaunch | None:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    # Accelerate's own parser: it knows where the options end and the user's script begins.
    options = launch_command_parser().parse_args(arguments)
    path = os.path.join(folder, options.config_file or default_config_file)
    config = load_config_from_file(path) if os.path.isfile(path) else None
    distributed_type = getattr(config, "distributed_type", "NO")
    return AskedLaunch(
        use_cpu=bool(options.cpu or getattr(config, "use_cpu", False)),
        num_processes=int(options.num_processes or getattr(config, "num_processes", 1) or 1),
        distributed_type=str(getattr(distributed_type, "value", distributed_type)),
        config_file=path if config is not None else "",
    )


def faults_of_config(path: str | None = None, *, devices: int = 0) -> list[str]:
    """What a YAML of ``accelerate launch`` asks for and will not get, each with the mend.

    Args:
        path: of the file; None: Accelerate's default one, if there is one.
        devices: how many GPUs this machine has.

    Raises:
        ConfigurationError: a file that cannot be read.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    path = path or default_config_file
    if not os.path.isfile(path):
        return []
    try:
        config = load_config_from_file(path)
        kind = str(getattr(config.distributed_type, "value", config.distributed_type))
        ranks = int(getattr(config, "num_processes", 1) or 1)
    except Exception as error:  # whatever a file may hold
        raise ConfigurationError(
            f"{in_one_line(path)}: Accelerate cannot read it: {in_one_line(error, 300)}"
        ) from None
    on_cpu = bool(getattr(config, "use_cpu", False))
    if ranks > 1 and kind in ("MULTI_CPU", "NO"):
        return [
            f"{path}: distributed_type {kind} starts one process without an MPI launcher, not "
            f"{ranks}; write `distributed_type: MULTI_GPU` (or FSDP) with `use_cpu: true`, and "
            f"launch with `-m distclip run`"
        ]
    if ranks > 1 and not on_cpu and devices == 0:
        return [
            f"{path}: {ranks} processes of {kind} on a machine without GPUs would each train "
            f"alone; add `use_cpu: true` and launch with `-m distclip run`, or pass it --cpu"
        ]
    return []
