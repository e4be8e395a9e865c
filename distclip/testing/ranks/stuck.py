"""Of ranks that gave no answer: which are stuck, and which only wait for those."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

STUCK_AFTER = "DISTCLIP_STUCK_AFTER"
"""Environment variable with the limit, in seconds, of :mod:`distclip.statistics.waiting`."""

STACK_SIGNAL = signal.SIGUSR1
"""Has a rank write the stacks of all its threads into a file that it shares with its caller."""

WAITS = "waiting in a collective for other ranks"
STOPPED = "stopped (SIGSTOP, or a debugger)"

WAITING_PLACES = (
    "/torch/distributed/",
    "/torch/autograd/",
    "/distclip/statistics/collectives.py",
    "/distclip/statistics/waiting.py",
)
"""Parts of the names of files in which a rank waits for others."""

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')
_HARNESS = "/distclip/testing/ranks/worker.py"


class Frame(NamedTuple):
    """One frame of a stack, as faulthandler writes it."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def frames_by_thread(stacks: str) -> list[list[Frame]]:
    """The frames of each thread in a dump of faulthandler, innermost first."""
    threads: list[list[Frame]] = [[]]
    for line in stacks.splitlines():
        if match := _FRAME.match(line):
            threads[-1].append(Frame(match["file"], int(match["line"]), match["function"]))
        elif threads[-1]:
            threads.append([])
    return [frames for frames in threads if frames]


def ask_for_stacks(files: Mapping[int, int | Path], limit: float) -> None:
    """Have processes write the stacks of all their threads, without their cooperation, and wait.

    Args:
        files: process -> where it writes them, as ``os.stat`` takes a file.
        limit: seconds to wait at most.
    """
    for pid in files:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACK_SIGNAL)
    deadline = time.monotonic() + limit
    sizes = [0] * len(files)
    while files and time.monotonic() < deadline:
        time.sleep(0.05)
        before, sizes = sizes, [os.stat(file).st_size for file in files.values()]
        if before == sizes and all(sizes):  # written, and no longer growing
            break


def kernel_fields(pid: int | None) -> list[str]:
    """What Linux says of a process, from its state on; empty if it is gone, or elsewhere.

    The fields of ``/proc/PID/stat`` after the name, see proc(5): state, parent and so on.
    """
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def is_stopped(pid: int) -> bool:
    """Whether a process gets no time until it is sent SIGCONT; False where that is not known."""
    return kernel_fields(pid)[:1] in (["T"], ["t"])


def waits(stacks: str) -> bool:
    """Whether the thread that runs the call is in a collective, or in a backward."""
    for frames in frames_by_thread(stacks):
        if any(frame.file.endswith(_HARNESS) for frame in frames):
            return any(part in frames[0].file for part in WAITING_PLACES)
    return False


def reason(pid: int, stacks: str) -> str:
    """What can be said of a rank that gave no answer; empty if nothing."""
    if is_stopped(pid):
        return STOPPED
    return WAITS if waits(stacks) else ""


def limit_within(seconds: float) -> float:
    """A limit for waits in collectives that ends before a limit of so many seconds for it all."""
    return max(0.75 * seconds, seconds - 5.0)


def culprits(reasons: Sequence[str]) -> list[int]:
    """Positions of those that the others wait for; all of them where that cannot be told."""
    found = [position for position, reason in enumerate(reasons) if reason != WAITS]
    return found or list(range(len(reasons)))


def names(ranks: Sequence[int]) -> str:
    """``rank 1``, ``ranks 0, 2``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
