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

    def save(self, clippers: Iterable[GradClipper], folder: str | os.PathLike[str]) -> None:
        """Write the states of all clippers, and those that still wait. On one rank only."""
        states = [clipper.state_dict() for clipper in clippers] + self._waiting
        torch.save({"version": 1, "clippers": states}, Path(folder) / FILE)

    def load(self, clippers: Iterable[GradClipper], folder: str | os.PathLike[str]) -> None:
        """Read them, on every rank; a checkpoint without the file gives a warning.

        Raises:
            StateError: a damaged file, or the state of another policy or model.
        """
        path = Path(folder) / FILE
        if not path.exists():
            _logger.warning(
                "%s has no %s (it is from before distclip was in use?): policies begin with an "
                "empty memory",
                folder,
                FILE,
            )
            self._waiting = []
            return
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict) or not isinstance(loaded.get("clippers"), list):
            raise StateError(f"{path} is no state of distclip; delete it to begin anew")
        self._waiting = loaded["clippers"]
        for clipper in clippers:
            self.hand_over(clipper)

    def hand_over(self, clipper: GradClipper) -> None:
        """Give a clipper the state that waits for it, if there is one.

        Raises:
            StateError: a state with some of its parameters, or for another policy: what differs.
        """
        names = set(clipper.names)
        for state in self._waiting:
            if set(state.get("parameters", ())) == names:
                self._waiting.remove(state)
                clipper.load_state_dict(state)
                return
        for state in self._waiting:  # none fits, and one nearly does: say what differs
            if not names.isdisjoint(state.get("parameters", ())):
                clipper.load_state_dict(state)
