"""Scripts under ``distclip run`` that save and load with torch.distributed.checkpoint."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from distclip.integrations.checkpoints import FILE
from tests.helpers.logs import logged
from tests.integrations.accelerated import make, same, sgd, whole
from tests.integrations.saving import ADAGC, NONE, STEPS, begun, step
from tests.integrations.scripted import running


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_has_the_memories_of_equal_models_in_their_order(tmp_path: Path) -> None:
    """By which they are told apart; an order by addresses in memory would be right by chance."""
    with running(ADAGC):
        models = [make(seed) for seed in range(5)]
        steppers = list(map(sgd, models))
        for number, (model, stepper) in enumerate(zip(models, steppers, strict=True)):
            step(model, stepper, range(1 + number))
        pairs = zip(models, steppers, strict=True)
        states = {str(n): get_optimizer_state_dict(*pair) for n, pair in enumerate(pairs)}
        dcp.save(states, checkpoint_id=tmp_path, no_dist=True)
    saved = torch.load(tmp_path / FILE, weights_only=True)["clippers"]
    assert [each["step"] for each in saved] == [1, 2, 3, 4, 5]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_is_loaded_from_once(tmp_path: Path) -> None:
    """A dict that is kept and given back has no memory, whatever has been loaded before."""
    with running(ADAGC):
        model, stepper = begun("one")
        step(model, stepper, range(3))
        state = {"optimizer": get_optimizer_state_dict(model, stepper)}
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    with running(ADAGC) as scripts, logged("distclip.torch") as found:
        model, stepper = begun("one")
        state = {"optimizer": get_optimizer_state_dict(model, stepper)}
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        for _ in range(2):  # nothing has been taken before the first step
            set_optimizer_state_dict(model, stepper, copy.deepcopy(state["optimizer"]))
        step(model, stepper, [3])
        (clipper,) = scripts._clippers.known.values()
        assert clipper.state_dict()["step"] == 4
        assert not found
        set_optimizer_state_dict(model, stepper, get_optimizer_state_dict(model, stepper))
        assert [NONE in each for each in found] == [True]


class App:
    """Model and optimizer, as torch's tutorial has them for ``torch.distributed.checkpoint``."""

    def __init__(self, model: nn.Module, stepper: Optimizer) -> None:
        self.model, self.stepper = model, stepper

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.stepper)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.stepper,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


@pytest.mark.ranks(1, 2)
def test_distributed_checkpoints(world_size: int, tmp_path: Path) -> None:
    layout = "fsdp2" if world_size > 1 else "one"
    plain, first, later = (tmp_path / name for name in ("plain", "first", "later"))
    model, stepper = begun(layout)
    step(model, stepper, range(4))
    dcp.save({"app": App(model, stepper)}, checkpoint_id=plain)
    assert not (plain / FILE).exists()
    with running(ADAGC):
        model, stepper = begun(layout)
        step(model, stepper, range(4))
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=tmp_path / "weights")
        assert not (tmp_path / "weights" / FILE).exists()
        dcp.save({"app": App(model, stepper)}, checkpoint_id=first)
        step(model, stepper, range(4, 6))
        state = App(model, stepper).state_dict()
        dcp.async_save(state, storage_writer=dcp.FileSystemWriter(later)).result()
        step(model, stepper, range(6, STEPS))
        wanted = whole(model)
    dist.barrier()
    for folder, done in ((first, 4), (later, 6)):
        with running(ADAGC), logged("distclip.torch") as found:
            model, stepper = begun(layout)
            app = App(model, stepper)
            if folder is first:
                dcp.load({"app": app}, checkpoint_id=folder)
            else:
                state = app.state_dict()
                dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
                app.load_state_dict(state)
            step(model, stepper, range(done, STEPS))
            same(whole(model), wanted, 0.0)
            assert not found
            dcp.load({"app": app}, checkpoint_id=plain)  # from before distclip was in use
            step(model, stepper, range(4, 6))
            assert [NONE in each for each in found] == [True] * (dist.get_rank() == 0)
    model, stepper = begun(layout)
    dcp.load({"app": App(model, stepper)}, checkpoint_id=first)  # without distclip
    assert stepper.state
    dcp.save({"app": App(model, stepper)}, checkpoint_id=first)  # over it
    with running(ADAGC), logged("distclip.torch") as found:
        model, stepper = begun(layout)
        dcp.load({"app": App(model, stepper)}, checkpoint_id=first)
        step(model, stepper, range(4, 5))
        assert [NONE in each for each in found] == [True] * (dist.get_rank() == 0)
