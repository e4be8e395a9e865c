"""Parts of a model, in words: by name, kind, optimizer, or a key of an optimizer parameter group.

A part is a line of text, so that it is the same in Python, in a configuration file, in a checkpoint
and in an error message::

    kind=matrix
    optimizer=Muon
    group.clip=False
    kind=embedding|bias
    name=blocks.*, not kind=norm
    kind=embedding or name=head.*
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from distclip.errors import ConfigurationError
from distclip.policies.protocol import ParameterInfo, matches

GROUP = "group."
KEYS = ("name", "kind", "optimizer", f"{GROUP}KEY")


def _named(*patterns: str) -> Callable[[ParameterInfo], bool]:
    """Whether a component of the name (between dots) matches one of these expressions."""
    known = re.compile("|".join(patterns))

    def holds(parameter: ParameterInfo) -> bool:
        return any(known.fullmatch(part) for part in parameter.name.split("."))

    return holds


_embedding = _named(r".*embed.*", "wte", "wpe", "tok_emb.*", "pos_emb.*")
_norm = _named(r".*norm\d*", r"(.*_)?ln(_.*|\d+)?", r"bn\d*")
_expert = _named(r"(?!shared_).*experts?(_\d+)?")
_lora = _named(r"lora_.*")


def _is_module(parameter: ParameterInfo, word: str) -> bool:
    return any(word in each for each in parameter.module)


PARAMETER_KINDS: dict[str, Callable[[ParameterInfo], bool]] = {
    "matrix": lambda parameter: len(parameter.shape) == 2,
    "vector": lambda parameter: len(parameter.shape) < 2,
    "embedding": lambda parameter: (
        _is_module(parameter, "Embedding")
        or (
            len(parameter.shape) > 1
            and _embedding(parameter)
            and not _is_module(parameter, "Linear")  # an output layer, such as embed_out
        )
    ),
    "norm": lambda parameter: (
        len(parameter.shape) < 2 and (_is_module(parameter, "Norm") or _norm(parameter))
    ),
    "bias": lambda parameter: parameter.name.rpartition(".")[2].endswith("bias"),
    "expert": lambda parameter: "@" in parameter.name or _expert(parameter),
    "lora": _lora,
}
"""Kind -> whether a parameter is of it; a parameter may be of several."""


@dataclass(frozen=True, slots=True)
class _Condition:
    """``key=value|value``, or its contrary. Values are patterns as of ``fnmatch``."""

    key: str
    values: tuple[str, ...]
    denied: bool

    def holds(self, parameter: ParameterInfo) -> bool:
        return any(map(self._is, [parameter] * len(self.values), self.values)) != self.denied

    def _is(self, parameter: ParameterInfo, value: str) -> bool:
        if self.key == "name":
            return matches(parameter.name, value)
        if self.key == "kind":
            return PARAMETER_KINDS[value](parameter)
        if self.key == "optimizer":
            return any(fnmatch.fnmatchcase(each, value) for each in parameter.optimizer)
        found = dict(parameter.options).get(self.key.removeprefix(GROUP))
        return found is not None and fnmatch.fnmatchcase(found.lower(), value.lower())


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a model: some of its parameters.

    ``text``: what :func:`part` was given. ``options``: the keys of parameter groups that it reads.
    """

    text: str
    clauses: tuple[tuple[_Condition, ...], ...]

    def holds(self, parameter: ParameterInfo) -> bool:
        """Whether a parameter belongs to it."""
        return any(all(each.holds(parameter) for each in clause) for clause in self.clauses)

    @property
    def options(self) -> frozenset[str]:
        """Keys of optimizer parameter groups that decide on it."""
        keys = (each.key for each in self._conditions() if each.key.startswith(GROUP))
        return frozenset(key.removeprefix(GROUP) for key in keys)

    @property
    def reads_optimizer(self) -> bool:
        """Whether it depends on which optimizer steps a parameter, or on its parameter group."""
        return bool(self.options) or any(each.key == "optimizer" for each in self._conditions())

    @property
    def reads_modules(self) -> bool:
        """Whether it depends on the module that a parameter belongs to."""
        return any(each.key == "kind" for each in self._conditions())

    def _conditions(self) -> Iterator[_Condition]:
        for clause in self.clauses:
            yield from clause


@lru_cache(maxsize=256)
def part(text: str) -> Part:
    """Read a part of a model.

    Args:
        text: conditions ``key=value``, of which all hold (``,``) or one does (``or``, which binds
            less). ``|`` separates values, ``not`` in front of a condition denies it.

            * ``name``: a name pattern (``*``, ``?``, ``[...]``, case-sensitive).
            * ``kind``: ``matrix`` (2 dims), ``vector`` (fewer), ``embedding``, ``norm``, ``bias``,
              ``expert``, ``lora``. Embeddings and norms are known by the class of their module
              (where the clipper was given modules) or by their names, the others by name or shape.
            * ``optimizer``: the class of the optimizer that steps it, or a base class of that; a
              pattern too.
            * ``group.KEY``: the value of a key of its optimizer parameter group, as ``str`` writes
              it, in upper or lower case: ``group.clip=False`` for ``{"params": [...], "clip":
              False}``.

    Raises:
        ConfigurationError: what of the text cannot be read.
    """
    if not isinstance(text, str):
        raise ConfigurationError(
            f"a part of a model is a text such as 'kind=matrix', got {type(text).__name__}"
        )
    clauses = [
        tuple(_condition(each.strip(), text) for each in clause.split(","))
        for clause in re.split(r"\s+or\s+", text)
    ]
    return Part(text, tuple(clauses))


def _condition(words: str, text: str) -> _Condition:
    denied = words.startswith("not ")
    key, equals, right = words.removeprefix("not ").partition("=")
    key, values = key.strip(), tuple(value.strip() for value in right.split("|"))
    if not equals or not all(values):
        raise ConfigurationError(
            f"part {text!r}: {words!r} is no condition key=value; write for instance "
            f"'kind=matrix', 'optimizer=Muon', 'group.clip=False' or 'name=*.bias'"
        )
    if key not in KEYS[:3] and not (key.startswith(GROUP) and len(key) > len(GROUP)):
        raise ConfigurationError(
            f"part {text!r}: there is no key {key!r}; the keys are {', '.join(KEYS)}"
        )
    unknown = [value for value in values if key == "kind" and value not in PARAMETER_KINDS]
    if unknown:
        raise ConfigurationError(
            f"part {text!r}: there is no kind {unknown[0]!r}; the kinds are "
            f"{', '.join(PARAMETER_KINDS)}"
        )
    return _Condition(key, values, denied)
