"""DeepSpeed: the ``"distclip"`` section of its JSON, or one line; ZeRO stages 0 to 3.

Reduced gradients are measured when ``engine.optimizer.step`` is entered, still multiplied by the
loss scale, with one all-reduce that takes the place of DeepSpeed's own. What the policy decides is
done to the fp32 gradients that the inner torch optimizer steps with: where it is one number, when
DeepSpeed divides them by the loss scale, in one multiplication; else when that optimizer steps.
Only this file imports ``deepspeed``.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip.application.stepping import StepHandle
from distclip.clipper import GradClipper
from distclip.config import Config
from distclip.config.logs import open_log, release_log
from distclip.engine.checkpoint import StateSource
from distclip.engine.walked import Apply
from distclip.integrations import deepspeed_engines, hooks
from distclip.integrations.attachment import Attachment
from distclip.integrations.checkpoints import Shelf
from distclip.integrations.deepspeed_json import (
    CLIPPING,
    SECTION,
    configured,
    configured_of,
    declines,
    json_of,
    resolve_for_trainer,
)
from distclip.integrations.given import PolicyOrConfig
from distclip.integrations.patches import replace
from distclip.kernels import changing
from distclip.layouts import zero
from distclip.options import OnNonfinite, refuse_late
from distclip.report import ClipReport

_logger = logging.getLogger("distclip.deepspeed")


def attach(engine: Any, policy_or_config: PolicyOrConfig | None = None) -> EngineAttachment:
    """Let a policy do all the clipping of a DeepSpeed engine.

    ::

        engine, *_ = deepspeed.initialize(model=model, config="ds.json")
        distclip.deepspeed.attach(engine)

    DeepSpeed's own clipping is switched off. ``engine.get_global_grad_norm()`` is the norm before
    clipping; a step that the policy skips counts in ``engine.skipped_steps`` and leaves loss scale,
    scheduler and moments alone; the policy's state is saved and loaded with the engine's
    checkpoints. Call it on every rank, right after ``deepspeed.initialize``.

    Args:
        engine: what ``deepspeed.initialize`` returned, with an optimizer; ZeRO stage 0 to 3.
        policy_or_config: a policy, a configuration file or mapping. None: the ``"distclip"``
            section of the engine's JSON, or its ``"gradient_clipping"`` as ``global_norm``.

    Returns:
        A handle: ``remove()`` undoes everything, ``last_report`` is the newest report.

    Raises:
        ConfigurationError: no policy, two of them, a bad one, or an engine that has one already.
        UnsupportedGradientError: an optimizer wrapper that distclip does not know.
        DistclipError: a mode of DeepSpeed that distclip cannot clip in, with the reason.
    """
    return EngineAttachment(engine, configured_of(engine, policy_or_config))


def enable(module: ModuleType, config: Config | None) -> None:
    """Attach to every engine of this process as soon as it is built: what ``distclip run`` does.

    Args:
        module: ``deepspeed.runtime.engine``.
        config: a checked configuration, for every engine; None: each engine's JSON has it, or
            says by ``"gradient_clipping": 0.0`` that this engine is not clipped.
    """
    from deepspeed.runtime.config import DeepSpeedConfig  # DeepSpeed is only half imported

    def checked(read: Callable[..., None], self: Any, document: Any) -> None:
        configured(document, config)  # mistakes are reported before anything is built
        read(self, document)

    def init(build: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if not hasattr(self.optimizer, "step"):  # an engine for inference has nothing to clip
            return
        if config is None and declines(json_of(self._config)):
            if self.global_rank == 0:
                _logger.info('"%s": 0 and no policy: this engine is not clipped', CLIPPING)
            return
        EngineAttachment(self, configured_of(self, config))

    replace(DeepSpeedConfig, "_initialize_params", checked)
    replace(module.DeepSpeedEngine, "__init__", init)
    hooks.on_import("transformers.integrations.deepspeed", resolve_for_trainer)


class EngineAttachment(Attachment):
    """A policy on one DeepSpeed engine; made by :func:`attach`."""

    def __init__(self, engine: Any, config: Config) -> None:
        super().__init__(engine, "DeepSpeed engine", config)
        deepspeed_engines.refuse_engine(engine)
        refuse_late(config.on_nonfinite, "DeepSpeed")
        self.engine = engine
        self.outer = outer = engine.optimizer
        self._apply: Apply | None = None
        self._factor: float | Tensor | None = 1.0
        self._growth: Callable[[], Any] | None = None
        self._skips, self._overflowed = False, False
        self._multiplied = False
        self._extents = zero.extents(outer, deepspeed_engines.trained(engine))
        self._plain = isinstance(outer, Optimizer) and type(outer).__name__ not in zero.READERS
        self._inners: list[Optimizer] = [outer] if self._plain else [outer.optimizer]
        backup = getattr(outer, "backup_optimizer", None)
        if backup is not None:
            self._inners.append(backup)
        for parameter, extent in self._extents:
            zero.mark(parameter, extent)
        try:
            self.clipper = GradClipper(
                deepspeed_engines.pairs_of(engine, [parameter for parameter, _ in self._extents]),
                optimizer=deepspeed_engines.groups(outer),
                # DeepSpeed shows the norm, and judges overflows by it; the rest has no effect here.
                **config.arguments(norms=True, overlap=False),
            )
        except Exception:
            self._unmark()
            raise
        self._cuts: dict[int, list[tuple[int, zero.StretchBox]]] = {}
        for position, piece in enumerate(self.clipper.plan.pieces):
            assert isinstance(piece.gradient, zero.StretchBox)  # all of them are marked
            owner = piece.gradient.stretch.owner
            self._cuts.setdefault(id(owner), []).append((position, piece.gradient))
        self._clipping = (engine._config.gradient_clipping, getattr(outer, "clip_grad", None))
        self._undo += [self._release]
        self._undo += [
            StepHandle(inner, functools.partial(self._before_inner_step, weakref.ref(inner))).remove
            for inner in self._inners
        ]
        if self._plain:
            outer.overflow = False  # Accelerate looks now whether it will say so of a skipped step
        self._take_over()
        open_log(self.clipper, config)
        self._begin("deepspeed")
        if engine.global_rank == 0:
            deepspeed_engines.announce(len(self._extents), config)

    def _release(self) -> None:
        """Restore what is not a method: DeepSpeed's clipping, marks, the name of the log."""
        self._unmark()
        self._switch_on()
        release_log(self.clipper)
        if self._plain:
            for name in ("overflow", "_global_grad_norm"):
                self.outer.__dict__.pop(name, None)

    def observe(self, loss: Tensor | float) -> None:
        self.clipper.observe(loss)

    def memory(self) -> tuple[Shelf, Iterable[GradClipper]]:
        return Shelf(self.config.policy), [self.clipper]

    def _unmark(self) -> None:
        for parameter, _ in self._extents:
            zero.mark(parameter, None)

    # ---- the step ------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Put our methods before DeepSpeed's, on these objects only."""
        self._switch_off()
        self._replace(self.engine, "save_checkpoint", self._save)
        self._replace(self.engine, "load_checkpoint", self._load)
        self._replace(self.engine, "backward", self._backward)
        if self._plain:
            return
        outer = self.outer
        self._replace(outer, "step", self._step)
        # Its own passes over all gradients, and their all-reduces, for what is known already. A
        # call from outside of a step gets DeepSpeed's own answer.
        replacements: dict[str, Callable[..., Any]] = {
            "_update_scale": self._update_scale,
            "scaled_global_norm": lambda original, *a, **k: self._verdict(),
            "_get_norm_groups": lambda original: [self._verdict()],
            "get_grads_for_norm": self._for_norm,
        }
        for name, ours in replacements.items():
            if hasattr(outer, name):
                self._replace(outer, name, ours, self._is_within_step)

        def overflowed(original: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
            return self._overflowed

        if type(outer).__name__.startswith("DeepSpeedZeroOptimizer"):
            self._replace(outer, "has_overflow", overflowed, self._is_within_step)
            self._replace(outer, "unscale_and_clip_grads", self._unscale, self._is_within_step)
        if hasattr(outer, "overflow_checker"):
            self._replace(outer.overflow_checker, "check", overflowed, self._is_within_step)

    def _is_within_step(self) -> bool:
        return self._apply is not None

    def _switch_off(self) -> None:
        """DeepSpeed's own clipping; a loaded checkpoint brings its `clip_grad` back."""
        self.engine._config.gradient_clipping = 0.0
        if hasattr(self.outer, "clip_grad"):
            self.outer.clip_grad = 0.0

    def _switch_on(self) -> None:
        self.engine._config.gradient_clipping, clip_grad = self._clipping
        if clip_grad is not None:
            self.outer.clip_grad = clip_grad

    def _backward(self, original: Callable[..., Any], loss: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._observe_backward(loss)
        return original(loss, *args, **kwargs)

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer = self.outer
        self._switch_off()
        outer.overflow = False  # up to 0.19.5 never reset in fp32 and bf16
        getattr(outer, "_wait_for_offload_copies", lambda: None)()
        report = self._decide(float(getattr(outer, "loss_scale", None) or 1.0))
        try:
            result = original(*args, **kwargs)
        finally:
            self._apply = None
        if self._growth is not None:
            self._growth()
        if self._skips:
            outer.overflow = True  # a skipped step for the engine, and none for its scheduler
        outer._global_grad_norm = report.total_norm
        return result

    def _decide(self, scale: float) -> ClipReport:
        # Under a dynamic loss scale an overflow is a part of finding the scale, no error.
        dynamic = bool(getattr(self.outer, "dynamic_loss_scale", False))
        self._growth, self._multiplied = None, False  # set within the step
        mode: OnNonfinite = "skip" if dynamic else self.config.on_nonfinite
        loss_scale = None if scale == 1.0 else torch.tensor(scale, device="cpu")
        report, self._apply = self.clipper.decide(mode, loss_scale)
        self.last_report = report
        # Left to DeepSpeed are an overflow under a dynamic scale, and all of them under "pass".
        left = dynamic or mode == "pass"
        self._overflowed = left and not math.isfinite(float(report.total_norm))
        self._skips = bool(report.skipped) and not self._overflowed
        self._factor = self._apply.factor()
        return report

    def _before_inner_step(
        self,
        inner: weakref.ref[Optimizer],
        loss_scale: Tensor | None,
        found_inf: Tensor | None,
        coming: object,
    ) -> ClipReport | None:
        optimizer = inner()
        assert optimizer is not None  # it is calling
        if self._plain:
            report = self.clipper.clip_before_step(loss_scale, found_inf)
            self.last_report = report
            self.outer._global_grad_norm = report.total_norm
            self.outer.overflow = bool(report.skipped)
            return report
        if self._apply is None:
            return None
        owners = [p for group in optimizer.param_groups for p in group["params"]]
        owners = [owner for owner in owners if owner.grad is not None]
        if self._multiplied:
            self._multiplied = False
        elif self._factor is None:
            cuts = [(owner.grad, *cut) for owner in owners for cut in self._cuts.get(id(owner), ())]
            self._apply([(position, cut.of_owner(whole)) for whole, position, cut in cuts])
        elif isinstance(self._factor, Tensor) or self._factor != 1.0:
            gradients = [owner.grad for owner in owners]
            given = self._factor
            device = given.device if isinstance(given, Tensor) else "cpu"
            factor = torch.as_tensor(given, dtype=torch.float64, device=device)
            changing.scale_(gradients, factor.expand(len(gradients)))
        return self.last_report

    def _unscale(self, original: Callable[..., Any], group: Any, *args: Any) -> None:
        """Multiply once, by the factor and the loss scale together, where there is a factor.

        ``group`` is fp32 gradients to step with, or, at stage 3, the number of their owner.
        """
        factor = self._factor
        if factor is not None and not isinstance(factor, Tensor):
            factor /= float(self.outer.loss_scale)
            if not 0.0 < factor < changing.TINY:  # of which float32 has few digits
                self._multiplied = True
                if isinstance(group, int):
                    group = [self.outer.fp32_partitioned_groups_flat[group].grad]
                for gradient in group if factor != 1.0 else ():
                    gradient.data.mul_(factor)
                return
        original(group, *args)

    def _verdict(self) -> Tensor:
        """For DeepSpeed's norm, which with its clipping off only tells it what is an overflow.

        A norm itself might fail by being squared in float32, or by being 0 (BF16_Optimizer up to
        0.18 demands that it be > 0).
        """
        assert self.last_report is not None
        norm = self.last_report.total_norm
        if norm.is_cpu:
            known = 1.0 if self._skips or math.isfinite(norm) else float(norm)
            norm = torch.tensor(known, device="cpu")
        else:
            norm = torch.where(torch.isfinite(norm) | self._skips, 1.0, norm)
        return norm.float().to(getattr(self.outer, "device", "cpu"))

    def _for_norm(self, original: Callable[..., Any], for_clipping: bool = False) -> Any:
        """BF16_Optimizer takes the norm of these."""
        return original(for_clipping) if for_clipping else ([self._verdict()], {})

    def _update_scale(self, original: Callable[..., Any], has_overflow: bool = False) -> None:
        """DeepSpeed unscales with the scale as it is *after* growing, and halves that step.

        So the growth waits until the step is done; and a step that a policy skips says nothing.
        """
        if self._skips:
            return
        if has_overflow:
            original(has_overflow)
        else:
            self._growth = functools.partial(original, has_overflow)

    # ---- checkpoints ---------------------------------------------------------------------

    def _save(
        self,
        original: Callable[..., Any],
        save_dir: Any,
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """With the policy's state among what the user keeps there: any stage, any rank count."""
        kept = {**(client_state or {}), SECTION: self.clipper.state_dict()}
        self._switch_on()  # DeepSpeed keeps its clip_grad there: a run without distclip needs it
        try:
            return original(save_dir, tag, kept, *args, **kwargs)
        finally:
            self._switch_off()

    def _load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        wanted = not bound.arguments.get("load_module_only")
        source = StateSource(
            f"the state of distclip in {bound.arguments.get('load_dir')}",
            "call remove() on distclip's handle (engine._distclip), then load_checkpoint, then "
            "distclip.deepspeed.attach",
        )
        load: list[Callable[[], None]] = []

        def look(module: Callable[..., Any], checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
            """Before DeepSpeed changes a weight: both are loaded, or neither."""
            if wanted and isinstance(checkpoint, Mapping) and SECTION in checkpoint:
                load.append(self.clipper.prepare_state_dict(checkpoint[SECTION], source))
            return module(checkpoint, *args, **kwargs)

        restore = replace(self.engine, "load_module_state_dict", look)
        try:
            loaded = original(*args, **kwargs)
        finally:
            restore()
            self._switch_off()
        path, client_state = loaded
        state = client_state.pop(SECTION, None) if isinstance(client_state, dict) else None
        if path is None or not wanted:
            return loaded
        if state is None:
            _logger.warning("no state of distclip in %s: the policy begins anew", path)
        elif not load:  # a universal checkpoint, which loads no module
            load.append(self.clipper.prepare_state_dict(state, source))
        for each in load:
            each()
        return loaded
