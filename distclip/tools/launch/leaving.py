"""Leaving a process with gloo groups in it, without the abort that torch may end with.

A thread of gloo lets go of the tensors of its last collective a moment after the caller has its
result. On a busy machine that moment can come when the interpreter is already being taken down;
the thread then asks for the GIL, and the process dies with "terminate called without an active
exception" after all its work is done (pytorch#190489, seen with torch 2.13).
"""

from __future__ import annotations

import time
from pathlib import Path

TASKS = Path("/proc/self/task")
THREAD = "pt_gloo_runloop"
"""torch's name for these threads, as the kernel shortens names: to 15 characters."""
PAUSE = 0.005
WAIT_LIMIT = 5.0
"""Longest wait for gloo's threads, in seconds."""


def let_gloo_finish() -> None:
    """Wait until no thread of gloo has anything left to do. At most 5 s, mostly 10 ms.

    One that waits, be it for a peer that is gone, has nothing to do. Linux only; elsewhere, and
    where there are no such threads, this returns at once.
    """
    deadline = time.monotonic() + WAIT_LIMIT
    quiet = 0
    while quiet < 2 and time.monotonic() < deadline:
        states = _states()
        if not states:
            return
        quiet = quiet + 1 if states == {"S"} else 0
        time.sleep(PAUSE)  # which lets go of the GIL, should one of them be waiting for it


def _states() -> set[str]:
    """What the kernel says of each of these threads: S sleeps, R runs or would like to."""
    states = set()
    for task in TASKS.glob("*"):
        try:
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended
            continue
        if name == THREAD:
            states.add(rest.split()[0])
    return states
