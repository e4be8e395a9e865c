"""From the ``log`` section of a configuration to the sinks of a clipper."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from distclip.clipper import GradClipper
from distclip.common.foreign import in_one_line
from distclip.config import Config, LogConfig
from distclip.errors import ConfigurationError
from distclip.monitor import trackers
from distclip.monitor.rank_noise import RankNoiseScale
from distclip.monitor.recording import RecordingSink
from distclip.monitor.sinks import JsonlSink
from distclip.monitor.states import States
from distclip.statistics import collectives

_logger = logging.getLogger("distclip.monitor")


opened: list[Callable[[GradClipper, Config], object]] = []
"""Called with every clipper that is built from a configuration: for what shows a run as a whole."""


def open_log(
    clipper: GradClipper,
    config: Config,
    accelerator: Any = None,
    process_group: ProcessGroup | None = None,
) -> None:
    """Give a clipper the sinks that a configuration's ``log`` section asks for.

    Each clipper of a process has places of its own: where one writes ``clip.jsonl``, the next of
    the same configuration writes ``clip.2.jsonl``; in a run of a tracker its names begin with
    ``2/``. A place is free again when its clipper is gone, or after :func:`release_log`.

    Raises:
        ConfigurationError: ``accelerate: true`` and no accelerator; ``noise_scale`` where gradients
            are not seen before they are reduced, or a step has one part only.
        DistclipError: a tracker is not installed.
    """
    for follow in opened:
        follow(clipper, config)
    log = config.log
    if log is None:
        return
    if log.accelerate and accelerator is None:
        raise ConfigurationError(
            "log.accelerate: this clipper does not belong to an Accelerator; use "
            "distclip.accelerate.attach(accelerator, ...), or name another place, such as "
            "tensorboard: runs"
        )
    number = 1
    while any(place in _taken for place in _places(log, number)):
        number += 1
    sinks = _sinks(log, number, accelerator)
    if log.noise_scale is not None:
        scaler = getattr(accelerator, "scaler", None)
        try:
            RankNoiseScale(
                clipper, scaler=scaler, process_group=process_group, **log.noise_scale.model_dump()
            )
        except ConfigurationError as error:
            raise ConfigurationError(f"log.noise_scale: {error}") from error
    clipper.sinks = (*clipper.sinks, *sinks)
    for place in _places(log, number):
        _taken[place] = sinks[0]
    if number > 1 and collectives.is_first():
        names = ", ".join(map(in_one_line, clipper.names[:3]))
        _logger.warning(
            "the log %s belongs to another clipper of this process; that of %d parameters (%s%s) "
            "is %s",
            in_one_line(_shown(log, 1)), len(clipper.names), names,
            ", ..." * (len(clipper.names) > 3), in_one_line(_shown(log, number)),
        )  # fmt: skip


def release_log(clipper: GradClipper) -> None:
    """Leave the places of a clipper's log to the next one; the clipper may go on with them."""
    for place, sink in [*_taken.items()]:
        if sink in clipper.sinks:
            del _taken[place]


def _sinks(log: LogConfig, number: int, accelerator: Any) -> list[RecordingSink]:
    states = States(**log.states.model_dump())
    common: dict[str, Any] = {
        "every": log.every, "per_parameter": log.per_parameter, "states": states,
    }  # fmt: skip
    prefixed = {**common, "prefix": "" if number == 1 else f"{number}/"}
    sinks: list[RecordingSink] = []
    if log.jsonl:
        sinks.append(JsonlSink(_numbered(log.jsonl, number), **common))
    if log.tensorboard:
        sinks.append(trackers.TensorBoardSink(_numbered(log.tensorboard, number), **common))
    if log.wandb:
        sinks.append(trackers.WandbSink(log.wandb, **prefixed))
    if log.mlflow:
        sinks.append(trackers.MLflowSink(log.mlflow, **prefixed))
    if log.trackio:
        sinks.append(trackers.TrackioSink(log.trackio, **prefixed))
    if log.accelerate:
        sinks.append(trackers.AccelerateSink(accelerator, **prefixed))
    for sink in sinks:
        sink.modules = log.modules
    return sinks


def _places(log: LogConfig, number: int) -> list[str]:
    """What another clipper must not write to as well."""
    files = [_numbered(path, number) for path in (log.jsonl, log.tensorboard) if path]
    runs = [f"{key} {number}" for key in ("wandb", "mlflow", "trackio") if getattr(log, key)]
    return [*map(os.path.abspath, files), *runs, *([f"accelerate {number}"] * log.accelerate)]


def _shown(log: LogConfig, number: int) -> object:
    path = log.jsonl or log.tensorboard
    return _numbered(path, number) if path else f"the tracker, names with {number}/"


def _numbered(name: str, number: int) -> Path:
    path = Path(name)
    return path if number == 1 else path.with_name(f"{path.stem}.{number}{path.suffix}")


_taken: weakref.WeakValueDictionary[str, RecordingSink] = weakref.WeakValueDictionary()
"""Place -> a sink of a clipper that lives."""
