"""Calls of a tracker that wait for another process, made by a thread in place of the training."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

MOST_WAITING = 1000
"""Records that may wait."""
CLOSE_LIMIT = 60.0
"""Seconds that the end waits for them, and then for the tracker to close."""


def within_patience(call: Callable[[], None]) -> None:
    """Call a function of a tracker that did not answer, and wait for it no longer than that."""
    thread = threading.Thread(target=call, name="distclip sink", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter ends; the tracker's own exit handler is left
        return
    thread.join(CLOSE_LIMIT)


class Background:
    """Hands records to a function one after another, in a thread of its own.

    The thread is started by the first record, and by the first one after a fork, which leaves
    threads behind.

    Args:
        log: called with step and values; raises nothing.
    """

    def __init__(self, log: Callable[[int, dict[str, float]], None]) -> None:
        self._log = log
        self._process = 0
        self._records: queue.Queue[tuple[int, dict[str, float]] | None]
        self._thread: threading.Thread

    def put(self, step: int, values: dict[str, float]) -> bool:
        """Hand a record on, without waiting; False where too many wait already.

        Where no thread can be started, as at the end of the process, it is logged here.
        """
        if self._process != os.getpid():
            records: Any = queue.Queue(MOST_WAITING)
            thread = threading.Thread(
                target=self._work, args=(records,), name="distclip sink", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # the interpreter ends, or there are too many threads
                self._log(step, values)
                return True
            self._process, self._records, self._thread = os.getpid(), records, thread
        try:
            self._records.put_nowait((step, values))
        except queue.Full:
            return False
        return True

    def drain(self) -> int:
        """Wait for what has been handed on, and end the thread; how many records are left."""
        if self._process != os.getpid():
            return 0
        self._process = 0
        until = time.monotonic() + CLOSE_LIMIT
        try:
            self._records.put(None, timeout=CLOSE_LIMIT)
        except queue.Full:
            return self._records.qsize() + 1  # and the one that is being logged
        self._thread.join(max(until - time.monotonic(), 0.0))
        # None is still in the queue then, and stands for the record that is being logged.
        return self._records.qsize() if self._thread.is_alive() else 0

    def _work(self, records: Any) -> None:
        while (record := records.get()) is not None:
            self._log(*record)
