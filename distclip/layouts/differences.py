"""Which rank differs from the others, and how to say so."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

Compared = TypeVar("Compared", bound=Hashable)


def sides(ranks: Sequence[int], values: Sequence[Compared]) -> list[tuple[Compared, list[int]]]:
    """The ranks by their value, the smallest group first, which is the likely fault.

    Of two sides of one size the one without the lowest rank comes first.
    """
    members: dict[Compared, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        members.setdefault(value, []).append(rank)
    return sorted(members.items(), key=lambda side: (len(side[1]), -side[1][0]))


def ranked(ranks: Sequence[int]) -> str:
    """Ranks in words: ``rank 2``, ``ranks 0, 1, 3``."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" * (len(ranks) > 8))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def told(ranks: Sequence[int], values: Sequence[str]) -> str:
    """Who has what, those in the minority first: ``rank 2: a; ranks 0, 1, 3: b``."""
    return "; ".join(f"{ranked(members)}: {value}" for value, members in sides(ranks, values))


def quoted_names(names: Sequence[str], most: int = 4) -> str:
    """The first of the names, quoted, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
