"""The JSON Schema, policies of one's own, and the digest that ranks compare."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest

from distclip import config, policies
from distclip.policies import checks, registry
from tests.config.writing import Write, fault


@dataclass(frozen=True)
class Halve(policies.Policy):
    """Halve the gradients now and then.

    Args:
        every: how often,
            in steps.
        share: of the parameters, 0 to 1.
        most: at most so much.
        limit: none by default.
        key: used in Python only.
        parts: too.
    """

    every: Annotated[int, policies.Limit(">= 1", whole=True, minimum=1)]
    share: float = 0.5
    most: checks.Share | None = None
    limit: float = math.inf
    key: Callable[[int], int] | None = None
    parts: Sequence[policies.Policy] = ()
    name: ClassVar[str] = "halve"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"a share of {self.share} is none")

    def update(self, statistics: Any, state: Any) -> Any:
        return (), state


@pytest.fixture
def halve() -> Iterator[None]:
    policies.register(Halve)
    yield
    registry._registered.pop("halve")


@pytest.mark.usefixtures("halve")
def test_a_policy_of_ones_own() -> None:
    assert config.load({"policy": {"name": "halve", "every": 1e3}}).policy == Halve(1000)
    assert "policy.every: must be >= 1, got 0" in fault({"policy": {"name": "halve", "every": 0}})
    assert "policy: a share of 2.0" in fault({"policy": {"name": "halve", "every": 1, "share": 2}})
    assert "should be a whole number" in fault({"policy": {"name": "halve", "every": 1.5}})
    assert config.json_schema()["$defs"]["halve"] == {
        "title": "halve",
        "description": "Halve the gradients now and then.",
        "type": "object",
        "properties": {
            "name": {"const": "halve"},
            "every": {"type": "integer", "minimum": 1, "description": "how often, in steps."},
            "share": {
                "anyOf": [{"type": "number"}, {"const": "inf"}], "default": 0.5,
                "description": "of the parameters, 0 to 1.",
            },
            "most": {
                "anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}],
                "default": None, "description": "at most so much.",
            },
            "limit": {
                "anyOf": [{"type": "number"}, {"const": "inf"}], "default": "inf",
                "description": "none by default.",
            },
        },
        "required": ["name", "every"],
        "additionalProperties": False,
    }  # fmt: skip


def test_schema_has_limits_and_infinity_where_the_classes_have_them() -> None:
    definitions = config.json_schema()["$defs"]
    max_norm = definitions["global_norm"]["properties"]["max_norm"]
    assert max_norm["anyOf"] == [{"type": "number"}, {"const": "inf"}]
    assert max_norm["minimum"] == 0
    clip_factor = definitions["agc"]["properties"]["clip_factor"]
    assert clip_factor == {
        "type": "number", "exclusiveMinimum": 0.0, "default": 0.01,
        "description": "lambda, > 0 and finite.",
    }  # fmt: skip


def test_every_argument_is_described() -> None:
    for name, policy in registry.registered().items():
        properties = config.json_schema()["$defs"][name]["properties"]
        for argument in set(properties) - {"name"}:
            assert properties[argument].get("description"), f"{policy.__name__}: {argument}"


def test_schema_is_valid_and_agrees_with_load(write: Write) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = config.json_schema()
    json.dumps(schema, allow_nan=False)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good: list[dict[str, Any]] = [
        {"policy": "measure"},
        {"policy": ["agc", {"name": "value", "clip_value": "inf"}], "on_nonfinite": "zero"},
        {"by_name": {"a": None, "b": ["measure"]}, "log": {"jsonl": "r", "every": 2}},
        {"policy": {"name": "agc", "unit_dims": {"a": [0, 1]}}, "by_name": {}, "log": None},
        {"policy": {"name": "ladder", "spikes": {"name": "skip_norm", "max_norm": 9}, "clips": 0}},
    ]
    bad: list[dict[str, Any]] = [
        {},
        {"policy": "global_norm"},
        {"policy": None},
        {"by_name": {}},
        {"policy": []},
        {"policy": {"name": "agc", "clip_factor": 0}},
        {"policy": {"name": "agc", "clip_factor": "inf"}},
        {"policy": {"name": "global_norm", "max_norm": -1}},
        {"policy": {"name": "global_norm", "max_norm": 1, "maxnorm": 1}},
        {"policy": {"name": "ladder", "spikes": {"name": "skip_norm"}}},
        {"policy": {"name": "ladder", "spikes": None}},
        {"policy": "measure", "log": {"every": 1}},
        {"policy": "measure", "norms": "yes"},
        {"policy": "measure", "verify_replicas": 0},
        {"policy": "measure", "verify_replicas": "always"},
        {"policy": "measure", "verify_replicas": True},
        {"policy": "measure", "lr": 1},
    ]
    for raw in good:
        config.load(raw)
        validator.validate(raw)
    for raw in bad:
        fault(raw)
        assert not validator.is_valid(raw), raw


def test_digest_counts_what_changes_gradients() -> None:
    base: dict[str, Any] = {"policy": {"name": "agc", "eps": 1e-3}}
    same: list[dict[str, Any]] = [base, {**base, "log": {"jsonl": "elsewhere"}}, {"policy": "agc"}]
    other: list[dict[str, Any]] = [
        {**base, "on_nonfinite": "skip"},
        {**base, "norms": False},
        {"policy": {"name": "agc", "eps": 2e-3}},
    ]
    digest = config.digest(config.load(base))
    assert [config.digest(config.load(raw)) for raw in same] == [digest] * 3
    assert digest not in [config.digest(config.load(raw)) for raw in other]
