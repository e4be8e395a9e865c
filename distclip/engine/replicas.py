"""The replica check: have copies of one tensor, on several ranks, drifted apart?

Each rank adds the fingerprints (:mod:`distclip.statistics.fingerprint`) of its pieces to the
all-reduce of the step, those of the counted copy and those of all others apart. Fingerprints are
exact sums over elements, so with ``k`` further copies of every element the second sum is ``k``
times the first, modulo ``2**64``, however each copy is cut. Where it is not, all ranks know that
alike, and only then tell each other who has what: the message of a step does not grow with the
number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distclip.errors import Drift, ReplicaDriftError
from distclip.layouts import soundness
from distclip.layouts.piece import Box
from distclip.layouts.plan import Plan
from distclip.statistics import collectives
from distclip.statistics.fingerprint import box_fingerprint
from distclip.statistics.packing import Stamp

REPLICATED = ("gradient", "weights")

DRIFTS_SHOWN = 8
"""Drifts that a message tells in full."""

_LIMB = 2**32
"""A fingerprint travels as two numbers below this: their float64 sum is exact on 2**21 ranks."""


@dataclass(frozen=True)
class ReplicaCheck:
    """What is compared, and with whom.

    Attributes:
        plan: the plan.
        group: ranks that compare; the plan has none where nothing is sharded.
        positions: the local pieces of tensors that lie on more than one rank.
        rows: the tensors, as rows of the plan's table, in the same order on every rank.
    """

    plan: Plan
    group: ProcessGroup
    positions: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, group: ProcessGroup, names: frozenset[str]) -> ReplicaCheck | None:
        """The check of the named tensors; None if there are none."""
        if not names:
            return None
        # By name: where nothing is sharded, each rank's table has an order of its own.
        place = {entry.name: row for row, entry in enumerate(plan.entries)}
        rows = tuple(place[name] for name in sorted(names))
        wanted = set(rows)
        positions = tuple(i for i, piece in enumerate(plan.pieces) if piece.index in wanted)
        return cls(plan, group, positions, rows)

    def pack(self, present: Sequence[Tensor | None], troubled: bool) -> Tensor:
        """This rank's part of the sum, float64 ``(10 * rows + 1,)``.

        Args:
            present: the local gradient of every piece of the plan.
            troubled: whether this rank is about to refuse the step.
        """
        device = self.plan.device
        place = {row: number for number, row in enumerate(self.rows)}
        sums = torch.zeros(2 * len(self.rows), len(REPLICATED), dtype=torch.int64, device=device)
        sizes = torch.zeros(2 * len(self.rows), dtype=torch.float64, device=device)
        if self.positions:
            where, prints, counts = [], [], []
            for position in self.positions:
                piece = self.plan.pieces[position]
                where.append(2 * place[piece.index] + (0 if self._counts(position) else 1))
                prints += [p.to(device) for p in self._fingerprints(position, present)]
                counts.append(float(torch.Size(piece.box.extents).numel()))
            index = torch.tensor(where, device=device)
            sums.index_add_(0, index, torch.stack(prints).view(-1, len(REPLICATED)))
            sizes.index_add_(0, index, torch.tensor(counts, dtype=torch.float64, device=device))
        low, high = sums & (_LIMB - 1), (sums >> 32) & (_LIMB - 1)
        flag = sizes.new_full((1,), float(troubled))
        return torch.cat([low.double().flatten(), high.double().flatten(), sizes, flag])

    def exchange(self, packed: Tensor, stamp: Stamp | None) -> tuple[Tensor, Tensor]:
        """The sum over all ranks, where nothing travels that it could ride on.

        Returns:
            The sum of ``packed``, and the flags of a packet: its trouble, and the stamp, if any.
        """
        parts = [packed]
        if stamp is not None:
            parts.append(packed.new_tensor(stamp.pair(maximum=False)))
        summed = torch.cat(parts)
        collectives.all_reduce_sum(summed, self.group)
        return summed[: packed.numel()], summed[packed.numel() - 1 :]

    def judge(self, summed: Tensor, present: Sequence[Tensor | None]) -> None:
        """Compare; reads the sums on the host.

        Raises:
            ReplicaDriftError: on all ranks alike; names parameters and ranks.
        """
        apart = self._apart(summed)
        if not apart:
            return
        ranks = collectives.ranks_of(self.group)
        told = collectives.gather(self._tell(apart, present), self.group)
        named = [(self.plan.entries[row].name, what) for row, what in apart]
        raise drift_error(named, dict(zip(ranks, told, strict=True)))

    def _counts(self, position: int) -> bool:
        if self.plan.group is None:
            return collectives.rank_in(self.group) == 0
        return self.plan.pieces[position].share > 0

    def _fingerprints(
        self, position: int, present: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        piece = self.plan.pieces[position]
        shape, offsets = self.plan.entries[piece.index].shape, piece.box.offsets
        # None: no gradient, or weights that are a tensor subclass without values. Other than the
        # fingerprint of zeros.
        nothing = torch.zeros((), dtype=torch.int64, device="cpu")
        gradient, weights = (
            nothing if tensor is None else box_fingerprint(tensor, shape, offsets)
            for tensor in (present[position], soundness.weight_if_any(piece))
        )
        return gradient, weights

    def _apart(self, summed: Tensor) -> list[tuple[int, str]]:
        """Rows and kinds whose copies do not agree."""
        count = 2 * len(self.rows) * len(REPLICATED)
        values = summed.tolist()
        low, high = values[:count], values[count : 2 * count]
        sizes = values[2 * count : -1]
        totals = [int(a) + int(b) * _LIMB for a, b in zip(low, high, strict=True)]
        found = []
        for number, row in enumerate(self.rows):
            counted, others = sizes[2 * number], sizes[2 * number + 1]
            if counted == 0 or others % counted:
                continue
            for kind, what in enumerate(REPLICATED):
                first = totals[4 * number + kind]
                second = totals[4 * number + len(REPLICATED) + kind]
                if (second - int(others / counted) * first) % 2**64:
                    found.append((row, what))
        return found

    def _tell(
        self, apart: Sequence[tuple[int, str]], present: Sequence[Tensor | None]
    ) -> list[_Told]:
        """What this rank has of the tensors that have drifted."""
        rows = {row for row, _ in apart}
        told = []
        for position in self.positions:
            piece = self.plan.pieces[position]
            if piece.index not in rows:
                continue
            prints = self._fingerprints(position, present)
            values = (present[position], soundness.weight_if_any(piece))
            for what, value, number in zip(REPLICATED, values, prints, strict=True):
                if (piece.index, what) in apart:
                    norm = None if value is None else _norm(value)
                    name = self.plan.entries[piece.index].name
                    told.append((name, what, piece.box, int(number), norm))
        return told


_Told: TypeAlias = tuple[str, str, Box, int, float | None]
"""Name, "gradient" or "weights", box, fingerprint, and norm (None: there is none)."""


def _norm(value: Tensor) -> float:
    wide = torch.complex128 if value.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(value.to(wide)))


def drift_error(
    apart: Sequence[tuple[str, str]],
    told: Mapping[int, Sequence[_Told]],
) -> ReplicaDriftError:
    """Who differs from whom: of each piece, from the fingerprint that most of its copies have.

    Args:
        apart: name and kind (``REPLICATED``) of the tensors that differ.
        told: what each rank has of them.
    """
    copies: dict[tuple[str, str], dict[Box, dict[int, tuple[int, float | None]]]] = {}
    for rank, pieces in told.items():
        for name, what, box, number, norm in pieces:
            copies.setdefault((name, what), {}).setdefault(box, {})[rank] = (number, norm)
    drifts, lines = [], []
    for name, what in apart:
        differ: set[int] = set()
        detail = ""
        for by_rank in copies[name, what].values():
            votes = Counter(number for number, _ in by_rank.values())
            usual = next(n for n, _ in by_rank.values() if votes[n] == max(votes.values()))
            odd = [rank for rank, (number, _) in by_rank.items() if number != usual]
            if odd and not detail:
                like = [rank for rank, (number, _) in by_rank.items() if number == usual]
                detail = f"{_has(odd[0], by_rank)}, {_has(like[0], by_rank)}"
            differ.update(odd)
        drifts.append(Drift(name, what, tuple(sorted(differ))))
        lines.append(f"  {_drift_line(drifts[-1])}{detail and f': {detail}'}")
    more = [f"  and {len(lines) - DRIFTS_SHOWN} more"] if len(lines) > DRIFTS_SHOWN else []
    return ReplicaDriftError(
        "\n".join(
            [
                "copies of the same tensor differ between ranks; no gradient was changed:",
                *lines[:DRIFTS_SHOWN],
                *more,
                *(
                    _DRIFT_MENDS[what]
                    for what in REPLICATED
                    if any(drift.what == what for drift in drifts)
                ),
                _ON_PURPOSE,
            ]
        ),
        drifts,
    )


_DRIFT_MENDS = {
    "gradient": "Gradients that differ were not synchronised: clip after a backward outside of "
    "no_sync(), through the wrapped model, and with the same parameters in use on every rank.",
    "weights": "Weights that differ were initialised, loaded or updated apart: broadcast them "
    "from one rank before training (DDP does so when it wraps a model).",
}

_ON_PURPOSE = (
    "Tensors that are meant to differ between ranks, such as local experts, need "
    "distclip.declare_sharded(parameter, process_group); where ranks are meant to differ (local "
    'SGD, a model of its own on each), or to leave this unchecked, use verify_replicas="never".'
)


def _drift_line(drift: Drift) -> str:
    if not drift.ranks:
        return f"{drift.what} of {drift.parameter!r}, between copies that are cut differently"
    listed = ", ".join(map(str, drift.ranks))
    return f"{drift.what} of {drift.parameter!r} on rank{'s' * (len(drift.ranks) > 1)} {listed}"


def _has(rank: int, by_rank: Mapping[int, tuple[int, float | None]]) -> str:
    norm = by_rank[rank][1]
    return f"none on rank {rank}" if norm is None else f"norm {norm:.9g} on rank {rank}"
