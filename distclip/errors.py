"""Every exception that distclip raises on purpose.

The tree::

    Exception
    └── DistclipError
        ├── ConfigurationError (ValueError)       a policy, threshold or file that cannot be meant
        ├── UnsupportedGradientError (TypeError)  a gradient that cannot be clipped correctly
        ├── RankMismatchError (RuntimeError)      the ranks do not agree on what to clip, or how
        ├── CollectiveError (RuntimeError)        a rank died, or is missing, in a collective
        ├── ProcessGroupError (RuntimeError)      a group that is closed, or that misses this rank
        ├── ReplicaDriftError (RuntimeError)      copies of one tensor differ between ranks
        ├── StateError (ValueError)               a state of another policy or model, or damaged
        ├── RewindRequested (RuntimeError)        a ladder asks to go back to a checkpoint
        ├── LadderExhaustedError (RuntimeError)   a ladder has used all its budgets
        └── NonFiniteGradientError (FloatingPointError, RuntimeError)
                                                  NaN or inf under on_nonfinite="error"

Each message says what is wrong, where, and how to mend it. All of them are raised before a
gradient changes, and alike on all ranks wherever all ranks can know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class DistclipError(Exception):
    """Base class: ``except DistclipError`` catches everything that distclip raises on purpose."""


class ConfigurationError(DistclipError, ValueError):
    """A threshold, policy or configuration key that cannot be meant as it stands."""


class UnsupportedGradientError(DistclipError, TypeError):
    """A gradient or parameter (a sparse shard, meta) that cannot be clipped."""


class RankMismatchError(DistclipError, RuntimeError):
    """The ranks do not agree on parameters, policy or configuration."""


class CollectiveError(DistclipError, RuntimeError):
    """A collective of a clipping failed, or took longer than ``stuck_after``.

    The process group cannot be used any more: end the process. Where the collective failed, the
    backend's error is the ``__cause__``. ``step`` is that of the clipping, None if it counts none;
    ``ranks`` holds the global ranks that had not come to it, as far as that could be known.
    """

    def __init__(self, message: str, step: int | None = None, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.ranks = tuple(ranks)


class ProcessGroupError(DistclipError, RuntimeError):
    """The process group is closed, or this rank is not a member of it."""


class Drift(NamedTuple):
    """A tensor whose copies differ.

    Attributes:
        parameter: its name.
        what: ``"gradient"`` or ``"weights"``.
        ranks: global ranks whose copy differs from that of most (of the lowest rank in a tie);
            empty where copies are cut differently, so that no two ranks hold the same piece.
    """

    parameter: str
    what: str
    ranks: tuple[int, ...]


class ReplicaDriftError(DistclipError, RuntimeError):
    """Copies of the same tensor differ between ranks; gradients are left as they were.

    ``drifts`` holds a :class:`Drift` for each tensor concerned, the same on every rank;
    ``parameters`` and ``ranks`` are those that occur in it.
    """

    def __init__(self, message: str, drifts: Sequence[Drift] = ()) -> None:
        super().__init__(message)
        self.drifts = tuple(drifts)
        self.parameters = tuple(dict.fromkeys(drift.parameter for drift in drifts))
        self.ranks = tuple(sorted({rank for drift in drifts for rank in drift.ranks}))


class StateError(DistclipError, ValueError):
    """A state dict or file that belongs to another policy or another model, or is damaged."""


class NonFiniteGradientError(DistclipError, FloatingPointError, RuntimeError):
    """NaN or inf gradients, or norms, under ``on_nonfinite="error"``; gradients stay as they were.

    Under ``"error_late"`` those of the step before, whose update was dropped.

    ``parameters`` holds the names of the parameters concerned, the same on every rank.
    Also a ``RuntimeError``, as ``torch.nn.utils.clip_grad_norm_(error_if_nonfinite=True)`` raises.
    """

    def __init__(self, message: str, parameters: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.parameters = tuple(parameters)


class RewindRequested(DistclipError, RuntimeError):  # noqa: N818 - asks, and is no fault
    """A :func:`~distclip.policies.ladder` asks to go back; raised before a clip, on every rank.

    The weights are those from before the spike that asked, whose update was skipped. Under a
    gradient scaler call its ``update()`` before going on, since it has unscaled the gradients.

    ``step`` is the clip (counted from 0) before which to go on: load a checkpoint that was taken
    at this step or earlier. ``batches`` holds what this rank told
    :meth:`~distclip.GradClipper.note` of the spikes of this episode, since this process began.
    """

    def __init__(self, message: str, step: int = 0, batches: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.batches = tuple(batches)


class LadderExhaustedError(DistclipError, RuntimeError):
    """A :func:`~distclip.policies.ladder` has used all its budgets; raised on every rank."""
