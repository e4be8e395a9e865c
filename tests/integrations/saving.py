"""Scripts that train, save and load with plain torch."""

import copy
import io
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.optim import Optimizer

from tests.integrations.accelerated import batch, loss_of, make, sgd, whole
from tests.integrations.scripted import mine, wrapped

ADAGC = {"name": "adagc", "warmup_steps": 2}
AUTOCLIP = {"name": "autoclip", "percentile": 30, "window": 6}
STEPS = 8
NONE = "has no state of distclip"


def step(model: nn.Module, stepper: Optimizer, numbers: Iterable[int]) -> None:
    for number in numbers:
        stepper.zero_grad()
        loss_of(model, mine(batch(number))).backward()
        stepper.step()


def full(layout: str, model: nn.Module, rank0_only: bool = False) -> Any:
    """FSDP1's way to whole tensors."""
    if not layout.startswith("fsdp1"):
        return nullcontext()
    kind, options = StateDictType.FULL_STATE_DICT, {"rank0_only": rank0_only}
    return FSDP.state_dict_type(
        model, kind, FullStateDictConfig(**options), FullOptimStateDictConfig(**options)
    )


def save(layout: str, model: nn.Module, stepper: Optimizer) -> Any:
    """As scripts do."""
    file = io.BytesIO()
    with full(layout, model):
        state = (
            FSDP.optim_state_dict(model, stepper)
            if layout.startswith("fsdp1")
            else stepper.state_dict()
        )
        torch.save({"model": model.state_dict(), "optimizer": state}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load(layout: str, model: nn.Module, stepper: Optimizer, checkpoint: Any) -> None:
    with full(layout, model):
        model.load_state_dict(checkpoint["model"])
        state = copy.deepcopy(checkpoint["optimizer"])  # torch keeps its tensors
        if layout.startswith("fsdp1"):
            state = FSDP.optim_state_dict_to_load(model, stepper, state)
    stepper.load_state_dict(state)


def begun(layout: str) -> tuple[nn.Module, Optimizer]:
    model = wrapped(layout, make())
    return model, sgd(model)


def trained(layout: str, numbers: Iterable[int], checkpoint: Any = None) -> dict[str, Tensor]:
    model, stepper = begun(layout)
    if checkpoint is not None:
        load(layout, model, stepper, checkpoint)
    step(model, stepper, numbers)
    return whole(model)
