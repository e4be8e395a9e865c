"""Checkpoints of Lightning's Trainer keep what a policy remembers."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

from distclip import StateError, policies
from distclip.testing import run_on_ranks
from tests.helpers.logs import logged
from tests.integrations.accelerated import (
    LR,
    sgd,
)
from tests.integrations.lightning_runs import REMEMBERS, clip_with, trained

pytestmark = pytest.mark.filterwarnings("ignore")


def decisions_of(folder: str, layout: str, steps: int, resume: bool) -> list[float]:
    """Train on whatever ranks there are; the checkpoint of step 4 lies in the folder."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    logged: list[float] = []
    keep = ModelCheckpoint(folder, "at{step}", every_n_train_steps=4, save_top_k=-1)
    options = {"enable_checkpointing": True, "max_steps": steps}
    if resume:
        options |= {"ckpt_path": f"{folder}/atstep=4.ckpt", "first": 4}
    callbacks = [clip_with(REMEMBERS), Coefficients(logged), *([] if resume else [keep])]
    options["enable_checkpointing"] = not resume
    trained(Path(folder), layout, steps, *callbacks, **options)
    return logged


def Coefficients(found: list[float]) -> Any:
    from lightning.pytorch import Callback

    class Reading(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            found.append(float(trainer.callback_metrics["clip_coefficient"]))

    return Reading()


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_decisions_survive_a_restart_on_other_ranks(layout: str, tmp_path: Path) -> None:
    through = run_on_ranks(decisions_of, 2, str(tmp_path), layout, 8, False, timeout=200)[0]
    assert len(set(through)) > 3
    for ranks in (2, 1) if layout == "ddp" else (2,):
        resumed = run_on_ranks(decisions_of, ranks, str(tmp_path), layout, 8, True, timeout=200)
        for each in resumed:
            assert each == pytest.approx(through[4:], rel=1e-5)


@pytest.mark.ranks(1)
def test_states_that_do_not_fit(tmp_path: Path) -> None:

    path = tmp_path / "plain.ckpt"
    trained(tmp_path, "ddp", 2).trainer.save_checkpoint(path)
    with logged() as messages:
        trained(tmp_path, "ddp", 4, clip_with(REMEMBERS), ckpt_path=path)
    assert [message for message in messages if "no state of distclip" in message]
    callback = clip_with(REMEMBERS)
    module = trained(tmp_path, "ddp", 2, callback)
    module.trainer.save_checkpoint(path)  # after the fit
    other = clip_with(policies.autoclip(50, window=4))
    with pytest.raises(StateError, match="this state belongs to"):
        trained(tmp_path, "ddp", 4, other, ckpt_path=path, max_epochs=2)
    clippers = callback.state_dict()["clippers"]
    assert [state["step"] for state in clippers] == [2]
    trained(tmp_path, "ddp", 3, callback)  # a second fit goes on with the memory
    assert [state["step"] for state in callback.state_dict()["clippers"]] == [5]


@pytest.mark.ranks(1)
def test_a_tuner_restores_a_checkpoint_from_before_the_training(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import LearningRateFinder

    from tests.integrations.lightnings import module_of, package

    module = module_of(package("lightning.pytorch"), lambda net: sgd(net))
    module.lr = LR
    finder = LearningRateFinder(num_training_steps=4)
    callback = clip_with(REMEMBERS)
    with logged() as messages:
        trained(tmp_path, "ddp", 6, callback, finder, module=module, max_steps=2)
    assert not [message for message in messages if "no state of distclip" in message]
    assert [state["step"] for state in callback.state_dict()["clippers"]] == [2]
