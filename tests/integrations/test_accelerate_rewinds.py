"""``distclip.accelerate.Rewinds``: bad batches are as if they had never been."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import distclip
from distclip import ConfigurationError, LadderExhaustedError, policies
from tests.helpers.ranks import everyones
from tests.integrations.accelerated import make, sgd, start, whole

pytest.importorskip("accelerate")
LADDER = policies.ladder(policies.skip_norm(1e4), skips=1, recomputes=0, rewinds=2)
BATCHES, ROWS = 8, 4
"""Of an epoch: batches, and their rows on each rank."""


class Run:
    """Two epochs, shuffled; ``bad``: epoch and number of batches whose loss is spoilt."""

    def __init__(
        self, layout: str, bad: Any = (), scaled: bool = False, seeded: bool = True,
        policy: Any = LADDER, **options: Any,
    ) -> None:  # fmt: skip
        from accelerate.utils import DataLoaderConfiguration

        order = DataLoaderConfiguration(use_seedable_sampler=seeded, data_seed=3)
        if scaled:
            options["mixed_precision"] = "fp16"
        self.accelerator = start(layout, dataloader_config=order, **options)
        if scaled:  # which Accelerate itself makes on a GPU alone
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.handle = distclip.accelerate.attach(self.accelerator, policy)
        model = make()
        count = BATCHES * ROWS * dist.get_world_size()
        rows = torch.randn(count, 5, generator=torch.Generator().manual_seed(7))
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, sgd(model), DataLoader(rows, batch_size=ROWS, shuffle=True)
        )
        self.accelerator.native_amp = scaled
        self.bad, self.seen = set(bad), []

    def rewinds(self, folder: Path) -> Any:
        return distclip.accelerate.Rewinds(self.accelerator, self.loader, folder, epochs=2)

    def train(self, rewinds: Any, folder: Path, every: int = 3) -> None:
        for x in rewinds:
            number = rewinds.epoch, rewinds._next
            self.seen.append(number)
            with rewinds.step():
                self.step(x, number in self.bad)
            if rewinds.steps % every == 0:
                self.accelerator.save_state(str(folder / f"{rewinds.steps}"))

    def step(self, x: Any, bad: bool) -> None:
        with self.accelerator.accumulate(self.model):
            loss = (self.model(x) - x[:, :1] * 3).square().mean() * 0.1
            self.accelerator.backward(loss * 1e7 if bad else loss)
            self.optimizer.step()
            self.optimizer.zero_grad()


def without(layout: str, bad: Any, **options: Any) -> Run:
    """A plain loop that never sees these batches."""
    run = Run(layout, **options)
    for epoch in range(2):
        for number, x in enumerate(run.loader):
            if (epoch, number) not in bad:
                run.step(x, False)
    return run


def equal(run: Run, other: Run) -> None:
    found, want = whole(run.model), whole(other.model)
    assert all(torch.equal(found[name], want[name]) for name in want)
    moments = [
        [state["momentum_buffer"] for state in each.optimizer.state.values()]
        for each in (run, other)
    ]
    for mine, theirs in zip(*moments, strict=True):
        assert bool((mine == theirs).all())
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.ranks(2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_the_weights_of_a_run_that_never_saw_them(layout: str, tmp_path: Path) -> None:
    """Two rewinds in two epochs; the first to before there was a clipper."""
    bad = {(0, 1), (0, 2), (1, 3), (1, 4)}
    run = Run(layout, bad)
    rewinds = run.rewinds(tmp_path)
    run.accelerator.save_state(str(tmp_path / "0"))
    run.train(rewinds, tmp_path)
    assert rewinds.left_out == bad
    (clipper,) = run.handle.memory()[1]
    assert clipper.rewinds == 2
    assert run.seen[:5] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 0)]  # the fourth asked to go back
    assert all(each == run.seen for each in everyones(run.seen))
    equal(run, without(layout, bad))
    assert len(run.accelerator.gradient_state.dataloader_references) == 1  # none but no loader


@pytest.mark.ranks(1)
@pytest.mark.parametrize("options", [{"scaled": True}, {"gradient_accumulation_steps": 2}])
def test_scaled_and_accumulated(options: Any, tmp_path: Path) -> None:
    """Micro-batches are left out with their update."""
    run = Run("ddp", {(0, 4), (0, 6)} if "scaled" not in options else {(0, 4), (0, 5)}, **options)
    rewinds = run.rewinds(tmp_path)
    run.train(rewinds, tmp_path, every=2)
    left_out = {(0, n) for n in ((4, 5) if "scaled" in options else (4, 5, 6, 7))}
    assert rewinds.left_out == left_out
    equal(run, without("ddp", left_out, **options))


@pytest.mark.ranks(1)
def test_a_resumed_run_goes_on_and_leaves_the_same_out(tmp_path: Path) -> None:
    bad = {(0, 4), (0, 5)}
    run = Run("ddp", bad)
    run.train(run.rewinds(tmp_path), tmp_path, every=1)
    resumed = Run("ddp", bad)
    rewinds = resumed.rewinds(tmp_path)
    resumed.accelerator.load_state(str(tmp_path / "9"))
    assert (rewinds.steps, rewinds.epoch, rewinds.left_out) == (9, 1, bad)
    resumed.train(rewinds, tmp_path / "other")
    assert resumed.seen == run.seen[-5:]
    equal(resumed, run)


@pytest.mark.ranks(1)
def test_a_loader_that_is_left_early_is_closed(tmp_path: Path) -> None:
    """Accelerate takes the loader that was opened last and not closed for the one that is read."""
    run = Run("ddp", {(0, 4), (0, 5)})
    rewinds = run.rewinds(tmp_path)
    for x in rewinds:
        loaders = run.accelerator.gradient_state.dataloader_references
        assert len(loaders) == 2  # none, and the one that is read
        number = rewinds.epoch, rewinds._next
        with rewinds.step():
            run.step(x, number in run.bad)
        if rewinds.steps == 3:
            run.accelerator.save_state(str(tmp_path / "3"))
    assert rewinds.left_out == run.bad


@pytest.mark.ranks(1)
def test_what_was_taken_back_is_not_loaded(tmp_path: Path) -> None:
    """The second rewind is to a clip of which the first try has left a spoilt checkpoint."""
    policy = policies.ladder(policies.skip_norm(1e4, clip_norm=1.0), 1, 0, 0)
    run = Run("ddp", {(0, 2), (0, 3), (0, 6), (0, 7)}, policy=policy)
    rewinds = run.rewinds(tmp_path)
    run.accelerator.save_state(str(tmp_path / "0"))
    for x in rewinds:
        number = rewinds.epoch, rewinds._next
        with rewinds.step():
            run.step(x, number in run.bad)
        if rewinds.steps == 3 and not (tmp_path / "3").exists():  # after a clipped spike
            run.accelerator.save_state(str(tmp_path / "3"))
    assert rewinds.left_out == run.bad
    equal(run, without("ddp", run.bad, policy=policy))


@pytest.mark.ranks(2)
def test_the_end_of_the_budget_and_no_checkpoint(tmp_path: Path) -> None:
    run = Run("ddp", {(0, n) for n in range(7)})
    rewinds = run.rewinds(tmp_path)
    run.accelerator.save_state(str(tmp_path / "0"))
    with pytest.raises(LadderExhaustedError):
        run.train(rewinds, tmp_path, every=99)
    run = Run("ddp", {(0, 2), (0, 3)})
    empty = tmp_path / "nothing here"
    with pytest.raises(ConfigurationError, match="no checkpoint that was taken at clip 2 or"):
        run.train(run.rewinds(empty), tmp_path / "elsewhere", every=99)


@pytest.mark.ranks(1)
def test_refused(tmp_path: Path) -> None:
    make_rewinds = distclip.accelerate.Rewinds
    run = Run("ddp")
    with pytest.raises(ConfigurationError, match="epochs must be a whole number"):
        make_rewinds(run.accelerator, run.loader, tmp_path, epochs=0)
    with pytest.raises(ConfigurationError, match="no loader of Accelerate"):
        make_rewinds(run.accelerator, DataLoader([1]), tmp_path)
    with pytest.raises(
        ConfigurationError, match="no step, or several, were made of batch 0 of epoch 0"
    ):
        for _ in run.rewinds(tmp_path):
            pass
    run.handle.remove()
    with pytest.raises(ConfigurationError, match="has no policy"):
        run.rewinds(tmp_path)
    run = Run("ddp", seeded=False)
    with pytest.raises(ConfigurationError, match="shuffles anew each time"):
        run.rewinds(tmp_path)
