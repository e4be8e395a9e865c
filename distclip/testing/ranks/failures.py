"""What became of a call on each rank, and the message that tells it."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distclip.testing.ranks.stuck import STOPPED, WAITS, names

ResultKind = Literal["returned", "raised", "skipped", "xfailed", "died", "stuck"]

# As faulthandler prints the frames that lie below every function; "<string>" starts the zygote.
_HARNESS_FILES = (
    '/distclip/testing/ranks/worker.py"',
    '/distclip/testing/ranks/zygote.py"',
    'File "<string>"',
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank did with a call.

    Attributes:
        rank: its rank.
        kind: returned, raised, skipped or xfailed (`pytest.skip`, `pytest.xfail`), died (the
            process ended), or stuck (no answer in time; the process was ended).
        result: what the function returned.
        error: one line: the exception, the reason of a skip, how the process ended, or what keeps
            a stuck one, as far as that is seen.
        trace: the traceback of what it raised; the stacks of all threads where it died or stuck.
        output: what it wrote to stdout and stderr during the call.
    """

    rank: int
    kind: ResultKind
    result: Any = None
    error: str = ""
    trace: str = ""
    output: str = ""


class RankError(AssertionError):
    """A call did not return on every rank. The message has the story of each.

    Attributes:
        outcomes: what each rank did, by rank.
    """

    def __init__(self, message: str, outcomes: Mapping[int, Outcome]) -> None:
        super().__init__(message)
        self.outcomes = dict(outcomes)

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.outcomes)


def rank_error(outcomes: Mapping[int, Outcome], first: int, timeout: float) -> RankError:
    """The error for a call that failed.

    Args:
        outcomes: what each rank did.
        first: the rank that is to blame, as far as can be told.
        timeout: the limit of the call in seconds.
    """
    blamed = outcomes[first]
    world = len(outcomes)
    if blamed.kind == "stuck":
        silent = {rank: each.error for rank, each in outcomes.items() if each.kind == "stuck"}
        waiting = [rank for rank, why in silent.items() if why == WAITS]
        blame = [rank for rank in silent if rank not in waiting] or list(silent)
        headline = f"no answer within {timeout:g} s from {names(blame)} of {world}"
        if blamed.error == STOPPED:
            blame = [rank for rank, why in silent.items() if why == STOPPED]
            headline = f"{names(blame)} of {world} {STOPPED}"
        if len(blame) < len(silent):
            headline += f"; {names(waiting)}: {WAITS}"
    elif blamed.kind in ("skipped", "xfailed"):
        headline = f"rank {first} of {world} {_deed(blamed)}, but not every rank did the same"
    else:
        alike = [rank for rank, outcome in outcomes.items() if _deed(outcome) == _deed(blamed)]
        headline = f"{names(alike)} of {world} {_deed(blamed)}"
    order = [first, *(rank for rank in outcomes if rank != first)]
    told: dict[tuple[str, str, str], list[int]] = {}  # ranks with the same story share one section
    for rank in order:
        told.setdefault(_story(outcomes[rank]), []).append(rank)
    sections = [headline]
    for (deed, trace, output), ranks in told.items():
        sections.append(f"---- {names(sorted(ranks))}: {deed} ----")
        sections += [text.rstrip("\n") for text in (trace, output) if text]
    return RankError("\n".join(sections), outcomes)


def exit_text(code: int) -> str:
    """How a process ended: 'exited with code 3', 'was killed by SIGKILL'."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def own_frames(stacks: str) -> str:
    """A faulthandler dump without the frames of the harness, which lie below every function."""
    kept: list[str] = []
    threads: list[list[str]] = []
    for line in stacks.splitlines():
        if line.startswith("Extension modules:"):
            continue
        if line.startswith(("Current thread", "Thread ")) or not threads:
            threads.append([])
        threads[-1].append(line)
    for lines in threads:
        frames = [line for line in lines if not any(file in line for file in _HARNESS_FILES)]
        kept += frames if len(frames) > 1 else lines
    return "\n".join(kept).strip()


def _deed(outcome: Outcome) -> str:
    if outcome.kind == "returned":
        text = repr(outcome.result)
        return f"returned {text if len(text) <= 200 else text[:200] + '...'}"
    if outcome.kind == "died":
        return outcome.error
    if outcome.kind == "stuck":
        return "was still running, its stacks:" if outcome.trace else outcome.error or "was stuck"
    return f"{outcome.kind} {outcome.error}".rstrip()


def _story(outcome: Outcome) -> tuple[str, str, str]:
    output = f"output:\n{outcome.output}" if outcome.output else ""
    trace = outcome.trace if outcome.kind not in ("skipped", "xfailed") else ""
    return _deed(outcome), trace, output
