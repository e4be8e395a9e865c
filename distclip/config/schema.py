"""The JSON Schema (draft 2020-12) of a configuration, for editors and for other programs."""

from __future__ import annotations

import inspect
import math
from typing import Any

from distclip.config.policies import Argument, arguments
from distclip.policies import Policy
from distclip.policies.registry import registered

Schema = dict[str, Any]


def complete(document: Schema) -> Schema:
    """The schema of the whole from that of the ``document`` model, whose policies are open."""
    schema = _plain(document)
    known = registered()
    definitions = schema.setdefault("$defs", {})
    definitions.update({name: _policy_schema(policy) for name, policy in known.items()})
    bare = [name for name, p in known.items() if not any(a.required for a in arguments(p).values())]
    definitions["policy"] = {
        "description": "One policy: a mapping with its name and arguments, or just its name.",
        "anyOf": [{"enum": bare}, *({"$ref": f"#/$defs/{name}"} for name in known)],
    }
    definitions["policies"] = {
        "description": "A policy, or a list of policies: a chain in that order.",
        "anyOf": [
            {"$ref": "#/$defs/policy"},
            {"type": "array", "items": {"$ref": "#/$defs/policy"}, "minItems": 1},
        ],
    }
    either = {"anyOf": [{"$ref": "#/$defs/policies"}, {"type": "null"}]}
    properties = schema["properties"]
    properties["policy"] = {**_described(properties["policy"]), **either}
    for side in ("by_name", "by_part"):
        properties[side] = {
            **_described(properties[side]),
            "anyOf": [{"type": "object", "additionalProperties": either}, {"type": "null"}],
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "distclip configuration",
        **schema,
        "anyOf": [
            {"required": ["policy"], "properties": {"policy": {"not": {"type": "null"}}}},
            *(
                {"required": [side], "properties": {side: {"type": "object", "minProperties": 1}}}
                for side in ("by_name", "by_part")
            ),
        ],
    }


def _described(schema: Schema) -> Schema:
    return {"description": schema["description"]} if "description" in schema else {}


def _policy_schema(policy: type[Policy]) -> Schema:
    properties: Schema = {"name": {"const": policy.name}}
    for argument in arguments(policy).values():
        properties[argument.name] = _argument(argument)
    text = (inspect.getdoc(policy) or "").split("\nArgs:")[0].split("\nRaises:")[0]
    required = [a.name for a in arguments(policy).values() if a.required]
    return {
        "title": policy.name,
        "description": text.strip(),
        "type": "object",
        "properties": properties,
        "required": ["name", *required],
        "additionalProperties": False,
    }


def _argument(argument: Argument) -> Schema:
    schema: Schema = {"$ref": "#/$defs/policies"}
    if argument.adapter is not None:
        schema = _plain(argument.adapter.json_schema())
    elif not argument.required:
        schema = {"anyOf": [schema, {"type": "null"}]}
    if argument.description:
        schema["description"] = argument.description
    if not argument.required:
        schema["default"] = _plain(argument.default)
    return schema


def _plain(value: Any) -> Any:
    """Valid JSON, without pydantic's titles: they repeat the key."""
    if isinstance(value, dict):
        return {
            str(key): _plain(item)
            for key, item in value.items()
            if not (key == "title" and isinstance(item, str))
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value if isinstance(value, (str, int, float, type(None))) else repr(value)
