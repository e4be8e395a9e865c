"""Going back under Lightning: fit again from the checkpoint before a spike, without its batches.

Lightning continues an epoch that a checkpoint was taken in by its count of batches, and reads a
``DataLoader`` from its beginning for it. So the batches before that place are passed over here.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from distclip.errors import ConfigurationError
from distclip.integrations.lightning_attachments import CHECKPOINT_KEY
from distclip.integrations.lightning_callback import ClipCallback
from distclip.integrations.patches import replace
from distclip.integrations.rewinding import Checkpoints, Rewinder

_logger = logging.getLogger("distclip.lightning")

Place = tuple[int, int]
"""Of a batch: epoch and number, both from 0."""

META = "meta.pt"
"""In the folder of a sharded checkpoint, all but its tensors."""

_NOT_RESUMABLE = "You're resuming from a checkpoint that ended before the epoch ended"


def fit_with_rewinds(
    trainer: Any,
    model: Any,
    *data: Any,
    left_out: Iterable[Place] = (),
    folder: str | os.PathLike[str] | None = None,
    ckpt_path: Any = None,
    **options: Any,
) -> None:
    """``trainer.fit``, which goes back when a :func:`~distclip.policies.ladder` asks to.

    ::

        often = ModelCheckpoint(every_n_train_steps=500, save_top_k=-1)
        trainer = Trainer(..., callbacks=[distclip.lightning.ClipCallback(ladder), often])
        distclip.lightning.fit_with_rewinds(trainer, module, loader)

    The loop is the Trainer's, which ends with any error, and so this is a function around ``fit``:
    upon a :exc:`~distclip.RewindRequested` it calls ``fit`` again with the newest checkpoint that
    was taken at the step of the error or before. The batches of the spikes, each with all that are
    accumulated to one update with it, are left out from then on: they are read, and neither
    ``training_step`` nor an optimizer is called; schedulers that count steps do not count them, and
    neither does ``global_step``. The number of rewinds made is not loaded; the ladder's budget ends
    a training that does not get better.

    Where ``fit`` begins in the middle of an epoch, the batches before that place are read and
    dropped, which Lightning alone does not do, unless the loader has a ``state_dict``.

    Args:
        trainer: with a :class:`ClipCallback`, and checkpoints with optimizer states, saved between
            updates; single process, DDP or FSDP2 (``ModelParallelStrategy``), whose
            ``configure_model`` is called again and has to leave alone what it has sharded.
        model: as for ``fit``, with automatic optimization and one optimizer.
        data: ``train_dataloaders`` and so on, as for ``fit``. The order of the batches has to
            follow from the epoch alone: no shuffling but by a sampler with ``set_epoch``.
        left_out: epoch and number of batches to leave out from the start: for a training that is
            resumed in another process those that the log of the first has named.
        folder: where the checkpoints lie, on a file system that all ranks share. None: where the
            Trainer's ``ModelCheckpoint`` callbacks save them.
        ckpt_path: as for ``fit``.
        options: others of ``fit``.

    Raises:
        ConfigurationError: no ``ClipCallback``, no checkpoints, DeepSpeed, processes that Lightning
            spawns, ``left_out`` with other than pairs. When training begins: manual optimization,
            several optimizers, a ``training_step`` that takes the iterator, data whose order is not
            fixed. Later: no checkpoint to go back to.
    """
    callback = _rewindable(trainer, folder)
    checkpoints = LightningCheckpoints(trainer, folder)
    places = (tuple(each) if isinstance(each, list) else each for each in left_out)
    rewinder = Rewinder(checkpoints, places, tuple, "epoch, batch", _logger)
    loop = trainer.fit_loop.epoch_loop

    def fit(checkpoint: Any) -> None:
        trainer.fit(model, *data, ckpt_path=checkpoint, **options)

    def interrupted() -> None:
        callback._rewinds = callback.handle.keep_rewinds()
        _drop_step(trainer, model)

    changes: list[tuple[Any, str, Callable[..., Any]]] = [
        (loop, "reset", _reset),
        (loop, "on_run_start", functools.partial(_begin_epoch, trainer)),
        (
            loop.automatic_optimization,
            "run",
            functools.partial(_make_step, trainer, callback, rewinder.left_out),
        ),
    ]
    undo = [replace(*change) for change in changes]
    try:
        rewinder.repeat(fit, ckpt_path, interrupted)
    finally:
        callback._rewinds = 0
        for restore in undo:
            restore()


class LightningCheckpoints(Checkpoints):
    """Files or folders ``*.ckpt``, as ``ModelCheckpoint`` saves them."""

    def __init__(self, trainer: Any, folder: str | os.PathLike[str] | None) -> None:
        super().__init__("" if folder is None else folder)
        self._savers = trainer.checkpoint_callbacks if folder is None else []

    def _folders(self) -> list[Path]:
        if not self._savers:
            return [self._folder]
        paths = (getattr(saver, "dirpath", None) for saver in self._savers)
        return [Path(path) for path in dict.fromkeys(paths) if path is not None]

    def _where(self) -> str:
        return ", ".join(map(str, self._folders())) or "no folder"

    def _files(self) -> Iterator[tuple[str, Path]]:
        for folder in self._folders():
            for path in sorted(folder.glob("*.ckpt")):
                file = path / META if path.is_dir() else path
                if file.exists():
                    yield str(path), file

    def _load(self, file: Path) -> Any:
        # As Lightning loads its own checkpoints, which hold objects of the script.
        loaded = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
        return loaded.get("callbacks", {}).get(CHECKPOINT_KEY)


def _rewindable(trainer: Any, folder: Any) -> Any:
    """The callback of a Trainer that can go back.

    Raises:
        ConfigurationError: there is none, or the Trainer cannot.
    """
    callbacks = [each for each in trainer.callbacks if isinstance(each, ClipCallback)]
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    launcher = {kind.__name__ for kind in type(trainer.strategy.launcher).__mro__}
    if not callbacks:
        raise ConfigurationError(
            "fit_with_rewinds: this Trainer has no ClipCallback; give it "
            "callbacks=[distclip.lightning.ClipCallback(policies.ladder(...)), ...]"
        )
    if folder is None and not trainer.checkpoint_callbacks:
        raise ConfigurationError(
            "fit_with_rewinds: this Trainer saves no checkpoints; give it "
            "callbacks=[..., ModelCheckpoint(every_n_train_steps=..., save_top_k=-1)], or say by "
            "folder= where the script saves them"
        )
    if "DeepSpeedStrategy" in kinds:
        raise ConfigurationError(
            "fit_with_rewinds: not under DeepSpeed; catch RewindRequested around trainer.fit, and "
            "start again from an older checkpoint"
        )
    if "_MultiProcessingLauncher" in launcher:
        raise ConfigurationError(
            "fit_with_rewinds: this strategy trains in processes that end with their first error; "
            "use strategy='ddp', or torchrun"
        )
    return callbacks[-1]


def _drop_step(trainer: Any, model: Any) -> None:
    """Drop what a fit that has ended early would leave for the next."""
    for parameter in model.parameters():
        parameter.grad = None
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        scaler.update(scaler.get_scale())  # or the next unscaling would be refused


def _count_as_saved(trainer: Any) -> None:
    """By a ``ModelCheckpoint``, which saves no step twice: this step, and none taken back."""
    for saver in trainer.checkpoint_callbacks:
        if hasattr(saver, "_last_global_step_saved"):
            saver._last_global_step_saved = trainer.global_step


def _reset(original: Callable[..., Any], *args: Any) -> Any:
    """Before an epoch. Lightning warns of data that it would read from its beginning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _NOT_RESUMABLE)
        return original(*args)


def _begin_epoch(trainer: Any, original: Callable[..., Any], fetcher: Any) -> None:
    """Before the first batch of an epoch, or of the rest of one: go to its place in the data."""
    loop = trainer.fit_loop.epoch_loop
    loaders = trainer.fit_loop._combined_loader.flattened
    _check_trainer(trainer, fetcher, loaders)
    _count_as_saved(trainer)
    original(fetcher)
    first = loop.batch_progress.current.ready
    if first and not any(hasattr(loader, "load_state_dict") for loader in loaders):
        iter(fetcher)  # the samplers know their epoch only now
        for _ in range(first):
            next(fetcher.iterator)
        fetcher.fetched = first


def _make_step(
    trainer: Any,
    callback: Any,
    left_out: set[Place],
    original: Callable[..., Any],
    optimizer: Any,
    batch_idx: int,
    kwargs: Any,
) -> Any:
    """What is made of a batch: nothing, if its update is left out."""
    epoch, together = trainer.current_epoch, trainer.accumulate_grad_batches
    first = batch_idx - batch_idx % together
    if not left_out.isdisjoint((epoch, number) for number in range(first, first + together)):
        callback.handle.leave_out_batch()
        return {}
    callback.handle.note((epoch, batch_idx))
    return original(optimizer, batch_idx, kwargs)


def _check_trainer(trainer: Any, fetcher: Any, loaders: list[Any]) -> None:
    """Refuse what a training could not be repeated with, before its first step.

    Raises:
        ConfigurationError: what it is, and what to do.
    """
    if not trainer.lightning_module.automatic_optimization:
        raise ConfigurationError(
            "fit_with_rewinds: with manual optimization a batch may be several updates or none, so "
            "that it cannot be left out; use automatic optimization, or catch RewindRequested"
        )
    if len(trainer.optimizers) != 1:
        raise ConfigurationError(
            f"fit_with_rewinds: {len(trainer.optimizers)} optimizers, each with norms and a ladder "
            f"of its own, and a rewind is for one; use one optimizer with parameter groups"
        )
    if "_DataLoaderIterDataFetcher" in {kind.__name__ for kind in type(fetcher).__mro__}:
        raise ConfigurationError(
            "fit_with_rewinds: training_step takes the iterator and reads its batches itself, so "
            "that none can be left out; let it take a batch"
        )
    for loader in loaders:
        _check_order(loader)
    if len({hasattr(loader, "load_state_dict") for loader in loaders}) > 1:
        raise ConfigurationError(
            "fit_with_rewinds: some of these loaders have a state_dict and some have not, and only "
            "the former would be at their place after a rewind; give all of them one, or none"
        )


def _check_order(loader: Any) -> None:
    """Refuse data whose order does not follow from the epoch."""
    if hasattr(loader, "load_state_dict"):
        return  # a checkpoint has its place
    if not isinstance(loader, DataLoader):
        if not hasattr(loader, "__len__"):
            raise ConfigurationError(
                f"fit_with_rewinds: {type(loader).__name__} has neither a length nor a state_dict, "
                f"so that its batches have no place to go back to; give a DataLoader of a dataset "
                f"with a length, or a loader with state_dict and load_state_dict"
            )
        return
    if isinstance(loader.dataset, IterableDataset) and not hasattr(loader.dataset, "__len__"):
        raise ConfigurationError(
            f"fit_with_rewinds: {type(loader.dataset).__name__} is an IterableDataset without a "
            f"length, and its loader has no state_dict, so that its batches have no place to go "
            f"back to; give it a __len__ if it yields the same in each epoch, or use a loader with "
            f"state_dict and load_state_dict, such as torchdata's StatefulDataLoader"
        )
    sampler = loader.sampler
    if isinstance(loader.batch_sampler, BatchSampler):
        sampler = loader.batch_sampler.sampler
    random = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    if isinstance(sampler, random) and not hasattr(sampler, "set_epoch"):
        raise ConfigurationError(
            f"fit_with_rewinds: {type(sampler).__name__} draws a new order each time it is "
            f"started, so that a batch has no place to be left out by; use a sampler with "
            f"set_epoch, such as DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True)"
        )
