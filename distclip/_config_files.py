"""Configuration text to plain mappings: strict YAML and JSON, nothing executed.

YAML is read by the rules of YAML 1.2, where PyYAML alone would follow 1.1: ``1e-3`` is a number
and not a string, ``on``, ``off``, ``yes`` and ``no`` are strings and not booleans, ``010`` is ten.
A duplicate key is an error in both formats: whichever of the two values won would be a guess.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from distclip.errors import ConfigurationError

_EXAMPLE = "policy: {name: global_norm, max_norm: 1.0}"


def read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The mapping at the top level of a configuration file.

    JSON where the name ends in ``.json``, or where it ends in nothing known and the text starts
    with ``{``; YAML otherwise.

    Raises:
        ConfigurationError: no such file, not text, not valid (with line and column), empty, or
            something else than a mapping at the top level.
    """
    name = os.fspath(path)
    text = _text(name)
    if not text.strip():
        raise ConfigurationError(f"{name}: the file is empty; write for instance {_EXAMPLE!r}")
    try:
        value = _parse_json(text) if _is_json(name, text) else _parse_yaml(text)
    except _SyntaxError as fault:
        raise ConfigurationError(f"{name}: {fault}") from None
    except RecursionError:
        raise ConfigurationError(f"{name}: nested too deeply for a configuration") from None
    if value is None:
        raise ConfigurationError(
            f"{name}: the file holds nothing but comments; write for instance {_EXAMPLE!r}"
        )
    if not isinstance(value, dict):
        raise ConfigurationError(
            f"{name}: expected keys such as {_EXAMPLE!r} at the top level, "
            f"got a {type(value).__name__}"
        )
    return value


class _SyntaxError(Exception):
    """What is wrong with the text, and where; the file name is added by the caller."""


def _text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigurationError(
            f"{name}: no such configuration file (looked in {Path.cwd()})"
            if not os.path.isabs(name)
            else f"{name}: no such configuration file"
        ) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigurationError(f"{name}: cannot be read as text: {error}") from None


def _is_json(name: str, text: str) -> bool:
    suffix = Path(name).suffix.lower()
    if suffix in (".yaml", ".yml"):
        return False
    return suffix == ".json" or text.lstrip().startswith("{")


# ---- JSON ------------------------------------------------------------------------------------


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise _SyntaxError(
            f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise _SyntaxError(f"key {key!r} appears twice in the same object; remove one")
        mapping[key] = value
    return mapping


# ---- YAML ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain scalars of YAML 1.2, and without duplicate keys."""

    # A class attribute of its own: the parent's table would be changed for every user of PyYAML.
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - as the stubs have it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # Checked here and not on the finished dict, where the first of the two is already gone.
        # Merged keys (<<) may be overridden, that is their purpose, so only written ones count.
        lines: dict[Hashable, int] = {}
        written: list[tuple[yaml.Node, yaml.Node]] = getattr(node, "written", None) or node.value
        for key_node, _ in written:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # PyYAML has its own words for that
            if key in lines:
                raise _SyntaxError(
                    f"line {line}: key {key!r} appears twice, first in line {lines[key]}; "
                    f"remove one"
                )
            lines[key] = line
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if not hasattr(node, "written"):
            node.written = list(node.value)  # type: ignore[attr-defined]
        super().flatten_mapping(node)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text.lower().startswith(("0x", "0o")) else int(text)


def _resolve(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first) or [""]
    )


_resolve("null", r"~|null|Null|NULL", "~nN")
_resolve("null", r"", "")  # `key:` without a value
_resolve("bool", r"true|True|TRUE|false|False|FALSE", "tTfF")
_resolve("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789")
_resolve(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+0123456789.",
)
_resolve("merge", r"<<", "<")
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _SyntaxError(
            f"{where}not valid YAML: {error.problem or error.context}{_hint(error)}"
        ) from None
    except yaml.YAMLError as error:
        raise _SyntaxError(f"not valid YAML: {error}") from None


def _hint(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or ""
    if "alias" in (error.context or "") + problem:
        return '; quote a name pattern that starts with "*"'
    if "'\\t'" in problem:
        return "; indent with spaces, not tabs"
    return ""
