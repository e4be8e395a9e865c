"""The reference for compositions: who is responsible for which parameters, and the norm shown."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any


def side_by_side(policy: Mapping[str, Any], dims: Mapping[str, int]) -> list[tuple[list[str], Any]]:
    """The parameters of each part of a ``by_name`` or ``by_part``, and the part's policy.

    Args:
        policy: ``{"by_name": {pattern: policy}, "default": policy}``, or the same with ``by_part``.
        dims: parameter name -> the number of its dims.
    """
    by_name = "by_name" in policy
    left, split = list(dims), []
    for key, sub_policy in policy["by_name" if by_name else "by_part"].items():
        chosen = [
            name
            for name in left
            if (fnmatch.fnmatchcase(name, key) if by_name else is_in(key, name, dims[name]))
        ]
        left = [name for name in left if name not in chosen]
        split.append((chosen, sub_policy))
    return [*split, (left, policy.get("default"))]


def is_in(text: str, name: str, ndim: int) -> bool:
    """Whether a parameter is in a part of the model, as far as name and shape tell."""
    kinds = {
        "matrix": ndim == 2,
        "vector": ndim < 2,
        "bias": name.endswith("bias"),
        "expert": "expert" in name or "@" in name,
        "embedding": ndim > 1 and "embed" in name,
        "norm": ndim < 2 and "norm" in name,
        "lora": "lora_" in name,
    }

    def true(condition: str) -> bool:
        key, values = condition.replace("not ", "").strip().split("=")
        found = [kinds[v] if key == "kind" else fnmatch.fnmatchcase(name, v)
                 for v in values.split("|")]  # fmt: skip
        return any(found) != condition.strip().startswith("not ")

    return any(all(map(true, clause.split(","))) for clause in text.split(" or "))


def norm_type(policy: Any) -> float:
    """The order of the norms in a report: that of the first policy that reads norms, else 2."""
    found = _found(policy)
    return 2.0 if found is None else found


def _found(policy: Any) -> float | None:
    if policy is None:
        return None
    if isinstance(policy, Mapping) and "spikes" in policy:
        return _found(policy["spikes"])
    if isinstance(policy, Mapping) and "name" in policy:
        # Policies that clamp scale by no norm.
        reads = None if policy["name"] in ("value", "running_max") else 2.0
        return float(policy["norm_type"]) if "norm_type" in policy else reads
    stages = policy
    if isinstance(policy, Mapping):
        parts = policy["by_name"] if "by_name" in policy else policy["by_part"]
        stages = [*parts.values(), policy.get("default")]
    found = (_found(stage) for stage in stages)
    return next((order for order in found if order is not None), None)


def reduced_dims(
    name: str, ndim: int, unit: str, unit_dims: Mapping[str, Sequence[int]]
) -> tuple[int, ...]:
    """The dims of a parameter that a unit's norm is taken over."""
    given = (dims for pattern, dims in unit_dims.items() if fnmatch.fnmatchcase(name, pattern))
    kept = next(given, (0,) if unit == "row" and ndim > 1 else ())
    return tuple(dim for dim in range(ndim) if dim not in kept)
