"""Checks of policy arguments: one wording for all policies."""

from __future__ import annotations

import math
from typing import Any

from distclip.errors import ConfigurationError


def number(policy: str, key: str, value: Any) -> float:
    """``value`` as a float; bools, strings and NaN are refused by name."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        value = float(value)  # numpy scalars, 0-dim tensors
    except OverflowError:
        raise ConfigurationError(
            f"{policy}: {key} is an integer that no float64 holds; give a smaller one, or inf"
        ) from None
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"{policy}: {key} must be a number, got {value!r} ({type(value).__name__})"
        ) from None
    if math.isnan(value):
        raise ConfigurationError(f"{policy}: {key} is NaN; give a number")
    return float(value)


def threshold(policy: str, key: str, value: Any) -> float:
    """A threshold on a norm or an element: >= 0, inf allowed (it measures and never clips)."""
    checked = number(policy, key, value)
    if checked < 0:
        raise ConfigurationError(
            f"{policy}: {key} must be >= 0, got {value!r}; a negative threshold would flip the "
            f"sign of every gradient (math.inf measures without clipping)"
        )
    return checked


def positive(policy: str, key: str, value: Any) -> float:
    """A finite number > 0."""
    checked = number(policy, key, value)
    if checked <= 0 or math.isinf(checked):
        raise ConfigurationError(f"{policy}: {key} must be finite and > 0, got {value!r}")
    return checked


def norm_order(policy: str, value: Any) -> float:
    """The order of a norm: p > 0, or inf (also as the string "inf", as torch takes it)."""
    if isinstance(value, str) and value in ("inf", "Inf"):
        return math.inf
    checked = number(policy, "norm_type", value)
    if checked <= 0:
        raise ConfigurationError(
            f"{policy}: norm_type must be > 0 or inf, got {value!r}; "
            f"2.0 is the Euclidean norm, inf the largest absolute element"
        )
    return checked


def whole(policy: str, key: str, value: Any, least: int) -> int:
    """An integer of at least ``least``; 3.0 counts as one, 3.5 and True do not."""
    checked = number(policy, key, value)
    if not checked.is_integer() or checked < least:
        raise ConfigurationError(
            f"{policy}: {key} must be a whole number of at least {least}, got {value!r}"
        )
    return int(checked)


LONGEST = 1_000_000
"""Samples that a window may hold: 8 MB of float64 numbers in every checkpoint."""


def window(policy: str, value: Any, least: int) -> int:
    """How many samples a policy remembers: an integer from ``least`` to :data:`LONGEST`."""
    checked = whole(policy, "window", value, least)
    if checked > LONGEST:
        raise ConfigurationError(
            f"{policy}: window must be at most {LONGEST:,}, got {value!r}: every number of it is "
            f"kept in memory and in checkpoints"
        )
    return checked


def fraction(policy: str, key: str, value: Any) -> float:
    """A share of the past: 0 <= value < 1."""
    checked = number(policy, key, value)
    if not 0 <= checked < 1:
        raise ConfigurationError(f"{policy}: {key} must be >= 0 and < 1, got {value!r}")
    return checked
