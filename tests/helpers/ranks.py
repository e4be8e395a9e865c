"""What the ranks of a test tell each other."""

from typing import Any

import torch.distributed as dist


def everyones(value: Any) -> list[Any]:
    """The value of each rank, by rank, on all of them."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
