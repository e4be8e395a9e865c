"""What a DeepSpeed JSON says of clipping: the ``"distclip"`` section, or ``gradient_clipping``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from distclip import policies
from distclip.common.foreign import in_one_line
from distclip.config import Config, Examined, examine, files, load
from distclip.config.problems import shown
from distclip.errors import ConfigurationError
from distclip.integrations import deepspeed_modes
from distclip.integrations.given import PolicyOrConfig, config_of
from distclip.integrations.patches import replace

SECTION, CLIPPING = "distclip", "gradient_clipping"
_JSON = "DeepSpeed JSON"
_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization")
"""Some of these are in every DeepSpeed JSON."""


def read_deepspeed_json(path: str | os.PathLike[str]) -> tuple[Mapping[str, Any] | None, bool]:
    """The content of a DeepSpeed JSON, as ``deepspeed.initialize`` reads it.

    That is by hjson: with comments, trailing commas and keys without quotes.

    Returns:
        The mapping, None for JSON of something else; and whether it is plain JSON, which is all
        that Accelerate and the Trainer read.

    Raises:
        ConfigurationError: no such file, or one that cannot be read.
    """
    plain = True
    try:
        found = files.read_configuration(path)
    except ConfigurationError:
        plain = False
        loose = files.read_loose(path)
        if loose is None:
            raise
        found = loose
    theirs = any(_is_meant(key) for key in found) or not found.keys().isdisjoint((CLIPPING, *_KEYS))
    if not plain and not theirs:
        files.read_configuration(path)  # which says what is wrong with it
    return (found if theirs else None), plain


def _is_meant(key: object) -> bool:
    """Whether a key is the section's name, or was meant to be."""
    letters = "".join(filter(str.isalpha, key)).lower() if isinstance(key, str) else ""
    return bool(difflib.get_close_matches(letters, [SECTION], 1, 0.85))


def configured(
    document: Mapping[str, Any],
    policy_or_config: PolicyOrConfig | None = None,
    *,
    name: str = _JSON,
) -> Config | None:
    """The one configuration that is meant, by a DeepSpeed JSON and what else was given.

    Args:
        document: the JSON, as a mapping.
        policy_or_config: what was given beside it; it also replaces ``gradient_clipping``.
        name: of the file, for messages.

    Returns:
        None: there is none.

    Raises:
        ConfigurationError: several, or a bad one; names the key and the mend.
    """
    section = _placed(document, name)
    if policy_or_config is not None:
        if section is not None:
            raise ConfigurationError(
                f'the DeepSpeed JSON has a "{SECTION}" section and another policy was given '
                f"(attach(engine, policy), --config or DISTCLIP_CONFIG): remove one of the two"
            )
        return config_of(policy_or_config)
    if section is None:
        return _threshold(document.get(CLIPPING), name)
    return load(_checked(section, document, name), name=f"{name}: {SECTION}")


def examined(document: Mapping[str, Any], *, name: str = _JSON) -> Examined | None:
    """As :func:`configured` with nothing else given; runs no code that the section imports.

    Raises:
        ConfigurationError: also of a mode of DeepSpeed in which distclip cannot clip, which else
            is told when there is an engine.
    """
    section = _placed(document, name)
    found: Examined | None
    if section is not None:
        found = examine(_checked(section, document, name), name=f"{name}: {SECTION}")
    else:
        config = _threshold(document.get(CLIPPING), name)
        found = None if config is None else Examined(config, (), ())
    if found is not None:
        deepspeed_modes.refuse_document(document, name)
    return found


def declines(document: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed JSON asks for no clipping at all: 0 for the key, and no section."""
    return document.get(SECTION) is None and CLIPPING in document and _is_off(document[CLIPPING])


def _is_off(clipping: object) -> bool:
    return clipping is None or (
        isinstance(clipping, (int, float)) and not isinstance(clipping, bool) and clipping == 0
    )


def _placed(document: Mapping[str, Any], name: str) -> object:
    """The section, if there is one, from where it belongs."""
    for key, value in document.items():
        where = in_one_line(key, 80)
        if key != SECTION and _is_meant(key):
            raise ConfigurationError(
                f"{name}: {where}: unknown key, which DeepSpeed passes over in silence: did you "
                f'mean "{SECTION}"?'
            )
        inner = [each for each in value if _is_meant(each)] if isinstance(value, Mapping) else []
        if key != SECTION and inner:
            raise ConfigurationError(
                f'{name}: {where}.{in_one_line(inner[0], 80)}: the "{SECTION}" section stands '
                f'inside "{where}", where it has no effect; move it to the top level, as '
                f'"{SECTION}"'
            )
    section: object = document.get(SECTION)
    return section


def _checked(section: object, document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section that stands alone, and in which nothing is left open."""
    clipping = document.get(CLIPPING)
    if not _is_off(clipping):
        raise ConfigurationError(
            f'{name}: "{CLIPPING}": {shown(clipping)} stands beside a "{SECTION}" section: '
            f'remove "{CLIPPING}" (the section then does all the clipping), or remove the '
            f"section (then the key alone means global_norm({shown(clipping)}))"
        )
    if not isinstance(section, Mapping):
        raise ConfigurationError(
            f"{name}: {SECTION}: should be a mapping of keys to values, got {shown(section)}"
        )
    _refuse_auto(section, SECTION, name)
    return section


def _threshold(clipping: object, name: str) -> Config | None:
    if _is_off(clipping):
        return None
    number = isinstance(clipping, (int, float)) and not isinstance(clipping, bool)
    if not number or not clipping > 0:  # type: ignore[operator]
        why = f". {_AUTO}" if clipping == "auto" else ""
        raise ConfigurationError(
            f"{name}: {CLIPPING}: must be a number > 0, got {shown(clipping)}{why}"
        )
    try:
        return Config(policy=policies.global_norm(clipping))  # type: ignore[arg-type]
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {CLIPPING}: {error}") from None


_AUTO = (
    '"auto" is filled in by what stands above DeepSpeed alone: the Trainer takes its '
    "max_grad_norm; Accelerate, under `distclip run`, the gradient_clipping of its DeepSpeedPlugin "
    "(in its YAML: gradient_clipping of deepspeed_config); under deepspeed.initialize alone it has "
    "no value"
)


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
    _refuse_auto(document[SECTION], SECTION, _JSON)


def _resolved(section: Any, value: float) -> Any:
    if isinstance(section, Mapping):
        return {key: _resolved(part, value) for key, part in section.items()}
    if isinstance(section, list):
        return [_resolved(part, value) for part in section]
    return value if section == "auto" else section


def _refuse_auto(value: Any, path: str, name: str, depth: int = 0) -> None:
    if depth > 100:
        raise ConfigurationError(f"{name}: {SECTION}: nested too deeply, or in a circle")
    if value == "auto":
        raise ConfigurationError(
            f'{name}: {in_one_line(path, 300)}: "auto" has no value here; write a number. {_AUTO}'
        )
    if isinstance(value, (Mapping, list)):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in pairs:
            step = f".{key}" if isinstance(key, str) else f"[{shown(key)}]"
            _refuse_auto(part, path + step, name, depth + 1)


def configured_of(engine: Any, policy_or_config: PolicyOrConfig | None) -> Config:
    """The one configuration of an engine.

    Raises:
        ConfigurationError: none, several, or a bad one.
    """
    config = configured(json_of(engine._config), policy_or_config)
    if config is None:
        raise ConfigurationError(
            f'no policy: the DeepSpeed JSON has neither a "{SECTION}" section nor '
            f'"{CLIPPING}" > 0; write "{SECTION}": {{"policy": {{"name": "global_norm", '
            f'"max_norm": 1.0}}}}. For an engine that `distclip run` is not to clip, write '
            f'"{CLIPPING}": 0.0'
        )
    return config


def resolve_for_trainer(module: ModuleType) -> None:
    """Give the Trainer's ``max_grad_norm`` to an ``"auto"`` in the section."""

    def process(original: Any, self: Any, args: Any, *more: Any, **kwargs: Any) -> Any:
        resolve_auto(self.config, args.max_grad_norm)
        return original(self, args, *more, **kwargs)

    replace(module.HfTrainerDeepSpeedConfig, "trainer_config_process", process)


def json_of(config: Any) -> Mapping[str, Any]:
    """The JSON behind a ``DeepSpeedConfig``; empty where it keeps none."""
    document = getattr(config, "_param_dict", None)
    return document if isinstance(document, Mapping) else {}
