"""The reference: what each policy must do, in float64, on whole tensors, in one process.

Written from the published formulas with numpy alone. It shares no code with the library, so that
the two can be compared. Slow and plain on purpose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from distclip.testing import memory as remembered
from distclip.testing.memory import Memory
from distclip.testing.norms import Array, norm, norm_of_norms, wide
from distclip.testing.parts import is_in, norm_type, reduced_dims, side_by_side

Stored: TypeAlias = Callable[[str, Array], Array]
PolicySpec: TypeAlias = "Mapping[str, Any] | Sequence[PolicySpec] | None"
NonFinite: TypeAlias = Literal["pass", "zero", "skip", "error"]


@dataclass(frozen=True, slots=True)
class Expected:
    """What clipping must have done, in float64 (complex128); norms are of whole tensors.

    Attributes:
        total_norm: norm of all gradients together before clipping, after ``"zero"`` has zeroed. Its
            order is that of the first policy that reads norms, else 2.
        clipped_norm: the same after clipping.
        parameter_norms: norm of each gradient before clipping; 0 where there is none.
        gradients: the clipped gradients; None where there was none.
        coefficients: what each gradient was multiplied by, over all stages but elementwise clamps.
            It broadcasts against the gradient: shape ``()``, or the extent of the gradient in the
            dims that make a unit and 1 elsewhere.
        coefficient: the smallest of them; 1 where nothing was scaled.
        skipped: whether the step is to be skipped.
        nonfinite: the parameters whose gradient holds a NaN or an infinity, sorted.
        threshold: of the first policy with a memory that has a single one; NaN where there is none.
    """

    total_norm: float
    clipped_norm: float
    parameter_norms: dict[str, float]
    gradients: dict[str, Array | None]
    coefficients: dict[str, Array]
    coefficient: float
    skipped: bool
    nonfinite: tuple[str, ...]
    threshold: float = float("nan")


def expected(
    policy: PolicySpec,
    gradients: Mapping[str, npt.ArrayLike | None],
    weights: Mapping[str, npt.ArrayLike],
    *,
    groups: Mapping[str, int] | None = None,
    on_nonfinite: NonFinite = "pass",
    memory: dict[str, Memory] | None = None,
    loss: float | None = None,
    stored: Stored | None = None,
) -> Expected:
    """What `policy` must make of these gradients.

    Args:
        policy: as in a configuration: ``{"name": "agc", "clip_factor": 0.01}``; a list, a chain in
            that order; ``{"by_name": {"*.bias": None, "embed*": ...}, "default": ...}``, where the
            first matching pattern wins and None leaves alone; ``by_part`` in place of it, by kind
            and name.
        gradients: the whole gradient of each parameter, an array or a tensor of any dtype; or None.
        weights: the whole parameters; only the adaptive policies look at them.
        groups: the optimizer parameter group of each parameter, for ``group_norm``.
        on_nonfinite: what to do when a gradient is not finite.
        memory: what the policies remember, a dict that is empty before the first step and is
            changed by this one; None for a single step.
        loss: the mean loss of this step, for a policy that reads it.
        stored: what becomes of the named gradient where its tensor is written: rounded to a dtype.
            Applied after each policy; None for nothing.

    Raises:
        FloatingPointError: ``on_nonfinite="error"`` and a gradient is not finite; names it.
        TypeError: a ``DTensor``, of which each rank holds a part.
        ValueError: no such policy, or one that needs `groups` without them.
    """
    table = {n: None if g is None else wide(g) for n, g in gradients.items()}
    nonfinite = sorted(n for n, g in table.items() if g is not None and not np.isfinite(g).all())
    if nonfinite and on_nonfinite == "error":
        raise FloatingPointError(f"gradients that are not finite: {', '.join(nonfinite)}")
    if on_nonfinite == "zero":
        table |= {name: np.zeros_like(table[name]) for name in nonfinite}
    run = _Run(
        present={name: g.copy() for name, g in table.items() if g is not None},
        weights={name: wide(w) for name, w in weights.items()},
        groups=groups,
        coefficients={name: np.ones(()) for name in table},
        memory={} if memory is None else memory,
        loss=loss,
        stored=stored,
    )
    order = norm_type(policy)
    parameter_norms = {name: 0.0 if g is None else norm(g, order) for name, g in table.items()}
    total = norm_of_norms(parameter_norms.values(), order)
    skipped = bool(nonfinite) and on_nonfinite == "skip"
    # Non-finite arithmetic is part of "pass", and a vanishing coefficient may underflow.
    before = {name: g.copy() for name, g in run.present.items()}
    with np.errstate(all="ignore"):
        if not skipped:
            run.apply(policy, list(table))
    asking = {path for path, asks in run.asked.items() if asks}
    if asking:
        skipped, run.present = True, before
        run.coefficients = {name: np.ones(()) for name in table}
    # A step that one policy skips leaves no trace in what the others remember.
    for path, new in run.remembers.items():
        if not asking or path in asking:
            run.memory[path] = new
    return Expected(
        total_norm=total,
        clipped_norm=norm_of_norms((norm(g, order) for g in run.present.values()), order),
        parameter_norms=parameter_norms,
        gradients={name: run.present.get(name) for name in table},
        coefficients=run.coefficients,
        coefficient=float(np.min([np.min(c, initial=1.0) for c in run.coefficients.values()] or 1)),
        skipped=skipped,
        nonfinite=tuple(nonfinite),
        threshold=run.threshold,
    )


@dataclass(slots=True)
class _Run:
    """The gradients on their way through the stages of a policy."""

    present: dict[str, Array]
    weights: dict[str, Array]
    groups: Mapping[str, int] | None
    coefficients: dict[str, Array]
    memory: dict[str, Memory]
    loss: float | None
    stored: Stored | None
    remembers: dict[str, Memory] = field(default_factory=dict)
    asked: dict[str, bool] = field(default_factory=dict)
    threshold: float = float("nan")

    def apply(self, policy: PolicySpec, names: list[str], path: str = "") -> None:
        if policy is None:
            return
        if not isinstance(policy, Mapping):
            for number, stage in enumerate(policy):
                self.apply(stage, names, f"{path}/{number}")
        elif "by_name" in policy or "by_part" in policy:
            split = side_by_side(policy, {name: np.ndim(self.weights[name]) for name in names})
            for number, (chosen, sub_policy) in enumerate(split):
                self.apply(sub_policy, chosen, f"{path}/{number}")
        else:
            arguments = dict(policy)
            self.act(arguments.pop("name"), arguments, names, path)

    def act(self, policy: str, arguments: dict[str, Any], names: list[str], path: str) -> None:
        here = [name for name in names if name in self.present]
        if policy in _REMEMBERING:
            before = self.remembers[path] = self.memory.get(path, {})
            _REMEMBERING[policy](self, names, path, before, **arguments)
        elif policy in _POLICIES:
            _POLICIES[policy](self, here, **arguments)
        else:
            known = sorted([*_POLICIES, *_REMEMBERING])
            raise ValueError(f"no policy {policy!r}; there are {known}")
        if self.stored is not None:
            self.present |= {name: self.stored(name, self.present[name]) for name in here}

    def scale(self, name: str, coefficient: Array | float) -> None:
        factor: Array = np.asarray(coefficient, np.float64)
        self.coefficients[name] = self.coefficients[name] * factor
        gradient = self.present[name]
        if np.iscomplexobj(gradient):  # as two real numbers: numpy would multiply by factor + 0j
            parts = np.stack([gradient.real, gradient.imag], -1) * np.expand_dims(factor, -1)
            self.present[name] = parts.view(np.complex128)[..., 0]
        else:
            self.present[name] = gradient * factor

    def norm(self, names: Iterable[str], norm_type: float) -> float:
        return norm_of_norms((norm(self.present[name], norm_type) for name in names), norm_type)

    def clip_to(self, names: Iterable[str], limit: float, total: float) -> None:
        """Clip these together to a limit that may be infinite, with torch's 1e-6."""
        if np.isinf(limit):
            return
        self.show(limit)
        for name in names:
            self.scale(name, np.minimum(1.0, limit / (total + 1e-6)))

    def show(self, threshold: float) -> None:
        if np.isnan(self.threshold):
            self.threshold = threshold


# ---- the policies: each scales or replaces the gradients of the names it is given ----


def _expert_aware(
    run: _Run,
    names: list[str],
    max_norm: float,
    expert_max_norm: float | None = None,
    norm_type: float = 2.0,
) -> None:
    experts = [name for name in names if is_in("kind=expert", name, 0)]
    limit = max_norm if expert_max_norm is None else expert_max_norm
    _global_norm(run, experts, limit, norm_type)
    _global_norm(run, [name for name in names if name not in experts], max_norm, norm_type)


def _global_norm(run: _Run, names: list[str], max_norm: float, norm_type: float = 2.0) -> None:
    # Pascanu et al. 2013, with torch's 1e-6.
    if np.isinf(max_norm):
        return
    coefficient = np.minimum(1.0, max_norm / (run.norm(names, float(norm_type)) + 1e-6))
    for name in names:
        run.scale(name, coefficient)


def _value(run: _Run, names: list[str], clip_value: float) -> None:
    for name in names:
        run.present[name] = np.clip(run.present[name], -clip_value, clip_value)


def _parameter_norm(run: _Run, names: list[str], max_norm: float, norm_type: float = 2.0) -> None:
    for name in names:
        _global_norm(run, [name], max_norm, norm_type)


def _group_norm(run: _Run, names: list[str], max_norm: float, norm_type: float = 2.0) -> None:
    if run.groups is None:
        raise ValueError("group_norm needs groups: the parameter group of each parameter")
    for group in sorted({run.groups[name] for name in names}):
        members = [name for name in names if run.groups[name] == group]
        _global_norm(run, members, max_norm, norm_type)


def _block_rms(run: _Run, names: list[str], threshold: float) -> None:
    # optax.clip_by_block_rms.
    for name in names:
        rms = norm(run.present[name]) / np.sqrt(max(1, run.present[name].size))
        run.scale(name, 1.0 / np.maximum(1.0, rms / threshold))


def _agc(
    run: _Run,
    names: list[str],
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    unit: Literal["row", "tensor"] = "row",
    unit_dims: Mapping[str, Sequence[int]] | None = None,
    norm_type: float = 2.0,
) -> None:
    # Brock et al. 2021, arXiv 2102.06171, eq. 3, with the units, the order and the 1e-6 of timm.
    for name in names:
        gradient = run.present[name]
        axes = reduced_dims(name, gradient.ndim, unit, unit_dims or {})
        size = norm(gradient, float(norm_type), axes)
        most = clip_factor * np.maximum(norm(run.weights[name], float(norm_type), axes), eps)
        # Asked this way round a unit with a NaN becomes all NaN, as in timm.
        coefficient = np.where(size <= most, 1.0, most / np.maximum(size, 1e-6))
        run.scale(name, coefficient if len(axes) < gradient.ndim else coefficient.reshape(()))


def _dreamer_agc(run: _Run, names: list[str], clip: float = 0.3, pmin: float = 1e-3) -> None:
    # DreamerV3, embodied/jax/opt.py, clip_by_agc.
    for name in names:
        upper = clip * np.maximum(pmin, norm(run.weights[name]))
        run.scale(name, 1.0 / np.maximum(1.0, norm(run.present[name]) / upper))


# ---- those with a memory: they get what they remember, and leave what they will ----


def _together(
    decide: Callable[..., tuple[float, Memory]],
    run: _Run,
    names: list[str],
    path: str,
    memory: Memory,
    **arguments: Any,
) -> None:
    here = [name for name in names if name in run.present]
    total = run.norm(here, 2.0)
    limit, run.remembers[path] = decide(memory, total, **arguments)
    run.clip_to(here, limit, total)


def _adagc(run: _Run, names: list[str], path: str, memory: Memory, **arguments: Any) -> None:
    if memory.get("step", 0) < arguments.get("warmup_steps", 100):
        run.show(arguments.get("lambda_abs", 1.0))
    total = run.norm([name for name in names if name in run.present], 2.0)
    _each(remembered.adagc, run, names, path, memory, total=total, **arguments)


def _each(
    decide: Callable[..., tuple[dict[str, float], Memory]],
    run: _Run,
    names: list[str],
    path: str,
    memory: Memory,
    **arguments: Any,
) -> None:
    norms = {name: run.norm([name], 2.0) for name in names if name in run.present}
    coefficients, run.remembers[path] = decide(memory, norms, **arguments)
    for name, coefficient in coefficients.items():
        run.scale(name, coefficient)


def _running_max(run: _Run, names: list[str], path: str, memory: Memory, **arguments: Any) -> None:
    here = [name for name in names if name in run.present]
    largest = {name: norm(run.present[name], np.inf) for name in here}
    bounds, run.remembers[path] = remembered.running_max(memory, largest, **arguments)
    for name, bound in bounds.items():
        run.present[name] = np.clip(run.present[name], -bound, bound)


def _skip_spikes(run: _Run, names: list[str], path: str, memory: Memory, **arguments: Any) -> None:
    here = [name for name in names if name in run.present]
    total = run.norm(here, 2.0)
    run.asked[path], run.remembers[path] = remembered.skip_spikes(
        memory, total, run.loss, **arguments
    )
    run.clip_to(here, remembered.spike_limit(memory, **arguments), total)


def _skip_norm(
    run: _Run,
    names: list[str],
    path: str,
    memory: Memory,
    max_norm: float,
    norm_type: float = 2.0,
    clip_norm: float | None = None,
) -> None:
    # Megatron-LM, ChainedOptimizer.step: no step where grad_norm > grad_norm_skip_threshold.
    here = [name for name in names if name in run.present]
    total = run.norm(here, float(norm_type))
    run.asked[path] = not np.isfinite(total) or total > max_norm
    run.clip_to(here, np.inf if clip_norm is None else clip_norm, total)


def _norm_gate(
    run: _Run, names: list[str], path: str, memory: Memory, part: str, **threshold: float
) -> None:  # arXiv 2605.19425
    text = part if "=" in part else f"name={part}"
    inside = [name for name in names if is_in(text, name, run.weights[name].ndim)]
    _skip_norm(run, inside, path, memory, **threshold)


def _ladder(
    run: _Run, names: list[str], path: str, memory: Memory, spikes: dict[str, Any], **budgets: int
) -> None:
    sound = all(np.isfinite(run.present[name]).all() for name in names if name in run.present)
    before = run.remembers[path] = memory.get("spikes", {})
    arguments = {key: value for key, value in spikes.items() if key != "name"}
    _REMEMBERING[spikes["name"]](run, names, path, before, **arguments)
    rung, after = remembered.ladder(memory, run.asked[path], sound, **budgets)
    run.asked[path] = rung > 1
    run.remembers[path] = {**after, "spikes": run.remembers[path]}


_REMEMBERING: dict[str, Callable[..., None]] = {
    "autoclip": functools.partial(_together, remembered.autoclip),
    "zclip": functools.partial(_together, remembered.zclip),
    "adagc": _adagc,
    "running_max": _running_max,
    "norm_stabilizer": functools.partial(_each, remembered.norm_stabilizer),
    "group_ema": functools.partial(_each, remembered.group_ema),
    "skip_spikes": _skip_spikes,
    "skip_norm": _skip_norm,
    "norm_gate": _norm_gate,
    "ladder": _ladder,
}

_POLICIES: dict[str, Callable[..., None]] = {
    "measure": lambda run, names: None,
    "expert_aware": _expert_aware,
    "global_norm": _global_norm,
    "value": _value,
    "parameter_norm": _parameter_norm,
    "group_norm": _group_norm,
    "block_rms": _block_rms,
    "agc": _agc,
    "dreamer_agc": _dreamer_agc,
}

WITHOUT_MEMORY = frozenset({*_POLICIES, "skip_norm", "norm_gate"})
"""Names of the policies of which one step can be repeated without those before it."""
