"""``distclip.transformers.train_with_rewinds``: updates of spikes are as if they had never been."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import distclip
from distclip import ConfigurationError, LadderExhaustedError, policies

LADDER = policies.ladder(policies.skip_norm(1e3, clip_norm=0.4), 1, 0, 0)


def trainer_of(folder: Path, bad: Any = (), layout: str = "ddp", **options: Any) -> Any:
    """``bad``: updates whose loss is spoilt. Checkpoints after every second of 8 updates."""
    from tests.integrations import trainers

    class Spoilt(trainers.InOrder):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.append(self.state.global_step)
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * 1e5 if self.state.global_step in bad else loss

    given = {"updates": 8, "save_strategy": "steps", "save_steps": 2, **options}
    trainer = trainers.trainer_of(
        folder, layout, [distclip.transformers.ClipCallback(LADDER)], kind=Spoilt, **given
    )
    trainer.seen = []
    return trainer


def train(trainer: Any, **options: Any) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the Trainer and of torch, about CPU
        distclip.transformers.train_with_rewinds(trainer, **options)


@pytest.mark.ranks(2, timeout=180)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_the_weights_of_a_training_that_never_saw_them(layout: str, tmp_path: Path) -> None:
    """The first spike was clipped, and has spoilt the weights; the second asks to go back."""
    from tests.integrations.trainers import ROWS, weights_of
    from tests.integrations.trainers import train as plainly

    trainer = trainer_of(tmp_path / "bad", (2, 3, 5, 6), layout)
    train(trainer)
    assert trainer.state.global_step == 8
    left = [step for step in range(8) if step not in (2, 3, 5, 6)]
    other = trainer_of(tmp_path / "good", (), layout, updates=4, save_strategy="no")
    data = trainer.train_dataset
    other.train_dataset = [row for step in left for row in data[step * ROWS :][:ROWS]]
    plainly(other)
    found, want = weights_of(trainer), weights_of(other)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert trainer.accelerator._distclip is None  # detached
    assert "get_batch_samples" not in vars(trainer)


@pytest.mark.ranks(1)
def test_the_last_updates_the_budget_and_what_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "end", (2, 3), count=80)  # more than the 8 updates take
    train(trainer, left_out=(6, 7))
    assert (trainer.state.global_step, trainer.seen[-1]) == (8, 5)
    with pytest.raises(LadderExhaustedError):
        train(trainer_of(tmp_path / "all", range(2, 8), updates=9))
    with pytest.raises(ConfigurationError, match=r"has no checkpoint that was taken at clip 0 or"):
        train(trainer_of(tmp_path / "none", (0, 1)))
    uneven = trainer_of(tmp_path / "uneven", (2, 3), count=34, max_steps=-1, num_train_epochs=1)
    with pytest.raises(ConfigurationError, match="an epoch has 17 micro-batches, and an update 4"):
        train(uneven)
    trainer = trainer_of(tmp_path, ignore_data_skip=True)
    with pytest.raises(ConfigurationError, match="ignore_data_skip"):
        train(trainer)
    trainer.remove_callback(distclip.transformers.ClipCallback)
    with pytest.raises(ConfigurationError, match="has no ClipCallback"):
        train(trainer)
