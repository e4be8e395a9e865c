"""What there is to know of a DeepSpeed engine before a policy is put on it."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from distclip.config import Config
from distclip.errors import DistclipError
from distclip.integrations.deepspeed_modes import ONE_BIT, REASONS
from distclip.layouts.names import named_parameters

_logger = logging.getLogger("distclip.deepspeed")


def refuse_engine(engine: Any) -> None:
    """What is known not to work, with the reason."""
    outer = engine.optimizer
    if outer is None or not hasattr(outer, "step"):
        raise DistclipError(
            "this DeepSpeed engine has no optimizer: there is nothing to clip for. Give one to "
            "deepspeed.initialize, or an optimizer section in the JSON"
        )
    inner = type(getattr(outer, "optimizer", outer)).__name__
    expert = getattr(engine._config, "expert_parallel_config", None)
    reasons = {
        "pipeline parallelism was not run with distclip": getattr(
            engine, "pipeline_parallelism", False
        ),
        REASONS["fp16 at stage 0"]: engine.fp16_enabled() and not engine.zero_optimization(),
        REASONS["nvme"]: getattr(outer, "swap_optimizer", False),
        REASONS["one bit"]: inner in ONE_BIT,
        REASONS["muon"]: "Muon" in inner and engine.zero_optimization(),
        "fp16 under torch.autocast scales inside of the step": getattr(
            outer, "torch_autocast_gradscaler", None
        )
        or getattr(engine, "torch_autocast_z0_gradscaler", None),
        # Of stage 3 the wrapper has the same class with it and without.
        REASONS["zenflow"]: getattr(engine, "zenflow", False),
        REASONS["super_offload"]: "SuperOffload" in type(outer).__name__,
        REASONS["autotp"]: engine.autotp_size() > 1,
        REASONS["autoep"]: getattr(expert, "enabled", False),
        "tensor parallelism (mpu) was not run with distclip": getattr(engine, "mpu", None)
        is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise DistclipError(f"distclip cannot clip for this DeepSpeed engine: {reason}")


def trained(engine: Any) -> list[Tensor]:
    """Parameters of the engine's module that require a gradient."""
    return [p for p in engine.module.parameters() if p.requires_grad]


def pairs_of(engine: Any, parameters: list[Tensor]) -> list[tuple[str, Tensor]]:
    """(name, parameter) pairs, with the names that the parameters have in the module."""
    names = {id(p): name for name, p in named_parameters(engine.module)}
    return [(names.get(id(p), f"unnamed.{place}"), p) for place, p in enumerate(parameters)]


def groups(outer: Any) -> Any:
    """The module's parameters by parameter group: inside, there are flat buffers."""

    class Groups:
        param_groups: list[dict[str, Any]]

    inner = getattr(outer, "optimizer", outer)
    lists = getattr(outer, "bit16_groups", None) or getattr(outer, "bf16_groups", None)
    if lists is None and hasattr(outer, "fp16_groups"):
        lists = outer.fp16_groups
        of = getattr(outer, "sub_group_to_group_id", None)
        if of is not None:
            merged: dict[int, list[Tensor]] = {}
            for sub, group in enumerate(lists):
                merged.setdefault(of[sub], []).extend(group)
            lists = [merged[number] for number in sorted(merged)]
    if lists is None:
        return outer
    # Called as the optimizer in it, and with the keys of its groups: policies may ask for both.
    found: Groups = type(type(inner).__name__, (Groups,), {})()
    keys = inner.param_groups if len(inner.param_groups) == len(lists) else [{}] * len(lists)
    found.param_groups = [
        {**others, "params": list(group)} for others, group in zip(keys, lists, strict=True)
    ]
    return found


def announce(count: int, config: Config) -> None:
    """Log what is clipped, and by what; for one rank to call."""
    _logger.info("clipping %d parameters by %r", count, config.policy)
    if config.overlap:
        _logger.warning(
            "overlap has no effect under DeepSpeed, which says of no gradient that it has been "
            "reduced; all are measured at the step"
        )
