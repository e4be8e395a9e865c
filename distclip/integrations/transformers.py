"""The Trainer of Hugging Face Transformers: one callback, or ``distclip run`` and none.

The Trainer clips through its ``Accelerator``, or leaves it to DeepSpeed; so does this, with the
integrations of those two. What is the Trainer's own is here: when its ``Accelerator`` or engine is
ready, where its checkpoints lie, and what part of a loss it gives to ``backward``. Only this file
imports ``transformers``.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import weakref
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from distclip.config import Config
from distclip.errors import ConfigurationError, DistclipError
from distclip.integrations import accelerate, deepspeed_json
from distclip.integrations.given import PolicyOrConfig
from distclip.integrations.patches import replace
from distclip.integrations.rewinding import Checkpoints, Rewinder
from distclip.monitor.tracking import metrics
from distclip.report import ClipReport

_logger = logging.getLogger("distclip.transformers")


class ClipCallback(TrainerCallback):
    """Let a policy do all the clipping of a ``Trainer``.

    ::

        trainer = Trainer(..., callbacks=[distclip.transformers.ClipCallback(policies.agc(0.01))])

    The policy takes the place of ``max_grad_norm``, whose value (1.0 unless it is set) is not used:
    the gradients of an update are clipped once. The Trainer's log shows the norm before clipping
    as ``grad_norm``, and beside it ``grad_norm_clipped``, ``clip_coefficient`` and the other names
    that trackers get. A step that the policy skips leaves weights, moments and scheduler alone. The
    policy's state lies in ``distclip.pt`` in each checkpoint, and is loaded with
    ``resume_from_checkpoint``; a checkpoint without that file gives a warning.

    A policy that reads the loss sees that of the whole update, averaged over the ranks.

    Args:
        policy_or_config: a policy, a configuration file or mapping. None: what ``distclip run`` was
            given, or the ``"distclip"`` section of the DeepSpeed JSON, in which ``"auto"`` is
            ``max_grad_norm``, or its ``"gradient_clipping"``.

    Raises:
        ConfigurationError: when training begins: a bad configuration, none, or two of them.
        DistclipError: when training begins: an engine in which distclip cannot clip.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> ClipCallback:
        """Watch the Trainers, in a process that only unpickles a callback too."""
        _watch_trainers()
        return super().__new__(cls)

    def __init__(self, policy_or_config: PolicyOrConfig | None = None) -> None:
        self.policy_or_config = policy_or_config
        self._handle: Any = None
        self._ours = False
        self._trainer: weakref.ref[Any] | None = None
        self._resume: Any = None

    @property
    def last_report(self) -> ClipReport | None:
        """The newest report; None before the first step."""
        return None if self._handle is None else self._handle.last_report

    def _begin(self, trainer: Any, resume_from_checkpoint: Any) -> None:
        """``trainer.train`` is about to start."""
        self._trainer = weakref.ref(trainer)
        self._resume = resume_from_checkpoint
        if trainer.is_deepspeed_enabled:
            for document in _documents(trainer):
                deepspeed_json.resolve_auto(document, trainer.args.max_grad_norm)
        # One norm per device mesh, and then a clip, that do not go through the Accelerator.
        trainer._has_mixed_mesh_grads = lambda model: False
        # Not `on_save`: the checkpoint upon SIGTERM comes without one.
        trainer.log = functools.partial(_log, self, weakref.ref(trainer))
        trainer._save_checkpoint = functools.partial(_save_checkpoint, self, weakref.ref(trainer))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach: the Accelerator has prepared everything, and the checkpoint has been loaded."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None:
            raise DistclipError(
                "ClipCallback: this training was not started by transformers.Trainer.train, by "
                "which it gets to know its Trainer; call distclip.accelerate.attach on the "
                "Trainer's accelerator, or distclip.deepspeed.attach on its engine"
            )
        self._attach(trainer)
        assert self._handle is not None
        if state.is_world_process_zero:
            self._handle.announced.add("transformers")  # no call of the Trainer is told of again
            _logger.warning(
                "the Trainer clips by %r; max_grad_norm=%s is not used",
                self._handle.config.policy,
                args.max_grad_norm,
            )
        # The losses that the Trainer gives to backward sum up to the update's.
        self._handle.loss_factor = lambda: getattr(
            trainer, "current_gradient_accumulation_steps", 1
        )
        folder = self._resume
        if folder is True:
            folder = get_last_checkpoint(args.output_dir)  # type: ignore[no-untyped-call]
        if folder:
            shelf, clippers = self._handle.memory()
            shelf.load(clippers, folder)

    def _attach(self, trainer: Any) -> None:
        engine = None
        if trainer.is_deepspeed_enabled:
            wrapped = trainer.accelerator.deepspeed_engine_wrapped
            engine = wrapped.engine if wrapped is not None else trainer.deepspeed
        place = trainer.accelerator if engine is None else engine
        there = getattr(place, "_distclip", None)
        if there is not None and (self.policy_or_config is None or there is self._handle):
            self._handle = there  # of `distclip run`, or of a training that an error has ended
            return
        if engine is not None:
            from distclip.integrations import deepspeed

            self._handle = deepspeed.attach(engine, self.policy_or_config)
            for accelerated in trainer.accelerator._optimizers:
                # Asked before stage 0's optimizer, a plain one, was told of skips.
                accelerated.__has_overflow__ = True
        elif self.policy_or_config is None:
            raise ConfigurationError(
                "ClipCallback(): no policy, and neither `distclip run` nor DeepSpeed's JSON gives "
                "one; write ClipCallback(policies.agc(0.01)) or ClipCallback('policy.yaml')"
            )
        else:
            self._handle = accelerate.attach(trainer.accelerator, self.policy_or_config)
        self._ours = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach, if it was the callback that attached."""
        if self._ours and self._handle is not None:
            self._handle.remove()
            self._ours = False
        trainer = None if self._trainer is None else self._trainer()
        if trainer is not None:
            for name in ("_has_mixed_mesh_grads", "_save_checkpoint", "log"):
                trainer.__dict__.pop(name, None)

    def _save(self, folder: str) -> None:
        """Write the policy's state into a checkpoint. On one rank only."""
        if self._handle is not None:
            shelf, clippers = self._handle.memory()
            shelf.save(clippers, folder)


def train_with_rewinds(
    trainer: Any,
    *,
    left_out: Iterable[int] = (),
    resume_from_checkpoint: Any = None,
    **options: Any,
) -> Any:
    """``trainer.train``, which goes back when a :func:`~distclip.policies.ladder` asks to.

    ::

        trainer = Trainer(..., callbacks=[distclip.transformers.ClipCallback(ladder)])
        distclip.transformers.train_with_rewinds(trainer)

    The loop is the Trainer's, which ends with any error, and so this is a function around
    ``train``: upon a :exc:`~distclip.RewindRequested` it calls ``train`` again with the newest
    checkpoint in ``args.output_dir`` that was taken at the step of the error or before. The
    updates of the spikes, each with all its micro-batches, are left out from then on. As a skipped
    update does, each counts in ``global_step``, and moves neither weights nor schedule. The number
    of rewinds made is not loaded; the ladder's budget ends a training that does not get better.

    Args:
        trainer: with a :class:`ClipCallback`; single process, DDP or FSDP2. It saves checkpoints.
        left_out: ``global_step`` of updates to leave out from the start: for a training that is
            resumed in another process those that the log of the first has named.
        resume_from_checkpoint: as for ``train``.
        options: others of ``train``.

    Returns:
        What ``train`` returns.

    Raises:
        ConfigurationError: no ``ClipCallback``, DeepSpeed, ``ignore_data_skip``. Later: no
            checkpoint to go back to, or epochs whose last update has fewer micro-batches.
    """
    callback = _rewindable(trainer)
    rewinder = Rewinder(Checkpoints(trainer.args.output_dir), left_out, int, "global_step", _logger)

    def train(checkpoint: Any) -> Any:
        return trainer.train(resume_from_checkpoint=checkpoint, **options)

    def interrupted() -> None:
        callback._handle.keep_rewinds()
        callback._handle.drop_step()
        trainer.model_wrapped = trainer.model  # to be prepared anew

    leave_out = functools.partial(_leave_out, trainer, callback, rewinder.left_out)
    undo = replace(trainer, "get_batch_samples", leave_out)
    try:
        return rewinder.repeat(train, resume_from_checkpoint, interrupted)
    finally:
        undo()


def _leave_out(
    trainer: Any,
    callback: ClipCallback,
    left_out: set[int],
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The micro-batches of the update to come; none where it is left out."""
    batches, items = original(*args, **kwargs)
    state = trainer.state
    if state.global_step not in left_out or not batches:
        callback._handle.note(state.global_step)
        return batches, items
    _refuse_remainder(trainer)
    state.global_step += 1
    if state.global_step >= state.max_steps:
        trainer.control.should_training_stop = True
    return [], None


def _rewindable(trainer: Any) -> ClipCallback:
    """The callback of a Trainer that can go back.

    Raises:
        ConfigurationError: there is none, or the Trainer cannot.
    """
    callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, ClipCallback)]
    if not callbacks:
        raise ConfigurationError(
            "train_with_rewinds: this Trainer has no ClipCallback; give it "
            "callbacks=[distclip.transformers.ClipCallback(policies.ladder(...))]"
        )
    if trainer.is_deepspeed_enabled:
        raise ConfigurationError(
            "train_with_rewinds: not under DeepSpeed; catch RewindRequested around trainer.train, "
            "and start again from an older checkpoint"
        )
    if trainer.args.ignore_data_skip:
        raise ConfigurationError(
            "train_with_rewinds: with ignore_data_skip=True a training that goes back sees other "
            "batches, so that none can be left out; set it to False"
        )
    return callbacks[0]


def _refuse_remainder(trainer: Any) -> None:
    """The Trainer would not step at the end of an epoch that has lost an update."""
    micro, loader = (
        trainer.args.gradient_accumulation_steps,
        trainer.callback_handler.train_dataloader,
    )
    if micro > 1 and hasattr(loader, "__len__") and len(loader) % micro:
        raise ConfigurationError(
            f"train_with_rewinds: an epoch has {len(loader)} micro-batches, and an update "
            f"{micro}, so that the last one is smaller; drop the rest of the data, or use another "
            f"gradient_accumulation_steps"
        )


def _save_checkpoint(
    callback: ClipCallback, trainer: weakref.ref[Any], model: Any, trial: Any
) -> None:
    """The Trainer's checkpoint, and the policy's state in its folder."""
    saving = trainer()
    assert saving is not None  # it is calling
    type(saving)._save_checkpoint(saving, model, trial)
    if saving.args.should_save:
        name = f"{PREFIX_CHECKPOINT_DIR}-{saving.state.global_step}"
        folder = os.path.join(saving._get_output_dir(trial=trial), name)
        callback._save(folder)


def _log(
    callback: ClipCallback, trainer: weakref.ref[Any], logs: dict[str, Any], *more: Any
) -> None:
    """The Trainer's log; in that of training, what the newest clip did."""
    training = trainer()
    assert training is not None  # it is calling
    report = callback.last_report
    if report is not None and "loss" in logs:
        logs.update({**metrics(report.to_dict(per_parameter=False)), **logs})
    type(training).log(training, logs, *more)


def _documents(trainer: Any) -> list[dict[str, Any]]:
    """The DeepSpeed JSON as the Trainer and as Accelerate hold it."""
    holders = (
        getattr(trainer.args, "hf_deepspeed_config", None),
        getattr(trainer.accelerator.state.deepspeed_plugin, "hf_ds_config", None),
    )
    return [holder.config for holder in holders if holder is not None]


def enable(module: ModuleType, config: Config | None) -> None:
    """Give every ``Trainer`` of this process a callback: what ``distclip run`` does.

    The policy itself is put on by the integrations of Accelerate and DeepSpeed.
    """
    global _everywhere
    _everywhere = True
    _watch_trainers()


_everywhere = False
"""Whether every Trainer of this process gets a callback: under ``distclip run``."""


@functools.cache
def _watch_trainers() -> None:
    """Have ``Trainer.train`` say which Trainer begins: a callback gets to know all else."""
    replace(Trainer, "train", _train)


def _train(original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
    callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, ClipCallback)]
    if len(callbacks) > 1:
        raise ConfigurationError(
            f"this Trainer has {len(callbacks)} ClipCallbacks; leave one, and compose policies "
            f"with policies.chain(...)"
        )
    if not callbacks and _everywhere:
        callbacks = [ClipCallback()]
        trainer.add_callback(callbacks[0])
    if callbacks:
        given = inspect.signature(original).bind(trainer, *args, **kwargs).arguments
        callbacks[0]._begin(trainer, given.get("resume_from_checkpoint"))
    return original(trainer, *args, **kwargs)
