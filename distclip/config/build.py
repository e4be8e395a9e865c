"""From a configuration to a working clipper."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from distclip._foreign import clean
from distclip.clipper import GradClipper
from distclip.config import Config, load
from distclip.layouts.names import Target
from distclip.monitor.sinks import JsonlSink
from distclip.statistics import collectives

_logger = logging.getLogger("distclip.monitor")


def from_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | Config,
    target: Target,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    process_group: ProcessGroup | None = None,
) -> GradClipper:
    """A :class:`GradClipper` from a configuration file or mapping.

    A second one from the same configuration, while the first lives, has a log of its own:
    ``clip.jsonl``, ``clip.2.jsonl``.

    Args:
        config: path of a YAML or JSON file, or a mapping of the same schema.
        target: as for :class:`GradClipper`.
        optimizer: as for :class:`GradClipper`.
        process_group: as for :class:`GradClipper`.

    Raises:
        ConfigurationError: names the key, the value and the nearest valid name.
    """
    checked = config if isinstance(config, Config) else load(config)
    clipper = GradClipper(
        target, optimizer=optimizer, process_group=process_group, **checked.arguments()
    )
    open_log(clipper, checked)
    return clipper


def open_log(clipper: GradClipper, config: Config) -> None:
    """Give a clipper the sink that a configuration's ``log`` section asks for.

    Each clipper of a process has a file of its own: where one writes ``clip.jsonl``, the next of
    the same configuration writes ``clip.2.jsonl``. A name is free again when its clipper is gone,
    or after :func:`release_log`.
    """
    log = config.log
    if log is None:
        return
    path, number = Path(log.jsonl), 1
    while (place := os.path.abspath(path)) in _logs:
        number += 1
        path = Path(log.jsonl)
        path = path.with_name(f"{path.stem}.{number}{path.suffix}")
    sink = JsonlSink(path, every=log.every, per_parameter=log.per_parameter)
    clipper.sinks = (*clipper.sinks, sink)
    _logs[place] = sink
    if number > 1 and collectives.is_first():
        names = ", ".join(map(clean, clipper.names[:3]))
        _logger.warning(
            "the log %s belongs to another clipper of this process; that of %d parameters (%s%s) "
            "is %s",
            clean(log.jsonl), len(clipper.names), names, ", ..." * (len(clipper.names) > 3),
            clean(path),
        )  # fmt: skip


def release_log(clipper: GradClipper) -> None:
    """Leave the name of a clipper's log to the next one; the clipper itself may go on with it."""
    for place, sink in [*_logs.items()]:
        if sink in clipper.sinks:
            del _logs[place]


_logs: weakref.WeakValueDictionary[str, JsonlSink] = weakref.WeakValueDictionary()
"""Absolute path -> the sink of a clipper that lives."""
