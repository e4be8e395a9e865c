"""One clip for the steps of several optimizers that share a model.

A model whose matrices one optimizer steps, and whose other parameters a second one, has one
gradient norm: it is measured, and clipped by, once per update, before the first of them steps.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip.application.copies import FollowedCopy
from distclip.application.folded import FusedStep
from distclip.application.stepping import Decision, StepHandle, scaler_of_step
from distclip.errors import ConfigurationError
from distclip.layouts.tensors import own, version_of


class Clip(Protocol):
    """Clips before a step; see :meth:`distclip.GradClipper.clip_before_step`."""

    def __call__(
        self,
        loss_scale: Tensor | None,
        found_inf: Tensor | None,
        coming: FusedStep | None,
        *,
        overflow_drops: bool = False,
    ) -> Decision: ...


class AttachHandle:
    """The step hooks of one clipper on one or several optimizers; :meth:`remove` undoes them.

    A clip is made before the first step after a backward, for all optimizers together; the others
    step, or are skipped, by its decision. An optimizer that steps a second time begins a new
    update, and so does one whose gradients have changed since the step before.

    Args:
        optimizers: the torch optimizers themselves, each once.
        clip: called once per update.
        agree: called where an optimizer's gradients may have changed on some ranks only, with
            whether they did here; whether they did anywhere.
        follow: called when one of the optimizers has been deep-copied, with the memo of that.
        finish: called when the hooks are off; may raise for a step that is over.

    Attributes:
        last_report: the :class:`distclip.ClipReport` of the last clip before a step; None before.

    Raises:
        ConfigurationError: an optimizer that runs no step hooks.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        clip: Clip,
        agree: Callable[[bool], bool],
        follow: Callable[[dict[int, Any]], None],
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self.last_report: Any = None
        self._make_clip = clip
        self._agree = agree
        self._finish = finish
        self._decision: Decision | None = None
        self._stepped: set[int] = set()
        self._left: dict[int, GradientsSeen] = {}
        """Gradients of the optimizers that are still to step, as the last step left them."""
        self._handles: list[StepHandle] = []
        self._copies: list[FollowedCopy] = []
        try:
            for number, optimizer in enumerate(optimizers):
                before = functools.partial(self._before, number)
                after = functools.partial(self._after, number) if len(optimizers) > 1 else None
                self._handles.append(StepHandle(optimizer, before, after))
        except ConfigurationError:
            self.remove()
            raise
        self._copies = [FollowedCopy(optimizer, follow) for optimizer in optimizers]

    @property
    def active(self) -> bool:
        """Whether the hooks are on, and an optimizer is still there."""
        return any(handle.active for handle in self._handles) and any(self._alive())

    def remove(self) -> None:
        """Take the hooks off; the optimizers step as they did before."""
        for handle in self._handles:
            handle.remove()
        for copied in self._copies:
            copied.remove()
        self._forget()
        self._finish()

    def _clip(
        self,
        loss_scale: Tensor | None,
        found_inf: Tensor | None,
        coming: FusedStep | None,
        *,
        overflow_drops: bool = False,
    ) -> Decision:
        decision = self._make_clip(loss_scale, found_inf, coming, overflow_drops=overflow_drops)
        self.last_report = decision
        return decision

    def _forget(self) -> None:
        self._decision = None
        self._stepped.clear()
        self._left.clear()

    def _before(
        self,
        number: int,
        loss_scale: Tensor | None,
        found_inf: Tensor | None,
        coming: FusedStep,
    ) -> Decision:
        if len(self._optimizers) == 1:
            return self._clip(loss_scale, found_inf, coming)
        if self._decision is None or number in self._stepped or self._changed(number):
            self._forget()
            self._decision = self._clip_all(number, loss_scale, found_inf, coming)
        self._stepped.add(number)
        return self._decision

    def _after(self, number: int, skipped: bool | Tensor) -> None:
        """Remember the gradients as this step leaves them: later changes are made by others."""
        self._left = {
            other: GradientsSeen(_gradients(optimizer))
            for other, optimizer in self._alive()
            if other not in self._stepped
        }

    def _alive(self) -> Iterator[tuple[int, Optimizer]]:
        for number, reference in enumerate(self._optimizers):
            optimizer = reference()
            if optimizer is not None:
                yield number, optimizer

    def _changed(self, number: int) -> bool:
        optimizer, seen = self._optimizers[number](), self._left.get(number)
        assert optimizer is not None  # it is calling
        here = seen is None or seen.differ(_gradients(optimizer))
        return self._agree(here)

    def _clip_all(
        self,
        number: int,
        loss_scale: Tensor | None,
        found_inf: Tensor | None,
        coming: FusedStep,
    ) -> Decision:
        """Clip with all gradients in one scale; a scaler unscales them optimizer by optimizer."""
        scaler = scaler_of_step()
        if scaler is None:
            self._refuse_scales(number, loss_scale)
            return self._clip(loss_scale, found_inf, coming)
        waiting = {n for n, o in self._alive() if n != number and _is_scaled(scaler, o)}
        scaled = {number} if loss_scale is not None else set()
        gradients = {n: _gradients(o) for n, o in self._alive()}
        there = {n for n, found in gradients.items() if any(g is not None for g in found)}
        scaled = (scaled | waiting) & there
        found_inf = torch.zeros((), device="cpu") if found_inf is None else found_inf
        if not scaled or scaled == there:
            scale = _scale_of(scaler, loss_scale) if scaled else None
            return self._clip(scale, found_inf, coming, overflow_drops=True)
        apart = [g for n in scaled for g in gradients[n] if g is not None]
        with _unscaled(apart, float(_scale_of(scaler, loss_scale))):
            return self._clip(None, found_inf, None, overflow_drops=True)

    def _refuse_scales(self, number: int, loss_scale: Tensor | None) -> None:
        """Refuse gradients that are scaled differently, as hand-set attributes say."""
        for other, optimizer in self._alive():
            scale = getattr(optimizer, "grad_scale", None)
            if scale is not loss_scale and any(g is not None for g in _gradients(optimizer)):
                raise ConfigurationError(
                    f"attach: the gradients of optimizers {number} and {other} have loss scales of "
                    f"their own (grad_scale), and no norm is over both: unscale the gradients of "
                    f"all before the first steps, or step them by one torch.amp.GradScaler"
                )


class GradientsSeen:
    """Gradients at one moment, to see later whether a backward has changed them.

    A scaler that unscales them, and a fused step that multiplies them, do not count as a change for
    torch; the sum of a further backward does.
    """

    def __init__(self, gradients: Sequence[Tensor | None]) -> None:
        self._references = [None if g is None else weakref.ref(own(g)) for g in gradients]
        self._versions = [None if g is None else version_of(g) for g in gradients]

    def differ(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether any of them is new, or was written to, since.

        Args:
            gradients: of the same parameters, now. One that is gone was not changed by a backward.
        """
        if len(gradients) != len(self._references):
            return True
        for gradient, reference, version in zip(
            gradients, self._references, self._versions, strict=True
        ):
            if gradient is None:
                continue
            if reference is None or reference() is not own(gradient):
                return True
            if version_of(gradient) != version:
                return True
        return False


def _gradients(optimizer: Optimizer) -> list[Tensor | None]:
    return [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]


def _is_scaled(scaler: Any, optimizer: Optimizer) -> bool:
    """Whether the scaler is still to unscale the gradients of this optimizer."""
    return bool(scaler._per_optimizer_states[id(optimizer)]["stage"].name == "READY")


def _scale_of(scaler: torch.amp.GradScaler, loss_scale: Tensor | None) -> Tensor:
    return torch.tensor(scaler.get_scale(), device="cpu") if loss_scale is None else loss_scale


@contextmanager
def _unscaled(gradients: Sequence[Tensor], scale: float) -> Iterator[None]:
    """Divide these by the scale for a while."""
    tensors = list(map(own, gradients))
    torch._foreach_mul_(tensors, 1.0 / scale)
    try:
        yield
    finally:
        torch._foreach_mul_(tensors, scale)
