"""Going back after a spike: to which checkpoint and without which batches, on all ranks alike."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distclip.errors import ConfigurationError, RewindRequested
from distclip.integrations.checkpoints import FILE
from distclip.statistics import collectives

_Result = TypeVar("_Result")


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
        # Only the first rank looks: what it sees is for all, and an error of another's file system
        # would leave the others waiting.
        distributed = dist.is_initialized()
        found: Any = None
        if not distributed or collectives.is_first():
            found = self._find(asked.step)
        if distributed:
            found = collectives.gather(found, collectives.everyone())[0]
        if isinstance(found, ConfigurationError):
            raise found from asked
        folder, at, self.abandoned = found
        return folder, at

    def _find(self, step: int) -> tuple[str, int, dict[str, int]] | ConfigurationError:
        try:
            return self._newest(step)
        except ConfigurationError as error:
            return error
        except OSError as error:
            return ConfigurationError(
                f"a rewind was asked for, and the checkpoints in {self._where()} cannot be looked "
                f"through ({type(error).__name__}: {error})"
            )

    def _newest(self, step: int) -> tuple[str, int, dict[str, int]]:
        usable: list[tuple[int, int, str]] = []
        abandoned = {}
        for checkpoint, file in self._files():
            written = file.stat().st_mtime_ns
            if self.abandoned.get(checkpoint) == written:
                abandoned[checkpoint] = written
                continue
            at = self._step_in(file)
            if at is None:
                continue
            if at > step:
                abandoned[checkpoint] = written
            else:
                usable.append((at, written, checkpoint))
        if not usable:
            raise ConfigurationError(
                f"a rewind was asked for, and {self._where()} has no checkpoint that was taken at "
                f"clip {step} or before; save one early, and then regularly"
            )
        at, _, chosen = max(usable)
        return chosen, at, abandoned

    def _where(self) -> str:
        """Where they lie, in words."""
        return str(self._folder)

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Each checkpoint, and the file in it that has the clippers' states."""
        for file in self._folder.glob(f"*/{FILE}"):
            yield str(file.parent), file

    def _load(self, file: Path) -> Any:
        """The clippers' states in such a file, as a :class:`Shelf` saves them; None for none."""
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)

    def _step_in(self, file: Path) -> int | None:
        """Before which clip a checkpoint was taken; 0 where there was no clipper yet.

        Raises:
            ConfigurationError: it cannot be read, or holds several clippers, which count by
                themselves.
        """
        try:
            loaded = self._load(file)
            states = None if loaded is None else loaded["clippers"]
        except Exception as error:  # of the archive, or of the pickle in it
            raise ConfigurationError(
                f"{file} is damaged and cannot be read ({type(error).__name__}), so it is not "
                f"known which step its checkpoint is of; remove that checkpoint"
            ) from error
        if states is None:
            return None
        if len(states) > 1:
            raise ConfigurationError(
                f"{file}: several sets of parameters are clipped by themselves, each with a count "
                f"of its own, and a rewind is for one; clip all parameters in one call"
            )
        return int(states[0]["step"]) if states else 0


class Rewinder:
    """What a training does about a request to go back, whatever its loop is.

    Args:
        checkpoints: of this run.
        left_out: places of batches that are left out from the start.
        kind: type of such a place; a batch that somebody else has named is none.
        what: a place is, for the log.
        logger: for one line a rewind.

    Attributes:
        left_out: places of batches that are left out from now on, the same on every rank.

    Raises:
        ConfigurationError: ``left_out`` has what is no such place.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        left_out: Iterable[Any],
        kind: type,
        what: str,
        logger: logging.Logger,
    ) -> None:
        self.checkpoints, self.left_out = checkpoints, set(left_out)
        for each in self.left_out:
            fits = isinstance(each, kind)
            if not fits or (kind is tuple and [*map(type, each)] != [int, int]):
                raise ConfigurationError(
                    f"left_out: {each!r} is no place of a batch; give ({what}), counted from 0"
                )
        self._kind, self._what, self._logger = kind, what, logger

    def go_back(self, asked: RewindRequested) -> tuple[str, int]:
        """The checkpoint to load, and before which clip it was taken. A collective.

        Raises:
            ConfigurationError: there is none, on every rank.
        """
        self.left_out |= {each for each in asked.batches if isinstance(each, self._kind)}
        checkpoint, at = self.checkpoints.before(asked)
        if collectives.is_first():
            self._logger.warning(
                "going back to %s, taken before clip %d; left out from now on (%s): %s",
                checkpoint,
                at,
                self._what,
                sorted(self.left_out),
            )
        return checkpoint, at

    def repeat(
        self,
        train: Callable[[Any], _Result],
        checkpoint: Any,
        interrupted: Callable[[], None],
    ) -> _Result:
        """Train, and again from an older checkpoint as often as a ladder asks for it.

        Args:
            train: the whole training, from a checkpoint.
            checkpoint: the one to begin with.
            interrupted: called when a training has ended by a request, before the next.
        """
        while True:
            try:
                return train(checkpoint)
            except RewindRequested as asked:
                interrupted()
                checkpoint, _ = self.go_back(asked)
