"""Waiting for the other ranks: with a limit where there is one, and with a name for who is missing.

A rank that has waited for a second writes so into the store of the process groups. When a wait has
come to its limit, or when the collective breaks, what the ranks wrote says who is not among them.
Nothing is written and no thread is woken in a step that waits for less.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup

from distclip.errors import CollectiveError, ConfigurationError
from distclip.layouts.differences import ranked

ENVIRONMENT = "DISTCLIP_STUCK_AFTER"
"""Seconds, for clippers that are given no ``stuck_after``."""

NOTED_AFTER = 1.0
"""Seconds after which a waiting rank writes that it waits."""

WORD_LIMIT = 1.0
"""Seconds that other ranks get to write so too, once one has given up."""

STORE_LIMIT = 2.0
"""Seconds that the store gets to answer: it may lie in a process that is stopped."""

POLL = 0.2

_logger = logging.getLogger("distclip")


class Wait(NamedTuple):
    """What this process waits for at present.

    Attributes:
        step: of the clipping; None for a function that counts no steps.
        limit: seconds; None: no limit but that of the process group.
    """

    step: int | None = None
    limit: float | None = None

    def __str__(self) -> str:
        return "a clipping collective" if self.step is None else f"the clipping of step {self.step}"


def limit_from_environment() -> float | None:
    """The limit that :data:`ENVIRONMENT` sets, if it does.

    Raises:
        ConfigurationError: it is no number of seconds.
    """
    text = os.environ.get(ENVIRONMENT, "")
    if not text:
        return None
    with contextlib.suppress(ValueError):
        if 0.0 < float(text) < math.inf:
            return float(text)
    raise ConfigurationError(
        f"{ENVIRONMENT} must be a number of seconds > 0 such as 600, got {text!r}; unset it for no "
        f"limit"
    )


_current = Wait()
with contextlib.suppress(ConfigurationError):  # a clipper will say so
    _current = Wait(limit=limit_from_environment())


def wait_for(wait: Wait) -> Wait:
    """From now on collectives belong to this :class:`Wait`; returns what they belonged to."""
    global _current
    before, _current = _current, wait
    return before


def current() -> Wait:
    """What this process waits for at present."""
    return _current


def has_limit() -> bool:
    """Whether waits have a limit at present."""
    return _current.limit is not None


def finish(work: dist.Work, group: ProcessGroup, *, on_host: bool) -> None:
    """Wait for a collective that was issued.

    Args:
        work: its handle.
        group: its ranks.
        on_host: whether the host waits for it. If not, its stream does, and a thread looks on.

    Raises:
        CollectiveError: it took longer than the limit; names the ranks that are missing.
    """
    wait, start = _current, time.monotonic()
    if wait.limit is None or not on_host:
        work.wait()
        if wait.limit is not None:
            _watchdog.watch(_Watched(work, group, wait, start))
        return
    notes: _Notes | None = None  # made when there is something to note
    pause = min(NOTED_AFTER, wait.limit)
    while True:
        try:
            work.wait(datetime.timedelta(seconds=pause))
            return
        except RuntimeError:
            if work.is_completed():
                raise
        waited = time.monotonic() - start
        notes = notes or _Notes(group)
        if waited >= wait.limit:
            raise _stuck(wait, notes)
        notes.write()
        pause = max(wait.limit - waited, 0.001)


@contextlib.contextmanager
def named(group: ProcessGroup) -> Iterator[None]:
    """Add to the error of a failed collective which one it was, and which ranks are missing."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, CollectiveError):
            raise
        _logger.error("%s failed: %s", _current, error)
        raise _broken(_current, _Notes(group), error) from error


def _stuck(wait: Wait, notes: _Notes) -> CollectiveError:
    missing = notes.missing()
    if missing is None:
        who = "for the other ranks, and the store that would say which are missing does not answer"
    elif missing:
        who = f"for {ranked(missing)}"
    else:
        who = "for other ranks, though all of them have come to it"
    return CollectiveError(
        f"{wait} waited {wait.limit:g} s {who}. A rank that is missing is stuck elsewhere, was "
        f"stopped, or left out a clip_(): look at its stacks (py-spy dump). If ranks may be so "
        f"late, as where one of them evaluates or saves alone, give a larger stuck_after, or "
        f"{ENVIRONMENT}",
        wait.step,
        missing or (),
    )


def _broken(wait: Wait, notes: _Notes, error: Exception) -> CollectiveError:
    missing = notes.missing() or ()
    who = f" (no word from {ranked(missing)})" if missing else ""
    return CollectiveError(
        f"{wait} failed: a rank has died, left, or called another collective{who}; its own output "
        f"says why. {type(error).__name__}: {str(error).strip().splitlines()[0]}",
        wait.step,
        missing,
    )


class _Notes:
    """What the ranks of a group write into the store about one collective of it."""

    def __init__(self, group: ProcessGroup) -> None:
        self._ranks = dist.get_process_group_ranks(group)
        self._written = False
        self._store: Any = None
        with contextlib.suppress(RuntimeError, AttributeError):
            counted: Any = group
            number = counted._get_sequence_number_for_group()
            self._prefix = f"distclip/waits/{counted.group_name}/{number}/"
            self._store = dist.distributed_c10d._get_default_store()

    def write(self) -> None:
        """Note that this rank has come to the collective and waits in it."""
        if not self._written and self._store is not None:
            self._written = True
            _in_time(lambda: self._store.set(self._prefix + str(dist.get_rank()), "waits"))

    def missing(self) -> tuple[int, ...] | None:
        """Global ranks that have written nothing; None where the store gives no answer."""
        if self._store is None:
            return None
        self.write()
        deadline = time.monotonic() + WORD_LIMIT
        while True:
            found = _in_time(lambda: [r for r in self._ranks if not self._has_written(r)])
            if not found or len(found) == 1 or time.monotonic() > deadline:
                return None if found is None else tuple(found)
            time.sleep(POLL)

    def _has_written(self, rank: int) -> bool:
        return bool(self._store.check([self._prefix + str(rank)]))


_joint: Counter[str] = Counter()
"""Group name -> calls of :func:`all_or_none` so far, the same on all of its ranks."""


@contextlib.contextmanager
def all_or_none(group: ProcessGroup | None, what: str) -> Iterator[None]:
    """Run something that may fail on one rank, and let no other rank go on by itself then.

    Each rank writes into the store how it went, and one that failed raises at once, without a
    collective, which others could take for theirs. A rank that waits in a collective of the thing
    itself gets no word: that ends when the failed rank does, or by the limit of its process group.

    Raises:
        CollectiveError: it has failed on another rank.
    """
    if group is None or dist.get_world_size(group) == 1:
        yield
        return
    store: Any = dist.distributed_c10d._get_default_store()
    name = group.group_name
    _joint[name] += 1
    prefix = f"distclip/joint/{name}/{_joint[name]}/"
    mine, ranks = str(dist.get_rank()), dist.get_process_group_ranks(group)
    try:
        yield
    except Exception as error:
        word = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        _in_time(lambda: store.set(prefix + mine, word))
        raise
    _in_time(lambda: store.set(prefix + mine, ""))
    words: dict[int, str] = {}
    with contextlib.suppress(RuntimeError):  # no store any more, or none in time: as without it
        for rank in ranks:
            words[rank] = store.get(prefix + str(rank)).decode()  # waits for it
    failed = [rank for rank in words if words[rank]]
    if failed:
        raise CollectiveError(
            f"{what} has failed on rank {failed[0]}, whose own error says where: "
            f"{words[failed[0]]}",
            ranks=failed,
        )


def _in_time(ask: Callable[[], Any]) -> Any:
    """The store's answer; None if there is none in time."""
    answers: list[Any] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(STORE_LIMIT)
    return answers[0] if answers else None


class _Watched(NamedTuple):
    """A collective on an accelerator, which no host thread waits for."""

    work: dist.Work
    group: ProcessGroup
    wait: Wait
    start: float


class _Watchdog:
    """A thread that looks at collectives on accelerators; started by the first with a limit."""

    def __init__(self) -> None:
        self._watched: list[_Watched] = []
        self._thread: threading.Thread | None = None

    def watch(self, watched: _Watched) -> None:
        self._watched.append(watched)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="distclip", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        notes: dict[int, _Notes] = {}
        while True:
            time.sleep(POLL)
            for each in list(self._watched):
                if each.work.is_completed():
                    self._watched.remove(each)
                    notes.pop(id(each), None)
                    continue
                waited = time.monotonic() - each.start
                if waited > NOTED_AFTER:
                    notes.setdefault(id(each), _Notes(each.group)).write()
                if each.wait.limit is not None and waited > each.wait.limit:
                    give_up(_stuck(each.wait, notes[id(each)]))
                    return


def give_up(error: CollectiveError) -> None:
    """End the process, whose main thread waits for a device that will not come back."""
    _logger.critical("distclip ends this process: %s", error)
    os.abort()


_watchdog = _Watchdog()

__all__: Sequence[str] = [
    "ENVIRONMENT", "Wait", "finish", "has_limit", "limit_from_environment", "named", "wait_for",
]  # fmt: skip
