"""Which checkpoint a ladder's request to go back means, the same on every rank."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from distclip.errors import ConfigurationError, RewindRequested
from distclip.integrations.checkpoints import FILE
from distclip.statistics import collectives


class Checkpoints:
    """The checkpoints of one run, by the clip before which they were taken.

    Args:
        folder: whose subfolders they are, each with the file of a :class:`Shelf`.

    Attributes:
        abandoned: those of steps that were taken back -> time of writing, in ns. They are not used
            until they are written anew.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self.abandoned: dict[str, int] = {}

    def before(self, asked: RewindRequested) -> tuple[str, int]:
        """The newest that was taken at this step or before, and its step. A collective.

        Raises:
            ConfigurationError: there is none, on every rank.
        """
        found = self._find(asked.step)
        if dist.is_initialized():  # as the first rank sees it
            found = collectives.gather(found, collectives.everyone())[0]
        if isinstance(found, ConfigurationError):
            raise found from asked
        folder, at, self.abandoned = found
        return folder, at

    def _find(self, step: int) -> tuple[str, int, dict[str, int]] | ConfigurationError:
        usable: list[tuple[int, int, str]] = []
        abandoned = {}
        for file in self._folder.glob(f"*/{FILE}"):
            folder, written = str(file.parent), file.stat().st_mtime_ns
            if self.abandoned.get(folder) == written:
                abandoned[folder] = written
                continue
            try:
                at = _step_in(file)
            except ConfigurationError as error:
                return error
            if at > step:
                abandoned[folder] = written
            else:
                usable.append((at, written, folder))
        if not usable:
            return ConfigurationError(
                f"a rewind was asked for, and {self._folder} has no checkpoint that was taken at "
                f"clip {step} or before; save one early, and then regularly"
            )
        at, _, chosen = max(usable)
        return chosen, at, abandoned


def _step_in(path: Path) -> int:
    """Before which clip a checkpoint was taken; 0 where there was no clipper yet.

    Raises:
        ConfigurationError: it cannot be read, or holds several clippers, which count by themselves.
    """
    try:
        states = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["clippers"]
    except Exception as error:  # of the archive, or of the pickle in it
        raise ConfigurationError(
            f"{path} is damaged and cannot be read ({type(error).__name__}), so it is not known "
            f"which step its checkpoint is of; remove that checkpoint"
        ) from error
    if len(states) > 1:
        raise ConfigurationError(
            f"{path}: several sets of parameters are clipped by themselves, each with a count of "
            f"its own, and a rewind is for one; clip all parameters in one call"
        )
    return int(states[0]["step"]) if states else 0
