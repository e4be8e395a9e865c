"""Real gloo ranks for an ``accelerate launch`` on a machine without GPUs.

Left to itself, Accelerate picks no communication backend without an accelerator device: FSDP2 then
trains N unsynchronised copies without a word, FSDP1 and DDP likewise believe that they are alone
(accelerate 1.15, ``PartialState._prepare_backend`` and ``AcceleratorState.__init__``). This module
gives each rank the backend it lacks, and then *verifies* that the distribution is really there.

It acts only when asked, by one of

* ``distclip run --cpu``,
* ``DISTCLIP_CPU=1`` in the environment (``DISTCLIP_CPU=0`` forbids it),
* ``use_cpu: true`` in the YAML of ``accelerate launch`` (or ``ACCELERATE_USE_CPU=true``), which
  Accelerate itself does not pass on to the ranks of a multi-process launch.

Call order in a rank: :func:`become_cpu_rank` and :func:`watch_accelerators` before the user's
script. The second has every ``Accelerator.prepare`` end with :func:`verify_ranks`, or, where the
mode was not asked for, begin with :func:`check_ranks`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from types import ModuleType, SimpleNamespace
from typing import Any

from distclip.errors import DistclipError
from distclip.integrations import hooks
from distclip.integrations.patches import replace
from distclip.tools.launch.accelerate_cpu_asked import (
    CPU_SWITCH,
    asked_launch,
    flag,
    is_launched_rank,
    requested,
)

_logger = logging.getLogger(__name__)

# What FSDP cannot do with parameters on CPU. Both settings only say how the *initial* weights
# reach the ranks; without them each rank keeps the ones that it made or loaded itself.
_GPU_ONLY = ("FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_SYNC_MODULE_STATES")


def become_cpu_rank(*, cpu: bool = False) -> bool:
    """Make this process a CPU rank, if that was asked for; returns whether it was.

    To be called before an ``Accelerator`` or a ``PartialState`` exists. Hides CUDA devices from
    this process, names CPU as Accelerate's device, and has Accelerate initialise gloo. A second
    call does nothing.

    Args:
        cpu: True is the explicit request of ``distclip run --cpu``; it is also left in
            ``DISTCLIP_CPU``, so that child processes and :func:`requested` agree.

    Raises:
        DistclipError: Accelerate's state exists already, or this Accelerate has no
            ``PartialState._prepare_backend``.
    """
    if cpu:
        os.environ[CPU_SWITCH] = "1"
    if not requested(os.environ):
        return False
    os.environ[CPU_SWITCH] = "1"
    _set_environment(os.environ)
    _patch_backend()
    return True


def watch_accelerators() -> None:
    """Check the ranks of every ``Accelerator`` of this process, once it prepares something.

    Raises:
        DistclipError: from ``prepare``: what :func:`verify_ranks` and :func:`check_ranks` raise.
    """
    hooks.on_import("accelerate.accelerator", _watch)
    if CPU_SWITCH in os.environ and requested():
        hooks.on_import("deepspeed.ops", without_compiler)


def without_compiler(module: ModuleType) -> None:
    """Leave DeepSpeed's shared-memory collectives away, which each rank would compile for 40 s."""
    module.__compatible_ops__["deepspeed_shm_comm"] = False


def _watch(module: ModuleType) -> None:
    def prepare(original: Callable[..., Any], accelerator: Any, *args: Any, **kwargs: Any) -> Any:
        on_cpu = requested()
        if not on_cpu:
            check_ranks(accelerator)
        prepared = original(accelerator, *args, **kwargs)
        models = original.__name__ != "prepare_optimizer" and not kwargs.get("evaluation_mode")
        if on_cpu and models:
            verify_ranks(accelerator, *(prepared if isinstance(prepared, tuple) else (prepared,)))
        return prepared

    for name in ("prepare", "prepare_model", "prepare_optimizer"):
        replace(module.Accelerator, name, prepare)


def verify_ranks(accelerator: Any, *prepared: Any) -> None:
    """Refuse to go on unless the ranks, and the distribution of the models, are really there.

    Call it on every rank after ``Accelerator.prepare``. Issues no collective; every rank comes to
    the same verdict.

    Args:
        accelerator: the ``accelerate.Accelerator`` of this rank.
        prepared: what ``prepare`` returned. Without it DDP cannot be checked: there the
            accelerator itself remembers only the model inside the wrapper.

    Raises:
        DistclipError: says what is missing, where, and the mend.
    """
    world_size = _world_size(os.environ)
    _verify_world(accelerator, world_size)
    if str(accelerator.device.type) != "cpu":
        raise DistclipError(
            f"CPU mode: the accelerator's device is {accelerator.device}, not cpu. An Accelerator "
            "or PartialState was made before distclip took over, or the script chose a device. "
            "Start the script with `distclip run --cpu`, and leave the device to Accelerate."
        )
    if world_size > 1 or flag(os.environ, "ACCELERATE_USE_FSDP"):
        _verify_models(accelerator, prepared)


def check_ranks(accelerator: Any) -> None:
    """Refuse a launch of several ranks in which Accelerate trains each one alone.

    For runs in which the CPU mode was not asked for; on machines with a working accelerator device
    it passes.

    Raises:
        DistclipError: says what was launched, what became of it, and to pass ``--cpu``.
    """
    environ = os.environ
    world_size = _world_size(environ)
    if world_size > 1 and accelerator.num_processes == 1:
        engine = _engine(environ)
        raise DistclipError(
            f"{world_size} processes were launched for {engine} (WORLD_SIZE={world_size}), but "
            "Accelerate found no device to communicate with and believes to be alone "
            f"(num_processes=1, device {accelerator.device}): each process would train its own "
            "copy, without synchronisation. To train on CPU with real gloo ranks pass --cpu "
            "(`accelerate launch ... -m distclip run --cpu ...`), set DISTCLIP_CPU=1, or say "
            "`use_cpu: true` in the YAML. If this machine should have GPUs, see why "
            "torch.cuda.is_available() is False."
        )
    _check_spawned(accelerator)


def examine_launch() -> str:
    """Whether this launch gives Accelerate real ranks, found by building an ``Accelerator``.

    For ``distclip doctor``; call it on every rank of the launch.

    Returns:
        How many ranks there are, and of what kind, in words.

    Raises:
        DistclipError: ranks that each believe to be alone, with the mend.
    """
    asked = become_cpu_rank()
    from accelerate import Accelerator

    accelerator = Accelerator()
    if asked:
        verify_ranks(accelerator)
    else:
        check_ranks(accelerator)
    kind = accelerator.distributed_type.value
    return f"{accelerator.num_processes} ranks on {accelerator.device.type}, {kind}"


# ---- the rank --------------------------------------------------------------------------------


def _set_environment(environ: MutableMapping[str, str]) -> None:
    environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's own choice
    if "LOCAL_RANK" in environ:  # without it: one process, or MPI, which Accelerate serves itself
        # Accelerate's own switch means "plain DDP" and would drop FSDP and DeepSpeed in silence.
        environ["ACCELERATE_USE_CPU"] = "false"
    # FSDP2 chooses the device of its default mesh by what torch sees, not by what Accelerate says.
    environ["CUDA_VISIBLE_DEVICES"] = ""
    # Set in any case: FSDP may also come later, by a plugin that the script passes.
    changed = [name for name in _GPU_ONLY if environ.get(name, "").lower() == "true"]
    environ.update(dict.fromkeys(_GPU_ONLY, "false"))
    if environ.get("FSDP_VERSION") == "2" and "FSDP_SYNC_MODULE_STATES" in changed:
        changed.remove("FSDP_SYNC_MODULE_STATES")  # the launcher's default, read by FSDP1 alone
    if changed and environ.get("RANK", "0") == "0":
        _logger.warning(
            "CPU mode: %s cannot be true on CPU and is set to false; seed all ranks alike, or load "
            "the same checkpoint on each.",
            " and ".join(changed),
        )


def _patch_backend() -> None:
    """Have ``PartialState`` choose gloo, and a distributed type that FSDP and DeepSpeed need."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    original = getattr(PartialState, "_prepare_backend", None)
    if original is None:
        import accelerate

        raise DistclipError(
            "CPU mode needs accelerate's PartialState._prepare_backend, which accelerate "
            f"{accelerate.__version__} does not have: install a version that distclip supports "
            "(1.15 does)."
        )
    if getattr(original, "_distclip_cpu", False):
        return
    if PartialState._shared_state != {}:
        raise DistclipError(
            "CPU mode came too late: an Accelerator or PartialState exists already in this "
            "process. Start the script with `distclip run --cpu`, or call install() before the "
            "first one."
        )

    def prepare_backend(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        environ = os.environ
        if int(environ.get("LOCAL_RANK", "-1")) == -1:  # no launcher: one process, or MPI
            return original(self, *args, **kwargs)
        sharded = flag(environ, "ACCELERATE_USE_FSDP") or flag(environ, "ACCELERATE_USE_DEEPSPEED")
        # Accelerate upgrades to FSDP only from a multi-GPU type. Plain DDP must not have that type:
        # it would be given device_ids, which DistributedDataParallel refuses for CPU modules.
        return "gloo", DistributedType.MULTI_GPU if sharded else DistributedType.MULTI_CPU

    replace(PartialState, "_prepare_backend", prepare_backend)
    PartialState._prepare_backend._distclip_cpu = True
    _accept_parallelism()


def _accept_parallelism() -> None:
    """Have a ``ParallelismConfig`` (tensor parallelism) accept CPU ranks as it does GPUs."""
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DistributedType

    def validate(original: Any, self: Any, accelerator: Any) -> None:
        if accelerator.distributed_type != DistributedType.MULTI_CPU or self.total_size == 1:
            original(self, accelerator)
            return
        names = ("num_processes", "is_fsdp2", "distributed_type", "is_main_process")
        asked = {name: getattr(accelerator, name) for name in names}
        original(self, SimpleNamespace(multi_device=True, **asked))

    replace(ParallelismConfig, "_validate_accelerator", validate)


# ---- the verdict -----------------------------------------------------------------------------


def _world_size(environ: Mapping[str, str]) -> int:
    return int(environ.get("WORLD_SIZE", "1") or 1)


def _engine(environ: Mapping[str, str]) -> str:
    """Which engine the launch names, in the words of its user."""
    if flag(environ, "ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed"
    if flag(environ, "ACCELERATE_USE_FSDP"):
        return f"FSDP{environ.get('FSDP_VERSION', '1')}"
    return "DDP"


def _verify_world(accelerator: Any, world_size: int) -> None:
    import torch.distributed as dist

    _check_spawned(accelerator)
    if world_size == 1:
        return
    seen = dist.get_world_size() if dist.is_available() and dist.is_initialized() else None
    if seen == world_size == accelerator.num_processes:
        return
    found = "no process group" if seen is None else f"a process group of {seen}"
    raise DistclipError(
        f"CPU mode: {world_size} ranks were launched (WORLD_SIZE={world_size}), but this process "
        f"has {found} and accelerator.num_processes={accelerator.num_processes}. Make no process "
        "group of your own, and no Accelerator before `distclip run --cpu` has started the script."
    )


def _check_spawned(accelerator: Any) -> None:
    """A MULTI_CPU launch without MPI starts a single process, whatever num_processes says."""
    if accelerator.num_processes > 1 or not is_launched_rank(os.environ):
        return
    launched = asked_launch()
    if launched is None or launched.num_processes <= 1 or _world_size(os.environ) > 1:
        return
    where = f" in {launched.config_file}" if launched.config_file else ""
    raise DistclipError(
        f"accelerate launch was asked for {launched.num_processes} processes{where}, but started "
        f"one: for distributed_type {launched.distributed_type} (and with its own --cpu) it relies "
        "on an MPI launcher. Write `distributed_type: MULTI_GPU` (or FSDP) and `use_cpu: true` in "
        "the YAML, as configs/accelerate/ddp_cpu.yaml has it, and leave --cpu off `accelerate "
        "launch`. (--cpu of `distclip run` alone does not start more processes.)"
    )


def _verify_models(accelerator: Any, prepared: Iterable[Any]) -> None:
    engine = _engine(os.environ)
    distributed_type = str(getattr(accelerator.distributed_type, "value", ""))
    expected = {"FSDP1": "FSDP", "FSDP2": "FSDP", "DeepSpeed": "DEEPSPEED", "DDP": "MULTI_CPU"}
    if distributed_type != expected[engine]:
        raise DistclipError(
            f"CPU mode: {engine} was asked for, but Accelerate runs as {distributed_type or 'NO'}. "
            "Usual cause: the script passes cpu=True to Accelerator, or makes a PartialState "
            "before the Accelerator that gets its FSDP plugin. Remove that."
        )
    for model in _trained(accelerator, engine, prepared):
        fault = _fault(engine, accelerator, model)
        if fault is not None:
            raise DistclipError(
                f"CPU mode: {type(model).__name__} is not distributed by {engine}: {fault}. Hand "
                "the model and its optimizer to one call of Accelerator.prepare."
            )


def _trained(accelerator: Any, engine: str, prepared: Iterable[Any]) -> list[Any]:
    """The prepared models that are to be trained."""
    import torch

    models = [item for item in prepared if isinstance(item, torch.nn.Module)]
    if not models and engine != "DDP":
        models = list(accelerator._models)
    return [m for m in models if any(p.requires_grad for p in m.parameters())]


def _fault(engine: str, accelerator: Any, model: Any) -> str | None:
    """What is wrong with the distribution of one prepared model; None if nothing is."""
    if engine == "FSDP2":
        from distclip.layouts.names import named_parameters

        return _fsdp2_fault(accelerator, named_parameters(model))
    if engine == "FSDP1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrapped = any(isinstance(m, FullyShardedDataParallel) for m in model.modules())
        return None if wrapped else "no module of it is wrapped in FullyShardedDataParallel"
    if engine == "DDP":
        from torch.nn.parallel import DistributedDataParallel

        from distclip.layouts.tensors import is_sharded

        # Sharded when it was loaded (tensor, expert parallelism): Accelerate leaves it as it is.
        wrapped = any(map(is_sharded, model.parameters())) or any(
            isinstance(m, DistributedDataParallel) for m in model.modules()
        )
        return None if wrapped else "it is not wrapped in DistributedDataParallel"
    return None  # DeepSpeed's engine builds its own groups and refuses what it cannot do


def _fsdp2_fault(accelerator: Any, named_parameters: Iterable[tuple[str, Any]]) -> str | None:
    from distclip.layouts.tensors import is_sharded

    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    plain = [name for name, p in trained if not is_sharded(p)]
    ignored = getattr(accelerator.state.fsdp_plugin, "ignored_modules", None)
    if not plain or (ignored is not None and len(plain) < len(trained)):
        return None
    return (
        f"{len(plain)} of {len(trained)} trained parameters are plain tensors, the first "
        f"{plain[0]!r}"
    )
