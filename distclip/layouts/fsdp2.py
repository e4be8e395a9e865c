"""FSDP2 modules while their parameters are gathered: which sharded parameter is meant.

Between a forward and the next backward, after ``unshard()``, and with
``set_reshard_after_backward(False)``, an FSDP2 module holds gathered parameters: plain tensors (or
DTensors of tensor parallelism alone) without a gradient, whose storage is freed when the module is
sharded again. Gradients and the optimizer's state belong to the sharded parameters. FSDP2's own
state (private to torch) has both, and every module's state is in one table of this process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed.fsdp import FSDPModule


def sharded(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parameters in order, with each gathered one replaced by its sharded parameter."""
    owners = {id(gathered): parameter for gathered, parameter in _gathered()}
    return [owners.get(id(parameter), parameter) for parameter in parameters]


def is_in_use() -> bool:
    """Whether any module of this process may have such a state."""
    return bool(getattr(_composable_state, "_module_state_mapping", True))


def known_to_fsdp2(parameters: Iterable[Tensor]) -> set[int]:
    """The ids of those that are sharded parameters of FSDP2, not DTensors of anything else."""
    wanted = set(map(id, parameters))
    return {id(managed.sharded_param) for managed in _managed()} & wanted


def unsharded_leaves(parameters: Iterable[Tensor]) -> list[Tensor | None]:
    """Of sharded parameters in order, what forward and backward compute with: autograd's leaf.

    Its gradient is this rank's own, not reduced yet. FSDP2 makes it at the first forward and keeps
    the object. None where there is none yet, or the parameter is none of FSDP2.
    """
    known = {id(each.sharded_param): getattr(each, "_unsharded_param", None) for each in _managed()}
    return [known.get(id(parameter)) for parameter in parameters]


def modules_of(model: nn.Module) -> list[FSDPModule]:
    """The modules within a model that ``fully_shard`` was called on."""
    return [each for each in model.modules() if isinstance(each, FSDPModule)]


def reduce_in_backward(modules: Iterable[FSDPModule]) -> None:
    """Have the next backward leave reduced gradients in ``.grad``, whatever was set before."""
    for module in modules:
        module.set_requires_gradient_sync(True, recurse=False)
        module.set_is_last_backward(True)


def unreduced(parameters: Iterable[Tensor]) -> bool:
    """Whether any has a gradient of this rank alone, of a backward without synchronisation."""
    wanted = set(map(id, parameters))
    return any(
        getattr(each, "unsharded_accumulated_grad", None) is not None
        or getattr(getattr(each, "_unsharded_param", None), "grad", None) is not None
        for each in _managed()
        if id(each.sharded_param) in wanted
    )


def _gathered() -> Iterator[tuple[Tensor, Tensor]]:
    """``(gathered, sharded)`` of every parameter of this process that FSDP2 has ever gathered."""
    for managed in _managed():
        for form in ("_unsharded_param", "_sharded_post_forward_param"):
            gathered = getattr(managed, form, None)
            if gathered is not None:
                yield gathered, managed.sharded_param


def _managed() -> Iterator[Any]:
    """What FSDP2 keeps of each parameter of this process."""
    known: Any = getattr(_composable_state, "_module_state_mapping", {})
    for state in {id(state): state for ref in list(known.values()) if (state := ref())}.values():
        for group in _groups(state):
            yield from group.fsdp_params


def _groups(state: Any) -> Sequence[Any]:
    """The parameter groups of a module's state: one, or none, before torch 2.12."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]
