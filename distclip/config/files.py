"""Configuration text to plain mappings: strict YAML and JSON, nothing executed.

YAML is read by the rules of YAML 1.2, where PyYAML alone would follow 1.1: ``1e-3`` is a number
and not a string, ``on``, ``off``, ``yes`` and ``no`` are strings and not booleans, ``010`` is ten.
A duplicate key is an error in both formats: whichever of the two values won would be a guess.

What a file can hold is bounded, so that reading one takes less than a second: its length, its
numbers, and what its YAML aliases unfold to. A tag makes nothing but plain values.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from distclip.common.foreign import in_one_line, read_text
from distclip.errors import ConfigurationError

MOST_JSON, MOST_YAML = 2**19, 2**16
"""Bytes. PyYAML reads about 200 of them in a millisecond."""
MOST_NODES = 20_000
"""Keys and values of a YAML file, each counted as often as aliases repeat it."""
MOST_LEVELS = 50
MOST_DIGITS = 309
"""Of an integer; that of a larger one is no float64."""

_EXAMPLE = "policy: {name: global_norm, max_norm: 1.0}"


def read_configuration(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The mapping at the top level of a configuration file.

    JSON where the name ends in ``.json``, or where it ends in nothing known and the text starts
    with ``{``; YAML otherwise.

    Raises:
        ConfigurationError: no such file, not text, not valid (with line and column), empty, or
            something else than a mapping at the top level.
    """
    text = _text(path)
    name = in_one_line(os.fspath(path))
    if not text.strip():
        raise ConfigurationError(f"{name}: the file is empty; write for instance {_EXAMPLE!r}")
    try:
        value = _parse_json(text) if _is_json(name, text) else _parse_yaml(text)
    except _SyntaxError as fault:
        raise ConfigurationError(f"{name}: {in_one_line(fault, 400)}") from None
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


def read_loose(path: str | os.PathLike[str]) -> Mapping[str, Any] | None:
    """What hjson makes of a file: JSON with comments, trailing commas and keys without quotes.

    Returns:
        None where it finds no mapping, or hjson, which DeepSpeed brings, is not installed.

    Raises:
        ConfigurationError: no such file, not text, or a key that appears twice.
    """
    try:
        import hjson  # type: ignore[import-untyped]
    except ImportError:
        return None
    try:
        found = hjson.loads(_text(path), object_pairs_hook=_unique)
    except _SyntaxError as fault:
        raise ConfigurationError(
            f"{in_one_line(os.fspath(path))}: {in_one_line(fault, 400)}"
        ) from None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class _SyntaxError(Exception):
    """What is wrong with the text, and where; the file name is added by the caller."""


def _text(path: str | os.PathLike[str]) -> str:
    try:
        return read_text(path, MOST_JSON)
    except FileNotFoundError:
        where = "" if os.path.isabs(path) else f" (looked in {in_one_line(Path.cwd())})"
        raise ConfigurationError(
            f"{in_one_line(os.fspath(path))}: no such configuration file{where}"
        ) from None


def _is_json(name: str, text: str) -> bool:
    suffix = Path(name).suffix.lower()
    if suffix in (".yaml", ".yml"):
        return False
    return suffix == ".json" or text.lstrip().startswith("{")


# ---- JSON ------------------------------------------------------------------------------------


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
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


def _integer(text: str, base: int = 10) -> int:
    if len(text) > MOST_DIGITS:
        raise _SyntaxError(f"a number of {len(text)} digits; no setting takes so large a one")
    return int(text, base)


# ---- YAML ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain scalars of YAML 1.2, and without duplicate keys."""

    # Class attributes of its own: the parent's tables would be changed for every user of PyYAML.
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - as the stubs have it
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._count = self._depth = 0
        self._sizes: dict[yaml.Node | None, int] = {}
        """How many nodes each finished node unfolds to."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        aliased = isinstance(event, yaml.AliasEvent)
        before = self._count
        self._depth += 1
        if self._depth > MOST_LEVELS:
            raise RecursionError
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not aliased:
            self._count += 1
            self._sizes[node] = self._count - before
        elif node in self._sizes:
            self._count += self._sizes[node]
        else:
            raise _SyntaxError(
                f"line {event.start_mark.line + 1}: the alias *{event.anchor} stands inside of "
                f"what it repeats"
            )
        if self._count > MOST_NODES:
            raise _SyntaxError(f"more than {MOST_NODES:,} keys and values, aliases unfolded")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if node.id != "mapping":  # a tag claims that it is one; PyYAML has its own words for that
            return super().construct_mapping(node, deep)
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
        return _integer(text, 0 if text.lower().startswith(("0x", "0o")) else 10)

    def construct_undefined(self, node: yaml.Node) -> Any:
        raise _SyntaxError(
            f"line {node.start_mark.line + 1}: the tag {node.tag!r} makes no value of a "
            f"configuration; leave it away"
        )


def _scalar(tag: str, pattern: str, first: str, construct: Callable[[_Loader, Any], Any]) -> None:
    """A kind of plain scalar; one that a tag claims to be of the kind has to look like it."""
    form = re.compile(rf"^(?:{pattern})$")

    def checked(loader: _Loader, node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode) and not form.match(node.value):
            raise _SyntaxError(f"line {node.start_mark.line + 1}: {node.value!r} is no {tag}")
        return construct(loader, node)

    name = f"tag:yaml.org,2002:{tag}"
    _Loader.add_implicit_resolver(name, form, list(first))
    _Loader.add_constructor(name, checked)


_scalar("null", r"~|null|Null|NULL|", "~nN", _Loader.construct_yaml_null)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])  # `key:` alone
_scalar("bool", "true|True|TRUE|false|False|FALSE", "tTfF", _Loader.construct_yaml_bool)
_scalar("int", "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", _Loader.construct_integer)
_scalar(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+0123456789.",
    _Loader.construct_yaml_float,
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])
_Loader.add_constructor(None, _Loader.construct_undefined)
for _kind in ("str", "seq", "map"):
    _Loader.add_constructor(
        f"tag:yaml.org,2002:{_kind}", getattr(_Loader, f"construct_yaml_{_kind}")
    )


def _parse_yaml(text: str) -> Any:
    if len(text) > MOST_YAML:
        raise _SyntaxError(
            f"longer than {MOST_YAML:,} characters, which YAML takes its time for; write it as JSON"
        )
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
