"""The right form of a plain value where a key takes a mapping or a list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distclip.config.log import PLACES
from distclip.config.problems import in_yaml

_FORMS: dict[str, tuple[str, object]] = {
    "by_name": ('{{"{}": null}}', "*.bias"),
    "by_part": ('{{"{}": null}}', "optimizer=Muon"),
    "log": ("{{jsonl: {}}}", "runs/clip.jsonl"),
    "log.jsonl": ("{}", "runs/clip.jsonl"),
    "log.tensorboard": ("{}", "runs/tensorboard"),
    **dict.fromkeys(("log.wandb", "log.mlflow", "log.trackio"), ("{}", "my_project")),
    "log.accelerate": ("{}", "true"),
    "log.modules": ("{} (null: none)", 2),
    "log.noise_scale": ("{{batch: {}}}", 256),
    "log.states": ("{{exploding: {}}}", 100),
    "log.states.normal": ("[1.0, {}]", 10),
    "imports": ("[{}]", "my_project.clipping"),
    "ratios": ("{} (null: never)", 10),
    "exponents": ("{} (null: never)", 100),
    "stuck_after": ("{} (null: no limit)", 600),
}
"""Key path -> the form of its value, and an example of what goes into that."""


def right_form(key: str, value: Any) -> str | None:
    """The right form of a plain value, such as a path where the mapping of ``log`` belongs."""
    if key not in _FORMS or isinstance(value, Mapping):
        return None
    form, example = _FORMS[key]
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if key == "log" and value in PLACES:
        return f"{{{value}: {right_form(f'log.{value}', None)}}}"
    if key == "imports" and isinstance(value, str):
        value = module_name(value)
    fits = type(value) is type(example) and form != "{}" and "(null" not in form
    return form.format(in_yaml(value if fits and (key != "log" or "." in value) else example))


def module_name(file: str) -> str:
    """The name of a module that is given as a file."""
    return file.removesuffix(".py").strip("./").replace("/", ".")
