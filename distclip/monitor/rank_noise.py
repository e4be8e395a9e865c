"""The gradient noise scale, from gradients of the data-parallel ranks before their reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distclip.common.rollups import Floats
from distclip.errors import ConfigurationError
from distclip.monitor.noise import Averages, check_noise_scale

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from distclip.clipper import GradClipper
    from distclip.report import ClipReport

_LONGER = 1.05
"""A mean is no longer than its parts in the root mean square, but for rounding to bfloat16."""
_SCALED = 2.0**16
"""Of ``n`` parts the squares are on average at most ``n`` times as large as that of the mean."""


class RankNoiseScale(Averages):
    """The gradient noise scale without gradient accumulation, from what each rank computes.

    ::

        clipper = distclip.GradClipper(model, policies.global_norm(1.0))
        noise = monitor.RankNoiseScale(clipper, batch=512, every=10)
        ...  # train; noise.scale is the newest

    What it is, :class:`NoiseScale` says. The small batches are those of each data-parallel rank in
    each backward, under ``DistributedDataParallel``, ``fully_shard`` (FSDP2; HSDP and tensor
    parallelism beside it too) and where a script averages ``.grad`` by hand. Hooks see these
    gradients before they are reduced, so ``no_sync()`` changes nothing. The whole step's norms are
    those of the clipper's report: attach the clipper, or call ``clip_()`` once a step.

    The gradient of a step is taken for the mean over its parts: ranks are averaged, as DDP and
    FSDP2 do, and the loss is divided by ``micro_batches``. A warning says so once where that
    cannot be.

    The averages are saved in ``clipper.state_dict()``. Every report has ``noise_scale`` from the
    first sample on, and so has the log of every sink.

    A sampled step reads each gradient once more, during backward, waits for the device once, and
    costs one all-reduce of 16 bytes a parameter. Other steps cost nothing. Under FSDP2 the first
    step of a process is not sampled.

    Args:
        clipper: whose steps it follows, as the first of its sinks. Its norms are of order 2. Every
            rank builds this at the same point.
        batch: samples of one step, over all micro-batches and ranks.
        micro_batches: backwards of one step, of equally many samples. A step with fewer or more, as
            at the end of an epoch, is left out, and a warning says so once.
        every: sample the steps that are divisible by it.
        decay: of the moving averages, per sampled step; in [0, 1).
        scaler: a gradient scaler: gradients are ``scaler.get_scale()`` times too large until it
            unscales them.
        process_group: as for the clipper.

    Raises:
        ConfigurationError: on all ranks where one has an argument that cannot be meant, or another
            than the others; a clipper that one follows already; a
            parameter whose gradient is seen
            only when it is reduced (FSDP1, DeepSpeed, Megatron): there, use :class:`NoiseScale`.
    """

    kept_as = "noise_scale"

    def __init__(
        self,
        clipper: GradClipper,
        *,
        batch: int,
        micro_batches: int = 1,
        every: int = 1,
        decay: float = 0.95,
        scaler: Any = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        from distclip.statistics import collectives  # imports torch, which a log is read without
        from distclip.statistics.unreduced import Unreduced

        self._group = collectives.default_group(process_group)
        self._device = collectives.device_for(self._group, clipper.plan.device)
        rows = {name: row for row, name in enumerate(clipper.names)}
        wrong: ConfigurationError | None = None
        try:
            check_noise_scale("RankNoiseScale", batch, micro_batches, every, decay, least=1)
            _check(clipper, batch, micro_batches, 1 if self._group is None else self._group.size())
            self._seen = Unreduced([*clipper.here.items()], rows, self._device)
        except ConfigurationError as error:
            wrong = error
        if self._group is not None:
            values = f"{batch=}, {micro_batches=}, {every=}, {decay=}"
            _refuse_together(collectives.gather((str(wrong or ""), values), self._group))
        if wrong is not None:
            raise wrong
        super().__init__(clipper.names, decay)
        self._batch, self._parts, self._every, self._scaler = batch, micro_batches, every, scaler
        self.step = -1
        """The last step that was sampled."""
        self._said: set[str] = set()
        self._closed: bool = False
        self._arm_for(0)
        clipper.sinks = (self, *clipper.sinks)

    def __call__(self, step: int, report: ClipReport) -> None:
        """Called by the clipper after each of its steps, on every rank."""
        if self._closed:
            return
        if step % self._every == 0:
            self._sample(step, report)
        object.__setattr__(report, "noise_scale", self.scale)  # the sinks behind this one read it
        self._arm_for(step + 1)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the averages of a :meth:`state_dict`, on every rank.

        The backwards of a step that was given up, as before a rewind, are forgotten.

        Raises:
            StateError: it is none, or of other parameters; nothing is loaded then.
        """
        super().load_state_dict(state)
        if not self._closed:
            self._seen.arm()

    def close(self) -> None:
        """Take the hooks off; no further step is sampled, and what was found stays."""
        self._closed = True
        self._seen.disarm()

    def _arm_for(self, step: int) -> None:
        if step % self._every:
            self._seen.disarm()
        else:
            self._seen.arm()

    def _sample(self, step: int, report: ClipReport) -> None:
        from distclip.statistics import collectives

        found, backwards = self._seen.table(), self._seen.backwards
        if backwards not in (None, self._parts):
            found.fill_(np.nan)
            self._say(
                "backwards",
                f"step {step} had {backwards} backwards and not micro_batches={self._parts}, and "
                f"is left out, as are others like it",
            )
        for row in self._seen.unmeasured:
            self._say(
                self._names[row],
                f"{self._names[row]!r} is left out: before it is reduced over data-parallel ranks "
                f"its gradient is sparse, or terms of a sum over the ranks of tensor parallelism",
            )
        if self._seen.error is not None:
            error = f"a gradient cannot be measured before its reduction: {self._seen.error}"
            self._say("error", error)
        if self._group is not None:
            collectives.all_reduce_sum(found, self._group)
        squares, ranks = found.cpu().numpy()
        if not np.isfinite(squares).all():
            return
        scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        parts = np.round(ranks) * self._parts
        small = squares * (self._parts / scale) ** 2 / np.maximum(parts, 1.0)
        large = np.square(np.array([*report.parameter_norms.values()]))
        if self._is_mean(small, large, parts) and self._take(small, large, parts, self._batch):
            self.step = step

    def _is_mean(self, small: Floats, large: Floats, parts: Floats) -> bool:
        """Whether gradients of these lengths can be a mean and its parts; a warning if not."""
        excess = np.where(parts >= 2, large - _LONGER * small - 1e-6 * large.sum(), 0.0)
        worst = int(np.argmax(excess))
        if excess[worst] > 0.0:
            self._say(
                "no mean",
                f"the gradient of {self._names[worst]!r} has the norm {large[worst] ** 0.5:.4g}, "
                f"and those of the ranks before their reduction {small[worst] ** 0.5:.4g} in the "
                f"root mean square, which its parts cannot have: ranks have to be averaged and "
                f"not summed, the loss be divided by micro_batches={self._parts}, and .grad be "
                f"what the backwards of this step left. Such steps are left out",
            )
            return False
        if self._scaler is None and small.sum() > _SCALED * parts.max() * large.sum() > 0.0:
            self._say(
                "scaler",
                "gradients are far longer before they are reduced than after it, as under a "
                "gradient scaler: give it, RankNoiseScale(..., scaler=scaler)",
            )
        return True

    def _say(self, what: str, message: str) -> None:
        """Warn, once of each thing."""
        from distclip.application.notices import warn

        if what not in self._said:
            self._said.add(what)
            warn(f"RankNoiseScale: {message}")


def _check(clipper: GradClipper, batch: int, micro_batches: int, ranks: int) -> None:
    """Refuse a clipper that cannot be followed, and steps without two parts.

    Raises:
        ConfigurationError: says what, and the mend.
    """
    if not clipper.norms:
        raise ConfigurationError(
            "RankNoiseScale: it reads the norms of the clipper's reports, which norms=False "
            "leaves out; build the GradClipper without it"
        )
    if clipper.norm_type != 2.0:
        raise ConfigurationError(
            f"RankNoiseScale: the clipper's norms are of order {clipper.norm_type:g}, and the "
            f"noise scale is of 2-norms; follow GradClipper(model, policies.measure())"
        )
    if ranks * micro_batches < 2:
        raise ConfigurationError(
            "RankNoiseScale: one rank and one micro-batch are one part of a step, and the "
            "scale follows from two at least; give micro_batches, or run on several ranks"
        )
    if any(isinstance(each, RankNoiseScale) and not each._closed for each in clipper.sinks):
        raise ConfigurationError(
            "RankNoiseScale: this clipper is followed by one already, and its reports and "
            "checkpoints have one noise scale; use that one, or close() it first"
        )
    if batch < ranks * micro_batches:
        raise ConfigurationError(
            f"RankNoiseScale: batch={batch} is less than one sample for each of {ranks} ranks "
            f"and {micro_batches} micro-batches; it counts the samples of all of them"
        )


def _refuse_together(ranks: Sequence[tuple[str, str]]) -> None:
    """Raise what any rank has found, or that their arguments differ: alone, it would hang the rest.

    Raises:
        ConfigurationError: on every rank.
    """
    for rank, (wrong, _) in enumerate(ranks):
        if wrong:
            raise ConfigurationError(f"{wrong} (found by rank {rank})")
    for rank, (_, values) in enumerate(ranks):
        if values != ranks[0][1]:
            raise ConfigurationError(
                f"RankNoiseScale: rank 0 was given {ranks[0][1]}, and rank {rank} {values}; give "
                f"all ranks the same, as they sample together"
            )
