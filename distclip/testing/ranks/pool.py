"""Pools of warm gloo ranks: run a function on every rank of a small world, in milliseconds.

    from distclip.testing import run_on_ranks

    def mean_rank():
        rank = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(rank)
        return rank.item() / dist.get_world_size()

    assert run_on_ranks(mean_rank, 3) == [1.0, 1.0, 1.0]

The ranks stay up between calls. A call that fails in any way ends them, and the next call forks
new ones; so does a call that leaves the process groups in a state that the next would notice.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, NoReturn, TypeVar

from distclip.testing.ranks import forkserver, shipping, worker
from distclip.testing.ranks.failures import Outcome, rank_error
from distclip.testing.ranks.forkserver import PoolError, RankProcess
from distclip.testing.ranks.health import GroupState, reusable
from distclip.testing.ranks.replies import read_shared, receive, stuck
from distclip.testing.ranks.stuck import STOPPED, STUCK_AFTER, limit_within

T = TypeVar("T")

GRACE = 1.0  # seconds that the other ranks get to finish after one has failed
JOIN_LIMIT = 90.0  # seconds for new ranks to find each other; the store gives up after 60


class RankPool:
    """A gloo world of a given size that runs functions on all of its ranks.

    Ranks are forked on the first call. The pool may be used from several threads; calls wait for
    each other. A context manager: leaving it ends the ranks.

    Args:
        world_size: how many ranks, at least 1.
    """

    def __init__(self, world_size: int) -> None:
        if world_size < 1:
            raise ValueError(f"a world has at least one rank, not {world_size=}")
        self.world_size = world_size
        self._ranks: list[RankProcess] = []
        self._lock = threading.Lock()

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes of the ranks, by rank; empty while none are up."""
        return tuple(rank.pid for rank in self._ranks)

    def run(
        self, function: Callable[..., T], /, *args: Any, timeout: float = 60.0, **kwargs: Any
    ) -> list[T]:
        """Call `function(*args, **kwargs)` on every rank; see `run_on_ranks`."""
        __tracebackhide__ = True
        if worker.in_rank:
            raise RuntimeError("ranks cannot be started from a rank; call this in the main process")
        call = shipping.dumps((function, args, kwargs))
        # Before the call counts as hung, so that the ranks that wait can say for whom.
        environment = {STUCK_AFTER: f"{limit_within(timeout):g}", **os.environ}
        request = worker.CallRequest(environment, _directory(), list(sys.path), call)
        with self._lock:
            try:
                outcomes, blamed, states = self._call(pickle.dumps(tuple(request)), timeout)
            except BaseException:  # KeyboardInterrupt above all: nobody will read the replies
                self._discard()
                raise
            if blamed is not None or not reusable(states):
                self._discard()
        if blamed is not None:
            _raise_together(outcomes, blamed)
            raise rank_error(outcomes, blamed, timeout)
        _show_output(outcomes)
        return [outcomes[rank].result for rank in range(self.world_size)]

    def close(self) -> None:
        """End the ranks. A later call starts new ones."""
        with self._lock:
            self._discard()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _discard(self) -> None:
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                if rank.wait(0) is None:
                    os.kill(rank.pid, 9)
        for rank in ranks:
            rank.kill()

    def _start(self) -> None:
        server = forkserver.get()
        try:
            for rank in range(self.world_size):
                self._ranks.append(server.fork(rank, self.world_size))
            port = self._hear(0)
            for process in self._ranks[1:]:
                process.connection.send_bytes(port)
            for rank in range(1, self.world_size):
                self._hear(rank)
            for rank in range(self.world_size):
                self._hear(rank)
        except BaseException:
            self._discard()
            raise

    def _hear(self, rank: int) -> bytes:
        process = self._ranks[rank]
        with contextlib.suppress(EOFError, OSError):
            if process.connection.poll(JOIN_LIMIT):
                return process.connection.recv_bytes()
        output = read_shared(process.output)
        raise PoolError(
            f"rank {rank} of {self.world_size} did not join its process group:\n{output}"
        )

    def _call(
        self, request: bytes, timeout: float
    ) -> tuple[dict[int, Outcome], int | None, list[GroupState]]:
        """Outcomes by rank, the rank to blame if any, and the state of the groups if none."""
        # An idle rank has nothing to say: a readable connection is a closed one. Its exit status
        # may come later, when the zygote gets to run.
        if any(rank.wait(0) is not None or rank.connection.poll(0) for rank in self._ranks):
            self._discard()
        if not self._ranks:
            self._start()
        for process in self._ranks:
            os.ftruncate(process.output.fileno(), 0)
            os.ftruncate(process.stacks.fileno(), 0)
        for process in self._ranks:
            with contextlib.suppress(OSError):  # dead already: noticed when it is listened to
                process.connection.send_bytes(request)
        outcomes, states = self._listen(timeout)
        silent = [rank for rank in range(self.world_size) if rank not in outcomes]
        for outcome in stuck(silent, [self._ranks[rank] for rank in silent]):
            outcomes[outcome.rank] = outcome
        by_rank = dict(sorted(outcomes.items()))
        # In order of arrival, but a death, or a stop, comes before the errors that it caused.
        for kinds in ("died", STOPPED), ("raised",), ("stuck",), ("xfailed", "skipped"):
            for rank, outcome in outcomes.items():
                if outcome.kind in kinds or outcome.error in kinds:
                    return by_rank, rank, []
        return by_rank, None, states

    def _listen(self, timeout: float) -> tuple[dict[int, Outcome], list[GroupState]]:
        outcomes: dict[int, Outcome] = {}
        states: dict[int, GroupState] = {}
        deadline = time.monotonic() + timeout
        while len(outcomes) < self.world_size:
            sources: dict[Any, int] = {}
            for rank, process in enumerate(self._ranks):
                if rank not in outcomes:
                    sources[process.connection] = sources[process.status] = rank
            ready = wait(list(sources), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in sorted({sources[source] for source in ready}):
                outcomes[rank], state = receive(rank, self._ranks[rank])
                if state is not None:
                    states[rank] = state
                if outcomes[rank].kind in ("raised", "died"):
                    deadline = min(deadline, time.monotonic() + GRACE)
        return outcomes, [states[rank] for rank in sorted(states)]


_pools: dict[int, RankPool] = {}
_pools_lock = threading.Lock()
_inherited_pools: list[RankPool] = []  # in a fork of this process: pools that belong to the parent


def run_on_ranks(
    function: Callable[..., T],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    **kwargs: Any,
) -> list[T]:
    """Call `function(*args, **kwargs)` on every rank of a gloo world.

    The default process group is up, over loopback, with one thread per rank; seeds, default dtype,
    environment, working directory and ``sys.path`` are set anew for each call. What the ranks
    print is printed here, each line with its rank.

    Args:
        function: importable, defined in a test module, local, or a `functools.partial` of such.
            It and the arguments are pickled once and sent to every rank.
        world_size: how many ranks, at least 1. Ranks are kept for the next call of that size.
        *args: positional arguments of the function, the same on every rank.
        **kwargs: keyword arguments of the function; for one called ``timeout`` use a partial.
        timeout: seconds until a rank that has not answered counts as hung.

    Returns:
        The results by rank, pickled on the way: return plain tensors, not sharded ones.

    Raises:
        RankError: a rank raised, hung or died; the message has the traceback or the stacks, and
            the output, of every rank.
        TypeError: the function or an argument cannot be sent.
        PoolError: the ranks could not be started.
        Skipped, SkipTest: every rank skipped the test.
    """
    __tracebackhide__ = True
    return shared_pool(world_size).run(function, *args, timeout=timeout, **kwargs)


def shared_pool(world_size: int) -> RankPool:
    """The pool of that size which this process keeps warm until it exits."""
    with _pools_lock:
        if world_size not in _pools:
            _pools[world_size] = RankPool(world_size)
        return _pools[world_size]


@atexit.register
def _close_all() -> None:
    for pool in _pools.values():
        pool.close()


def _forget_all() -> None:
    global _pools_lock
    _inherited_pools.extend(_pools.values())
    _pools.clear()
    _pools_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_all)


def _raise_together(outcomes: dict[int, Outcome], blamed: int) -> None:
    """Skip, or xfail, here too where all ranks did."""
    __tracebackhide__ = True
    kind, reason = outcomes[blamed].kind, outcomes[blamed].error
    if any(outcome.kind != kind for outcome in outcomes.values()):
        return
    if kind == "skipped":
        _skip(reason)
    if kind == "xfailed":
        import pytest  # it is there: the ranks have raised its exception

        pytest.xfail(reason)


def _skip(reason: str) -> NoReturn:
    __tracebackhide__ = True
    if "pytest" in sys.modules:
        import pytest

        raise pytest.skip.Exception(reason)
    import unittest

    raise unittest.SkipTest(reason)


def _show_output(outcomes: dict[int, Outcome]) -> None:
    for rank, outcome in outcomes.items():
        for line in outcome.output.splitlines():
            print(f"[rank {rank}] {line}")


def _directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # removed under our feet
        return "/"
