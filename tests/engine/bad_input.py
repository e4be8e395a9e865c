"""What is refused, and how a test sees that nothing has changed."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from distclip import (
    DistclipError,
)
from tests.sharded import mesh_of


def refused(act: Callable[[], object], kind: type[DistclipError], *words: str) -> str:
    """Every rank raises ``kind`` with ``words`` in the message. Returns this rank's message."""
    with pytest.raises(kind) as caught:
        act()
    message = str(caught.value)
    for word in words:
        assert word in message, message
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()  # everybody got here, and the group still works
    return message


def sharded(*shape: int, gradient: bool = True) -> nn.Parameter:
    """A parameter that is cut along dim 0 over all ranks."""
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    cut = functools.partial(
        distribute_tensor, device_mesh=mesh, placements=[Shard(0)], src_data_rank=None
    )
    result = nn.Parameter(cut(torch.ones(*shape)))
    if gradient:
        result.grad = cut(torch.full(shape, 9.0))
    return result


def plain(*shape: int, gradient: float | None = 9.0) -> nn.Parameter:
    result = nn.Parameter(torch.ones(*shape))
    result.grad = None if gradient is None else torch.full(shape, gradient)
    return result
