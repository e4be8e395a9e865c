"""Acting around ``optimizer.step()``: clip before it, and really skip it where that is asked.

A skipped step leaves momentum, weight decay and step counters alone. Where the optimizer's fused
kernel takes ``found_inf`` that costs no host read; otherwise the gradients are hidden from the step
and given back after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer


class Decision(Protocol):
    """What the clipping before a step says about the step."""

    @property
    def skipped(self) -> Tensor: ...


class StepHandle:
    """Hooks on one optimizer; :meth:`remove` undoes them.

    ``step(closure)`` clips after every evaluation of the closure, which is where the gradients
    come from. Should a dropped step raise all the same, its gradients are given back by
    :meth:`remove` or by the next step, except to a parameter that has a new one by then.

    Args:
        optimizer: the torch optimizer itself, not a wrapper around it.
        clip: called before every step with the loss scale that the gradients still carry (0-dim
            tensor, or None) and whether a gradient scaler has already found them not finite.
        after: called after every step with whether it was skipped, or None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clip: Callable[[Tensor | None, Tensor | None], Decision | None],
        after: Callable[[bool | Tensor], None] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._clip = clip
        self._after = after
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._found_inf: tuple[bool, Any] | None = None
        self._skipped: bool | Tensor = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Take the hooks off; the optimizer steps as it did before."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._give_back(self._optimizer)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._clip_gradients(optimizer)
            return None

        def clipped() -> Any:
            loss = closure()
            self._clip_gradients(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": clipped}
        return (args[0], clipped, *args[2:]), kwargs

    def _clip_gradients(self, optimizer: Optimizer) -> None:
        self._give_back(optimizer)  # a step that raised never reached its post-hook
        # GradScaler hands a fused optimizer scaled gradients, and tells it so in these.
        scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        decision = self._clip(scale, found_inf)
        self._skipped = False
        if decision is None:
            return
        if skips_by_found_inf(optimizer) and decision.skipped.device.type != "cpu":
            flag = decision.skipped.float()
            had = hasattr(optimizer, "found_inf")
            self._found_inf = (had, found_inf)
            merged = flag if found_inf is None else torch.maximum(found_inf, flag.to(found_inf))
            optimizer.found_inf = merged  # type: ignore[attr-defined]
            self._skipped = decision.skipped
        elif bool(decision.skipped):
            self._skipped = True
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._hidden.append((parameter, parameter.grad))
                        parameter.grad = None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._give_back(optimizer)
        if self._after is not None:
            self._after(self._skipped)

    def _give_back(self, optimizer: Optimizer) -> None:
        for parameter, gradient in self._hidden:
            if parameter.grad is None:
                parameter.grad = gradient
        self._hidden.clear()
        if self._found_inf is not None:
            had, value = self._found_inf
            self._found_inf = None
            if had:
                optimizer.found_inf = value  # type: ignore[attr-defined]
            else:
                del optimizer.found_inf  # type: ignore[attr-defined]


def skips_by_found_inf(optimizer: Optimizer) -> bool:
    """Whether the optimizer's kernel itself leaves everything alone where ``found_inf`` is set.

    Fused Adam and AdamW do. Fused SGD keeps an uninitialised momentum buffer when its first step
    is skipped so (torch 2.13), so it is not asked to.
    """
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and all(
        group.get("fused") for group in optimizer.param_groups
    )
