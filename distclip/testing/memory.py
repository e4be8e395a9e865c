"""The reference for policies with a memory: plain Python numbers and lists, from the publications.

Each function takes what its policy remembers (a dict, empty at first) and gives what it decides,
and what it remembers then. Histories are kept whole here; nothing is clever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from distclip.testing.norms import norm_of_norms

Memory: TypeAlias = dict[str, Any]


def enters_memory(norm: float) -> bool:
    """Whether a norm may enter a memory."""
    return math.isfinite(norm) and norm > 0


def autoclip(
    memory: Memory, norm: float, percentile: float = 10.0, window: int | None = None
) -> tuple[float, Memory]:
    """The threshold; inf where nothing is known. Seetharaman et al. 2020, algorithm 1."""
    history = [*memory.get("history", []), *([norm] if enters_memory(norm) else [])]
    if window is not None:
        history = history[-window:]
    limit = float(np.percentile(history, percentile)) if history else math.inf
    return limit, {"history": history}


def zclip(
    memory: Memory,
    norm: float,
    z_thresh: float = 2.5,
    alpha: float = 0.97,
    warmup_steps: int = 25,
    max_norm: float | None = 1.0,
) -> tuple[float, Memory]:
    """The threshold; inf where the norm is no outlier. arXiv 2504.02507, algorithm 1."""
    ceiling = math.inf if max_norm is None else max_norm
    if not enters_memory(norm):
        return ceiling, memory
    if "mean" not in memory:
        buffer = [*memory.get("buffer", []), norm]
        if len(buffer) < warmup_steps:
            return ceiling, {"buffer": buffer}
        wide = np.array(buffer, np.longdouble)  # squares of norms may leave float64
        return ceiling, {"mean": np.mean(wide), "var": np.var(wide)}
    mean, deviation = memory["mean"], np.sqrt(memory["var"])
    z = (norm - mean) / (deviation + 1e-6)
    limit = mean + z_thresh * deviation / (z / z_thresh) if z > z_thresh else math.inf
    sample = min(norm, limit)
    mean = alpha * mean + (1 - alpha) * sample
    var = alpha * memory["var"] + (1 - alpha) * (sample - mean) ** 2
    return float(min(limit, ceiling)), {"mean": mean, "var": var}


def adagc(
    memory: Memory,
    norms: Mapping[str, float],
    total: float,
    lambda_rel: float = 1.05,
    beta: float = 0.98,
    warmup_steps: int = 100,
    lambda_abs: float = 1.0,
    floor: float = 1e-6,
    max_growth: float | None = None,
) -> tuple[dict[str, float], Memory]:
    """The coefficient of each gradient. arXiv 2502.11034, algorithm 1, raw norms in warm-up."""
    step = memory.get("step", 0)
    gamma, first = dict(memory.get("gamma", {})), dict(memory.get("first", {}))
    warm = step >= warmup_steps
    together = lambda_abs / total if total > lambda_abs else 1.0
    together = math.nan if math.isnan(total) and math.isfinite(lambda_abs) else together
    coefficients = {}
    for name, norm in norms.items():
        known = name in gamma
        limit = lambda_rel * gamma[name] if known else math.inf
        alone = math.nan if known and math.isnan(norm) else 1.0
        coefficients[name] = (limit / norm if norm > limit else alone) if warm else together
        if not enters_memory(norm):
            continue
        if not known:
            new = norm
        elif warm:
            new = beta * gamma[name] + (1 - beta) * min(norm, limit)
        else:
            new = min(gamma[name], norm)
        new = max(new, floor)
        if max_growth is not None and warm and name in first:
            new = min(new, max_growth * first[name])
        gamma[name] = new
        if not warm or name not in first:
            first[name] = new
    step += math.isfinite(total)
    return coefficients, {"step": step, "gamma": gamma, "first": first}


def running_max(
    memory: Memory, largest: Mapping[str, float], theta: float = 0.999
) -> tuple[dict[str, float], Memory]:
    """The bound of each gradient's elements. arXiv 2502.17055, AdaClip, as a plain clamp."""
    mean, seen = dict(memory.get("mean", {})), dict(memory.get("seen", {}))
    bounds = {}
    for name, value in largest.items():
        if enters_memory(value):
            mean[name] = theta * mean.get(name, 0.0) + (1 - theta) * value
            seen[name] = seen.get(name, 0) + 1
        bounds[name] = mean[name] / (1 - theta ** seen[name]) if name in mean else math.inf
    return bounds, {"mean": mean, "seen": seen}


def norm_stabilizer(
    memory: Memory,
    norms: Mapping[str, float],
    gamma1: float = 0.7,
    gamma2: float = 0.9,
    eps: float = 1e-8,
) -> tuple[dict[str, float], Memory]:
    """The coefficient of each gradient. arXiv 2502.17055, AdaGN in the code of Stable-SPAM."""
    moments, coefficients = dict(memory), {}
    for name, norm in norms.items():
        mean, square, seen = moments.get(name, (0.0, 0.0, 0))
        if enters_memory(norm):
            mean = gamma1 * mean + (1 - gamma1) * norm
            square = gamma2 * square + (1 - gamma2) * norm**2
            seen += 1
            moments[name] = (mean, square, seen)
        coefficients[name] = 1.0
        if seen and norm != 0:
            first, second = mean / (1 - gamma1**seen), square / (1 - gamma2**seen)
            coefficients[name] = first / (math.sqrt(second) + eps) / norm
    return coefficients, moments


def group_ema(
    memory: Memory,
    norms: Mapping[str, float],
    high_mult: float = 1.05,
    low_mult: float = 0.0,
    ema_beta: float = 0.98,
    max_down_scale: float = 0.0,
    max_up_scale: float = 1.1,
    high_late: float | None = None,
    low_late: float | None = None,
    late_start: int = 0,
    late_stop: int = 0,
) -> tuple[dict[str, float], Memory]:
    """The coefficient of each gradient. arXiv 2601.11864, with its linear schedule."""
    running, coefficients = dict(memory), {}
    step = running.get("*steps", 0)
    running["*steps"] = step + 1
    late = min(1.0, max(0.0, (step - late_start) / max(1, late_stop - late_start)))
    high_mult += 0.0 if high_late is None else late * (high_late - high_mult)
    low_mult += 0.0 if low_late is None else late * (low_late - low_mult)
    groups: dict[str, list[str]] = {}
    for name in norms:
        words = [word for word in name.split("@")[0].split(".")[:-1] if not word.isdigit()]
        groups.setdefault(words[-1] if words else "", []).append(name)
    for group, members in groups.items():
        norm, scale = norm_of_norms((norms[name] for name in members), 2.0), 1.0
        if group in running:
            lower, upper = running[group] * low_mult, running[group] * high_mult
            if norm > upper:
                scale = max(upper / (norm + 1e-12), max_down_scale)
            elif 0 < norm < lower:
                scale = min(lower / (norm + 1e-12), max_up_scale)
            elif math.isnan(norm):
                scale = math.nan
        coefficients.update(dict.fromkeys(members, scale))
        if enters_memory(norm):
            past = running.get(group, norm * scale)
            running[group] = ema_beta * past + (1 - ema_beta) * norm * scale
    return coefficients, running


def skip_spikes(
    memory: Memory,
    norm: float,
    given_loss: float | None,
    window: int = 128,
    sigma: float = 6.0,
    min_history: int = 64,
    max_consecutive: int = 10,
    loss: bool = False,
    clip_sigma: float | None = None,
) -> tuple[bool, Memory]:
    """Whether to skip. OLMo's skip-step rule, with spikes kept out and series ended."""
    if not math.isfinite(norm):
        return True, memory
    norms, losses = memory.get("norms", []), memory.get("losses", [])
    series = memory.get("series", 0)
    judged = loss and given_loss is not None and math.isfinite(given_loss)
    spike = is_spike(norms, norm, sigma, min_history)
    if judged:
        assert given_loss is not None
        spike = spike or is_spike(losses, given_loss, sigma, min_history)
    if spike and series < max_consecutive:
        return True, {**memory, "series": series + 1}
    if spike:
        norms, losses = [], []
    return False, {
        "norms": [*norms, *([norm] if enters_memory(norm) else [])][-window:],
        "losses": [*losses, *([given_loss] if judged else [])][-window:],
        "series": 0,
    }


def spike_limit(
    memory: Memory, clip_sigma: float | None = None, min_history: int = 64, **others: Any
) -> float:
    """What norms that are not skipped are clipped to; inf for nothing."""
    norms = memory.get("norms", [])
    if clip_sigma is None or len(norms) < min_history:
        return math.inf
    wide = np.array(norms, np.longdouble)
    return float(np.mean(wide) + clip_sigma * np.std(wide, ddof=1))


def is_spike(history: Sequence[float], value: float, sigma: float, least: int) -> bool:
    """Whether a value lies ``sigma`` sample deviations above the mean of its history."""
    if len(history) < least:
        return False
    wide = np.array(history, np.longdouble)  # squares may leave float64
    return bool(value - np.mean(wide) > sigma * np.std(wide, ddof=1))


def ladder(
    memory: Memory,
    spike: bool,
    sound: bool,
    clips: int = 0,
    skips: int = 5,
    recomputes: int = 1,
    rewinds: int = 2,
    calm: int = 100,
) -> tuple[int, Memory]:
    """The rung of a step: 0 for no spike, then clip, skip, recompute, rewind and, 5, abort."""
    budgets = {"clips": clips, "skips": skips, "recomputes": recomputes, "rewinds": rewinds}
    used, quiet = {key: memory.get(key, 0) for key in budgets}, memory.get("quiet", 0)
    if quiet >= calm:
        used |= {"clips": 0, "skips": 0, "recomputes": 0}
    if not spike:
        return 0, {**used, "quiet": quiet + 1}
    for rung, (key, budget) in enumerate(budgets.items(), 1):
        if used[key] < budget and (sound or key != "clips"):
            return rung, {**used, key: used[key] + 1, "quiet": 0}
    return 5, {**used, "quiet": 0}
