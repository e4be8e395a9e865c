"""Policies as configuration, read off the policy classes themselves.

Nothing here knows a policy by name. The arguments, their types and defaults are those of the
class's ``__init__``, the descriptions those of its docstring, and the limits stand in the type
hints: so a policy of the user's own is configured, checked and described like a built-in one.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

from pydantic import (
    BeforeValidator,
    PydanticInvalidForJsonSchema,
    PydanticSchemaGenerationError,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from distclip import policies
from distclip.config.problems import Path, Problems, did_you_mean, in_yaml, key_text, said, shown
from distclip.errors import ConfigurationError
from distclip.policies import Policy
from distclip.policies.checks import Limit, limits_of
from distclip.policies.registry import registered


def _infinity(value: object) -> object:
    """JSON has no infinity, so a string stands for it; everything else is pydantic's to judge."""
    if isinstance(value, str) and value.lower().lstrip("+.") in ("inf", "infinity"):
        return math.inf
    return value


def _integral(value: object) -> object:
    """``1e3`` where an integer is meant: YAML and JSON read it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_COMPOSITIONS = {
    "chain": "a list is a chain, policy: [agc, {name: global_norm, max_norm: 1.0}]",
    "by_name": "by_name is a key beside policy",
    "by_part": "by_part is a key beside policy",
}

_Number = Annotated[
    float,
    BeforeValidator(_infinity),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"const": "inf"}]}),
]
_Integer = Annotated[int, BeforeValidator(_integral)]


@dataclass(frozen=True)
class Argument:
    """One argument of a policy class; without an adapter, a policy in the same form."""

    name: str
    adapter: TypeAdapter[Any] | None
    default: Any
    description: str

    @property
    def required(self) -> bool:
        """Whether the argument has no default."""
        return self.default is inspect.Parameter.empty


@functools.cache
def arguments(policy: type[Policy]) -> dict[str, Argument]:
    """The arguments that a configuration can give to a policy class.

    An argument with a default whose type no file can hold (a function, a tensor) is left out.

    Raises:
        ConfigurationError: a type hint that cannot be resolved; a required argument whose type no
            file can hold.
    """
    try:
        hints = _hints(policy)
    except NameError as error:
        raise ConfigurationError(
            f"policy {policy.name!r} ({policy.__qualname__}): a type hint of its __init__ cannot "
            f"be resolved: {error}; define or import it at the top of {policy.__module__}"
        ) from None
    descriptions = _descriptions(policy)
    found = {}
    for parameter in inspect.signature(policy).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = hints.get(parameter.name, Any)
        adapter: TypeAdapter[Any] | None = None
        try:
            if not _is_policy(hint):
                adapter = TypeAdapter(_in_files(hint), config={"strict": True})
                adapter.json_schema()
        except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema):
            if parameter.default is parameter.empty:
                raise ConfigurationError(
                    f"policy {policy.name!r}: its argument {parameter.name} of type "
                    f"{hint} cannot be written in a configuration; give it a "
                    f"default, or build the policy in Python"
                ) from None
            continue
        found[parameter.name] = Argument(
            parameter.name, adapter, parameter.default, descriptions.get(parameter.name, "")
        )
    return found


def build_policy(
    spec: object, path: Path, problems: Problems, unknown: list[str] | None = None
) -> Policy | None:
    """The policy that ``spec`` describes; None after a problem (or several) was noted.

    Args:
        spec: a name, a mapping with ``name`` and arguments, or a list of these: a chain.
        path: where it stands.
        problems: where faults are noted.
        unknown: gets the names that no policy has, which are then no fault.
    """
    if not isinstance(spec, list):
        return _build_one(spec, path, problems, unknown)
    if not spec:
        problems.add(path, "an empty list; give at least one policy, or measure to change nothing")
        return None
    parts = [_build_one(item, (*path, i), problems, unknown) for i, item in enumerate(spec)]
    return policies.chain(*(part for part in parts if part)) if all(parts) else None


def _build_one(
    spec: object, path: Path, problems: Problems, unknown: list[str] | None
) -> Policy | None:
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        example = as_policy(policies.GlobalNorm, 1.0 if isinstance(spec, bool) else spec)
        mend = f"; write {_NOTHING}" if isinstance(spec, bool) else ""
        problems.add(path, f"expected a policy such as {example}, got {shown(spec)}{mend}")
        return None
    policy = _named(spec, path, problems, unknown)
    if policy is None:
        return None
    given, sound = _checked(policy, spec, path, problems, unknown)
    if not sound:
        return None
    try:
        return policy(**given)
    except Exception as error:  # a class of the user's own may raise anything
        _add_refusal(policy, path, error, problems)
        return None


def _named(
    spec: Mapping[Any, Any], path: Path, problems: Problems, unknown: list[str] | None
) -> type[Policy] | None:
    known = registered()
    if "name" not in spec:
        guess = next((as_policy(known[key], spec[key]) for key in spec if key in known), None)
        guess = guess or taken_by(next(iter(spec), ""), spec)
        mend = f"write {guess}" if guess else f"one of {', '.join(known)}"
        problems.add((*path, "name"), f"missing in {shown(spec)}; {mend}")
        return None
    name = spec["name"]
    if unknown is not None and isinstance(name, str) and name not in known:
        unknown.append(name)
        return None
    if not isinstance(name, str) or name not in known:
        hint = "" if problems.full else did_you_mean(key_text(name), known)
        mend = _COMPOSITIONS.get(key_text(name), f"there are {', '.join(sorted(known))}")
        call = re.fullmatch(r"(\w+)[ (]+([\w.=, ]+?)\)?", key_text(name))
        if call and call[1] in known:
            hint, mend = "", f"write {as_policy(known[call[1]], call[2].replace('=', ': '))}"
        elif key_text(name).lower() in ("none", "null", "off", "no", "false"):
            hint, mend = "", f"write {_NOTHING}"
        problems.add(
            (*path, "name"),
            f"no policy is called {shown(name)}{hint}{' ' if hint else '; '}{mend}",
        )
        return None
    return known[name]


_NOTHING = "measure to clip nothing, or null to leave a part alone"


def as_policy(policy: type[Policy], given: object) -> str:
    """How a policy is written in a file, with its arguments, or with its first one."""
    if given is None or given == {}:
        return policy.name
    first = next(iter(arguments(policy)), "")
    if isinstance(given, Mapping):
        text = ", ".join(f"{key_text(k)}: {in_yaml(v)}" for k, v in given.items() if k != "name")
    else:
        text = in_yaml(given) if isinstance(given, (int, float, str)) else "1.0"
    text = text if ":" in text else f"{first}: {text}"
    return f"{{name: {policy.name}, {text}}}"


def taken_by(key: object, spec: Mapping[Any, Any]) -> str | None:
    """A policy that takes ``key`` as an argument, as it is written; None if there is none.

    Of several, the one that ``spec`` names.
    """
    known = registered()
    named = [name for name in known if name in (spec.get("name"), spec.get("policy"))]
    if key == "name":
        return as_policy(known[named[0]], spec if len(spec) > 1 else None) if named else None
    takers = [name for name in (*named, *known) if key in arguments(known[name])]
    return as_policy(known[takers[0]], {key: spec[key]}) if takers else None


def _checked(
    policy: type[Policy],
    spec: Mapping[Any, Any],
    path: Path,
    problems: Problems,
    unknown: list[str] | None,
) -> tuple[dict[str, Any], bool]:
    """The arguments in their types, and whether all is well with them."""
    accepted = arguments(policy)
    given: dict[str, Any] = {}
    sound = True
    for key, value in spec.items():
        if key == "name":
            continue
        if key not in accepted:
            problems.add_unknown((*path, key_text(key)), value, accepted, policy.name)
            sound = False
            continue
        adapter = accepted[key].adapter
        if adapter is None:
            if value is not None or accepted[key].required:
                given[key] = build_policy(value, (*path, key), problems, unknown)
                sound = sound and given[key] is not None
            continue
        try:
            given[key] = adapter.validate_python(value)
        except ValidationError as error:
            problems.add_validation((*path, key), value, error)
            sound = False
    missing = [a.name for a in accepted.values() if a.required and a.name not in spec]
    for name in missing:
        example = f"{{name: {policy.name}, {name}: ...}}"
        problems.add((*path, name), f"missing; {policy.name} needs it: write {example}")
    return given, sound and not missing


def _add_refusal(policy: type[Policy], path: Path, error: Exception, problems: Problems) -> None:
    """Note why the class itself refused, under the key of the argument where it names one."""
    message = said(error).removeprefix(f"{policy.name}: ")
    argument = re.match(r"(\w+)\b(\s*)", message)
    if argument and argument[1] in arguments(policy):
        path = (*path, argument[1])
        message = message[argument.end() :] if argument[2] else message
    problems.add(path, message)


# ---- types and descriptions ------------------------------------------------------------------


def _is_policy(hint: Any) -> bool:
    """Whether an argument is one policy, or a policy and else None or of another type."""
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return hint is Policy or (union and Policy in typing.get_args(hint))


def _in_files(hint: Any) -> Any:
    """A type hint as a file can meet it: numbers as YAML and JSON write them."""
    if hint is float:
        return _Number
    if hint is int:
        return _Integer
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return Union[tuple(_in_files(part) for part in parts)]  # noqa: UP007 - a tuple of types
    if origin is Annotated:
        whole = (_in_files(parts[0]), *parts[1:], *_schema_of(limits_of(hint)))
        return Annotated[whole]
    return hint


def _hints(policy: type[Policy]) -> dict[str, Any]:
    """The type hints of a policy's arguments.

    The ``__init__`` of a dataclass has them as its fields have, and these are understood where they
    were written, which may be in a base of another module.
    """
    fields = {key: f.type for key, f in getattr(policy, "__dataclass_fields__", {}).items()}
    written = inspect.get_annotations(policy.__init__)
    generated = all(fields.get(key) == hint for key, hint in written.items() if key != "return")
    return typing.get_type_hints(policy if generated else policy.__init__, include_extras=True)


def _schema_of(limits: Sequence[Limit]) -> list[WithJsonSchema]:
    """What :class:`distclip.policies.Limit` says, for pydantic; nothing without limits."""
    if not limits:
        return []
    schema: dict[str, Any] = {"type": "integer" if any(x.whole for x in limits) else "number"}
    if all(limit.fits(math.inf) for limit in limits):
        schema = {"anyOf": [schema, {"const": "inf"}]}
    for limit in limits:
        schema.update(limit.bounds)
    return [WithJsonSchema(schema)]


_ARGUMENT = re.compile(r"    (\w+)(?: \([^)]*\))?: (.*)")


def _descriptions(policy: type[Policy]) -> dict[str, str]:
    """The ``Args:`` section of a class's docstring (or its ``__init__``'s)."""
    text = "\n".join(filter(None, (inspect.getdoc(policy), inspect.getdoc(policy.__init__))))
    found: dict[str, str] = {}
    name, inside = "", False
    for line in text.splitlines():
        if not line.startswith(" "):
            inside = line == "Args:" or (inside and not line)
            continue
        start = _ARGUMENT.fullmatch(line) if inside else None
        if start:
            name = start[1]
            found[name] = start[2]
        elif inside and name:
            found[name] += " " + line.strip()
    return {name: text.strip() for name, text in found.items()}
