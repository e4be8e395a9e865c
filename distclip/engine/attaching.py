"""What has to be true of optimizers that a clipper is attached to."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from distclip.errors import ConfigurationError
from distclip.layouts import fsdp2
from distclip.layouts.detect import refuse_dummy
from distclip.layouts.names import Named

_logger = logging.getLogger("distclip")


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """One optimizer, several, or none."""
    if optimizer is None:
        return ()
    return tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)


def stepped_by(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_optimizers(optimizers: Sequence[Optimizer], named: Named) -> None:
    """Refuse optimizers that cannot step these parameters, or not all of them in one clip.

    Raises:
        ConfigurationError: says which optimizer, and why.
    """
    if not optimizers:
        raise ConfigurationError("attach: expected an optimizer, got an empty list")
    mine = {id(parameter) for _, parameter in named}
    for number, optimizer in enumerate(optimizers):
        if not hasattr(optimizer, "param_groups"):
            raise ConfigurationError(
                f"attach: expected the optimizer that steps the parameters, got a "
                f"{type(optimizer).__name__}"
            )
        refuse_dummy(optimizer)
        stepped = list(stepped_by(optimizer))
        if any(map(operator.is_not, stepped, fsdp2.sharded(stepped))):
            raise ConfigurationError(
                f"the optimizer ({type(optimizer).__name__}) was built of parameters that "
                f"FSDP2 had gathered for a forward: those get no gradient, and their memory is "
                f"freed; build it before the first forward, or after model.reshard()"
            )
        if any(optimizer is other for other in optimizers[:number]):
            raise ConfigurationError(f"attach: optimizer {number} is given twice; give it once")
        if mine and mine.isdisjoint(map(id, stepped)):
            which = f" (number {number}, {type(optimizer).__name__})" * (len(optimizers) > 1)
            raise ConfigurationError(
                f"the optimizer{which} steps none of this GradClipper's parameters; FSDP2 "
                f"(fully_shard) replaces parameters: build both after sharding, from the same "
                f"model"
            )


def mention_unstepped(optimizers: Sequence[Optimizer], named: Named) -> None:
    """Log parameters that no optimizer steps: their gradients still count in the norm."""
    stepped = {id(p) for optimizer in optimizers for p in stepped_by(optimizer)}
    names = [n for n, p in named if p.requires_grad and id(p) not in stepped]
    if names:
        _logger.warning(
            "attach: no attached optimizer steps %s%s, whose gradients are measured and "
            "clipped with the others; if another optimizer steps them, attach to both: "
            "clipper.attach(first, second)",
            ", ".join(map(repr, names[:3])),
            f" and {len(names) - 3} more trainable parameters" if len(names) > 3 else "",
        )
