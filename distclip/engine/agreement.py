"""Do the ranks still mean the same? A digest of what they clip by, in the all-reduce of a step.

At construction the ranks compare policy and options (:mod:`distclip.engine.handshake`). What comes
later is theirs alone: parameter groups at ``attach``, a loaded state, how many steps have been
clipped. From all of it each rank makes one small number, and two numbers travel in the all-reduce
that there is anyway. All ranks see in the result, alike, whether one of them sent another number;
only then does a second exchange tell who has what.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distclip.errors import RankMismatchError
from distclip.layouts import tensors
from distclip.layouts.differences import quoted_names, told
from distclip.statistics import collectives
from distclip.statistics.packing import Measurement, Stamp

EVERY = 16
"""Steps from one comparison to the next where the host does not read the statistics."""

WITNESSES = 2
"""Gradients by which a rank knows whether there was a backward since the last clip."""

RankFact: TypeAlias = str | Mapping[str, int | None]
"""What a rank has, in words; or the group of each parameter."""

_DISAGREEMENT_MENDS = {
    "parameter groups": "Give the optimizer the same parameter groups, in the same order, on every "
    "rank",
    "parts by optimizer": "Give the same parameters to the same kind of optimizer, with the same "
    "keys in their parameter groups, on every rank",
    "loaded state": "Call load_state_dict on every rank, with the same state, or on none",
    "step": "Call clip_() equally often on every rank, and load a state on every rank or on none",
    "memory of the policy": "It was changed on some ranks only; load one state on every rank",
}


class LastClip:
    """A few gradients as the last clip left them, to see whether there are new ones since."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        step = max(1, len(parameters) // WITNESSES)
        self._watched = list(parameters[::step][:WITNESSES])
        self._left: list[tuple[weakref.ref[Tensor], tensors.Versions] | None] = []

    def remember(self) -> None:
        """Record the watched gradients as the clip that has just been made left them."""
        gradients = [parameter.grad for parameter in self._watched]
        self._left = [
            None
            if g is None or g.is_inference()
            else (weakref.ref(tensors.own(g)), tensors.versions_of(g))
            for g in gradients  # of inference tensors torch counts no changes
        ]

    def is_repeated(self) -> bool:
        """Whether there are gradients, and they are as the last clip left them."""
        seen = False
        for parameter, left in zip(self._watched, self._left, strict=False):
            gradient = parameter.grad
            if gradient is None:
                continue
            if left is None or left[0]() is not tensors.own(gradient):
                return False
            if left[1] != tensors.versions_of(gradient):
                return False
            seen = True
        return seen


class Agreement:
    """What this rank clips by, and whether all ranks of a group have the same.

    Args:
        group: the ranks that clip together.
        device: of the statistics.
        immediate: whether the host reads them anyway. Elsewhere ranks compare at every
            ``EVERY``-th step, and read the outcome of one comparison at the next.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, *, immediate: bool) -> None:
        self._group = group
        self._ranks = group.size()
        self._talks = collectives.sends_anything(group)
        self._device = device
        self._immediate = immediate
        self._facts: dict[str, RankFact] = {}
        self._changed = True
        self._digest = 0
        self._clips = 0
        self._pending: tuple[Agreed, Tensor, torch.Event, bool] | None = None
        # So small that a sum of squares over all ranks is exact in float64.
        self._bits = (53 - (self._ranks - 1).bit_length()) // 2

    def note(self, what: str, fact: RankFact) -> None:
        """Replace the facts of this rank, which the next step compares."""
        if self._facts.get(what) != fact:
            self._facts[what] = fact
            self._changed = True

    def of_step(self, step: int, *, memory: str, now: bool) -> Agreed:
        """What has to be the same in this step. One call for each step that reduces, on every rank.

        Args:
            step: how many steps have been clipped.
            memory: digest of the policy's state; empty in a step that does not compare it.
            now: whether this step compares on every device.
        """
        clips, self._clips = self._clips, self._clips + 1
        if self._device.type != "cpu" and not now and clips % EVERY:
            return Agreed(self, Stamp(0, 1 << self._bits, self._ranks, idle=True), {}, now)
        if self._changed:
            self._digest, self._changed = _hashed(sorted(self._facts.items(), key=_by_name)), False
        number = _mixed(self._digest ^ _mixed(step))
        if memory:
            number = _mixed(number ^ int(memory, 16))
        shown = {"step": str(step), "memory of the policy": memory and f"[{memory}]"}
        stamp = Stamp(number >> (64 - self._bits), 1 << self._bits, self._ranks)
        return Agreed(self, stamp, shown, now)

    def judge(self, agreed: Agreed, reduced: Measurement) -> None:
        """Compare what was reduced, or what was reduced before where the host should not wait."""
        pending, self._pending = self._pending, None
        if pending is not None:
            before, flags, event, as_maxima = pending
            event.synchronize()
            self._compare(before, flags.tolist(), as_maxima)
        if self._immediate or agreed.now:
            self._compare(agreed, reduced.read_flags, reduced.as_maxima)
            return
        # Copied now and read at the next comparison, when it has long been there.
        flags = torch.empty(
            3, dtype=torch.float64, pin_memory=self._device.type == "cuda", device="cpu"
        )
        flags.copy_(reduced.flags, non_blocking=True)
        event = torch.Event(self._device)
        event.record()
        self._pending = agreed, flags, event, reduced.as_maxima

    def _compare(self, agreed: Agreed, flags: Sequence[float], as_maxima: bool) -> None:
        if not self._talks or agreed.stamp.is_everybodys(flags[1:], maximum=as_maxima):
            return
        ranks = collectives.ranks_of(self._group)
        facts: Mapping[str, RankFact] = {**self._facts, **agreed.facts}
        raise disagreement(dict(zip(ranks, collectives.gather(facts, self._group), strict=True)))


class Agreed(NamedTuple):
    """What has to be the same on every rank in one step.

    Attributes:
        agreement: of this rank with the others.
        stamp: the number that travels.
        facts: what it is made of besides the facts of the agreement, in words.
        now: whether the host reads this step's statistics, on every device.
    """

    agreement: Agreement
    stamp: Stamp
    facts: Mapping[str, str]
    now: bool

    def judge(self, reduced: Measurement) -> None:
        """Look at the two numbers of the stamp as they were reduced, if they travelled.

        Raises:
            RankMismatchError: on all ranks alike; names the ranks, and in what they differ.
        """
        if not self.stamp.idle and reduced.flags.numel() > 1:
            self.agreement.judge(self, reduced)


def disagreement(facts: Mapping[int, Mapping[str, RankFact]]) -> RankMismatchError:
    """The error for ranks that differ, from what each of them has."""
    ranks = list(facts)
    differences, mends = [], []
    for what in dict.fromkeys(name for each in facts.values() for name in each):
        values = [each.get(what, "") for each in facts.values()]
        if all(value == values[0] for value in values):
            continue
        differences.append(f"{what}: {told(ranks, _in_words(values))}")
        mends.append(_DISAGREEMENT_MENDS[what])
        if what == "loaded state":  # which says all about step and memory
            break
    return RankMismatchError(
        f"the ranks no longer clip by the same rule: {'. And '.join(differences)}. No gradient was "
        f"changed in this step. {'. '.join(dict.fromkeys(mends))}"
    )


def digest_of(states: Mapping[str, Mapping[str, Tensor]]) -> str:
    """A digest of the bits of policies' states; reads them on the host."""
    result = hashlib.sha256()
    for path, state in sorted(states.items()):
        for key, value in sorted(state.items()):
            result.update(repr((path, key, value.shape, value.dtype)).encode())
            bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            result.update(bits.numpy().tobytes())
    return result.hexdigest()[:16]


def _in_words(values: Sequence[RankFact]) -> list[str]:
    """Groups of parameters as far as they differ between ranks; other facts as they are."""
    if any(isinstance(value, str) for value in values):
        return [str(value) or "none" for value in values]
    groups: list[Any] = list(values)
    names = sorted({name for each in groups for name in each})
    apart = [name for name in names if len({each.get(name) for each in groups}) > 1]
    by_rank = []
    for each in groups:
        numbers: dict[int | None, list[str]] = {}
        for name in apart:
            numbers.setdefault(each.get(name), []).append(name)
        by_rank.append(
            ", ".join(
                f"{quoted_names(found)} in {'no group' if number is None else f'group {number}'}"
                for number, found in numbers.items()
            )
        )
    return by_rank


def _by_name(item: tuple[str, RankFact]) -> str:
    return item[0]


def _hashed(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big")


def _mixed(value: int) -> int:
    """Another 64-bit number for each, of which no bit is kin to one of ``value`` (SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)
