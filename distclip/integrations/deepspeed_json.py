"""What a DeepSpeed JSON says of clipping: the ``"distclip"`` section, or ``gradient_clipping``."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from distclip import policies
from distclip._foreign import clean
from distclip.config import Config, Examined, examine, load
from distclip.config.problems import shown
from distclip.errors import ConfigurationError
from distclip.integrations.given import PolicyOrConfig, config_of
from distclip.integrations.patches import replace

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
    section = _placed(document)
    if policy_or_config is not None:
        if section is not None:
            raise ConfigurationError(
                f'the DeepSpeed JSON has a "{SECTION}" section and another policy was given '
                f"(attach(engine, policy), --config or DISTCLIP_CONFIG): remove one of the two"
            )
        return config_of(policy_or_config)
    if section is None:
        return _threshold(document.get(CLIPPING))
    return load(_checked(section, document), name=_NAME)


def examined(document: Mapping[str, Any]) -> Examined | None:
    """As :func:`configured` with nothing else given; runs no code that the section imports."""
    section = _placed(document)
    if section is not None:
        return examine(_checked(section, document), name=_NAME)
    config = _threshold(document.get(CLIPPING))
    return None if config is None else Examined(config, (), ())


def declines(document: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed JSON asks for no clipping at all: 0 for the key, and no section."""
    return document.get(SECTION) is None and CLIPPING in document and _is_off(document[CLIPPING])


_NAME = f"DeepSpeed JSON: {SECTION}"


def _is_off(clipping: object) -> bool:
    return clipping is None or (
        isinstance(clipping, (int, float)) and not isinstance(clipping, bool) and clipping == 0
    )


def _placed(document: Mapping[str, Any]) -> object:
    """The section, if there is one, from where it belongs."""
    for key, value in document.items():
        if key != SECTION and isinstance(value, Mapping) and SECTION in value:
            where = clean(key, 80)
            raise ConfigurationError(
                f'DeepSpeed JSON: {where}.{SECTION}: the "{SECTION}" section stands inside '
                f'"{where}", where nobody reads it; move it to the top level'
            )
    section: object = document.get(SECTION)
    return section


def _checked(section: object, document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A section that stands alone, and in which nothing is left open."""
    clipping = document.get(CLIPPING)
    if not _is_off(clipping):
        raise ConfigurationError(
            f'DeepSpeed JSON: "{CLIPPING}": {shown(clipping)} stands beside a "{SECTION}" section: '
            f'remove "{CLIPPING}" (the section then does all the clipping), or remove the '
            f"section (then the key alone means global_norm({shown(clipping)}))"
        )
    if not isinstance(section, Mapping):
        raise ConfigurationError(
            f"{_NAME}: should be a mapping of keys to values, got {shown(section)}"
        )
    _refuse_auto(section, SECTION)
    return section


def _threshold(clipping: object) -> Config | None:
    if _is_off(clipping):
        return None
    number = isinstance(clipping, (int, float)) and not isinstance(clipping, bool)
    if not number or not clipping > 0:  # type: ignore[operator]
        raise ConfigurationError(
            f'DeepSpeed JSON: {CLIPPING}: must be a number > 0, got {shown(clipping)}; "auto" has '
            f"a value under Accelerate and the Trainer only"
        )
    try:
        return Config(policy=policies.global_norm(clipping))  # type: ignore[arg-type]
    except ConfigurationError as error:
        raise ConfigurationError(f"DeepSpeed JSON: {CLIPPING}: {error}") from None


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


def _refuse_auto(value: Any, path: str, depth: int = 0) -> None:
    if depth > 100:
        raise ConfigurationError(f"DeepSpeed JSON: {SECTION}: nested too deeply, or in a circle")
    if value == "auto":
        raise ConfigurationError(
            f'DeepSpeed JSON: {clean(path, 300)}: "auto" has no value here; write a number. (Under '
            f"`distclip run` it becomes gradient_clipping of Accelerate's plugin, or the Trainer's "
            f"max_grad_norm.)"
        )
    if isinstance(value, (Mapping, list)):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in pairs:
            step = f".{key}" if isinstance(key, str) else f"[{shown(key)}]"
            _refuse_auto(part, path + step, depth + 1)


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
