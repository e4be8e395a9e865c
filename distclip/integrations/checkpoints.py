"""A clipper's memory in the checkpoints of a framework whose clippers come into being late.

The file holds the state dict of every clipper. A state that is loaded before its clipper exists
waits until one with the same parameters does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from distclip.clipper import GradClipper
from distclip.engine import checkpoint
from distclip.engine.checkpoint import StateSource
from distclip.errors import StateError
from distclip.policies import Policy

FILE = "distclip.pt"
"""In the folder of a checkpoint, beside the framework's own files."""

_logger = logging.getLogger("distclip")


class Shelf:
    """The states that were loaded and have no clipper yet.

    Attributes:
        rewinds: those that this process has made, which none of its clippers gets back.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self._policy = policy
        self._waiting: list[dict[str, Any]] = []
        self._source = StateSource()
        self.rewinds = 0

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    def state_dict(self, clippers: Iterable[GradClipper]) -> dict[str, Any]:
        """The states of all clippers, and those that still wait: tensors and plain values."""
        states = [clipper.state_dict() for clipper in clippers] + self._waiting
        return {"version": 1, "clippers": states}

    def load_state_dict(
        self, state: object, clippers: Iterable[GradClipper], source: StateSource
    ) -> None:
        """Hand the states over, now or when their clipper comes into being; all of them or none.

        Args:
            state: what :meth:`state_dict` gave.
            clippers: those that are there.
            source: where it is from, for the messages. An empty state gives a warning.

        Raises:
            StateError: something else, the state of another policy or model, or a damaged one.
        """
        if state is None or (isinstance(state, dict) and not state):
            self._warn_of_none(source.what)
            return
        if not isinstance(state, dict) or not isinstance(state.get("clippers"), list):
            raise StateError(f"{source.what} is no state of distclip; to begin anew, {source.anew}")
        waiting = list(state["clippers"])
        for each in waiting:
            checkpoint.check_state(self._policy, each, source)
        loads = [_taken(clipper, waiting, source) for clipper in clippers]
        # Everything fits.
        self._waiting, self._source = waiting, source
        for load in loads:
            load()

    def save(self, clippers: Iterable[GradClipper], folder: str | os.PathLike[str]) -> None:
        """Write the states of all clippers, and those that still wait. On one rank only."""
        torch.save(self.state_dict(clippers), Path(folder) / FILE)

    def load(
        self,
        clippers: Iterable[GradClipper],
        folder: str | os.PathLike[str],
        checkpoint_id: str | None = None,
    ) -> None:
        """Read them, on every rank; a checkpoint without the file gives a warning.

        Args:
            clippers: those that are there.
            folder: of the checkpoint.
            checkpoint_id: of the checkpoint. Nothing is taken from a file of another one, which was
                saved in the same folder before.

        Raises:
            StateError: a damaged file, or the state of another policy or model. Nothing is loaded.
        """
        path = Path(folder) / FILE
        if not path.exists():
            self._warn_of_none(f"{folder} has no {FILE}")
            return
        source = StateSource(str(path), f"remove {path}")
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of the archive, of the pickle in it, or of its tensors
            raise StateError(
                f"{path} is damaged and cannot be read ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}); nothing was loaded. Take "
                f"another checkpoint, or, to begin with an empty memory, {source.anew}"
            ) from error
        of = loaded.get("checkpoint") if isinstance(loaded, dict) else None
        if None not in (of, checkpoint_id) and of != checkpoint_id:
            return
        self.load_state_dict(loaded, clippers, source)

    def _warn_of_none(self, what: str) -> None:
        _logger.warning(
            "%s: no state of distclip (the checkpoint is from before it was in use?); policies go "
            "on with the memory they have, at the start with none",
            what,
        )
        self._waiting = []

    def hand_over(self, clipper: GradClipper) -> None:
        """Give a clipper the state that waits for it, if there is one.

        Raises:
            StateError: a state with some of its parameters: what differs.
        """
        _taken(clipper, self._waiting, self._source)()
        clipper.rewinds = self.rewinds


def _taken(
    clipper: GradClipper, waiting: list[dict[str, Any]], source: StateSource
) -> Callable[[], None]:
    """Take a clipper's state out of those that wait: what loads it, or does nothing without one.

    Two clippers whose parameters have the same names and shapes (two models of one class) are told
    apart by the order in which they come into being.
    """
    shapes = {entry.name: list(entry.shape) for entry in clipper.plan.entries}
    for position, state in enumerate(waiting):
        saved = zip(state["parameters"], map(list, state["shapes"]), strict=True)
        if dict(saved) == shapes:
            load = clipper.prepare_state_dict(state, source)
            del waiting[position]
            return load
    for state in waiting:  # none fits, and one nearly does: say what differs
        if not shapes.keys().isdisjoint(state["parameters"]):
            clipper.prepare_state_dict(state, source)
    return lambda: None
