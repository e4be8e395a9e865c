"""What every fuzzed input is held to: no file left behind, nothing run, an end within a second."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from unittest import mock

from benchmarks.reliability.hostile import CANARY
from distclip.errors import DistclipError

LIMIT = 1.0
"""Seconds of CPU time for one input."""
HANG = 20.0
"""Seconds by the clock: for what waits and takes no CPU time."""


class BrokenPromiseError(Exception):
    """An input did not end as promised."""


class TooLongError(BaseException):
    """Raised by the timer, past every ``except Exception``."""


Outcome = str
Fuzzer = Callable[[Random], Outcome]


class Folder:
    """The working directory of all inputs, in which only named files may appear."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[str] = []
        """What was executed by an input."""
        (path / f"{CANARY}.py").write_text(f"import sys\nsys.modules[{CANARY + '_seen'!r}].run()\n")
        seen = types.ModuleType(CANARY + "_seen")
        seen.run = lambda *a: self.runs.append("run")  # type: ignore[attr-defined]
        sys.modules[CANARY + "_seen"] = seen

    def file(self, rng: Random, names: tuple[str, ...], content: bytes) -> Path:
        path = self.path / rng.choice(names)
        path.write_bytes(content)
        return path

    def sweep(self, *allowed: str) -> None:
        """Forget the input; complain of what it left behind."""
        self.runs.clear()
        sys.modules.pop(CANARY, None)
        for path in self.path.iterdir():
            if path.name.startswith("in") or path.suffix == ".png" or path.name in allowed:
                path.unlink()
            elif path.name not in (f"{CANARY}.py", "__pycache__"):
                path.unlink()
                raise BrokenPromiseError(f"wrote {path.name!r}")


@contextlib.contextmanager
def folder() -> Iterator[Folder]:
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as name, mock.patch.object(sys, "path", [*sys.path, name]):
        os.chdir(name)
        try:
            yield Folder(Path(name))
        finally:
            os.chdir(before)
            sys.modules.pop(CANARY + "_seen", None)


@contextlib.contextmanager
def limit() -> Iterator[None]:
    def expired(number: int, frame: object) -> None:
        raise TooLongError(signal.Signals(number).name)

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, LIMIT),
        (signal.SIGALRM, signal.ITIMER_REAL, HANG),
    )
    before = [signal.signal(number, expired) for number, _, _ in timers]
    try:
        for _, timer, seconds in timers:
            signal.setitimer(timer, seconds)
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def printable(text: str, what: str) -> None:
    bad = {c for c in text if not c.isprintable() and c != "\n"}
    if bad:
        raise BrokenPromiseError(f"{what} has control characters: {sorted(map(ascii, bad))}")


def refused(error: DistclipError) -> Outcome:
    printable(str(error), "the message")
    return "refused"
