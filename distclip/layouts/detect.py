"""The one dispatch point: which layout does this parameter have?"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.errors import UnsupportedGradientError
from distclip.layouts import dtensor, plain, zero
from distclip.layouts.piece import Described


def detect(name: str, parameter: Tensor) -> Described:
    """Entry and local pieces of ``parameter``, read off the tensor itself.

    Raises:
        UnsupportedGradientError: a sharding that distclip cannot read; it is named.
    """
    if (extent := zero.extent_of(parameter)) is not None:
        return zero.describe(name, parameter, extent)
    if isinstance(parameter, DTensor):
        return dtensor.describe(name, parameter)
    # These look like plain tensors, and would be taken for whole ones.
    if getattr(parameter, "_fsdp_flattened", False):
        raise UnsupportedGradientError(
            f"parameter {name!r} is a flat shard of FSDP1 (FullyShardedDataParallel), which "
            f"distclip cannot read yet; use FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    if hasattr(parameter, "ds_tensor"):
        raise UnsupportedGradientError(
            f"parameter {name!r} is partitioned by DeepSpeed ZeRO-3: attach to the engine instead, "
            f"distclip.deepspeed.attach(engine, policy)"
        )
    return plain.describe(name, parameter)
