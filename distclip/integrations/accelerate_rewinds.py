"""Going back under Accelerate: the last checkpoint before a spike, without the batches of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import RandomSampler

from distclip.errors import ConfigurationError, RewindRequested
from distclip.integrations.rewinding import Checkpoints, Rewinder

_logger = logging.getLogger("distclip.accelerate")


class Rewinds:
    """The batches of a training that goes back when a :func:`~distclip.policies.ladder` asks to.

    ::

        distclip.accelerate.attach(accelerator, policies.ladder(policies.skip_spikes()))
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        rewinds = distclip.accelerate.Rewinds(accelerator, loader, "checkpoints", epochs=3)
        for batch in rewinds:
            with rewinds.step():
                accelerator.backward(model(batch).mean())
                optimizer.step()
                optimizer.zero_grad()
            if rewinds.steps % 500 == 0:
                accelerator.save_state(f"checkpoints/{rewinds.steps}")

    The loop stays the script's own, so this is an iterator and not a function that trains. When
    ``step()`` meets a :exc:`~distclip.RewindRequested`, it keeps it to itself, and the next batch
    comes after the newest checkpoint that was taken at its step or before: gradients are dropped,
    ``accelerator.load_state`` loads it, and the batches of the spikes are left out from then on, by
    their place in their epoch, the same on every rank. Where to go on lies in the checkpoint too
    (``register_for_checkpointing``), so that ``accelerator.load_state`` before the loop resumes a
    run. The number of rewinds made is not loaded; the ladder's budget ends a run that does not get
    better.

    Save after an update, and outside of ``step()``. Nothing is deleted here.

    Args:
        accelerator: with a policy on it, by :func:`attach`, that clips all parameters together.
        loader: that ``accelerator.prepare`` gave. Its order must follow from the epoch alone: no
            shuffling, or ``DataLoaderConfiguration(use_seedable_sampler=True)``.
        folder: whose subfolders are this run's checkpoints, as ``save_state`` makes them; on a file
            system that all ranks share.
        epochs: how often to go through the loader, >= 1.

    Attributes:
        epoch: that of the batch, from 0.
        steps: ``step()`` blocks that have ended, less those taken back.
        left_out: epoch and number of each batch that is left out, both from 0.

    Raises:
        ConfigurationError: arguments outside of these; while iterating: a batch that no
            ``step()`` was made of, or no checkpoint to go back to (every rank raises).
    """

    def __init__(
        self, accelerator: Any, loader: Any, folder: str | os.PathLike[str], *, epochs: int = 1
    ) -> None:
        self._attachment: Any = getattr(accelerator, "_distclip", None)
        if self._attachment is None:
            raise ConfigurationError(
                "Rewinds: this Accelerator has no policy; call distclip.accelerate.attach first"
            )
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ConfigurationError(f"Rewinds: epochs must be a whole number >= 1, got {epochs!r}")
        _check_loader(accelerator, loader)
        self._accelerator, self._loader = accelerator, loader
        self._epochs = epochs
        self.epoch = self.steps = 0
        self._next = 0
        """Number of the next batch in this epoch."""
        self._rewinder = Rewinder(Checkpoints(folder), (), tuple, "epoch, batch", _logger)
        self.left_out: set[tuple[int, int]] = self._rewinder.left_out
        self._asked: RewindRequested | None = None
        accelerator.register_for_checkpointing(self)

    def __iter__(self) -> Iterator[Any]:
        while self.epoch < self._epochs:
            self._loader.set_epoch(self.epoch)
            source = self._loader
            if self._next:
                source = self._accelerator.skip_first_batches(source, self._next)
            for number, batch in enumerate(source, self._next):
                if (self.epoch, number) not in self.left_out:
                    self._attachment.note((self.epoch, number))
                    yield batch
                    if self._asked is not None:
                        source.end()
                        self._go_back(self._asked)
                        break
                    if self._next != number + 1:
                        raise ConfigurationError(
                            f"Rewinds: no step, or several, were made of batch {number} of epoch "
                            f"{self.epoch}; make one in `with rewinds.step():`"
                        )
                self._next = number + 1
            else:
                self.epoch, self._next = self.epoch + 1, 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Forward, backward and optimizer step of one batch: a request to go back ends in here."""
        try:
            yield
        except RewindRequested as asked:
            self._asked = asked
        self._next += 1
        self.steps += 1

    def _go_back(self, asked: RewindRequested) -> None:
        self._asked = None
        folder, at = self._rewinder.go_back(asked)
        self._attachment.keep_rewinds()
        self._attachment.drop_step()
        if at == 0:  # there was no clipper yet, and nothing of it is in the checkpoint
            self._attachment.begin_anew()
        self._accelerator.load_state(folder)

    def state_dict(self) -> dict[str, Any]:
        """Where this is, for ``accelerator.save_state``: plain values."""
        return {
            "epoch": self.epoch,
            "next": self._next,
            "steps": self.steps,
            "left_out": sorted(self.left_out),
            "abandoned": self._rewinder.checkpoints.abandoned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. What has been left out since stays so."""
        self.epoch, self._next, self.steps = state["epoch"], state["next"], state["steps"]
        self.left_out.update(map(tuple, state["left_out"]))
        self._rewinder.checkpoints.abandoned |= state["abandoned"]


def _check_loader(accelerator: Any, loader: Any) -> None:
    """Refuse a loader whose batches have no fixed place."""
    if not hasattr(loader, "set_epoch") or not hasattr(loader, "end"):
        raise ConfigurationError(
            f"Rewinds: {type(loader).__name__} is no loader of Accelerate; give the one that "
            f"accelerator.prepare(loader) returned"
        )
    if getattr(accelerator, "use_stateful_dataloader", False):
        raise ConfigurationError(
            "Rewinds: a stateful DataLoader finds its place by itself, and batches would be left "
            "out twice; leave use_stateful_dataloader off"
        )
    sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    if isinstance(sampler, RandomSampler) and not hasattr(sampler, "set_epoch"):
        raise ConfigurationError(
            "Rewinds: this loader shuffles anew each time it is started, so that a batch has no "
            "place to be left out by; use "
            "Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))"
        )
