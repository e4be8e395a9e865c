"""From a configuration to a working clipper."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from distclip.clipper import GradClipper
from distclip.config import Config, load
from distclip.config.logs import open_log
from distclip.layouts.names import Target


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
    open_log(clipper, checked, process_group=process_group)
    return clipper
