"""What the ranks compare once, when a clipper is built: a mistake is an error and not a hang."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch.distributed import ProcessGroup

from distclip._version import __version__
from distclip.errors import DistclipError, RankMismatchError
from distclip.layouts.differences import told
from distclip.layouts.piece import Entry
from distclip.statistics import collectives

OptionTexts = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Notes:
    """What one rank tells the others when a clipper is built.

    Attributes:
        versions: of distclip and torch.
        options: policy and arguments in words, by name.
        table: the parameters.
        frozen: names of those that require no gradient.
        device: type of the device of the first of them; empty where there are none.
    """

    versions: OptionTexts
    options: OptionTexts
    table: tuple[Entry, ...]
    frozen: tuple[str, ...] = ()
    device: str = ""

    def digest(self) -> bytes:
        """A short fingerprint: where all ranks have the same, nothing else needs comparing.

        The ranks of a mesh are written out once: with thousands of them, in each of hundreds of
        parameters, they would be all that takes time.
        """
        groups: dict[tuple[int, ...] | None, int] = {}
        numbers: dict[int, int] = {}
        table = []
        for entry in self.table:
            for ranks in (entry.ranks, entry.others):
                if id(ranks) not in numbers:
                    numbers[id(ranks)] = groups.setdefault(ranks, len(groups))
            short = replace(entry, ranks=None, others=())
            table.append((short, numbers[id(entry.ranks)], numbers[id(entry.others)]))
        facts = (self.versions, self.options, list(groups), table, self.frozen, self.device)
        return hashlib.sha256(repr(facts).encode()).digest()


class Hail(NamedTuple):
    """The first message of every rank: short, a plain tuple that any version can read.

    Attributes:
        version: of distclip.
        digest: of what has to be the same; empty where this rank cannot go on.
        trouble: why it cannot.
        call: of a function without memory: its name and its parameters, in words; empty where a
            clipper is built.
    """

    version: str
    digest: bytes
    trouble: str = ""
    call: str = ""


class Agreements:
    """What functions without memory have compared between ranks: each call once in each group.

    They keep no names and compare shapes and dtypes only. A rank asks if it has not agreed with
    its group on what it has now; since agreeing means that all had the same, all of them ask then.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[ProcessGroup, dict[bytes, set[str]]]] = {}
        self._devices: dict[int, tuple[ProcessGroup, str]] = {}

    def agree(self, group: ProcessGroup, what: str, entries: Sequence[Entry]) -> set[str]:
        """Compare, unless that has been done.

        Returns:
            The habits of such calls, which only calls of all ranks together change: a rank that has
            forgotten its session, as others have not, goes on like them.

        Args:
            group: the ranks that call together.
            what: what is called, in words; part of what has to be the same.
            entries: the table that the call will reduce.

        Raises:
            RankMismatchError: on every rank, with who has what.
        """
        digest, shown = self._digest(what, entries)
        if self.knows(group, what, entries):
            return self._known[id(group)][1][digest]
        hail = Hail(__version__, digest, call=f"{what} of {shown}")
        ranks = collectives.ranks_of(group)
        heard = refuse_troubled(collectives.gather(tuple(hail), group), ranks)
        if any(other.digest != digest for other in heard):
            raise RankMismatchError(
                f"the ranks were given different parameters: "
                f"{told(ranks, [each.call for each in heard])}. Give every rank its part of the "
                f"same parameters, gradients there or not (pipeline_group= is for stages)"
            )
        alive = {
            key: each for key, each in self._known.items() if collectives.is_registered(each[0])
        }
        _, known = alive.setdefault(id(group), (group, {}))
        self._known = alive
        return known.setdefault(digest, set())

    def knows(self, group: ProcessGroup, what: str, entries: Sequence[Entry]) -> bool:
        """Whether the group has agreed on such a call; the same on every rank that asks so."""
        found = self._known.get(id(group))
        return (
            found is not None and found[0] is group and self._digest(what, entries)[0] in found[1]
        )

    def device(self, group: ProcessGroup, here: str) -> str:
        """Type of the device whose backend carries the numbers of members with and without any.

        Where a group has several backends, asked at the first such call in it.

        Args:
            group: the ranks that call together.
            here: type of the device of this rank's numbers; empty where it has none.
        """
        if not collectives.is_mixed(group):
            return here or "cpu"
        known = self._devices.get(id(group))
        if known is None or known[0] is not group:
            known = group, common_device(collectives.gather(here, group))
            alive = {
                key: each
                for key, each in self._devices.items()
                if collectives.is_registered(each[0])
            }
            self._devices = {**alive, id(group): known}
        return known[1]

    @staticmethod
    def _digest(what: str, entries: Sequence[Entry]) -> tuple[bytes, str]:
        # Slices that are declared need not be of one size.
        table = tuple((entry.dtype, _without_own_extent(entry)) for entry in entries)
        return hashlib.sha256(repr((what, table)).encode()).digest(), _table_in_words(table)


agreements = Agreements()
"""What functions without memory have compared between ranks, in this process."""


def _without_own_extent(entry: Entry) -> tuple[int | str, ...]:
    """The shape, without the extent that is this rank's own."""
    if entry.slice is None or entry.slice.whole:
        return entry.shape
    (cut,) = entry.split_dims
    return tuple("sliced" if dim == cut else extent for dim, extent in enumerate(entry.shape))


def _table_in_words(table: Sequence[tuple[str, tuple[int | str, ...]]]) -> str:
    """As much of a table of dtypes and shapes as tells it from others, in a few words."""
    digest = hashlib.sha256(repr(table).encode()).hexdigest()[:8]
    some = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in table[:3])
    more = f", ... [{digest}]" if len(table) > 3 else ""
    return f"{len(table)} parameter{'s' * (len(table) != 1)} ({some}{more})"


def meet(mine: Notes, group: ProcessGroup) -> list[Notes]:
    """Exchange notes with the ranks of a group, and refuse what does not go together.

    Returns:
        Those of every rank, in group order. Ranks that have the same share one object: with
        thousands of ranks, nothing may be done for each parameter of each of them.

    Raises:
        RankMismatchError: on every rank.
    """
    ranks = collectives.ranks_of(group)
    heard = collectives.gather(tuple(Hail(__version__, mine.digest())), group)
    digests = [hail.digest for hail in refuse_troubled(heard, ranks)]
    if len(set(digests)) == 1:
        return [mine] * len(ranks)
    notes = collectives.gather_by_key(mine, digests, group)
    compare_notes(notes, ranks)
    return notes


def tell_trouble(error: Exception, group: ProcessGroup, call: str = "") -> None:
    """Say that this rank cannot go on, before it raises, so that the others do not wait for it."""
    known = isinstance(error, DistclipError)
    trouble = str(error) if known else f"{type(error).__name__}: {error}"
    collectives.gather(tuple(Hail(__version__, b"", trouble, call)), group)


def refuse_troubled(hails: Sequence[object], ranks: Sequence[int]) -> list[Hail]:
    """Refuse where another rank has said what went wrong there, or runs another version.

    Raises:
        RankMismatchError: names such ranks, and the trouble of the first.
    """
    heard = [
        Hail(*hail)
        if isinstance(hail, tuple) and len(hail) == len(Hail._fields)
        else Hail("another one", b"")
        for hail in hails
    ]
    _refuse_apart("distclip versions", "Install the same", ranks, [h.version for h in heard])
    for rank, hail in zip(ranks, heard, strict=True):
        if hail.trouble:
            doing = "clip or measure" if hail.call else "build its GradClipper"
            raise RankMismatchError(f"rank {rank} cannot {doing}: {hail.trouble}")
    calls = [hail.call or "a GradClipper is built" for hail in heard]
    if len({bool(hail.call) for hail in heard}) > 1:
        raise RankMismatchError(
            f"the ranks make different calls: {told(ranks, calls)}. Build the GradClipper, and "
            f"call the functions, at the same points on every rank"
        )
    return heard


def compare_notes(notes: Sequence[Notes], ranks: Sequence[int]) -> None:
    """Refuse ranks that run another version, policy or option; tables are compared elsewhere.

    Raises:
        RankMismatchError: names the ranks and every difference.
    """
    first = notes[0]
    for position, (what, _) in enumerate(first.versions):
        values = [note.versions[position][1] for note in notes]
        _refuse_apart(f"{what} versions", "Install the same", ranks, values)
    differences = []
    for position, (what, _) in enumerate(first.options):
        values = [f"{what}={note.options[position][1]}" for note in notes]
        if len(set(values)) > 1:
            differences.append(told(ranks, values))
    if differences:
        raise RankMismatchError(
            f"the ranks were given different policies or options: {'. And '.join(differences)}. "
            f"Build the same GradClipper on every rank"
        )
    _refuse_frozen(notes, ranks)


def common_device(devices: Iterable[str]) -> str:
    """Type of the device that every rank's statistics are to lie on.

    That of the parameters, for a rank without any (an empty name) too: its part of a collective
    has to go to the backend that the others use. The CPU where they have different ones.
    """
    found = {device for device in devices if device}
    return found.pop() if len(found) == 1 else "cpu"


def _refuse_apart(what: str, mend: str, ranks: Sequence[int], values: Sequence[str]) -> None:
    if len(set(values)) > 1:
        raise RankMismatchError(
            f"the ranks have different {what}: {told(ranks, values)}. {mend} on every rank"
        )


def _refuse_frozen(notes: Sequence[Notes], ranks: Sequence[int]) -> None:
    trained, frozen = set[str](), set[str]()
    for note in {id(note): note for note in notes}.values():
        frozen.update(note.frozen)
        trained.update({entry.name for entry in note.table}.difference(note.frozen))
    for name in sorted(frozen & trained):
        holders = [
            (rank, "frozen" if name in note.frozen else "trained")
            for rank, note in zip(ranks, notes, strict=True)
            if any(entry.name == name for entry in note.table)
        ]
        if holders:
            shown = told([rank for rank, _ in holders], [state for _, state in holders])
            raise RankMismatchError(
                f"parameter {name!r} requires a gradient on some ranks only: {shown}. Set "
                f"requires_grad alike on every rank"
            )
