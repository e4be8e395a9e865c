"""What the ranks tell each other once, so that a mistake is an error and not a hang."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distclip.errors import RankMismatchError
from distclip.layouts.piece import Entry


@dataclass(frozen=True, slots=True)
class Notes:
    """One rank's view: version, policy and options in words, and the table of parameters."""

    version: str
    configuration: str
    table: tuple[Entry, ...]

    def digest(self) -> bytes:
        """A short fingerprint: where all ranks have the same, nothing else needs comparing."""
        return hashlib.sha256(
            repr((self.version, self.configuration, self.table)).encode()
        ).digest()


def refuse_troubled(digests: Sequence[bytes | str], ranks: Sequence[int]) -> None:
    """Refuse where another rank sent what went wrong there, instead of its digest.

    Raises:
        RankMismatchError: names the first such rank and its trouble.
    """
    for rank, digest in zip(ranks, digests, strict=True):
        if isinstance(digest, str):
            raise RankMismatchError(f"rank {rank} cannot build its GradClipper: {digest}")


def compare(notes: Sequence[Notes], ranks: Sequence[int]) -> None:
    """Refuse ranks that run another version, policy or option; tables are compared elsewhere.

    Raises:
        RankMismatchError: names the ranks and the difference.
    """
    for what in ("version", "configuration"):
        groups: dict[str, list[int]] = {}
        for rank, note in zip(ranks, notes, strict=True):
            groups.setdefault(getattr(note, what), []).append(rank)
        if len(groups) > 1:
            listed = "; ".join(
                f"rank{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}: {value}"
                for value, members in groups.items()
            )
            raise RankMismatchError(
                f"the ranks have different distclip {what}s: {listed}. Give every rank the same "
                f"{what}"
            )


def merge_groups(groups: Sequence[Mapping[str, int]], ranks: Sequence[int]) -> dict[str, int]:
    """Optimizer parameter group of each parameter on any rank, where ranks hold different ones.

    Raises:
        RankMismatchError: a parameter that two ranks have in groups of different index.
    """
    first: dict[str, tuple[int, int]] = {}
    for rank, here in zip(ranks, groups, strict=True):
        for name, group in here.items():
            other, known = first.setdefault(name, (rank, group))
            if known != group:
                raise RankMismatchError(
                    f"parameter {name!r} is in optimizer parameter group {known} on rank {other} "
                    f"but in group {group} on rank {rank}: build the groups in the same order on "
                    f"every rank (groups of the same index are one group)"
                )
    return {name: group for name, (_, group) in first.items()}
