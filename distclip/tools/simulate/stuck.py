"""Who is where: read off the stacks of ranks that had to be stopped."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence

from distclip.testing.ranks.stuck import (
    STOPPED,
    WAITING_PLACES,
    Frame,
    frames_by_thread,
    names,
)
from distclip.tools.simulate.records import Rank

_HARNESS = ("/tools/launch/script.py", "/tools/simulate/rank.py", "/tools/simulate/recorder.py",
    "/tools/simulate/__main__.py", "<frozen runpy>")  # fmt: skip
_LIBRARY = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")})


def is_users(file: str) -> bool:
    """Whether a frame in this file is none of a library."""
    libraries = ("-packages/", "/distclip/", "/torch/", *_HARNESS)
    return not (file.startswith((*_LIBRARY, "<frozen")) or any(part in file for part in libraries))


def main_thread(stacks: str) -> list[Frame]:
    """The frames of the thread that runs the script, innermost first, down to the script's own."""
    for frames in frames_by_thread(stacks):
        if any(frame.file.endswith("/tools/simulate/rank.py") for frame in frames):
            return [f for f in frames if not any(part in f.file for part in _HARNESS)]
    return []


def without_machinery(stacks: str) -> str:
    """The stacks without the frames of this machinery."""
    lines = stacks.strip().splitlines()
    left_out = (*_HARNESS, "Extension modules: ")
    return "\n".join(line for line in lines if not any(part in line for part in left_out))


def where(stacks: str) -> str:
    """The user's line a rank is in, and what that called."""
    frames = main_thread(stacks)
    for depth, frame in enumerate(frames):
        if is_users(frame.file):
            called = f", in {frames[depth - 1].function}" if depth else ""
            return f"{frame}{called}"
    return str(frames[0]) if frames else "unknown place"


def talks(stacks: str) -> bool:
    """Whether it is in a collective, or in a backward that may wait in one."""
    for frame in main_thread(stacks):
        if is_users(frame.file):
            return False
        if any(part in frame.file for part in WAITING_PLACES):
            return True
    return False


def blamed(ranks: Sequence[Rank], stacks: Mapping[int, str]) -> tuple[list[int], str]:
    """Who keeps the others waiting, as far as can be told, and why that is thought.

    Returns:
        Ranks (none: it cannot be told), and a reason.
    """
    gone = [rank.number for rank in ranks if rank.code is not None and not rank.error]
    if gone and len(gone) < len(ranks):
        steps = ", ".join(f"{ranks[r].done}" for r in gone)
        return gone, f"ended after {steps} step(s), while the others go on"
    stopped = [rank.number for rank in ranks if rank.stopped]
    if stopped:
        return stopped, STOPPED
    # One that does not wait for anybody is what the others wait for.
    silent = [rank for rank, text in stacks.items() if not talks(text)]
    if silent and len(silent) < len(ranks):
        return silent, "is in no collective, and the others wait for it in one"
    places = {rank.number: rank.place() for rank in ranks}
    last = max(places.values())
    behind = [rank for rank, place in places.items() if place < last]
    if behind:
        return behind, "is behind the others"
    different = {rank: where(text) for rank, text in stacks.items()}
    if len(set(different.values())) > 1:
        usual = max(different.values(), key=list(different.values()).count)
        odd = [rank for rank, place in different.items() if place != usual]
        return odd, "is elsewhere in the script than the others"
    return [], "all ranks wait in the same place"


def story(ranks: Sequence[Rank], stacks: Mapping[int, str]) -> list[str]:
    """A line for each rank: how far it came, and where it is."""
    lines: dict[str, list[int]] = {}
    for rank in ranks:
        steps = f"after {rank.done} step{'s' if rank.done != 1 else ''}"
        if rank.error:
            text = f"raised {rank.error} {steps}"
        elif rank.code is not None:
            text = f"the script ended with exit code {rank.code} {steps}"
        elif rank.stopped:
            text = f"{STOPPED} {steps}"
        else:
            text = f"{steps}, at {where(stacks.get(rank.number, ''))}"
        lines.setdefault(text, []).append(rank.number)
    return [f"{names(who)}: {text}" for text, who in lines.items()]
