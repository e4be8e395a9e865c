"""Of ranks that gave no answer: which are stuck, and which only wait for those."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Sequence
from pathlib import Path

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

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line \d+ in .+$')
_HARNESS = "/distclip/testing/ranks/worker.py"


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
    threads: list[list[str]] = []
    for line in stacks.splitlines():
        match = _FRAME.match(line)
        if match is None:
            threads.append([])
        elif threads:
            threads[-1].append(match["file"])
    for files in threads:
        if any(file.endswith(_HARNESS) for file in files):
            return any(part in files[0] for part in WAITING_PLACES)
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
