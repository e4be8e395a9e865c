"""Gradients measured during backward, as they are reduced, and used at the clip if untouched.

FSDP2 calls the ``register_post_accumulate_grad_hook``s of its sharded parameters when a gradient is
reduced over the ranks, on the stream of that reduction. The gradients of one ``fully_shard`` are
then measured together, when as many of them are there as the last time. What does not come so
(other parameters, gradients without a call, the first step) is measured at the clip as ever. Of
DDP whole buckets are measured, see ``buckets``.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from distclip.layouts import plain
from distclip.layouts.piece import Holder, Piece
from distclip.layouts.plan import Plan
from distclip.layouts.tensors import own
from distclip.statistics import buckets
from distclip.statistics.early import Batch, Early, Pattern, batch_of
from distclip.statistics.request import Request
from distclip.statistics.survey import Survey

CALLER = "torch.distributed.fsdp._fully_shard."
"""Modules of FSDP2, which calls the hooks itself. A call by autograd comes before any reduction."""
PATTERNS = 512
"""Sets of parameters that are remembered; routing may call other ones at every step."""

_grad = operator.attrgetter("grad")

_running = 0
"""Hooks that run now, in any thread: meanwhile torch walks over the hooks of a parameter."""


class Overlap:
    """Hooks that measure during backward what the first pass of a clip will ask for.

    It is held weakly by its hooks: when it is gone, so are they.

    Args:
        plan: whose pieces to measure. Hooks go on the parameters that FSDP2 may manage; whether it
            does, its call says.
        modules: DDP modules, whose buckets are measured.
    """

    def __init__(self, plan: Plan, modules: Sequence[DistributedDataParallel] = ()) -> None:
        self._plan = plan
        self._holds: dict[int, Holder] = {}
        self._handles: list[RemovableHandle] = []
        self._survey: Survey | None = None
        self._wanted: frozenset[int] = frozenset()
        self._patterns: dict[tuple[int, ...], Pattern] = {}
        self._sizes: dict[int, int] = {}
        """First parameter of a group -> how many were called one after another."""
        self._group: tuple[int, int, int] | None = None
        """The group that is being called: its storage, its first parameter, how many so far."""
        self._pending: list[int] = []
        self._done: dict[int, Batch] = {}
        self.calls = 0
        """Calls by FSDP2 so far."""
        self.taken = 0
        """Pieces whose norms the last clip used."""
        self.error: Exception | None = None
        """What ended the measuring during backward, for good."""
        for position, piece in enumerate(plan.pieces):
            if piece.hold is not None and _is_eligible(piece, plan.device):
                self._holds[position] = piece.hold
                hook = _overlap_hook(weakref.ref(self), position)
                parameter: Any = piece.hold()
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
        weakref.finalize(self, _remove, self._handles).atexit = False
        self.refused = [why for module in modules if (why := buckets.refusal(module))]
        """Why some of the modules are measured at the clip."""
        self._followed = [module for module in modules if not buckets.refusal(module)]
        positions: dict[int, int] = {}
        for position, piece in enumerate(plan.pieces):
            hold = plain.hold_of(piece)
            if hold is not None and hold().requires_grad and hold().device == plan.device:
                positions[id(hold())] = position
                if self._followed:
                    self._holds[position] = hold
        for module in self._followed:
            buckets.follow(module, self, positions)

    @property
    def active(self) -> bool:
        """Whether there is a parameter to wait for."""
        return bool(self._handles or self._followed) and self.error is None

    @property
    def device(self) -> torch.device:
        """The device of the statistics."""
        return self._plan.device

    @property
    def wanted(self) -> frozenset[int]:
        """Positions of the pieces that may come early."""
        return self._wanted

    @property
    def expects_buckets(self) -> bool:
        """Whether there is anything to measure of a bucket."""
        return bool(self._followed and self._wanted) and self.error is None

    def asked_of(self, positions: tuple[int, ...]) -> tuple[Pattern, Request]:
        """What is measured of these pieces together."""
        assert self._survey is not None
        return self._pattern(positions), self._survey.request

    def keep(self, batch: Batch) -> None:
        """Take what was measured of gradients that are finished."""
        self._done.update(dict.fromkeys(batch.pattern.positions, batch))

    def close(self) -> None:
        """Remove the hooks."""
        self._drop()
        self._wanted = frozenset()
        self._followed = []
        _remove(self._handles)
        self._handles.clear()

    def expect(self, survey: Survey) -> None:
        """Set what the first pass of the next clips measures."""
        self.forget()
        self._patterns.clear()
        self._survey, request = survey, survey.request
        self._wanted = frozenset(
            position
            for position in self._holds
            if self._plan.pieces[position].share > 0.0
            or self._plan.pieces[position].index in request.decided_locally
        )
        # A clamp acts on elements, and under a loss scale its bound is not known before the clip.
        if request.bounds:
            self._wanted = frozenset()

    def forget(self) -> None:
        """Begin anew: what was measured belongs to gradients that have been clipped."""
        self._end_group()
        self._drop()

    def take(self) -> Early | None:
        """What may be used of gradients as they are now.

        On an accelerator it reads flags on the host, once.
        """
        self.taken = 0
        try:
            early = self._untouched()
        except Exception as error:  # the other ranks are on their way to the all-reduce
            self.fail(error)
            return None
        if early is not None:
            self.taken = len(early.positions)
        return early

    def _untouched(self) -> Early | None:
        batches: list[Batch] = []
        flags: list[Tensor] = []
        for batch in dict.fromkeys(self._done.values()):
            shards = batch.untouched(self._gradients(batch.pattern.positions))
            if shards is not None:
                batches.append(batch)
                flags += [(batch.pattern.sampled(shards) == batch.samples).all(), batch.telling]
        if not batches:
            return None
        read: list[bool] = torch.stack(flags).tolist()
        if not all(read[::2]):  # behind torch's back, and so perhaps in others where it shows less
            return None
        return Early([batch for batch, telling in zip(batches, read[1::2], strict=True) if telling])

    def note(self, position: int) -> None:
        """The gradient of this piece has been reduced, for the first time or once more."""
        self.calls += 1
        if position not in self._wanted or self.error is not None:
            return
        (gradient,) = self._gradients((position,))
        storage = own(gradient).untyped_storage().data_ptr()
        group = self._group
        if group is None or group[0] != storage or position in self._pending:
            self._end_group()
            group = (storage, position, 0)
        self._group = (group[0], group[1], group[2] + 1)
        self._pending.append(position)
        # In the same call of FSDP2, so on the stream that its gradients were made on. Fewer or more
        # than the last time are left to the clip.
        if self._group[2] == self._sizes.get(group[1]):
            self._measure(tuple(self._pending), storage)
            self._pending = []

    def fail(self, error: Exception) -> None:
        """Measure at the clip from now on. A hook that raised would leave other ranks waiting."""
        self.error = error
        self._drop()

    def _drop(self) -> None:
        self._done.clear()
        self._pending = []
        self._group = None

    def _end_group(self) -> None:
        if self._group is not None:
            _, first, count = self._group
            self._sizes[first] = count
        self._group, self._pending = None, []

    def _gradients(self, positions: Iterable[int]) -> list[Any]:
        with torch._C.DisableTorchFunctionSubclass():
            return list(map(_grad, [self._holds[each]() for each in positions]))

    def _measure(self, positions: tuple[int, ...], storage: int) -> None:
        gradients = self._gradients(positions)
        shards: list[Tensor] = list(map(own, gradients))
        if not _are_alike(shards, storage, self._plan.device):
            return
        pattern, request = self.asked_of(positions)
        norms, units = pattern.measured(shards, request, self._plan.device)
        # Versions of now, and not of when each was called: neighbours are views of one tensor and
        # share its version, which counts up as FSDP2 adds to one after the other.
        batch = batch_of(pattern, gradients, norms, units)
        self.keep(batch)

    def _pattern(self, positions: tuple[int, ...]) -> Pattern:
        known = self._patterns.get(positions)
        if known is None:
            if len(self._patterns) >= PATTERNS:
                self._patterns.clear()
            known = self._patterns[positions] = self._made(positions)
        return known

    def _made(self, positions: tuple[int, ...]) -> Pattern:
        assert self._survey is not None
        table = self._survey.table
        numbers = [number for number, each in enumerate(positions) if each in table.numbers]
        found = [table.numbers[positions[number]] for number in numbers]
        return Pattern(
            positions,
            torch.tensor(positions, dtype=torch.long, device=self._plan.device),
            [each not in table.numbers for each in positions],
            numbers,
            [table.dims[each] for each in found],
            [table.local.counts[each] for each in found],
            table.units_of(found),
        )


def _is_eligible(piece: Piece, device: torch.device) -> bool:
    """Whether FSDP2 may call for it; the whole of what a rank has of a sharded parameter."""
    spread = piece.spread
    whole = spread is not None and spread.whole and piece.trainable
    return whole and spread is not None and spread.may_be_hooked(device)


def _are_alike(shards: Sequence[Tensor], storage: int, device: torch.device) -> bool:
    """Whether these are plain tensors without gaps in one storage."""
    return all(
        type(shard) is Tensor
        and shard.is_contiguous()
        and shard.dtype is shards[0].dtype
        and shard.device == device
        and shard.untyped_storage().data_ptr() == storage
        for shard in shards
    )


def _overlap_hook(owner: weakref.ref[Overlap], position: int) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        global _running
        overlap = owner()
        if overlap is None or not _is_called_by_fsdp2():
            return
        _running += 1
        try:
            with torch.no_grad():
                overlap.note(position)
        except Exception as error:
            overlap.fail(error)
        finally:
            _running -= 1

    return hook


def _is_called_by_fsdp2() -> bool:
    """Whether the hook that asks was called by FSDP2's Python, and not by autograd.

    That is exact where the sharding of a parameter is not: tensor parallelism, FSDP2's
    ``ignored_params``, a loss that reads sharded weights. Elsewhere in torch it would read False.
    """
    try:
        caller = sys._getframe(2)
    except ValueError:  # autograd's own thread: no Python below
        return False
    return str(caller.f_globals.get("__name__", "")).startswith(CALLER)


def _remove(handles: Sequence[RemovableHandle]) -> None:
    # A garbage collection may come in the middle of a hook, while FSDP2 walks over the hooks: they
    # stay there then, and do nothing, since their owner is gone.
    if not _running:
        for handle in handles:
            handle.remove()
