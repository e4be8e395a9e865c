"""``distclip.lightning.fit_with_rewinds``: batches of spikes are as if they had never been."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

pytest.importorskip("lightning")

import distclip
from distclip import ConfigurationError, LadderExhaustedError, policies
from tests.helpers.logs import logged
from tests.integrations.accelerated import make, sgd

pytestmark = pytest.mark.filterwarnings("ignore")

LADDER = policies.ladder(policies.skip_norm(1e3, clip_norm=0.4), 1, 0, 0)
BATCHES, ROWS = 8, 4
"""Of an epoch: batches, and their rows on each rank."""
BAD = {(0, 2), (0, 3), (1, 3), (1, 4)}
"""Epoch and number. Of two in a row the first is clipped, and the second asks to go back."""


class Run:
    """Two epochs, shuffled; ``bad``: batches whose loss is spoilt."""

    def __init__(
        self,
        folder: Path,
        layout: str = "ddp",
        bad: Any = (),
        every: int = 2,
        loader: Any = None,
        policy: Any = LADDER,
        **options: Any,
    ) -> None:
        from lightning.pytorch.callbacks import ModelCheckpoint

        from tests.integrations.lightnings import package, trainer_of

        self.saver = ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1)
        callbacks = [distclip.lightning.ClipCallback(policy), *([self.saver] if every else [])]
        given = {"max_epochs": 2, "enable_checkpointing": bool(every), **options}
        pl = package("lightning.pytorch")
        self.trainer = trainer_of(folder, layout, callbacks, pl, **given)
        self.module = module(pl, bad)
        self.loader = loader_of() if loader is None else loader
        self.module.seen = self.seen = []

    def fit(self, **options: Any) -> list[str]:
        """The lines of the log about going back, which the first rank writes."""
        with logged("distclip.lightning") as lines:
            distclip.lightning.fit_with_rewinds(self.trainer, self.module, self.loader, **options)
        return [line for line in lines if "going back to" in line]

    def ends(self) -> dict[str, torch.Tensor]:
        """Weights, momenta and the learning rate."""
        from tests.integrations.lightnings import whole

        (optimizer,) = self.trainer.optimizers
        momenta = {
            f"momentum {n}": getattr(b := state["momentum_buffer"], "full_tensor", lambda b=b: b)()
            for n, state in enumerate(optimizer.state.values())
        }
        return whole(self.module) | momenta | {"lr": torch.tensor(optimizer.param_groups[0]["lr"])}


def module(pl: Any, bad: Any) -> Any:
    from torch.distributed.fsdp import FSDPModule

    from tests.integrations.lightnings import shard

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def configure_model(self) -> None:
            mesh = getattr(self, "_device_mesh", None)
            if mesh is not None and not isinstance(self.net, FSDPModule):
                shard(self.net, mesh)

        def training_step(self, x: Any, index: int) -> Any:
            self.seen.append((self.trainer.current_epoch, index))
            loss = (self.net(x) - x[:, :1] * 3).square().mean() * 0.1
            return loss * 1e7 if self.seen[-1] in bad else loss

        def configure_optimizers(self) -> Any:
            optimizer = sgd(self.net)
            rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": rates, "interval": "step"}]

    return Module()


def loader_of() -> Any:
    from tests.integrations.lightnings import world

    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(BATCHES * ROWS * world(), 5, generator=generator)
    rank = torch.distributed.get_rank() if world() > 1 else 0
    return DataLoader(rows, ROWS, sampler=DistributedSampler(rows, world(), rank, seed=3))


def without(folder: Path, layout: str, left_out: Any, **options: Any) -> dict[str, torch.Tensor]:
    """One epoch of the other batches of two, by ``fit`` alone."""
    loader, batches = loader_of(), []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches += [x for n, x in enumerate(loader) if (epoch, n) not in left_out]
    given = {"every": 0, "max_epochs": 1, **options}
    run = Run(folder, layout, loader=DataLoader(batches, batch_size=None), **given)
    run.trainer.fit(run.module, run.loader)
    return run.ends()


def equal(run: Run, want: dict[str, torch.Tensor]) -> None:
    found = run.ends()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.ranks(1, 2, timeout=180)
def test_the_weights_of_a_training_that_never_saw_them(tmp_path: Path) -> None:
    as_if_it_never_saw_them(tmp_path, "ddp")


@pytest.mark.ranks(2, timeout=180)
def test_and_under_fsdp2(tmp_path: Path) -> None:
    """Whose checkpoints are folders."""
    as_if_it_never_saw_them(tmp_path, "fsdp2")


def as_if_it_never_saw_them(tmp_path: Path, layout: str) -> None:
    """Twice back to the middle of an epoch, the second one in an order of its own."""
    run = Run(tmp_path, layout, BAD)
    backs = run.fit()
    if backs:
        assert "step=2.ckpt, taken before clip 2; left out from now on (epoch, batch)" in backs[0]
        assert "step=8.ckpt, taken before clip 8" in backs[1]
        assert str(sorted(BAD)) in backs[1]
        assert len(backs) == 2
    assert run.seen[:6] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 4)]
    assert run.trainer.global_step == 12
    equal(run, without(tmp_path / "good", layout, BAD))
    assert "run" not in vars(run.trainer.fit_loop.epoch_loop.automatic_optimization)
    assert getattr(run.trainer, "_distclip", None) is None


@pytest.mark.ranks(1)
@pytest.mark.parametrize("kind", ["accumulated", "scaled"])
def test_accumulated_and_scaled(kind: str, tmp_path: Path) -> None:
    """Batches are left out with all of their update."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Full(MixedPrecision):  # type: ignore[misc]
        """With a scaler, and without the rounding of half precision."""

        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    def options() -> dict[str, Any]:
        if kind == "accumulated":
            return {"accumulate_grad_batches": 2}
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return {"plugins": [Full("16-mixed", "cpu", scaler)]}

    bad = {(0, 5), (0, 6)} if kind == "accumulated" else {(0, 4), (0, 5)}
    run = Run(tmp_path, "ddp", bad, **options())
    scaler, unfinished = getattr(run.trainer.precision_plugin, "scaler", None), []
    if scaler is not None:
        run.module.on_train_start = lambda: unfinished.append(len(scaler._per_optimizer_states))
    assert len(run.fit(left_out={(1, 0)} if kind == "accumulated" else ())) == 1
    assert not any(unfinished)
    also = {(0, 4), (0, 7), (1, 0), (1, 1)} if kind == "accumulated" else set()
    left_out = bad | also
    equal(run, without(tmp_path / "good", "ddp", left_out, **options()))


@pytest.mark.ranks(1)
def test_what_was_taken_back_is_saved_anew_and_a_resumed_run_leaves_the_same_out(
    tmp_path: Path,
) -> None:
    """The second rewind is to a step of which the first has abandoned a checkpoint."""
    bad, policy = {(0, 4), (0, 6)}, policies.ladder(policies.skip_norm(1e3), 0, 0, 0, margin=1)
    run = Run(tmp_path, "ddp", bad, policy=policy)
    saved: list[int] = []
    run.module.on_save_checkpoint = lambda checkpoint: saved.append(checkpoint["global_step"])
    backs = run.fit()
    assert "taken before clip 2" in backs[0]
    assert "taken before clip 4" in backs[1]
    assert saved == [2, 4, 4, 6, 6, 8, 10, 12, 14]  # and not with a batch that is left out
    equal(run, want := without(tmp_path / "good", "ddp", bad, policy=policy))
    (middle,) = tmp_path.glob("epoch=1-step=8.ckpt")
    resumed = Run(tmp_path / "resumed", "ddp", bad, policy=policy, loader=Eager(loader_of()))
    assert resumed.fit(left_out=bad, ckpt_path=middle) == []
    assert resumed.seen[0] == (1, 2)
    equal(resumed, want)


class Eager:
    """A loader that reads its sampler when it is started, as one with workers does."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.sampler = loader, loader.sampler

    def __iter__(self) -> Any:
        return iter(list(self.loader))

    def __len__(self) -> int:
        return len(self.loader)


class Stateful:
    """A loader that finds its place by itself, and says so."""

    def __init__(self) -> None:
        self.rows, self.place = torch.randn(BATCHES, ROWS, 5), 0

    def __iter__(self) -> Any:
        while self.place < BATCHES:
            self.place += 1
            yield self.rows[self.place - 1]
        self.place = 0

    def __len__(self) -> int:
        return BATCHES

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


@pytest.mark.ranks(1)
def test_a_loader_with_a_state_is_at_its_place(tmp_path: Path) -> None:
    loader = Stateful()
    run = Run(tmp_path, "ddp", {(0, 4), (0, 5)}, loader=loader, max_epochs=1)
    assert len(run.fit()) == 1
    rows = [loader.rows[n] for n in (0, 1, 2, 3, 6, 7)]
    other = Run(tmp_path / "good", every=0, loader=DataLoader(rows, batch_size=None), max_epochs=1)
    other.trainer.fit(other.module, other.loader)
    equal(run, other.ends())


@pytest.mark.ranks(1)
def test_the_end_of_the_budget_and_what_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "all", "ddp", {(0, n) for n in range(2, 8)})
    with pytest.raises(LadderExhaustedError):
        run.fit()
    assert run.module.seen.count((0, 1)) == 1  # both times back to the checkpoint after it
    run = Run(tmp_path / "none", "ddp", {(0, 0), (0, 1)})
    with pytest.raises(ConfigurationError, match="none has no checkpoint that was taken at clip 0"):
        run.fit()
    rows = torch.randn(8, 5)
    for loader, message in (
        (DataLoader(rows, 4, shuffle=True), "RandomSampler draws a new order"),
        (DataLoader(Endless(), 4), "Endless is an IterableDataset without a length"),
        (iter_only(), "generator has neither a length nor a state_dict"),
        ([Stateful(), DataLoader(rows, 4)], "some of these loaders have a state_dict"),
    ):
        run = Run(tmp_path, loader=loader, limit_train_batches=1)
        with pytest.raises(ConfigurationError, match=message):
            run.fit()
        assert run.seen == []
    run = Run(tmp_path)
    run.module.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="with manual optimization"):
        run.fit()
    run.trainer.callbacks = [c for c in run.trainer.callbacks if c is not run.saver]
    with pytest.raises(ConfigurationError, match="saves no checkpoints"):
        run.fit()
    run.trainer.callbacks = [run.saver]
    with pytest.raises(ConfigurationError, match="has no ClipCallback"):
        run.fit()


@pytest.mark.ranks(1, 2)
def test_a_loop_of_fabric_goes_back_by_itself(tmp_path: Path) -> None:
    from distclip import RewindRequested
    from tests.integrations.lightnings import fabric_of, prepared, whole

    def ends(bad: Any, left_out: Any) -> dict[str, torch.Tensor]:
        callback = distclip.lightning.ClipCallback(LADDER)
        fabric = fabric_of("ddp", [callback])
        model, optimizer = prepared(fabric, "ddp")
        state = {"model": model, "optimizer": optimizer, "step": 0}
        batches, left_out, asked = list(loader_of()), set(left_out), 0
        while state["step"] < BATCHES:
            if state["step"] == 2 and not asked:
                fabric.save(tmp_path / "state", state)
            if (step := state["step"]) not in left_out:
                callback.handle.note(batch=step)
                optimizer.zero_grad()
                loss = model(batches[step]).square().mean()
                fabric.backward(loss * 1e7 if step in bad else loss)
                try:
                    optimizer.step()
                except RewindRequested as request:
                    asked, left_out = asked + 1, left_out | set(request.batches)
                    fabric.load(tmp_path / "state", state)
                    continue
            state["step"] += 1
        (clipper,) = callback.handle.memory()[1]
        assert clipper.rewinds == asked == bool(bad)
        return whole(model)

    found, want = ends({3, 4}, ()), ends((), {3, 4})
    assert all(torch.equal(found[name], want[name]) for name in want)


class Endless(torch.utils.data.IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(5)


def iter_only() -> Any:
    while True:
        yield torch.zeros(4, 5)
