"""Acting around ``optimizer.step()``: clip before it, and really skip it where that is asked.

A skipped step leaves momentum, weight decay and step counters alone. Where the optimizer's fused
kernel takes ``found_inf`` that costs no host read; otherwise the gradients are hidden from the step
and given back after it. What a step can multiply by itself is in ``folded.py``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip.application.eager import caller, eagerly
from distclip.application.folded import (
    FusedStep,
    ScalerArgument,
    take_back,
    takes_scaler,
    tell,
)
from distclip.errors import ConfigurationError


class Decision(Protocol):
    """What the clipping before a step says about the step."""

    @property
    def leave_out(self) -> Tensor | None: ...


class StepHandle:
    """Hooks on one optimizer; :meth:`remove` undoes them.

    ``step(closure)`` clips what each call of the closure leaves behind, since that is what is then
    stepped with. The handle keeps the optimizer alive no longer than its other users do.

    Args:
        optimizer: the torch optimizer itself, not a wrapper around it.
        clip: called before every step with the loss scale that the gradients still carry (0-dim
            tensor, or None), whether a gradient scaler has already found them not finite, and the
            step to come, which may be able to multiply them itself.
        after: called after every step with whether it was skipped, by ``clip`` or by the scaler.

    Raises:
        ConfigurationError: an optimizer that runs no step hooks.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clip: Callable[[Tensor | None, Tensor | None, FusedStep], Decision | None],
        after: Callable[[bool | Tensor], None] | None = None,
    ) -> None:
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise ConfigurationError(
                f"{type(optimizer).__name__} runs no step hooks: it wraps an optimizer or never "
                f"called Optimizer.__init__. Attach to the torch optimizer inside it (mostly "
                f"`.optimizer`)"
            )
        self._optimizer = weakref.ref(optimizer)
        self._clip = clip
        self._after = after
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._settings: list[dict[str, Any]] = []
        self._asked = False
        self._then: Callable[[bool | Tensor], None] | None = None
        self._skipped: bool | Tensor = False
        self._step: FrameType | None = None
        """The call of ``step`` that is under way, or that raised."""
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def active(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._handles)

    @property
    def stepping(self) -> bool:
        """Whether this is asked from within a step of the optimizer."""
        return self._step is not None and is_within(sys._getframe(), self._step)

    def remove(self) -> None:
        """Take the hooks off; the optimizer steps as it did before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for parameter, gradient in self._hidden:  # from a step that raised
            if parameter.grad is None:
                parameter.grad = gradient
        self._hidden.clear()
        optimizer = self._optimizer()
        if optimizer is not None:
            self._untell(optimizer)

    @eagerly
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Of a class whose `step` calls `super().step()`, torch runs the hooks twice.
        step = caller()
        if self._step is not None and is_within(step, self._step):
            return None
        if not optimizer.state and only_makes_state(step):
            return None
        self._step = step
        # A step that raised never reached its post-hook. What it hid is history by now.
        self._hidden.clear()
        self._settings.clear()
        self._take_back(optimizer)
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._clipping(optimizer, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._clipping(optimizer, args[1]), *args[2:]), kwargs
        argument = None
        if takes_scaler(optimizer):
            argument = ScalerArgument(optimizer, kwargs.get("grad_scaler"))
        self._decide(optimizer, argument)
        return None if argument is None else (args, {**kwargs, "grad_scaler": argument})

    def _clipping(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        @eagerly
        def evaluate() -> Any:
            self._take_back(optimizer)  # L-BFGS evaluates it several times
            loss = closure()
            self._decide(optimizer)
            return loss

        return evaluate

    def _decide(self, optimizer: Optimizer, argument: ScalerArgument | None = None) -> None:
        # GradScaler hands a fused optimizer scaled gradients, and tells it so in these.
        told: Any = optimizer
        scale: Tensor | None = getattr(told, "grad_scale", None)
        found_inf: Tensor | None = getattr(told, "found_inf", None)
        if argument is not None:  # or in an argument
            scale, found_inf = argument.loss_scale, argument.found_inf
        coming = FusedStep(optimizer, scale, self._others_look(optimizer), argument)
        try:
            decision = self._clip(scale, found_inf, coming)
        except BaseException:
            take_back(optimizer)  # there will be no step, whatever other handles have told it
            if getattr(told, "_step_supports_amp_scaling", False) and scaler_of_step() is not None:
                for name in ("grad_scale", "found_inf"):  # which the scaler deletes after a step
                    vars(optimizer).pop(name, None)
            raise
        self._asked, self._then = coming.told, coming.then
        self._skipped = False if found_inf is None else _lazy((found_inf > 0).any())
        skips = None if decision is None else decision.leave_out
        if skips is None:
            return
        if skips_by_found_inf(optimizer) and not reads_on_host(skips):
            flag = skips.float()
            merged = flag if found_inf is None else torch.maximum(found_inf, flag.to(found_inf))
            tell(optimizer, "found_inf", merged)
            self._asked = True
            self._skipped = (merged > 0).any()
        elif bool(skips):
            self._skipped = True
            self._hide(optimizer)

    def _hide(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            # Some optimizers count their steps here, and do so without any gradient.
            counters = {k: v for k, v in group.items() if isinstance(v, (bool, int, float))}
            self._settings.append(counters)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    @eagerly
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if caller() is not self._step:
            return
        self._step = None
        self._take_back(optimizer)
        if self._after is not None:
            self._after(self._skipped)
        then, self._then = self._then, None
        if then is not None:
            then(self._skipped)

    def _take_back(self, optimizer: Optimizer) -> None:
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()
        for group, settings in zip(optimizer.param_groups, self._settings, strict=False):
            group.update(settings)
        self._settings.clear()
        self._untell(optimizer)

    def _untell(self, optimizer: Optimizer) -> None:
        if self._asked:
            self._asked = False
            take_back(optimizer)

    def _others_look(self, optimizer: Any) -> bool:
        """Whether a hook that is not distclip's comes between this one and the step."""
        owners = [getattr(h, "__self__", h) for h in optimizer._optimizer_step_pre_hooks.values()]
        if self not in owners:  # removed by the closure
            return True
        return not all(isinstance(o, StepHandle) for o in owners[owners.index(self) :])


def scaler_of_step() -> torch.amp.GradScaler | None:
    """The enabled gradient scaler whose ``step`` is making this step."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("step", "_maybe_opt_step"):
            owner = frame.f_locals.get("self")
            if isinstance(owner, torch.amp.GradScaler) and owner.is_enabled():
                return owner
        frame = frame.f_back
    return None


def is_attached(optimizer: Any) -> bool:
    """Whether a :class:`StepHandle` is on this optimizer."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {})
    return any(isinstance(getattr(h, "__self__", None), StepHandle) for h in hooks.values())


_STATE_MAKERS = {
    "_init_optim_state": "torch.distributed.checkpoint.state_dict",
    "init_state": "torch.distributed.optim.named_optimizer",
}
"""Functions that step a fresh optimizer, with gradients of 0 and no learning rate, only so that it
makes its state: name -> module."""


def only_makes_state(frame: FrameType | None) -> bool:
    """Whether the step is made by torch's checkpointing, and none of training."""
    if sys.modules.keys().isdisjoint(_STATE_MAKERS.values()):
        return False
    while frame is not None:
        module = _STATE_MAKERS.get(frame.f_code.co_name)
        if module is not None and frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


def is_within(frame: FrameType | None, outer: FrameType) -> bool:
    """Whether ``frame`` is ``outer``, or called by it."""
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is not None


def _lazy(flag: Tensor) -> bool | Tensor:
    """A bool, unless reading it would wait for a device."""
    return bool(flag) if reads_on_host(flag) else flag


def reads_on_host(flag: Tensor) -> bool:
    """Whether reading ``flag`` waits for nothing, so that the simpler way is also the faster."""
    return flag.device.type == "cpu"


def skips_by_found_inf(optimizer: Optimizer) -> bool:
    """Whether the optimizer's kernel itself leaves everything alone where ``found_inf`` is set.

    Fused Adam and AdamW do. Fused SGD keeps an uninitialised momentum buffer when its first step
    is skipped so (torch 2.13), so it is not asked to.
    """
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and all(
        group.get("fused") for group in optimizer.param_groups
    )
