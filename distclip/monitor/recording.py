"""What all sinks share: which steps they record, on which rank, and when the host is read."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, TypeAlias

from distclip.common.foreign import in_one_line
from distclip.errors import ConfigurationError
from distclip.monitor.states import States


class PendingValues(Protocol):
    """Values of a report on their way to the host."""

    @property
    def ready(self) -> bool:
        """Whether a call waits for nothing."""

    def __call__(self) -> dict[str, Any]:
        """Plain numbers; waits for the copy."""


class Report(Protocol):
    """What a sink reads of a ``ClipReport``; of one that has ``fetch``, that."""

    def to_dict(self, *, per_parameter: bool = True) -> dict[str, Any]:
        """Plain numbers; waits for the device, starts no collective. Takes ``modules`` if asked."""


Sink: TypeAlias = Callable[[int, Report], object]


class Writer(Protocol):
    """Where the records of one sink go. Its methods raise nothing that has to do with the place."""

    @property
    def lost(self) -> int:
        """How many records could not be written."""

    def write(self, step: int, record: dict[str, Any], first: int) -> None:
        """Write a step's record; ``first`` is the clipper's first step in this process."""

    def end(self) -> None:
        """Write what is waiting, and let the place go."""


class RecordingSink:
    """Records every n-th step on the main rank; the other ranks never read a report.

    On an accelerator the hot path does not wait: a step's numbers are copied in the background, to
    pinned memory, and written at the next step; the last one at :meth:`close`, or when the sink is
    garbage collected or the process ends.

    Args:
        writer: where the records go.
        every: record the steps that are divisible by it.
        per_parameter: with each parameter's norm and coefficient.
        states: judges the norms. Give one to all sinks of a clipper, so that a change is logged
            once. None: one of its own, with the default bounds.

    Attributes:
        modules: n: with the joint norms of the parameters whose names begin with the same n parts;
            may be set at any time. None: without.

    Raises:
        ConfigurationError: ``every < 1``.
    """

    def __init__(
        self, writer: Writer, every: int, per_parameter: bool, states: States | None
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            name = type(self).__name__
            raise ConfigurationError(f"{name}: every must be an integer >= 1, got {every!r}")
        self.every = every
        self.per_parameter = per_parameter
        self.modules: int | None = None
        self._queue = _Queue(writer, states or States())
        self._end = weakref.finalize(self, self._queue.end)
        self._closed = False

    @property
    def lost(self) -> int:
        """How many records could not be written."""
        return self._queue.writer.lost

    def __call__(self, step: int, report: Report) -> None:
        """Record the report of a step, where it is this step's and this rank's turn."""
        from distclip.statistics import collectives  # imports torch, which a log is read without

        if not collectives.is_first():
            return
        if self._closed:
            raise ValueError(f"{self!r} is closed")
        self._queue.flush()
        if self._queue.first is None:
            self._queue.first = step
        if step % self.every == 0:
            start = getattr(report, "fetch", None) or functools.partial(_Read, report)
            more = {} if self.modules is None else {"modules": self.modules}
            self._queue.put(step, start(per_parameter=self.per_parameter, **more))

    def close(self) -> None:
        """Write what is waiting, and close; a second call does nothing."""
        self._closed = True
        self._end()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(every={self.every})"

    def __enter__(self) -> RecordingSink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Read:
    """A report that is read at once."""

    ready = True

    def __init__(self, report: Report, per_parameter: bool, **more: int) -> None:
        self._values = report.to_dict(per_parameter=per_parameter, **more)

    def __call__(self) -> dict[str, Any]:
        return self._values


class _Queue:
    """The record that is on its way; holds no reference to the sink, which it outlives."""

    def __init__(self, writer: Writer, states: States) -> None:
        self.writer = writer
        self.first: int | None = None
        """The first step that the sink was called with."""
        self._states = states
        self._waiting: tuple[int, PendingValues] | None = None
        self._ends_at_exit = self._ended = False
        self._process = os.getpid()
        """Whose the waiting record is; a fork that ends does not write it."""

    def put(self, step: int, fetch: PendingValues) -> None:
        self._waiting, self._process = (step, fetch), os.getpid()
        if fetch.ready:
            self.flush()

    def flush(self) -> None:
        if self._waiting is None:
            return
        (step, fetch), self._waiting = self._waiting, None
        record = fetch()
        state = self._states.judge(step, record["total_norm"], bool(record["nonfinite"]))
        self.writer.write(step, {"state": state, **record}, self.first or 0)
        if not self._ends_at_exit:
            # After the tracker's own exit handler, which the first record has registered: the last
            # to come is the first to run.
            self._ends_at_exit = True
            atexit.register(self.end)

    def end(self) -> None:
        if self._ended:
            return
        self._ended = True
        atexit.unregister(self.end)
        try:
            if self._process == os.getpid():
                self.flush()
        except Exception as error:  # the device is gone, as at the end of a process
            logging.getLogger("distclip.monitor").warning(
                "the record of the last step was lost: %s", in_one_line(error, 300)
            )
        self.writer.end()
