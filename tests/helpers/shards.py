"""The whole of sharded tensors and models, and the part here, by torch's own means."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def full(tensor: Any) -> Any:
    """A whole tensor, on every rank; None for None."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Any) -> Any:
    """The part of a tensor that lies on this rank; None for None."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights of a model, by their names in the bare one."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name: p.detach().clone() for name, p in model.named_parameters()}
    named = model.named_parameters()
    return {name.removeprefix("module."): full(p).detach().clone() for name, p in named}
