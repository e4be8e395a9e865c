"""What is wrong with a configuration: collected, worded and raised all at once."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from distclip.common.foreign import in_one_line
from distclip.errors import ConfigurationError

Path = tuple[str | int, ...]
"""Keys and indices that lead to a value, from the top level of the configuration."""


MOST_FAULTS = 20
"""Faults that are told; the others are counted."""


class Problems:
    """A list of faults, one line each, with the key path of each."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, path: Path, message: str) -> None:
        """Add one problem to the list."""
        where = "" if self.full else render(path)
        self._lines.append(in_one_line(f"{where}: {message}" if where else message, 1000))

    def add_validation(
        self,
        path: Path,
        value: object,
        error: ValidationError,
        known: Mapping[str, Iterable[str]] | None = None,
        written: Callable[[str, object], str | None] = lambda key, value: None,
    ) -> None:
        """Note what pydantic found in ``value``, which stands at ``path``.

        ``known`` are the keys that each mapping of fixed keys may have, by its key path;
        ``written(key_path, value)`` is the right form of what was probably meant.
        """
        # The branches of a union come as separate faults at locations that are no keys: joined.
        found: dict[Path, list[ErrorDetails]] = {}
        for fault in error.errors(include_url=False):
            location = _within(value, fault["loc"])
            if fault["type"] == "missing":
                self.add((*path, *location, *fault["loc"][-1:]), "missing")
            elif fault["type"] == "extra_forbidden":
                whose = render((path + location)[:-1])
                keys = (known or {}).get(whose, ())
                self.add_unknown(path + location, _at(value, location), keys, whose)
            else:
                found.setdefault(location, []).append(fault)
        for location, faults in found.items():
            culprit = _at(value, location)
            sentence = " or ".join(dict.fromkeys(map(_sentence, faults)))
            hint = "".join(_nearest_literal(culprit, fault) for fault in faults)
            key = path + location
            form = written(render(key), culprit) or _form(culprit, [f["type"] for f in faults])
            if form and not hint:
                last = key[-1] if str(key[-1]).isidentifier() else f'"{key[-1]}"'
                hint = f"; write {last}: {form}" if isinstance(key[-1], str) else f"; write {form}"
            self.add(key, f"{sentence}, got {shown(culprit)}{hint}")

    def add_unknown(self, path: Path, value: object, known: Iterable[str], whose: str) -> None:
        """Note the key at the end of ``path``, which is none of the ``known`` ones of ``whose``."""
        if self.full:
            self.add(path, "unknown key")
            return
        known = list(known)
        takes = ", ".join(known) if known else "no arguments"
        hint = did_you_mean(str(path[-1]), known)
        separator = " " if hint else "; "
        self.add(path, f"unknown key (value {shown(value)}){hint}{separator}{whose} takes {takes}")

    @property
    def full(self) -> bool:
        """Whether further faults are only counted: looking for the nearest name takes its time."""
        return len(self._lines) >= MOST_FAULTS

    def __bool__(self) -> bool:
        return bool(self._lines)

    def raise_if_any(self, source: str) -> None:
        """Raise one ``ConfigurationError`` with all lines, naming the ``source``."""
        source, count = in_one_line(source), len(self._lines)
        if count == 1:
            raise ConfigurationError(f"{source}: {self._lines[0]}")
        if count:
            lines = "".join(f"\n  {line}" for line in self._lines[:MOST_FAULTS])
            more = f"\n  and {count - MOST_FAULTS:,} more" if count > MOST_FAULTS else ""
            raise ConfigurationError(f"{source}: {count:,} problems{lines}{more}")


def render(path: Path) -> str:
    """``("policy", 1, "unit_dims", "*.bias")`` as ``policy[1].unit_dims["*.bias"]``."""
    text = ""
    for part in path:
        if isinstance(part, str):
            part = in_one_line(part, 80)
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier():
            text += f".{part}" if text else part
        else:
            text += f'["{part}"]'
    return text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``, did you mean 'x'?`` with the nearest of the ``known`` names, or nothing."""
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {nearest[0]!r}?" if nearest else ""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def shown(value: object) -> str:
    """A ``repr`` that stays on one line, whatever the file holds."""
    try:
        return _short.repr(value)
    except Exception:  # an integer of over 4,300 digits, an object whose repr fails
        return f"<{type(value).__name__}>"


def in_yaml(value: object) -> str:
    """A value as a file has it, on one line, whatever it is."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return shown(value)[1:-1] if isinstance(value, str) else shown(value)


_WORDS = {
    "model_type": "should be a mapping of keys to values",
    "dict_type": "should be a mapping of keys to values",
    "sequence_str": "should be a list",
    "list_type": "should be a list",
    "bool_type": "should be true or false",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "string_type": "should be a text",
}
"""pydantic's own words, where they speak of Python classes to the writer of a file."""

_CLASSES = {"Sequence": "a list", "Mapping": "a mapping of keys to values"}


def _sentence(fault: ErrorDetails) -> str:
    if fault["loc"][-1:] == ("[key]",):
        return "keys must be strings (quote them)"
    if fault["type"] == "is_instance_of":
        name = fault["ctx"]["class"]
        return f"should be {_CLASSES.get(name, name)}"
    message = _WORDS.get(fault["type"], fault["msg"])
    return message.removeprefix("Value error, ").removeprefix("Input ")


def _within(value: Any, location: Sequence[str | int]) -> Path:
    """The part of pydantic's location that really leads into ``value``."""
    kept: list[str | int] = []
    for part in location:
        keys = range(len(value)) if isinstance(value, (list, tuple)) else value
        if not isinstance(keys, (Mapping, range)) or part not in keys:
            break
        value = value[part]
        kept.append(part)
    return tuple(kept)


def _at(value: Any, location: Path) -> object:
    for part in location:
        value = value[part]
    return value


def _form(value: object, types: Iterable[str]) -> str | None:
    """The right form of a value that pydantic finds of a wrong type; None where none is near."""
    for kind in types:
        if kind == "bool_type" and in_yaml(value).lower() in ("1", "yes", "on", "true"):
            return "true"
        if kind == "bool_type" and in_yaml(value).lower() in ("0", "no", "off", "false"):
            return "false"
        if kind in ("list_type", "is_instance_of") and type(value) in (str, int):
            return f"[{in_yaml(value)}]"
        if kind in ("int_type", "float_type") and isinstance(value, str):
            return value if re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", value) else None
    return None


def _nearest_literal(value: object, fault: ErrorDetails) -> str:
    """The nearest of the words that were expected, where one of a few words was."""
    if fault["type"] != "literal_error":
        return ""
    return did_you_mean(in_yaml(value), re.findall(r"'([^']*)'", fault["ctx"]["expected"]))


def key_text(key: object) -> str:
    """The text of a mapping key, of any type, for a key path."""
    return key if isinstance(key, str) else shown(key)


def said(error: BaseException) -> str:
    """The message of an exception of others, on one line."""
    try:
        return in_one_line(error, 400)
    except Exception:
        return "(its message cannot be shown)"
