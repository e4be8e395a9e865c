"""Lightning and Fabric: one callback, or ``distclip run`` and none.

Serves the packages ``lightning`` and ``pytorch_lightning`` (with ``lightning_fabric``), whichever
the script imports. Under DeepSpeed the engine gets the policy.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from distclip.common.environment import CONFIG_VARIABLE
from distclip.config import Config, load
from distclip.errors import ConfigurationError
from distclip.integrations.attachment import Attachment
from distclip.integrations.checkpoints import Shelf
from distclip.integrations.given import PolicyOrConfig, config_of
from distclip.integrations.lightning_attachments import (
    CHECKPOINT_KEY,
    FabricAttachment,
    LightningAttachment,
    TrainerAttachment,
)
from distclip.integrations.patches import replace
from distclip.monitor.tracking import tensors
from distclip.report import ClipReport

PACKAGES = ("lightning", "pytorch_lightning")
if not any(map(importlib.util.find_spec, PACKAGES)):
    raise ModuleNotFoundError("neither lightning nor pytorch_lightning", name="lightning")

TRAINERS = {f"{name}.trainer.trainer" for name in ("lightning.pytorch", "pytorch_lightning")}
FABRICS = {"lightning.fabric.fabric", "lightning_fabric.fabric"}

_logger = logging.getLogger("distclip.lightning")
_run: list[Config | None] = []
"""The configuration of ``distclip run``, if that has started this process."""


class ClipCallback:
    """Let a policy do all the clipping of a Lightning ``Trainer``, or of a ``Fabric``.

    ::

        trainer = Trainer(..., callbacks=[distclip.lightning.ClipCallback(policies.agc(0.01))])
        fabric = Fabric(..., callbacks=[distclip.lightning.ClipCallback(policies.agc(0.01))])

    Gradients are clipped once per optimizer step, after unscaling and accumulation, in automatic
    and in manual optimization. Each optimizer has its own norm and its own policy state. Calls of
    ``clip_gradients``, and an overridden ``configure_gradient_clipping``, have no effect of their
    own under a ``Trainer``; under ``Fabric`` ``clip_gradients`` applies the policy and returns the
    norm. A step that the policy skips leaves weights, moments and schedulers with
    ``interval="step"`` alone.

    The Trainer's log shows ``grad_norm`` (before clipping), ``grad_norm_clipped``,
    ``clip_coefficient``, ``clip_threshold`` (if the policy has one), ``clipped_fraction``,
    ``step_skipped`` (0 or 1) and ``nonfinite`` (a number of parameters); of a second optimizer
    ``grad_norm/1`` and so on. They are given to ``log`` as tensors, so no step waits for the
    device. The policy's state lies in the checkpoints, and is loaded on any number of ranks.

    Args:
        policy_or_config: a policy, a configuration file or mapping. None: what ``distclip run`` was
            given, or DISTCLIP_CONFIG in the environment names, or the ``"distclip"`` section of a
            DeepSpeed JSON.
        log: whether to log to the Trainer's loggers.

    Raises:
        ConfigurationError: when training begins: a bad configuration, none or two of them, or
            ``Trainer(gradient_clip_val=...)`` beside it.
        DistclipError: when training begins: an engine in which distclip cannot clip.
    """

    state_key = CHECKPOINT_KEY

    def __new__(cls, *args: Any, **kwargs: Any) -> ClipCallback:
        """An instance that is a ``Callback`` of every Lightning package that is loaded."""
        for name in FABRICS:
            if name in sys.modules:
                _watch_fabrics(name)
        return object.__new__(_class_of(cls, _callbacks()))

    def __init__(self, policy_or_config: PolicyOrConfig | None = None, *, log: bool = True) -> None:
        self.policy_or_config = policy_or_config
        self.handle: Attachment | None = None
        """Attachment of the training under way, or of the last one; of the Fabric set up last."""
        self._logs = log
        self._ours = False
        self._state: Any = None
        self._rewinds = 0
        """Made in earlier fits of :func:`fit_with_rewinds`."""
        self._logged: list[ClipReport | None] = []

    def __reduce__(self) -> Any:
        return functools.partial(_origin(type(self)), log=self._logs), (self.policy_or_config,)

    @property
    def last_report(self) -> ClipReport | None:
        """The newest report; None before the first step."""
        return None if self.handle is None else self.handle.last_report

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What the Trainer's log shows, of the newest report, as 0-dim tensors.

        For Fabric, which logs nothing by itself: ``fabric.log_dict(callback.metrics)``. Empty
        before the first step; reads no host.
        """
        return {} if self.last_report is None else tensors(self.last_report)

    def config(self, engine: Any = None) -> Config | None:
        """The configuration that is meant.

        Raises:
            ConfigurationError: a bad one, or none.
        """
        if self.policy_or_config is not None:
            return config_of(self.policy_or_config)
        if _run and _run[0] is not None:
            return _run[0]
        if not _run and os.environ.get(CONFIG_VARIABLE):
            return load(os.environ[CONFIG_VARIABLE])
        if engine is not None:
            return None  # its JSON has it
        raise ConfigurationError(
            f"ClipCallback(): no policy, and neither `distclip run` nor {CONFIG_VARIABLE} names "
            f"one; write ClipCallback(policies.agc(0.01)) or ClipCallback('policy.yaml')"
        )

    def _attach_engine(self, engine: Any) -> None:
        from distclip.integrations import deepspeed

        there = getattr(engine, "_distclip", None)
        if there is not None and self.policy_or_config is None:
            self.handle = there  # of `distclip run`
        else:
            config = self.config(engine)
            self.handle = deepspeed.attach(engine, config)
            self._ours = True

    # ---- Trainer ---------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be meant, before anything is built."""
        if stage != "fit":
            return
        if trainer.gradient_clip_val:
            raise ConfigurationError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) and a distclip policy "
                f"would both clip: remove gradient_clip_val; or, to let Lightning clip, remove "
                f"ClipCallback, or start without `distclip run` and {CONFIG_VARIABLE}"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: models are wrapped, optimizers are there, a checkpoint has been loaded."""
        engine = _engine(trainer.strategy.model)
        if engine is not None:
            self._attach_engine(engine)
            return
        config = self.config()
        assert config is not None
        self.handle = attached = TrainerAttachment(trainer, pl_module, config)
        self._ours = True
        if self._state is not None:
            state, self._state = self._state, None
            attached.load_from(state, "the state of distclip in the checkpoint")
        attached.have_made(self._rewinds)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        if isinstance(self.handle, TrainerAttachment):
            self.handle.begin_batch()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Pass the loss on to a policy that reads it."""
        handle = self.handle
        if isinstance(handle, TrainerAttachment) and handle.reads_loss:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            loss = loss.detach()
            handle._observe_backward(loss if scaler is None else loss / scaler.get_scale())

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        """Log the steps of this batch."""
        if not self._logs or self.handle is None or trainer.barebones:
            return
        reports = [self.handle.last_report]
        if isinstance(self.handle, LightningAttachment):
            reports = [self.handle.reports.get(optimizer) for optimizer in trainer.optimizers]
        shown, self._logged = self._logged, reports
        values = {
            key if number == 0 else f"{key}/{number}": value
            for number, report in enumerate(reports)
            if report is not None and not any(report is each for each in shown)
            for key, value in tensors(report).items()
        }
        if values:
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach, if it was the callback that attached; a further ``fit`` goes on from here."""
        if self._ours and self.handle is not None:
            self._ours = False
            self._state = self.state_dict() or None
            self.handle.remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach; what went wrong is the exception's to say."""
        try:
            self.on_fit_end(trainer, pl_module)
        except Exception as error:
            _logger.warning("after %s: %s", type(exception).__name__, error)

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The policy's state; empty under DeepSpeed, whose engine keeps it in its checkpoint."""
        if isinstance(self.handle, LightningAttachment):
            return self.handle.state_dict()
        if self.handle is None and self._state is None:  # as in the checkpoint of a tuner
            return Shelf().state_dict(())
        return self._state or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, now or when training begins.

        Raises:
            StateError: the state of another policy or model, or a damaged one.
        """
        if isinstance(self.handle, LightningAttachment) and self._ours:
            self.handle.load_from(state, "the state of distclip in the checkpoint")
        else:
            self._state = state

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if (
            CHECKPOINT_KEY not in checkpoint.get("callbacks", {})
            and _engine(trainer.strategy.model) is None
        ):
            _logger.warning(
                "the checkpoint has no state of distclip (it is from before it was in use?); the "
                "policy begins anew"
            )

    # ---- Fabric ----------------------------------------------------------------------------------

    def _follow(self, fabric: Any, prepared: Any) -> None:
        """``fabric`` has set up models or optimizers."""
        objects = prepared if isinstance(prepared, (tuple, list)) else (prepared,)
        for each in objects:
            engine = _engine(getattr(each, "_forward_module", None))
            if engine is not None:
                self._attach_engine(engine)
                return
        attached = getattr(fabric, "_distclip", None)
        if attached is None:
            config = self.config()
            assert config is not None
            attached = FabricAttachment(fabric, config)
        self.handle = attached
        for each in objects:
            if hasattr(each, "_forward_module"):
                attached.models.append(each._forward_module)
            elif hasattr(each, "optimizer") and hasattr(each, "_strategy"):
                attached.adopt(each.optimizer)


class AutomaticClipCallback(ClipCallback):
    """The callback that ``distclip run`` and the entry points give; one of the script replaces it.

    Lightning refuses two callbacks with one key, before they can see each other.
    """

    state_key = f"{CHECKPOINT_KEY}.automatic"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if any(c is not self and isinstance(c, ClipCallback) for c in trainer.callbacks):
            trainer.callbacks = [c for c in trainer.callbacks if c is not self]
            return
        self.state_key = CHECKPOINT_KEY
        super().setup(trainer, pl_module, stage)


def _engine(model: Any) -> Any:
    """The model, if it is DeepSpeed's engine."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    return model if "DeepSpeedEngine" in kinds else None


def _callbacks() -> tuple[type, ...]:
    """The ``Callback`` classes of the packages that are loaded."""
    names = ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks")
    return tuple(sys.modules[name].Callback for name in names if name in sys.modules)


def _class_of(kind: type, callbacks: tuple[type, ...]) -> type:
    """``kind`` as a subclass of these too."""
    kind = _origin(kind)
    key = kind, callbacks
    if key not in _classes:
        added = {"__module__": kind.__module__, "_distclip_origin": kind}
        _classes[key] = type(kind.__name__, (kind, *callbacks), added) if callbacks else kind
    return _classes[key]


_classes: dict[tuple[type, tuple[type, ...]], type] = {}


def _origin(kind: type) -> type:
    origin: type = vars(kind).get("_distclip_origin", kind)
    return origin


# ---- without a change to the script --------------------------------------------------------------


def automatic() -> list[ClipCallback]:
    """A callback by the configuration in the environment; none if ``distclip run`` gives one."""
    return [] if _run else [AutomaticClipCallback()]


def enable(module: ModuleType, config: Config | None) -> None:
    """Give every ``Trainer`` and ``Fabric`` of this process a callback: ``distclip run`` does."""
    _run[:] = [config]
    if module.__name__ in TRAINERS:
        replace(module.Trainer, "__init__", _init_trainer)
    else:
        replace(module.Fabric, "__init__", _init_fabric)
        _watch_fabrics(module.__name__)


def _init_trainer(original: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any) -> None:
    original(trainer, *args, **kwargs)
    if not any(isinstance(callback, ClipCallback) for callback in trainer.callbacks):
        trainer.callbacks.insert(0, AutomaticClipCallback())  # checkpoints come last


def _init_fabric(original: Callable[..., None], fabric: Any, *args: Any, **kwargs: Any) -> None:
    original(fabric, *args, **kwargs)
    if not any(isinstance(callback, ClipCallback) for callback in fabric._callbacks):
        fabric._callbacks.append(AutomaticClipCallback())


@functools.cache
def _watch_fabrics(name: str) -> None:
    """Have ``Fabric.setup`` and the like say what they have set up."""
    for method in ("setup", "setup_module", "setup_optimizers"):
        replace(sys.modules[name].Fabric, method, _setup)


def _setup(original: Callable[..., Any], fabric: Any, *args: Any, **kwargs: Any) -> Any:
    prepared = original(fabric, *args, **kwargs)
    callbacks = [c for c in fabric._callbacks if isinstance(c, ClipCallback)]
    chosen = [c for c in callbacks if not isinstance(c, AutomaticClipCallback)] or callbacks
    if len(chosen) > 1 and len(chosen) == len(callbacks):
        raise ConfigurationError(
            f"this Fabric has {len(chosen)} ClipCallbacks; leave one, and compose policies with "
            f"policies.chain(...)"
        )
    if chosen:
        chosen[0]._follow(fabric, prepared)
    return prepared
