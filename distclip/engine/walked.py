"""What one walk found and did, and what it has left to be done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from distclip.engine.ledger import Ledger
from distclip.engine.program import Program, StageStates
from distclip.kernels.transfer import to_device
from distclip.policies.protocol import combine_norms


class Apply(Protocol):
    """What a walk has decided and not done, for tensors that are not the measured ones."""

    def __call__(
        self, present: Sequence[tuple[int, Tensor]], loss_scale: Tensor | None = None
    ) -> None:
        """Clip these ``(position of the piece in the plan, gradient)`` pairs, of any pieces.

        Only where :meth:`factor` gives None.
        """
        ...

    def factor(self) -> float | Tensor | None:
        """The number, or 0-dim tensor, that multiplies everything; None: no single one."""
        ...


class Walked:
    """What one walk found and did. All tensors on the plan's device.

    What only a report shows is computed when it is read.

    Attributes:
        raw: float64 ``(parameters,)`` norms before, NaN where not known.
        in_range: whether powers of these stay in float64's range.
        skipped: 0-dim bool.
        nonfinite: bool ``(parameters,)``.
        weights: float64 ``(parameters,)`` norms of the weights; None where not asked for.
        exponents: float64 ``(parameters, columns)`` counts; None where not asked for.
        states: the new state of every stage.
        apply: under ``later``, what is still to be done.
    """

    def __init__(self, program: Program, states: StageStates) -> None:
        self.raw = program.unknown
        self.in_range = False
        self.skipped = program.no_skip
        self.nonfinite = program.all_finite
        self.weights: Tensor | None = None
        self.exponents: Tensor | None = None
        self.states = dict(states)
        self.apply: Apply | None = None
        self._program: Program | None = program
        self._ledgers: list[Ledger] = []

    def absorb(self, ledger: Ledger) -> None:
        """Add what one pass decided."""
        self._ledgers.append(ledger)
        for flag in ledger.asked.values():
            self.skipped = self.skipped | flag

    @property
    def may_skip(self) -> bool:
        """Whether a policy has a say in whether the step is skipped."""
        return any(ledger.asked for ledger in self._ledgers)

    def undo(self, before: StageStates, *, dropped: bool) -> None:
        """Let a skipped step leave no trace in any state but that of the stage that asked for it.

        Args:
            before: the states before the step.
            dropped: whether a step with a non-finite gradient leaves no trace in any.
        """
        asked: dict[str, Tensor] = {}
        for ledger in self._ledgers:
            asked.update(ledger.asked)
        remembering = [path for path, state in self.states.items() if state]
        if not remembering or not (asked or dropped):
            return
        bad = self.nonfinite.any() if dropped else None
        counting = {
            stage.path
            for one in self.program.passes
            for stage in one.stages
            if stage.policy.counts_nonfinite
        }
        for path in remembering:
            stop = self.skipped
            if path in asked:
                stop = stop & ~asked[path]
                stop = stop if bad is None or path in counting else stop | bad
            old = before[path]
            self.states[path] = {
                key: torch.where(stop, old[key], value) for key, value in self.states[path].items()
            }

    @cached_property
    def total_norm(self) -> Tensor:
        """0-dim float64, the joint norm before; NaN where it is not known."""
        return combine_norms(self.raw, self.program.shown, in_range=self.in_range)

    @cached_property
    def part_norms(self) -> Mapping[str, Tensor]:
        """Part that the policy tells apart -> 0-dim float64, the joint norm before of its own."""
        program = self.program
        return {
            part: combine_norms(
                self.raw[to_device(members, self.raw.device)],
                program.shown,
                in_range=self.in_range,
            )
            for part, members in program.parts.items()
        }

    @cached_property
    def after(self) -> Tensor:
        """float64 ``(parameters,)`` norms after, NaN where not known."""
        program = self.program
        known = [ledger.norms.get(program.shown) for ledger in self._ledgers]
        return next((norms for norms in reversed(known) if norms is not None), program.unknown)

    @cached_property
    def coefficients(self) -> Tensor:
        """float64 ``(parameters,)``, what each gradient was multiplied by."""
        return self._product(ledger.total for ledger in self._ledgers)

    @cached_property
    def smallest(self) -> Tensor:
        """float64 ``(parameters,)``, the smallest coefficient applied to a unit of it."""
        return self._product(ledger.smallest() for ledger in self._ledgers)

    @cached_property
    def clipped(self) -> Tensor:
        """float64 ``(parameters,)``, share of its units that were changed."""
        most = torch.zeros_like(self.program.ones)
        for ledger in self._ledgers:
            most = torch.maximum(most, ledger.clipped())
        return most

    @cached_property
    def threshold(self) -> Tensor:
        """0-dim float64, NaN where the policy has no single one."""
        first = self.program.unknown.new_full((), math.nan)
        for ledger in self._ledgers:
            if ledger.threshold is not None:
                first = torch.where(torch.isnan(first), ledger.threshold, first)
        return first

    @cached_property
    def has_threshold(self) -> bool:
        """Whether there is a threshold to show; one of a state may be NaN in a step."""
        return any(ledger.threshold is not None for ledger in self._ledgers)

    def __getstate__(self) -> dict[str, object]:
        """With everything computed, and without the model and the ledgers it came from."""
        for name in (
            "total_norm",
            "part_norms",
            "after",
            "coefficients",
            "smallest",
            "clipped",
            "threshold",
            "has_threshold",
        ):
            getattr(self, name)
        return {**self.__dict__, "apply": None, "_program": None, "_ledgers": []}

    @property
    def skips_nothing(self) -> bool:
        """Whether no step is ever skipped here, so that nobody has to ask the device."""
        return self._program is not None and self.skipped is self._program.no_skip

    @property
    def program(self) -> Program:
        """The compiled policy."""
        assert self._program is not None, "everything was computed before this was copied"
        return self._program

    def _product(self, factors: Iterable[Tensor]) -> Tensor:
        product = self.program.ones
        for factor in factors:
            product = product * factor
        return product
