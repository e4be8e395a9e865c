"""The gradient noise scale, from norms of the gradients of parts of a step, and of all of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distclip.common.rollups import Floats, grouped
from distclip.errors import ConfigurationError, ReplicaDriftError, StateError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from distclip.layouts.names import Target

_ENOUGH = 10
"""Samples after which it is known what is usual."""
_MOST = 4.0
"""The largest squared norm of a part's gradient that counts as it is, of the usual one."""
_MEND = (
    "its gradient has to be reduced over the ranks by then: leave out no_sync() and "
    "set_requires_gradient_sync(False) in the steps that are sampled"
)


class Averages:
    """Moving averages of both terms of the noise scale, by parameter, and what is read off them."""

    def __init__(self, names: Sequence[str], decay: float) -> None:
        self._names, self._decay = names, decay
        self._noise = self._signal = np.zeros(len(names))
        self.samples = 0
        """How many steps the averages are over."""

    def _take(self, small: Floats, large: Floats, parts: Any, batch: float) -> bool:
        """Average in one step; False for one that is left out, since a gradient is not finite.

        A step with a spike is scaled down: as it is, it alone would be the average of the next
        hundreds of samples.

        Args:
            small: by parameter, mean over parts of a step of the squared norm of the gradient.
            large: the squared norm of the mean of these gradients.
            parts: how many parts there are; where it is below 2, nothing is seen.
            batch: samples of all parts together.
        """
        if not np.isfinite(small.sum() + large.sum()):
            return False
        enough = np.broadcast_to(parts, small.shape) >= 2
        others = np.where(enough, parts - 1.0, 1.0)
        now, usual = float(small[enough].sum()), math.inf
        if self.samples >= _ENOUGH:  # both averages began with 0, which the divisor takes out
            means = self._signal + self._noise * parts / batch
            usual = float(means.sum()) / (1.0 - self._decay**self.samples)
        weight = _MOST * usual / now if now > _MOST * usual > 0.0 else 1.0
        noise = np.where(enough, (small - large) * batch / others, 0.0) * weight
        signal = np.where(enough, (parts * large - small) / others, 0.0) * weight
        self._noise = self._decay * self._noise + (1.0 - self._decay) * noise
        self._signal = self._decay * self._signal + (1.0 - self._decay) * signal
        self.samples += 1
        return True

    @property
    def scale(self) -> float:
        """The noise scale of the whole model, in samples; NaN before the first sampled step.

        inf where, so far, nothing but noise is seen. May be below 0, where the noise is smaller
        than the error of its estimate.
        """
        return self._ratio(slice(None))

    @property
    def parameter_scales(self) -> Mapping[str, float]:
        """Name -> noise scale of one parameter; NaN where it has no gradient."""
        return {name: self._ratio(place) for place, name in enumerate(self._names)}

    def module_scales(self, depth: int) -> Mapping[str, float]:
        """Module path -> noise scale of its parameters together; see ``ClipReport.module_norms``.

        Raises:
            ConfigurationError: ``depth < 1``.
        """
        groups = grouped(self._names, depth)
        return {path: self._ratio(places) for path, places in groups.items()}

    def _ratio(self, places: Any) -> float:
        noise = float(np.sum(self._noise[places]))
        signal = float(np.sum(self._signal[places]))
        if signal > 0.0:
            return noise / signal
        return math.inf if noise > 0.0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        """The averages, as plain values; the same on every rank, whatever the sharding.

        Returns:
            ``{"samples": int, "noise": {name: float}, "signal": {name: float}}``.
        """
        kept = {"noise": self._noise, "signal": self._signal}
        rows = {
            key: dict(zip(self._names, each.tolist(), strict=True)) for key, each in kept.items()
        }
        return {"samples": self.samples, **rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the averages of a :meth:`state_dict`, on every rank.

        Raises:
            StateError: it is none, or of other parameters; nothing is loaded then.
        """
        kind, names = type(self).__name__, set(self._names)
        if not isinstance(state, Mapping) or not {"samples", "noise", "signal"} <= set(state):
            raise StateError(f"{kind}: the state is none that {kind}.state_dict() gave")
        for key in ("noise", "signal"):
            other = names.symmetric_difference(state[key])
            if other:
                raise StateError(
                    f"{kind}: the state is of other parameters than these ({min(other)!r} is in "
                    f"one of them only); do not load it, and the averages begin anew"
                )
        noise, signal = (
            np.array([float(state[key][name]) for name in self._names])
            for key in ("noise", "signal")
        )
        if not np.isfinite(noise.sum() + signal.sum()):
            raise StateError(f"{kind}: the state has values that are not finite; it is damaged")
        self._noise, self._signal, self.samples = noise, signal, int(state["samples"])


def check_noise_scale(
    kind: str, batch: int, micro_batches: int, every: int, decay: float, least: int
) -> None:
    """Refuse arguments that cannot be meant.

    Raises:
        ConfigurationError: names the argument.
    """
    for name, value, least_of_it in (
        ("micro_batches", micro_batches, least),
        ("batch", batch, micro_batches),
        ("every", every, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least_of_it:
            raise ConfigurationError(
                f"{kind}: {name} must be an integer >= {least_of_it}, got {value!r}"
            )
    if not 0.0 <= decay < 1.0:
        raise ConfigurationError(f"{kind}: decay must be in [0, 1), got {decay!r}")


class NoiseScale(Averages):
    """The gradient noise scale: about how many samples a step can use before more are wasted.

    ::

        noise = monitor.NoiseScale(model, batch=512, micro_batches=8, every=10)
        for part in parts:
            (loss(part) / 8).backward()
            noise.micro_batch()
        optimizer.step()

    The *simple* noise scale of McCandlish et al. 2018 (arXiv 1812.06162, appendix A.1), ``tr(S) /
    |G|**2`` with the covariance ``S`` of the gradients of single samples and the true gradient
    ``G``; per layer as in arXiv 2411.00999. Both are estimated without bias from the squared norms
    of the first micro-batch's gradient and of all micro-batches' together, and averaged over steps.
    Whole tensors under any sharding; needs gradient accumulation, with gradients that are reduced
    after each micro-batch. Without it, :class:`RankNoiseScale` compares the ranks.

    A sampled step costs two readings of the gradients, two all-reduces of 8 bytes a parameter where
    anything is sharded, and two waits for the device. Other steps cost nothing.

    Args:
        target: as for :class:`distclip.GradClipper`. Every rank builds this at the same point.
        batch: samples of one step, over all micro-batches and ranks.
        micro_batches: backwards of one step, of equally many samples. A step with fewer, as at the
            end of an epoch, is left out, once its optimizer has changed the weights.
        every: sample the steps that are divisible by it.
        decay: of the moving averages, per sampled step; in [0, 1).
        process_group: as for :class:`distclip.GradClipper`.

    Raises:
        ConfigurationError: an argument that cannot be meant, such as ``micro_batches < 2``.
    """

    def __init__(
        self,
        target: Target,
        *,
        batch: int,
        micro_batches: int,
        every: int = 1,
        decay: float = 0.95,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_noise_scale("NoiseScale", batch, micro_batches, every, decay, least=2)
        from distclip.application.notices import sample  # these import torch, too
        from distclip.clipper import GradClipper  # imports torch, which a log is read without
        from distclip.layouts.tensors import version_of
        from distclip.policies import measure

        self._clipper = GradClipper(
            target, measure(), on_nonfinite="pass", process_group=process_group
        )
        self._clipper.expects_gradients = False
        super().__init__(self._clipper.names, decay)
        self._batch, self._parts, self._every = float(batch), micro_batches, every
        self._version_of = version_of
        self._step = self._number = 0
        """Step of the micro-batch to come, and its number within the step."""
        self._weights = sample([p for p in self._clipper.here.values() if p.requires_grad])
        self._versions = [version_of(parameter) for parameter in self._weights]
        self._first: Floats = np.zeros(0)

    def micro_batch(self, loss_scale: float = 1.0) -> None:
        """Call it after every backward, before clipping, on every rank.

        Args:
            loss_scale: the gradients are this many times too large, as under a gradient scaler.

        Raises:
            ConfigurationError: the first micro-batch left no gradient at all, or another one on
                each rank: on all ranks alike.
        """
        if self._has_stepped() and self._number:
            self._step, self._number = self._step + 1, 0  # the last step had fewer micro-batches
        step, number = self._step, self._number
        self._step, self._number = divmod(step * self._parts + number + 1, self._parts)
        if step % self._every:
            return
        if number == 0:
            self._first = self._squares(loss_scale)
            if not self._first.any() and self._are_missing():
                raise ConfigurationError(f"NoiseScale: the first micro-batch left none; {_MEND}")
        elif number == self._parts - 1:
            small = self._first * self._parts**2
            self._take(small, self._squares(loss_scale), self._parts, self._batch)

    def _squares(self, loss_scale: float) -> Floats:
        """Squared norm of each parameter's gradient as it is now."""
        try:
            report = self._clipper.clip_()
        except ReplicaDriftError as error:
            raise ConfigurationError(
                f"NoiseScale: after the first micro-batch ranks differ; {_MEND} ({error})"
            ) from None
        norms = np.array([*report.parameter_norms.values()])
        squares: Floats = np.square(norms / loss_scale)
        return squares

    def _has_stepped(self) -> bool:
        """Whether an optimizer has changed the weights since this was asked last."""
        before, self._versions = self._versions, [self._version_of(p) for p in self._weights]
        changed = [
            old != new
            for old, new, parameter in zip(before, self._versions, self._weights, strict=True)
            if _gradient(parameter) is not None
        ]
        return bool(changed) and all(changed)  # one alone may be changed by its module's forward

    def _are_missing(self) -> bool:
        """Whether no rank has a gradient, where all are 0: of a masked batch they may be."""
        here = any(_gradient(p) is not None for p in self._clipper.here.values())
        return not self._clipper._session.anywhere(here)


def _gradient(parameter: Any) -> Any:
    return getattr(parameter, "main_grad", None) if parameter.grad is None else parameter.grad
