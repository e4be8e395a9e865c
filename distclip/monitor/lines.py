"""A file of whole lines, on a disk that may be full or gone."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from pathlib import Path

from distclip.common.foreign import in_one_line

_logger = logging.getLogger("distclip.monitor")

# Waits neither for the reader of a pipe nor for one that is behind: that is a lost line.
_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0)


class LineFile:
    """Lines appended one by one, each in the file whole or not at all.

    A line that cannot be written is counted in ``lost``, and the next one tries again: it opens the
    file anew, makes its folder, and comes after the last whole line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost = 0
        self._file: io.FileIO | None = None
        self._torn = False
        """Whether the file, when it was opened, ended within a line."""
        self._failing = self._warned = self._told = False

    def append(self, line: str) -> None:
        """Write a line; raises nothing that has to do with the file."""
        try:
            self._write(line.encode() + b"\n")
        except (OSError, ValueError) as error:  # ValueError: a path that the system cannot encode
            self._lose(error)
        else:
            self._recover()

    def end(self) -> None:
        """Close the file, and say how many lines it lacks."""
        self._let_go()
        if self.lost:
            _logger.warning(
                "the log %s lacks %d records, which could not be written",
                in_one_line(self.path), self.lost,
            )  # fmt: skip

    # ---- the file ------------------------------------------------------------------------

    def _write(self, line: bytes) -> None:
        file, start = self._opened()
        data = b"\n" + line if self._torn else line
        done = 0
        try:
            while done < len(data):
                written = file.write(data[done:])
                if not written:
                    raise BlockingIOError("it takes no more for now")
                done += written
        except OSError:
            # Take back the part that was written, unless somebody has written after it.
            with contextlib.suppress(OSError):
                if done and os.fstat(file.fileno()).st_size == start + done:
                    os.ftruncate(file.fileno(), start)
            raise
        self._torn = False

    def _opened(self) -> tuple[io.FileIO, int]:
        """The file, and its size."""
        file = self._file
        found = None if file is None else os.fstat(file.fileno())
        if found is not None and found.st_nlink == 0:
            self._let_go()  # deleted: what is written there would be gone in silence
            file = None
        if file is None or found is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._torn = _ends_within_a_line(self.path)
            file = self._file = open(self.path, "ab", buffering=0, opener=_open)  # noqa: SIM115
            found = os.fstat(file.fileno())
        return file, found.st_size

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    # ---- what is said of it --------------------------------------------------------------

    def _lose(self, error: Exception) -> None:
        self.lost += 1
        self._failing = True
        self._let_go()
        if not self._warned:
            self._warned = True
            _logger.warning(
                "the log %s cannot be written (%s); training goes on, and every record tries again",
                in_one_line(self.path), in_one_line(getattr(error, "strerror", None) or error, 300),
            )  # fmt: skip

    def _recover(self) -> None:
        if self._failing and not self._told:
            self._told = True
            _logger.warning(
                "the log %s is written again; so far it lacks %d records",
                in_one_line(self.path), self.lost,
            )  # fmt: skip
        self._failing = False


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | _WITHOUT_WAITING, 0o666)


def _ends_within_a_line(path: Path) -> bool:
    """Whether a crash cut the last line, to which the next must not be glued."""
    if not path.is_file() or not path.stat().st_size:
        return False
    try:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except PermissionError:  # may be written and not read: an empty line does no harm
        return True
