"""What a DeepSpeed JSON says of clipping: the ``"distclip"`` section, or ``gradient_clipping``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from distclip import policies
from distclip.config import Config, load
from distclip.errors import ConfigurationError
from distclip.policies import Policy

PolicyOrConfig = Policy | str | os.PathLike[str] | Mapping[str, Any] | Config

SECTION, CLIPPING = "distclip", "gradient_clipping"


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
