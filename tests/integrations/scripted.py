"""Plain torch scripts in miniature: how they wrap a model, and how they clip."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip.config import Config
from distclip.integrations import torch_scripts
from tests.helpers.shards import full
from tests.integrations.accelerated import (
    Reference,
    batch,
    loss_of,
    make,
    sgd,
    whole,
)

STEPS = 20
LAYOUTS = ["ddp", "fsdp2", "fsdp1", "fsdp1_flat"]


@contextmanager
def running(policy: Any, **options: Any) -> Iterator[Any]:
    """The integration, as ``distclip run`` installs it."""
    document = {"policy": policy} if isinstance(policy, (dict, list)) else None
    if document is not None:
        config = distclip.config.load({**document, **options})
    else:
        config = Config(policy=policy, **options)
    scripts = torch_scripts.enable(sys.modules["torch.optim.optimizer"], config)
    try:
        yield scripts
    finally:
        scripts.remove()


_LIBRARY: dict[str, Any] = {"__name__": "somelib.clipping"}
_SOURCE = "def call(function, *given, **named): return function(*given, **named)"
exec(compile(_SOURCE, "/lib/site-packages/somelib/clipping.py", "exec"), _LIBRARY)
by_library: Callable[..., Any] = _LIBRARY["call"]
"""Calls a function, as the code of an installed package would."""


def mine(x: Tensor) -> Tensor:
    """This rank's rows of a batch."""
    if not dist.is_initialized():
        return x
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def wrapped(layout: str, model: nn.Module) -> nn.Module:
    if layout == "one" or not dist.is_initialized():
        return model
    if layout == "ddp":
        return DistributedDataParallel(model)
    if layout == "fsdp2":
        for child in model.children():
            fully_shard(child)
        return fully_shard(model)
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=layout == "fsdp1"
    )


# ---- how scripts clip --------------------------------------------------------------------------


def never(model: nn.Module) -> None:
    return None


def by_utils(model: nn.Module) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), 1e-9)


def by_late_name(model: nn.Module) -> Tensor:
    from torch.nn.utils import clip_grad_norm_

    return clip_grad_norm_(model.parameters(), 1e-9, norm_type=2, error_if_nonfinite=True)


def by_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-9)


def measuring(model: nn.Module) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), math.inf)


def plain(norm: Any) -> float:
    return full(norm).item()


def train(
    layout: str,
    policy: Any,
    clip: Callable[[nn.Module], Any] = never,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    steps: int = STEPS,
    micro: int = 1,
) -> tuple[dict[str, Tensor], list[float], list[float], int]:
    """Weights; norms that the script saw; norms in reports; how many clips there were."""
    with running(policy) as scripts:
        seen: list[float] = []
        model = wrapped(layout, make())
        stepper = optimizer(model)
        clips: list[float] = []
        for number in range(steps):
            stepper.zero_grad()
            for part in mine(batch(number)).chunk(micro):
                (loss_of(model, part) / micro).backward()
            norm = clip(model)
            stepper.step()
            seen += [] if norm is None else [plain(norm)]
            clips.append(scripts.last_report.total_norm.item())
        counts = [c._session.step for c in scripts._clippers.known.values()]
        return whole(model), seen, clips, sum(counts)


def reference(
    policy: Any,
    steps: int = STEPS,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
) -> tuple[dict[str, Tensor], list[float]]:
    model = make()
    oracle = Reference(model, optimizer(model))
    for number in range(steps):
        oracle.update(policy, loss_of(model, batch(number)))
    return whole(model), oracle.norms


def of_two(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [sgd(part) for part in model.children()]
