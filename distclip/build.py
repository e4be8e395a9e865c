"""From a configuration to a working clipper."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from distclip.clipper import GradClipper, Sink
from distclip.config import Config, load
from distclip.layouts.names import Target
from distclip.monitor.sinks import JsonlSink


def from_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | Config,
    target: Target,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    process_group: ProcessGroup | None = None,
) -> GradClipper:
    """A :class:`GradClipper` from a configuration file or mapping.

    Args:
        config: path of a YAML or JSON file, or a mapping of the same schema.
        target: as for :class:`GradClipper`.
        optimizer: as for :class:`GradClipper`.
        process_group: as for :class:`GradClipper`.

    Raises:
        ConfigurationError: names the key, the value and the nearest valid name.
    """
    checked = config if isinstance(config, Config) else load(config)
    return GradClipper(
        target,
        optimizer=optimizer,
        process_group=process_group,
        sinks=sinks_of(checked),
        **checked.arguments(),
    )


def sinks_of(config: Config) -> tuple[Sink, ...]:
    """The sinks that a configuration's ``log`` section asks for."""
    log = config.log
    if log is None:
        return ()
    return (JsonlSink(log.jsonl, every=log.every, per_parameter=log.per_parameter),)
