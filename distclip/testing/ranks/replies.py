"""What comes back from a rank: a reply, the news of its death, or the stacks it is stuck in."""

from __future__ import annotations

import pickle
from typing import IO

from distclip.testing.ranks import worker
from distclip.testing.ranks.failures import Outcome, exit_text, own_frames
from distclip.testing.ranks.forkserver import RankProcess
from distclip.testing.ranks.health import GroupState
from distclip.testing.ranks.stuck import ask_for_stacks, culprits, is_stopped, reason

STACK_LIMIT = 2.0  # seconds to wait for the stacks of a stuck rank


def receive(rank: int, process: RankProcess) -> tuple[Outcome, GroupState | None]:
    """The outcome of a rank whose connection or exit status has become readable.

    With the state of its process groups where it returned.
    """
    try:
        if process.connection.poll(0):
            reply = worker.Reply(*pickle.loads(process.connection.recv_bytes()))
        else:
            raise EOFError  # only its end was readable
    except (EOFError, OSError):
        code = process.wait(10.0)
        text = exit_text(code) if code is not None else "hung up"
        stacks = own_frames(read_shared(process.stacks))
        return Outcome(
            rank, "died", error=text, trace=stacks, output=read_shared(process.output)
        ), None
    output = read_shared(process.output)
    if reply.kind != "returned":
        return Outcome(rank, reply.kind, error=reply.error, trace=reply.trace, output=output), None
    try:
        return Outcome(rank, "returned", pickle.loads(reply.value), output=output), reply.groups
    except Exception as error:
        text = f"a result that cannot be loaded here: {type(error).__name__}: {error}"
        return Outcome(rank, "raised", error=text, output=output), None


def stuck(ranks: list[int], processes: list[RankProcess]) -> list[Outcome]:
    """The outcomes of ranks that gave no answer in time, those that others wait for first."""
    running = [process for process in processes if not is_stopped(process.pid)]
    ask_for_stacks({process.pid: process.stacks.fileno() for process in running}, STACK_LIMIT)
    # Empty before the call, and so where nobody wrote into it.
    stacks = [read_shared(process.stacks) for process in processes]
    reasons = [reason(p.pid, text) for p, text in zip(processes, stacks, strict=True)]
    outcomes = [
        Outcome(
            rank, "stuck", error=why, trace=own_frames(text), output=read_shared(process.output)
        )
        for rank, process, why, text in zip(ranks, processes, reasons, stacks, strict=True)
    ]
    first = culprits(reasons)
    return [outcomes[n] for n in first] + [o for n, o in enumerate(outcomes) if n not in first]


def read_shared(file: IO[bytes]) -> str:
    """All that was written to a file that a rank shares with its caller."""
    file.seek(0)
    return file.read().decode(errors="replace")
