"""DeepSpeed: the ``"distclip"`` section of its JSON, or one line; ZeRO stages 0 to 3.

Reduced gradients are measured when ``engine.optimizer.step`` is entered, still multiplied by the
loss scale, with one all-reduce that takes the place of DeepSpeed's own. What the policy decides is
done when the inner torch optimizer steps, on fp32 gradients that DeepSpeed has unscaled by then.
Only this file imports ``deepspeed``.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.optim import Optimizer

from distclip import policies
from distclip.application.stepping import StepHandle
from distclip.build import sinks_of
from distclip.clipper import GradClipper, OnNonfinite
from distclip.config import Config, load
from distclip.errors import ConfigurationError, DistclipError
from distclip.integrations import accelerate_cpu, hooks
from distclip.layouts import zero
from distclip.layouts.names import named_parameters
from distclip.ledger import Apply
from distclip.policies import Policy
from distclip.report import ClipReport

_logger = logging.getLogger("distclip.deepspeed")

PolicyOrConfig = Policy | str | os.PathLike[str] | Mapping[str, Any] | Config

SECTION, CLIPPING = "distclip", "gradient_clipping"
RAN_WITH = ("0.16.9", "0.18.0", "0.19.8")
"""The versions that the tests were run with; pyproject.toml says the same."""
_OWN_REDUCTION = ("OnebitAdam", "ZeroOneAdam", "OnebitLamb")
_warned: set[str] = set()


def attach(engine: Any, policy_or_config: PolicyOrConfig | None = None) -> Attachment:
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
    if getattr(engine, "_distclip", None) is not None:
        raise ConfigurationError(
            "this DeepSpeed engine has a distclip policy already, from an earlier attach() or from "
            "`distclip run`; call remove() on the first handle, or start without `distclip run`"
        )
    return Attachment(engine, _configured(engine, policy_or_config))


def enable(module: ModuleType, config: Config | None) -> None:
    """Attach to every engine of this process as soon as it is built: what ``distclip run`` does.

    Args:
        module: ``deepspeed.runtime.engine``.
        config: a checked configuration; None: each engine's JSON has it.
    """
    from deepspeed.runtime.config import DeepSpeedConfig  # DeepSpeed is only half imported

    build, read = module.DeepSpeedEngine.__init__, DeepSpeedConfig._initialize_params

    @functools.wraps(read)
    def checked(self: Any, document: Any) -> None:
        configured(document, config)  # mistakes are told before anything is built
        read(self, document)

    @functools.wraps(build)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        if hasattr(self.optimizer, "step"):  # an engine for inference has nothing to clip
            Attachment(self, _configured(self, config))

    DeepSpeedConfig._initialize_params = checked
    module.DeepSpeedEngine.__init__ = init
    hooks.on_import("transformers.integrations.deepspeed", _resolve_for_trainer)
    if accelerate_cpu.requested():
        # Would be compiled in the first collective, by every rank: that takes 40 s and a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _configured(engine: Any, policy_or_config: PolicyOrConfig | None) -> Config:
    config = configured(_json_of(engine._config), policy_or_config)
    if config is None:
        raise ConfigurationError(
            f'no policy: the DeepSpeed JSON has neither a "{SECTION}" section nor '
            f'"{CLIPPING}" > 0; write "{SECTION}": {{"policy": {{"name": "global_norm", '
            f'"max_norm": 1.0}}}}'
        )
    return config


def configured(
    document: Mapping[str, Any], policy_or_config: PolicyOrConfig | None = None
) -> Config | None:
    """The one configuration that is meant, by a DeepSpeed JSON and what else was given.

    Args:
        document: the JSON, as a mapping.
        policy_or_config: what was given beside it; it also replaces ``gradient_clipping``.

    Returns:
        None: there is none.

    Raises:
        ConfigurationError: several, or a bad one; names the key and the mend.
    """
    section, clipping = document.get(SECTION), document.get(CLIPPING)
    for key, value in document.items():
        if key != SECTION and isinstance(value, Mapping) and SECTION in value:
            raise ConfigurationError(
                f'DeepSpeed JSON: {key}.{SECTION}: the "{SECTION}" section stands inside '
                f'"{key}", where nobody reads it; move it to the top level'
            )
    if policy_or_config is not None:
        if section is not None:
            raise ConfigurationError(
                f'the DeepSpeed JSON has a "{SECTION}" section and another policy was given '
                f"(attach(engine, policy), --config or DISTCLIP_CONFIG): remove one of the two"
            )
        if isinstance(policy_or_config, Config):
            return policy_or_config
        if isinstance(policy_or_config, Policy):
            return Config(policy=policy_or_config)
        return load(policy_or_config)
    off = clipping is None or (not isinstance(clipping, (bool, str)) and clipping == 0)
    if section is not None:
        if not off:
            raise ConfigurationError(
                f'DeepSpeed JSON: "{CLIPPING}": {clipping!r} stands beside a "{SECTION}" section: '
                f'remove "{CLIPPING}" (the section then does all the clipping), or remove the '
                f"section (then the key alone means global_norm({clipping!r}))"
            )
        if not isinstance(section, Mapping):
            raise ConfigurationError(
                f"DeepSpeed JSON: {SECTION}: should be a mapping of keys to values, got {section!r}"
            )
        _refuse_auto(section, SECTION)
        return load(section, name=f"DeepSpeed JSON: {SECTION}")
    if off:
        return None
    if isinstance(clipping, bool) or not isinstance(clipping, (int, float)) or not clipping > 0:
        raise ConfigurationError(
            f'DeepSpeed JSON: {CLIPPING}: must be a number > 0, got {clipping!r}; "auto" has a '
            f"value under Accelerate and the Trainer only"
        )
    return Config(policy=policies.global_norm(float(clipping)))


def resolve_auto(document: dict[str, Any], value: Any) -> None:
    """Replace every ``"auto"`` in the section of a DeepSpeed JSON, where there is a value for it.

    Args:
        document: the JSON as a mapping; changed in place.
        value: the clipping threshold that a framework above DeepSpeed was given, or no number.

    Raises:
        ConfigurationError: an ``"auto"`` and no value.
    """
    if SECTION not in document:
        return
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        document[SECTION] = _resolved(document[SECTION], value)
    _refuse_auto(document[SECTION], SECTION)


def _resolved(section: Any, value: float) -> Any:
    if isinstance(section, Mapping):
        return {key: _resolved(part, value) for key, part in section.items()}
    if isinstance(section, list):
        return [_resolved(part, value) for part in section]
    return value if section == "auto" else section


def _resolve_for_trainer(module: ModuleType) -> None:
    """Give the Trainer's ``max_grad_norm`` to an ``"auto"`` in the section."""
    original = module.HfTrainerDeepSpeedConfig.trainer_config_process

    @functools.wraps(original)
    def process(self: Any, args: Any, *more: Any, **kwargs: Any) -> Any:
        resolve_auto(self.config, args.max_grad_norm)
        return original(self, args, *more, **kwargs)

    module.HfTrainerDeepSpeedConfig.trainer_config_process = process


def _refuse_auto(value: Any, path: str) -> None:
    if value == "auto":
        raise ConfigurationError(
            f'DeepSpeed JSON: {path}: "auto" has no value here; write a number. (Under `distclip '
            f"run` it becomes gradient_clipping of Accelerate's plugin, or the Trainer's "
            f"max_grad_norm.)"
        )
    if isinstance(value, (Mapping, list)):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in pairs:
            _refuse_auto(part, f"{path}.{key}" if isinstance(key, str) else f"{path}[{key}]")


def _json_of(config: Any) -> Mapping[str, Any]:
    document = getattr(config, "_param_dict", None)
    return document if isinstance(document, Mapping) else {}


class Attachment:
    """A policy on one DeepSpeed engine; made by :func:`attach`."""

    def __init__(self, engine: Any, config: Config) -> None:
        _warn_untested()
        _refuse(engine)
        self.engine, self.config = engine, config
        self.outer = outer = engine.optimizer
        self.last_report: ClipReport | None = None
        self._apply: Apply | None = None
        self._factor: float | Tensor | None = 1.0
        self._growth: Callable[[], Any] | None = None
        self._scale, self._skips, self._overflowed = 1.0, False, False
        self._extents = zero.extents(outer, _trained(engine))
        self._plain = isinstance(outer, Optimizer) and type(outer).__name__ not in zero.READERS
        self._inners: list[Optimizer] = [outer] if self._plain else [outer.optimizer]
        backup = getattr(outer, "backup_optimizer", None)
        if backup is not None:
            self._inners.append(backup)
        for parameter, extent in self._extents:
            zero.mark(parameter, extent)
        self.clipper = GradClipper(
            _named(engine, [parameter for parameter, _ in self._extents]),
            config.policy,
            optimizer=_groups(engine, outer),
            on_nonfinite=config.on_nonfinite,
            sinks=sinks_of(config),
            norms=config.norms,
            verify_replicas=config.verify_replicas,
        )
        self._cuts: dict[int, list[tuple[int, zero.Cut]]] = {}
        for position, piece in enumerate(self.clipper.plan.pieces):
            assert isinstance(piece.gradient, zero.Cut)  # all of them are marked
            owner = piece.gradient.stretch.owner
            self._cuts.setdefault(id(owner), []).append((position, piece.gradient))
        self._clipping = (engine._config.gradient_clipping, getattr(outer, "clip_grad", None))
        self._replaced: list[tuple[Any, str]] = []
        self._handles = [
            StepHandle(inner, functools.partial(self._before_inner_step, weakref.ref(inner)))
            for inner in self._inners
        ]
        self._take_over()
        engine._distclip = self
        hooks.mark_active("deepspeed")
        if engine.global_rank == 0:
            _logger.info("clipping %d parameters by %r", len(self._extents), config.policy)

    def remove(self) -> None:
        """Give the engine its own clipping back; a second call does nothing."""
        if getattr(self.engine, "_distclip", None) is not self:
            return
        for owner, name in self._replaced:
            del owner.__dict__[name]
        self._replaced.clear()
        for handle in self._handles:
            handle.remove()
        for parameter, _ in self._extents:
            zero.mark(parameter, None)
        self._switch_on()
        if self._plain:
            for name in ("overflow", "_global_grad_norm"):
                self.outer.__dict__.pop(name, None)
        self.engine._distclip = None

    # ---- the step ------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Put our methods before DeepSpeed's, on these objects only."""
        self._switch_off()
        self._replace(self.engine, "save_checkpoint", self._save)
        self._replace(self.engine, "load_checkpoint", self._load)
        if self._plain:
            return
        outer = self.outer
        self._replace(outer, "step", self._step)
        # Its own passes over all gradients, and their all-reduces, for what we know already.
        replacements: dict[str, Callable[..., Any]] = {
            "_update_scale": self._update_scale,
            "scaled_global_norm": lambda original, *a, **k: self._scaled(),
            "_get_norm_groups": lambda original: [self._scaled()],
            "get_grads_for_norm": self._for_norm,
        }
        for name, ours in replacements.items():
            if hasattr(outer, name):
                self._replace(outer, name, ours)
        if type(outer).__name__.startswith("DeepSpeedZeroOptimizer"):
            self._replace(outer, "has_overflow", lambda original, *a, **k: self._overflowed)
        if hasattr(outer, "overflow_checker"):
            checker = outer.overflow_checker
            self._replace(checker, "check", lambda original, *a, **k: self._overflowed)

    def _replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def ours(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        setattr(owner, name, ours)
        self._replaced.append((owner, name))

    def _switch_off(self) -> None:
        """DeepSpeed's own clipping; a loaded checkpoint brings its `clip_grad` back."""
        self.engine._config.gradient_clipping = 0.0
        if hasattr(self.outer, "clip_grad"):
            self.outer.clip_grad = 0.0

    def _switch_on(self) -> None:
        self.engine._config.gradient_clipping, clip_grad = self._clipping
        if clip_grad is not None:
            self.outer.clip_grad = clip_grad

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer = self.outer
        self._switch_off()
        outer.overflow = False  # up to 0.19.5 never reset in fp32 and bf16
        wait = getattr(outer, "_wait_for_offload_copies", None)
        if wait is not None:
            wait()
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
        self._growth = None  # set by `_update_scale`, within the step
        mode: OnNonfinite = "skip" if dynamic else self.config.on_nonfinite
        loss_scale = None if scale == 1.0 else torch.tensor(scale)
        report, self._apply = self.clipper.decide(mode, loss_scale)
        self.last_report, self._scale = report, scale
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
        if self._factor is None:
            self._apply(
                [
                    (position, cut.of_owner(owner.grad))
                    for owner in owners
                    for position, cut in self._cuts.get(id(owner), ())
                ]
            )
        elif isinstance(self._factor, Tensor) or self._factor != 1.0:
            for owner in owners:
                owner.grad.mul_(self._factor)
        return self.last_report

    def _scaled(self) -> Tensor:
        """What DeepSpeed's own norm pass would give."""
        assert self.last_report is not None
        norm = self.last_report.total_norm * self._scale
        if self._skips:  # nothing that DeepSpeed would call an overflow of its own
            norm = torch.nan_to_num(norm, nan=1.0, posinf=1.0)
        return norm.float().to(getattr(self.outer, "device", "cpu"))

    def _for_norm(self, original: Callable[..., Any], for_clipping: bool = False) -> Any:
        """BF16_Optimizer takes the norm of these, and up to 0.18 demands that it be > 0."""
        if for_clipping:
            return original(for_clipping)
        return [self._scaled().clamp(min=torch.finfo(torch.float32).tiny)], {}

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
        loaded = original(*args, **kwargs)
        self._switch_off()
        path, client_state = loaded
        state = client_state.pop(SECTION, None) if isinstance(client_state, dict) else None
        if path is None or bound.arguments.get("load_module_only"):
            return loaded
        if state is None:
            _logger.warning("no state of distclip in %s: the policy begins anew", path)
        else:
            self.clipper.load_state_dict(state)
        return loaded


def _warn_untested() -> None:
    version = str(deepspeed.__version__).split("+")[0]
    if version not in RAN_WITH and version not in _warned:
        _warned.add(version)
        warnings.warn(
            f"distclip was not run with DeepSpeed {version}, but with {', '.join(RAN_WITH)}; "
            f"compare engine.get_global_grad_norm() once with a run without distclip",
            stacklevel=4,
        )


def _refuse(engine: Any) -> None:
    """What is known not to work, with the reason."""
    outer = engine.optimizer
    if outer is None or not hasattr(outer, "step"):
        raise DistclipError(
            "this DeepSpeed engine has no optimizer: there is nothing to clip for. Give one to "
            "deepspeed.initialize, or an optimizer section in the JSON"
        )
    inner = type(getattr(outer, "optimizer", outer)).__name__
    reasons = {
        "pipeline parallelism was not run with distclip": getattr(
            engine, "pipeline_parallelism", False
        ),
        "fp16 at ZeRO stage 0: DeepSpeed 0.19.8 unscales the gradients but never scales the loss; "
        "use bf16, or fp16 with ZeRO stage 1": engine.fp16_enabled()
        and not engine.zero_optimization(),
        "optimizer states on NVMe are not in memory when their weights are measured": getattr(
            outer, "swap_optimizer", False
        ),
        f"{inner} reduces gradients itself, in its step": inner in _OWN_REDUCTION,
        "Muon transforms gradients before DeepSpeed's norm, which distclip replaces": "Muon"
        in inner,
        "fp16 under torch.autocast scales inside of the step": getattr(
            outer, "torch_autocast_gradscaler", None
        )
        or getattr(engine, "torch_autocast_z0_gradscaler", None),
        "tensor parallelism (mpu) was not run with distclip": getattr(engine, "mpu", None)
        is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise DistclipError(f"distclip cannot clip for this DeepSpeed engine: {reason}")


def _trained(engine: Any) -> list[Tensor]:
    return [p for p in engine.module.parameters() if p.requires_grad]


def _named(engine: Any, parameters: list[Tensor]) -> list[tuple[str, Tensor]]:
    names = {id(p): name for name, p in named_parameters(engine.module)}
    return [(names.get(id(p), f"unnamed.{place}"), p) for place, p in enumerate(parameters)]


def _groups(engine: Any, outer: Any) -> Any:
    """The module's parameters by parameter group: inside, there are flat buffers."""

    class Groups:
        param_groups: list[dict[str, Any]]

    lists = getattr(outer, "bit16_groups", None) or getattr(outer, "bf16_groups", None)
    if lists is None and hasattr(outer, "fp16_groups"):
        lists = outer.fp16_groups
        of = getattr(outer, "sub_group_to_group_id", None)
        if of is not None:
            merged: dict[int, list[Tensor]] = {}
            for sub, group in enumerate(lists):
                merged.setdefault(of[sub], []).extend(group)
            lists = [merged[number] for number in sorted(merged)]
    if lists is None:
        return outer
    found = Groups()
    found.param_groups = [{"params": list(group)} for group in lists]
    return found
