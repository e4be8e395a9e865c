"""Leaving the multiplying to the optimizer: a fused kernel divides by ``grad_scale`` as it reads.

Where one coefficient is for everything that an optimizer steps, the pass over the gradients that
would multiply them disappears: torch's fused Adam, AdamW, SGD and Adagrad divide each gradient by
the attribute ``grad_scale`` of the optimizer (made for ``torch.amp.GradScaler``), and write the
quotient back, so that ``.grad`` after the step is the clipped gradient here too.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip.layouts import plain
from distclip.layouts.tensors import is_sharded

FOLDING = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
"""Optimizers whose fused kernels divide by ``grad_scale``, and write the quotient back."""
SHARDED = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers of ``FOLDING`` whose fused kernels do so for DTensors too."""
FOLDABLE_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""The kernels compute these in float32. float64 would be divided by a float32 number, which is off
by up to 6e-8 of it, and complex ones they do not take."""
DEVICES = frozenset(("cpu", "cuda"))
"""Measured on the CPU; of the CUDA kernels Adam's was read, the others are taken at torch's word
(``_step_supports_amp_scaling``), and none was run."""
MULTIPLYING = ("apex", "transformer_engine")
"""Packages whose ``FusedAdam``, made with ``capturable=True``, asks the ``grad_scaler`` of its step
for a scale, and multiplies by its inverse. Read, and never run here."""
_FLOAT = torch.finfo(torch.float32)


class Scope:
    """The parameters that one clipper multiplies, held against those that an optimizer steps."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = tuple(parameters)
        self._known = frozenset(map(id, parameters))
        self._stepped: list[tuple[int, torch.dtype, torch.device]] = []
        self._suits = self._sharded = False
        self._strangers: list[tuple[int, int]] = []
        """Group and position of parameters that the clipper does not know."""
        self._left_out: list[Tensor] = []
        """Parameters that the clipper knows and the optimizer does not step."""

    def suits(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer's kernel does to all gradients what the clipper would, and no more.

        Frozen parameters may be missing on one side, as long as they have no gradient.
        """
        if not multiplies(optimizer):
            return False
        groups = [group["params"] for group in optimizer.param_groups]
        stepped = [(id(p), p.dtype, p.device) for group in groups for p in group]
        if stepped != self._stepped:
            self._look(groups)
            self._stepped = stepped
        return (
            self._suits
            and (not self._sharded or isinstance(optimizer, SHARDED))
            and all(groups[g][p].grad is None for g, p in self._strangers)
            and all(parameter.grad is None for parameter in self._left_out)
        )

    def _look(self, groups: Sequence[Sequence[Tensor]]) -> None:
        listed = [parameter for group in groups for parameter in group]
        ids = frozenset(map(id, listed))
        self._strangers = [
            (number, position)
            for number, group in enumerate(groups)
            for position, parameter in enumerate(group)
            if id(parameter) not in self._known
        ]
        self._left_out = [p for p in self._parameters if id(p) not in ids]
        self._sharded = any(map(is_sharded, listed))
        devices = {parameter.device for parameter in listed}
        self._suits = (
            len(devices) == 1
            and not any(map(plain.has_main_gradient, self._parameters))
            and all(device.type in DEVICES for device in devices)
            and all(parameter.dtype in FOLDABLE_DTYPES for parameter in listed)
        )


class FusedStep:
    """A step that is about to be made, whose kernel may do the multiplying.

    Args:
        optimizer: the one that steps.
        loss_scale: 0-dim; what it would divide by anyway.
        watched: whether others get to see the gradients between clipping and step: they are to
            see them clipped.
        argument: the ``grad_scaler`` that the step will be given, where it takes one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loss_scale: Tensor | None,
        watched: bool,
        argument: ScalerArgument | None = None,
    ) -> None:
        self._argument = argument
        self._optimizer = optimizer
        self._loss_scale = loss_scale
        self._watched = watched
        self.told = False
        """Whether the optimizer has been told to multiply; to be taken back after the step."""
        self.multiplies = False
        """Whether the step will multiply the gradients."""
        self.then: Callable[[bool | Tensor], None] | None = None
        """Called after the step with whether it was skipped."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer whose step this is."""
        return self._optimizer

    @property
    def alone(self) -> bool:
        """Whether the only hook before the optimizer's steps is the clipper's."""
        hooks: Any = getattr(self._optimizer, "_optimizer_step_pre_hooks", {})
        return len(hooks) == 1

    def suits(self, scope: Scope) -> bool:
        """Whether :meth:`multiply` may be called for a clipper of these parameters."""
        return not self._watched and scope.suits(self._optimizer)

    def multiply(self, coefficient: float | Tensor | None) -> bool:
        """Let the step multiply all gradients by one number.

        Args:
            coefficient: float, or 0-dim on the parameters' device, which is then not read. None:
                there is no such number.

        Returns:
            Whether it will; False: multiply them yourself. The number is left to you where float32
            cannot hold 1 / number (below 2.9e-39 times the loss scale).
        """
        if coefficient is None or not self._reaches(coefficient):
            return False
        divisor = divisor_of(coefficient, self._loss_scale)
        if divisor is not None and self._argument is not None:
            self._argument.scale = divisor
        elif divisor is not None:
            tell(self._optimizer, "grad_scale", divisor)
            self.told = True
        self.multiplies = divisor is not None
        return self.multiplies

    def _reaches(self, coefficient: float | Tensor) -> bool:
        """False under CPU offload: torch copies ``grad_scale`` to the host and does not wait."""
        if isinstance(coefficient, float):
            return True
        groups = self._optimizer.param_groups
        device = next(parameter.device for group in groups for parameter in group["params"])
        return bool(coefficient.device == device)


class ScalerArgument:
    """Stands for a gradient scaler in ``optimizer.step(grad_scaler=...)``."""

    def __init__(self, optimizer: Optimizer, given: Any) -> None:
        devices = {p.device for group in optimizer.param_groups for p in group["params"]}
        self.loss_scale: Tensor | None = None if given is None else given._get_scale_async()
        if given is None:
            self._found = {device: torch.zeros(1, device=device) for device in devices}
        else:
            self._found = given._check_inf_per_device(optimizer)
        self.found_inf: Tensor | None = None
        if given is not None:
            self.found_inf = functools.reduce(torch.maximum, self._found.values())
        device = next(iter(devices))
        self.scale = torch.ones(1, device=device) if given is None else self.loss_scale
        """What the kernel divides by."""

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[torch.device, Tensor]:
        return self._found

    def _get_scale_async(self) -> Tensor | None:
        return self.scale


def takes_scaler(optimizer: Any) -> bool:
    """Whether the step multiplies by the inverse of its ``grad_scaler``, and writes the product."""
    return (
        type(optimizer).__name__ == "FusedAdam"
        and type(optimizer).__module__.partition(".")[0] in MULTIPLYING
        and bool(getattr(optimizer, "capturable", False))
        and not getattr(optimizer, "use_decoupled_grad", False)
    )


def multiplies(optimizer: Any) -> bool:
    """Whether the optimizer's step is torch's own fused one, in all its groups.

    A subclass with a ``step`` of its own may look at the gradients first.
    """
    if takes_scaler(optimizer):
        return True
    kind = next((kind for kind in FOLDING if isinstance(optimizer, kind)), None)
    return (
        kind is not None
        and getattr(optimizer, "_step_supports_amp_scaling", False)
        and inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step)
        and all(group.get("fused") for group in optimizer.param_groups)
    )


def divisor_of(coefficient: float | Tensor, loss_scale: Tensor | None) -> Tensor | None:
    """``loss_scale / coefficient``, computed in float64, as the float32 tensor of the kernels.

    None, on the host, where it would leave the normal numbers of float32. On a device that would
    have to wait to know, it is held within them; a coefficient of 0 gives inf, and gradients of 0.
    """
    if isinstance(coefficient, float):
        if loss_scale is None or loss_scale.device.type == "cpu":
            scale = 1.0 if loss_scale is None else loss_scale.item()
            quotient = scale / coefficient if coefficient else 0.0
            fits = _FLOAT.tiny <= quotient <= _FLOAT.max  # false for NaN
            return torch.tensor(quotient, dtype=torch.float32, device="cpu") if fits else None
        coefficient = torch.tensor(coefficient, dtype=torch.float64, device=loss_scale.device)
    numerator = torch.ones((), dtype=torch.float64, device=coefficient.device)
    if loss_scale is not None:
        numerator = loss_scale.to(numerator).reshape(())
    divisor = (numerator / coefficient).clamp(_FLOAT.tiny, _FLOAT.max)  # NaN stays
    return torch.where(coefficient == 0.0, torch.inf, divisor).float()


class _Told(NamedTuple):
    """An optimizer's attribute as it was, and what stands there now."""

    was_there: bool
    before: Any
    now: Tensor


_told: weakref.WeakKeyDictionary[Optimizer, dict[str, _Told]] = weakref.WeakKeyDictionary()
"""Kept for all handles together: post-hooks run in the order of the pre-hooks, not in reverse."""


def tell(optimizer: Any, name: str, value: Tensor) -> None:
    """Set an attribute that a fused kernel is given; several may, one on top of the other."""
    told = _told.setdefault(optimizer, {})
    first = told.get(name)
    if first is None or getattr(optimizer, name, None) is not first.now:
        there = hasattr(optimizer, name)
        first = _Told(there, getattr(optimizer, name, None), value)
    told[name] = first._replace(now=value)
    setattr(optimizer, name, value)


def take_back(optimizer: Any) -> None:
    """Leave all such attributes as they were before the first :func:`tell`."""
    for name, first in _told.pop(optimizer, {}).items():
        if getattr(optimizer, name, None) is not first.now:
            continue
        if first.was_there:
            setattr(optimizer, name, first.before)
        else:
            delattr(optimizer, name)
