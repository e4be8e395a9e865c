"""The one dispatch point: which layout does this parameter have?"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.errors import UnsupportedGradientError
from distclip.layouts import dtensor, plain
from distclip.layouts.piece import Described


def detect(name: str, parameter: Tensor) -> Described:
    """Entry and local pieces of ``parameter``, read off the tensor itself.

    Raises:
        UnsupportedGradientError: a sharding that distclip cannot read; it is named.
    """
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
            f"parameter {name!r} is partitioned by DeepSpeed ZeRO-3, which distclip cannot read "
            f"yet; use FSDP2, or ZeRO with DeepSpeed's own gradient_clipping"
        )
    return plain.describe(name, parameter)
