"""Whole gradients and weights, gathered by the library that has sharded them.

For checks only: needs memory for the whole model on every rank, and nothing of it is made by the
code that is checked.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping

from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from distclip.errors import DistclipError
from distclip.layouts import fsdp1

WholeTensors = dict[str, tuple["Tensor | None", Tensor]]
"""Name -> whole gradient (None: there is none) and whole weights, on the CPU."""


def can_gather(parameter: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether another library than distclip can put the parameter together."""
    sharded = isinstance(parameter, DTensor) or fsdp1.is_flattened(parameter)
    return sharded or tuple(parameter.shape) == tuple(shape)


def gather_whole(named: Mapping[str, Tensor]) -> WholeTensors:
    """Whole gradients and weights of these parameters; a collective.

    Args:
        named: name -> parameter, as the optimizer steps it; in the same order on all ranks, with a
            gradient on all of them or on none.

    Raises:
        DistclipError: a flat parameter of FSDP1 that cannot be gathered.
    """
    flattened = {name: p for name, p in named.items() if fsdp1.is_flattened(p)}
    found = _summoned(flattened) if flattened else {}
    for name, parameter in named.items():
        if name not in flattened:
            gradient = None if parameter.grad is None else _full(parameter.grad)
            found[name] = gradient, _full(parameter.detach())
    return found


def _full(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone()


def _summoned(flattened: Mapping[str, Tensor]) -> WholeTensors:
    """Through FSDP1 itself: every module that holds one of these is asked for them."""
    found: WholeTensors = {}
    wanted = {id(parameter): name for name, parameter in flattened.items()}
    for module in _roots():
        if wanted.keys().isdisjoint(map(id, module.parameters())):
            continue  # another model's
        try:
            summoned = FullyShardedDataParallel.summon_full_params(
                module, writeback=False, with_grads=True
            )
            with summoned:
                for parameter in module.parameters():
                    if name := wanted.get(id(parameter)):
                        gradient = parameter.grad
                        kept = None if gradient is None else gradient.detach().cpu().clone()
                        found[name] = kept, parameter.detach().cpu().clone()
        except (NotImplementedError, AssertionError, ValueError) as error:
            raise DistclipError(
                f"check: FSDP1 cannot gather gradients here ({error}); wrap with "
                f"use_orig_params=True, or leave --check away"
            ) from None
    if lacking := [name for name in flattened if name not in found]:
        raise DistclipError(
            f"check: no FullyShardedDataParallel in this process has a parameter called "
            f"{lacking[0]!r}; leave --check away"
        )
    return found


def _roots() -> list[FullyShardedDataParallel]:
    modules = [m for m in gc.get_objects() if type(m) is FullyShardedDataParallel]
    inner = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in inner]
