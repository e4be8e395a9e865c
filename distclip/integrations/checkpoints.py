"""A clipper's memory in the checkpoints of a framework whose clippers come into being late.

The file holds the state dict of every clipper. A state that is loaded before its clipper exists
waits until one with the same parameters does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from distclip.clipper import GradClipper
from distclip.errors import StateError

FILE = "distclip.pt"
"""In the folder of a checkpoint, beside the framework's own files."""

_logger = logging.getLogger("distclip")


class Shelf:
    """The states that were loaded and have no clipper yet."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []

    def state_dict(self, clippers: Iterable[GradClipper]) -> dict[str, Any]:
        """The states of all clippers, and those that still wait: tensors and plain values."""
        states = [clipper.state_dict() for clipper in clippers] + self._waiting
        return {"version": 1, "clippers": states}

    def load_state_dict(self, state: object, clippers: Iterable[GradClipper], source: str) -> None:
        """Hand the states over, now or when their clipper comes into being.

        Args:
            state: what :meth:`state_dict` gave.
            clippers: those that are there.
            source: where it is from, for the messages. An empty state gives a warning.

        Raises:
            StateError: something else, or the state of another policy or model.
        """
        if not state:
            self._warn_of_none(source)
            return
        if not isinstance(state, dict) or not isinstance(state.get("clippers"), list):
            raise StateError(f"{source} is no state of distclip; leave it out to begin anew")
        self._waiting = list(state["clippers"])
        for clipper in clippers:
            self.hand_over(clipper)

    def save(self, clippers: Iterable[GradClipper], folder: str | os.PathLike[str]) -> None:
        """Write the states of all clippers, and those that still wait. On one rank only."""
        torch.save(self.state_dict(clippers), Path(folder) / FILE)

    def load(self, clippers: Iterable[GradClipper], folder: str | os.PathLike[str]) -> None:
        """Read them, on every rank; a checkpoint without the file gives a warning.

        Raises:
            StateError: a damaged file, or the state of another policy or model.
        """
        path = Path(folder) / FILE
        if not path.exists():
            self._warn_of_none(f"{folder} has no {FILE}")
            return
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        self.load_state_dict(loaded, clippers, str(path))

    def _warn_of_none(self, what: str) -> None:
        _logger.warning(
            "%s: no state of distclip (the checkpoint is from before it was in use?); policies go "
            "on with the memory they have, at the start with none",
            what,
        )
        self._waiting = []

    def hand_over(self, clipper: GradClipper) -> None:
        """Give a clipper the state that waits for it, if there is one.

        Two clippers whose parameters have the same names and shapes (two models of one class) are
        told apart by the order in which they come into being.

        Raises:
            StateError: a state with some of its parameters, or for another policy: what differs.
        """
        shapes = {entry.name: list(entry.shape) for entry in clipper.plan.entries}
        names = shapes.keys()
        for position, state in enumerate(self._waiting):
            saved = zip(state.get("parameters", ()), state.get("shapes", ()), strict=False)
            if dict(saved) == shapes:
                del self._waiting[position]
                clipper.load_state_dict(state)
                return
        for state in self._waiting:  # none fits, and one nearly does: say what differs
            if not names.isdisjoint(state.get("parameters", ())):
                clipper.load_state_dict(state)
