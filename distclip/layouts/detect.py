"""The one dispatch point: which layout does this parameter have?"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip.errors import UnsupportedGradientError
from distclip.layouts import declared, dtensor, plain
from distclip.layouts.piece import Described


def refuse_stepped_in_backward(name: str, parameter: Tensor) -> None:
    """Refuse a parameter that ``torch.distributed.optim._apply_optimizer_in_backward`` steps.

    Raises:
        UnsupportedGradientError: it is named.
    """
    if getattr(parameter, "_in_backward_optimizers", None):
        raise UnsupportedGradientError(
            f"parameter {name!r} is stepped during backward (_apply_optimizer_in_backward): its "
            f"gradient is gone before the others are there, so no norm over the model can clip it; "
            f"use an optimizer that steps after backward"
        )


def detect(name: str, parameter: Tensor) -> Described:
    """Entry and local pieces of ``parameter``, read off the tensor itself.

    Raises:
        UnsupportedGradientError: a sharding that distclip cannot read; it is named.
    """
    refuse_stepped_in_backward(name, parameter)
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
    spread = declared.spread_of(name, parameter)
    if spread is not None:
        return declared.describe(name, parameter, spread)
    return plain.describe(name, parameter)
