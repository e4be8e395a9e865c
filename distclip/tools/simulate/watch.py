"""Follow a launch to its end: it comes through, or a rank fails, or nobody moves any more."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distclip.testing.ranks.loopback import interface_name
from distclip.testing.ranks.stuck import (
    STUCK_AFTER,
    ask_for_stacks,
    is_stopped,
    kernel_fields,
    limit_within,
)
from distclip.tools.simulate import nodes
from distclip.tools.simulate.layouts import Launch, inherited
from distclip.tools.simulate.records import Rank, Reader, written
from distclip.tools.simulate.task import stacks_of

LAUNCH_GRACE = 2.0
"""Seconds that the other ranks get to say something after one has failed."""

LAUNCH_STACK_LIMIT = 3.0
LAUNCH_START_LIMIT = 180.0
"""Seconds until ranks that have not started count as lost."""

END_LIMIT = 30.0
"""Seconds that launchers get to end after their ranks."""

LAST_LIMIT = 5.0
"""Seconds that a killed process gets to be gone."""

LAUNCH_POLL = 0.1

MOST_GAP = 0.5
"""Seconds between two looks that count."""

COMPUTING_LIMITS = 10
"""Limits that ranks which compute get, though nothing is heard of them."""

BUSY = 0.02
"""Of one core, from which on a rank counts as computing; one that waits takes next to nothing."""

How = Literal["ended", "failed", "hung", "not started"]


@dataclass
class Ending:
    """How a launch ended.

    Attributes:
        how: ``"ended"`` (every script came to its end), ``"failed"`` (one raised or died),
            ``"hung"``, ``"not started"``.
        ranks: what each wrote.
        stacks: of those that had to be stopped, by rank.
        died: ranks whose process went without a word.
        seconds: it took.
        log: what the launchers printed.
        isolated: whether each node had a network namespace; None: there is one node only.
    """

    how: How
    ranks: list[Rank]
    stacks: dict[int, str] = field(default_factory=dict)
    died: list[int] = field(default_factory=list)
    seconds: float = 0.0
    log: str = ""
    isolated: bool | None = None


def follow_launch(
    launch: Launch,
    folder: Path,
    limit: float,
    progress: Callable[[str], object] = lambda text: None,
) -> Ending:
    """Start it, follow it, and leave nothing behind.

    Args:
        launch: what to start.
        folder: where its ranks write.
        limit: seconds in which no rank says or computes anything until it counts as hung; ten
            times as long if one only computes.
        progress: told how far the ranks are.
    """
    start = time.monotonic()
    reader = Reader(folder, launch.world)
    logs = [str(folder / f"node{node}.log") for node in range(len(launch.commands))]
    isolated = len(launch.commands) > 1 and not nodes.why_not()
    agents: list[subprocess.Popen[bytes]] = []
    try:
        agents += _start(launch, logs, isolated, limit)
        how = _follow(reader, agents, limit, progress)
        reader.read()
        stacks = {} if how == "ended" else _stacks(reader, folder)
        died = [r.number for r in reader.ranks if r.pid and r.code is None and not _runs(r)]
    finally:
        _stop(reader, agents)
    reader.read()
    reader.read_output()
    return Ending(
        how,
        reader.ranks,
        stacks | {rank: text for rank in died if (text := written(stacks_of(folder, rank)))},
        [rank for rank in died if not reader.ranks[rank].error],
        time.monotonic() - start,
        "".join(written(Path(log)) for log in logs),
        isolated if len(launch.commands) > 1 else None,
    )


def _start(
    launch: Launch, logs: list[str], isolated: bool, limit: float
) -> list[subprocess.Popen[bytes]]:
    interface = nodes.INTERFACE if isolated else interface_name()
    environment = inherited() | launch.environment
    # Before the launch counts as hung, so that the ranks that wait can say for whom.
    wanted = os.environ.get(STUCK_AFTER)
    environment[STUCK_AFTER] = f"{limit_within(limit):g}" if wanted is None else wanted
    if interface:
        environment["GLOO_SOCKET_IFNAME"] = interface
    else:
        del environment["GLOO_SOCKET_IFNAME"]
    commands = [nodes.with_addresses(command, None) for command in launch.commands]
    if isolated:
        commands, logs = [nodes.enclosed(launch.commands, logs)], logs[:1]
    agents = []
    for command, log in zip(commands, logs, strict=True):
        with open(log, "ab") as file:
            agents.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=environment,
                    start_new_session=True,
                )
            )
    return agents


def _follow(
    reader: Reader,
    agents: list[subprocess.Popen[bytes]],
    limit: float,
    progress: Callable[[str], object],
) -> How:
    started = moved = busy = looked = now = 0.0
    failed: float | None = None
    spent, last = 0.0, time.monotonic()
    while True:
        # While this process does not get to run (a laptop sleeps), the ranks do not either.
        now, last = now + min(time.monotonic() - last, MOST_GAP), time.monotonic()
        if now - looked > min(1.0, limit / 4):
            before, spent = spent, sum(map(_seconds, reader.ranks))
            busy = now if spent - before > BUSY * (now - looked) else busy
            looked = now
        if reader.read():
            moved = now
            progress(_progress(reader.ranks))
        ranks = reader.ranks
        if all(rank.code == 0 for rank in ranks):
            return "ended"
        if failed is None and (
            _some_failed(ranks) or any(agent.poll() is not None for agent in agents)
        ):
            failed = now
        if failed is not None and now - failed > LAUNCH_GRACE:
            return "failed" if any(rank.pid for rank in ranks) else "not started"
        if any(rank.pid is None for rank in ranks) and now - started > max(
            limit, LAUNCH_START_LIMIT
        ):
            return "not started"
        quiet = now - max(moved, busy) > limit or now - moved > COMPUTING_LIMITS * limit
        if quiet and all(rank.pid for rank in ranks):
            return "hung"
        time.sleep(LAUNCH_POLL)


def _seconds(rank: Rank) -> float:
    """Processor time that a rank has taken; 0 where that cannot be known."""
    spent = map(int, kernel_fields(rank.pid)[11:13])
    return sum(spent) / os.sysconf("SC_CLK_TCK")


def _some_failed(ranks: list[Rank]) -> bool:
    return any(
        rank.error or rank.code or (rank.pid and rank.code is None and not _runs(rank))
        for rank in ranks
    )


def _progress(ranks: list[Rank]) -> str:
    if not all(rank.pid for rank in ranks):
        return f"starting, {sum(rank.pid is not None for rank in ranks)} of {len(ranks)} ranks"
    slowest, fastest = min(rank.done for rank in ranks), max(rank.done for rank in ranks)
    return f"step {slowest}" if slowest == fastest else f"steps {slowest} to {fastest}"


def _runs(rank: Rank) -> bool:
    """Whether the process of a rank is there and no zombie."""
    if rank.pid is None:
        return False
    if fields := kernel_fields(rank.pid):
        return fields[0] not in ("Z", "X")
    if os.path.isdir("/proc/self"):
        return False
    try:
        os.kill(rank.pid, 0)
    except OSError:
        return False
    return True


def _stacks(reader: Reader, folder: Path) -> dict[int, str]:
    """The stacks of all threads of the ranks that still run, taken without their cooperation."""
    files: dict[int, Path] = {}
    for rank in reader.ranks:
        if rank.pid and rank.code is None and not rank.error and _runs(rank):
            rank.stopped = is_stopped(rank.pid)
            if not rank.stopped:
                files[rank.pid] = stacks_of(folder, rank.number)
    ask_for_stacks(files, LAUNCH_STACK_LIMIT)
    return {r.number: written(files[r.pid]) for r in reader.ranks if r.pid in files}


def _stop(reader: Reader, agents: list[subprocess.Popen[bytes]]) -> None:
    """End everything that still runs; launchers whose ranks have all ended may do so themselves."""
    reader.read()
    deadline = time.monotonic() + (END_LIMIT if all(r.code == 0 for r in reader.ranks) else 0)
    for agent in agents:
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(max(0.0, deadline - time.monotonic()))
    for rank in reader.ranks:
        if rank.pid is not None and _runs(rank):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
    deadline = time.monotonic() + LAST_LIMIT
    while any(map(_runs, reader.ranks)) and time.monotonic() < deadline:
        time.sleep(LAUNCH_POLL / 10)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for agent in agents:
            if agent.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(agent.pid, number)
        for agent in agents:
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(2.0)
