"""What an optimizer's step did to each parameter: norm, RMS and share of the weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from distclip.application.eager import caller, eagerly
from distclip.common.rollups import Floats, grouped, joint
from distclip.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

    from distclip.layouts.names import Target

UpdateSink: TypeAlias = "Callable[[int, UpdateReport], None]"


@dataclass(frozen=True, eq=False, repr=False)
class UpdateReport:
    """What one step of the optimizer did: of ``p_after - p_before``, over whole tensors.

    Norms are 2-norms, each element counted once. Reading starts no collective.

    Attributes:
        step: of the optimizer, counted from 0 since the monitor was built.
        names: of the parameters.
        sizes: elements of each whole parameter.
        norms: float64 ``(parameters,)`` norms of the updates, on the device.
        weights: float64 ``(parameters,)`` norms of the weights after the step; 0 for frozen ones.
    """

    step: int
    names: Sequence[str]
    sizes: Sequence[int]
    norms: Tensor
    weights: Tensor

    @property
    def total_norm(self) -> Tensor:
        """0-dim float64: norm of the whole update. Does not wait for the device."""
        return _total(self.norms)

    @property
    def weight_norm(self) -> Tensor:
        """0-dim float64: norm of all weights after the step. Does not wait for the device."""
        return _total(self.weights)

    @cached_property
    def _table(self) -> Floats:
        """Norm of update, norm of weight and number of elements, by parameter."""
        norms, weights = np.array(self.norms.tolist()), np.array(self.weights.tolist())
        return np.stack((norms, weights, np.array(self.sizes, np.float64)))

    @property
    def update_norms(self) -> Mapping[str, float]:
        """Name -> norm of its update; 0 where it was not stepped. Reads the host."""
        return self._column("norm")

    @property
    def update_rms(self) -> Mapping[str, float]:
        """Name -> root mean square of the elements of its update. Reads the host."""
        return self._column("rms")

    @property
    def update_ratios(self) -> Mapping[str, float]:
        """Name -> norm of its update by that of its weight after the step. Reads the host.

        inf for a weight of 0, NaN where the update is 0 too.
        """
        return self._column("ratio")

    def modules(self, depth: int) -> Mapping[str, Mapping[str, float]]:
        """Module path -> ``norm``, ``rms`` and ``ratio`` of it as a whole. Reads the host.

        Args:
            depth: as for :meth:`ClipReport.module_norms <distclip.ClipReport.module_norms>`.

        Raises:
            ConfigurationError: ``depth < 1``.
        """
        groups = grouped(self.names, depth)
        rows = [
            [*joint(self._table[:2, places], 2.0), self._table[2, places].sum()]
            for places in groups.values()
        ]
        return _rows(groups, np.array(rows).reshape(-1, 3).T)

    def to_dict(self, *, per_parameter: bool = True, modules: int | None = None) -> dict[str, Any]:
        """Plain numbers, for a log. Reads the host.

        Args:
            per_parameter: with ``"parameters": {name: {"norm": ..., "rms": ..., "ratio": ...}}``.
            modules: with ``"modules"``, the same of the modules of this depth.

        Raises:
            ConfigurationError: ``modules < 1``.
        """
        norm, weight = joint(self._table[:2], 2.0).tolist()
        shown: dict[str, Any] = {"step": self.step, "update_norm": norm, "weight_norm": weight}
        if modules is not None:
            shown["modules"] = self.modules(modules)
        if per_parameter:
            shown["parameters"] = _rows(self.names, self._table)
        return shown

    def _column(self, field: str) -> dict[str, float]:
        return {name: row[field] for name, row in _rows(self.names, self._table).items()}

    def __repr__(self) -> str:
        return f"<UpdateReport of step {self.step}: {len(self.names)} parameters>"


def _total(norms: Tensor) -> Tensor:
    from distclip.policies.protocol import combine_norms  # imports torch

    return combine_norms(norms, 2.0)


def _rows(names: Any, table: Floats) -> dict[str, dict[str, float]]:
    norms, weights, sizes = table
    with np.errstate(all="ignore"):
        columns = norms, norms / np.sqrt(np.maximum(sizes, 1.0)), norms / weights
    rows = np.stack(columns, axis=1).tolist()
    return {
        name: dict(zip(("norm", "rms", "ratio"), row, strict=True))
        for name, row in zip(names, rows, strict=True)
    }


class UpdateMonitor:
    """Measures what every n-th ``optimizer.step()`` does to each parameter, under any sharding.

    ::

        updates = monitor.UpdateMonitor(model, optimizer, every=100)
        ...  # train
        updates.last.update_rms["head.weight"]

    A clipped gradient bounds the update of SGD and of nothing else: Adam divides by moments that
    may lag behind, and a parameter that moves far in one step is seen here before it shows in a
    gradient. Norm, RMS and ratio to the weight are of ``p_after - p_before``, weight decay
    included, over whole tensors, computed in float32 at least.

    A measured step keeps a copy of this rank's part of the trained parameters while it is made (4
    bytes an element in 16- and 32-bit dtypes, 8 in float64), reads update and weights once after
    it, and costs one all-reduce of 16 bytes a parameter where anything is sharded. It waits for an
    accelerator no more than a clip does. Other steps cost nothing. Nothing is kept in checkpoints.

    A step that a clipper drops, or a fused optimizer under a gradient scaler, is an update of 0.
    One that a scaler leaves out by not calling the optimizer is not seen, and not counted.

    Args:
        target: as for :class:`distclip.GradClipper`. Every rank builds this at the same point.
        optimizer: that steps these parameters; or several, in the order in which they step. An
            update is then what lies between the first one's step and the last one's.
        every: measure the steps that are divisible by it.
        sinks: one or several, called on every rank after a measured step as ``sink(step, report)``.
            What one raises, ``optimizer.step()`` raises, when the parameters have been stepped.
        process_group: as for :class:`distclip.GradClipper`.

    Raises:
        ConfigurationError: an argument that cannot be meant, or an optimizer that steps none of
            these parameters or runs no step hooks.
        UnsupportedGradientError: a sharding, or weights, that distclip cannot read.
        RankMismatchError: ranks that disagree, on every rank.
    """

    def __init__(
        self,
        target: Target,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        every: int = 1,
        sinks: UpdateSink | Sequence[UpdateSink] = (),
        process_group: ProcessGroup | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigurationError(f"UpdateMonitor: every must be an integer >= 1, got {every!r}")
        from distclip.engine import attaching  # imports torch, which a log is read without
        from distclip.engine.session import Session
        from distclip.policies import measure

        given = {
            "policy": measure(),
            "on_nonfinite": "pass",
            "verify_replicas": "never",
            "ratios": 1,
        }
        optimizers = attaching.as_optimizers(optimizer)
        self._session = session = Session.open(target, given, process_group, ())
        session.expects_gradients = False
        session.program.scratch.only_measures = True
        attaching.check_optimizers(optimizers, session.named)
        for each in optimizers:
            if not hasattr(each, "_optimizer_step_pre_hooks"):
                raise ConfigurationError(
                    f"UpdateMonitor: {type(each).__name__} runs no step hooks: it wraps an "
                    f"optimizer or never called Optimizer.__init__; give the torch optimizer inside"
                )
        self._sizes = [int(np.prod(entry.shape, dtype=np.int64)) for entry in session.plan.entries]
        self._every, self._steps = every, 0
        self._sinks: tuple[UpdateSink, ...] = (sinks,) if callable(sinks) else tuple(sinks)
        self._before: list[Tensor | None] | None = None
        self._under_way: list[FrameType | None] = [None] * len(optimizers)
        self.last: UpdateReport | None = None
        """The report of the last step that was measured."""
        self._handles: list[Any] = []
        for place, each in enumerate(optimizers):
            hook = each.register_step_pre_hook(partial(self._before_step, place))
            # Behind a clipper's hook it would keep a fused optimizer from clipping as it steps.
            hooks: Any = each._optimizer_step_pre_hooks  # an OrderedDict
            hooks.move_to_end(hook.id, last=False)
            after = each.register_step_post_hook(partial(self._after_step, place))
            self._handles += [hook, after]

    def remove(self) -> None:
        """Measure no more; ``last`` stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._before = [], None

    @eagerly
    def _before_step(self, place: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        from distclip.application.stepping import is_within, only_makes_state

        # Of a class whose `step` calls `super().step()`, torch runs the hooks twice.
        step, outer = caller(), self._under_way[place]
        if outer is not None and is_within(step, outer):
            return
        if not optimizer.state and only_makes_state(step):
            return
        self._under_way[place] = step
        if place == 0:  # what is left of a step that raised is dropped here
            self._before = None if self._steps % self._every else self._copies()
            self._steps += 1

    @eagerly
    def _after_step(self, place: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if caller() is not self._under_way[place]:
            return
        self._under_way[place] = None
        if place == len(self._under_way) - 1 and self._before is not None:
            before, self._before = self._before, None
            self._measure(before)

    def _copies(self) -> list[Tensor | None]:
        """This rank's weights, of each piece of a parameter that is trained."""
        import torch

        def copied(weight: Tensor) -> Tensor:
            return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

        pieces = self._session.plan.pieces
        return [copied(piece.weight()) if piece.trainable else None for piece in pieces]

    def _measure(self, before: list[Tensor | None]) -> None:
        """Measure the differences as if they were gradients: they lie as the parameters do."""
        from distclip.layouts.fetching import Fetched

        session = self._session
        for piece, weight in zip(session.plan.pieces, before, strict=True):
            if weight is not None:
                weight.sub_(piece.weight())
        session.fetched = Fetched(before, None)
        session.begin("pass")
        walked = session.clip("pass", None)
        assert walked.weights is not None  # every step measures ratios
        step, names = self._steps - 1, session.plan.names
        self.last = UpdateReport(step, names, self._sizes, walked.raw, walked.weights)
        for sink in self._sinks:
            sink(step, self.last)
