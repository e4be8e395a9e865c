"""Configuration: what is accepted, and how every fault is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from distclip import config, policies
from distclip.errors import ConfigurationError
from distclip.policies import _registry

CONFIGS = Path(__file__).parents[1] / "configs"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "p.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def fault(source: Any) -> str:
    """The message with which a source is refused."""
    with pytest.raises(ConfigurationError) as caught:
        config.load(source)
    return str(caught.value)


# ---- accepted --------------------------------------------------------------------------------


def test_a_whole_configuration(write: Write) -> None:
    path = write(
        """
        policy: {name: agc, clip_factor: 0.02}
        by_name: {"*.bias": null, "embed*": {name: value, clip_value: 0.1}}
        on_nonfinite: skip
        log: {jsonl: runs/clip.jsonl, every: 10, per_parameter: true}
        norms: false
        verify_replicas: 100
        fold: false
        overlap: true
        stuck_after: 600
        """
    )
    assert config.load(path) == config.Config(
        policies.by_name(
            {"*.bias": None, "embed*": policies.value(0.1)}, default=policies.agc(0.02)
        ),
        on_nonfinite="skip",
        log=config.LogConfig(jsonl="runs/clip.jsonl", every=10, per_parameter=True),
        norms=False,
        verify_replicas=100,
        fold=False,
        overlap=True,
        stuck_after=600.0,
    )


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("measure", policies.measure()),
        ({"name": "global_norm", "max_norm": 1}, policies.global_norm(1.0)),
        (["agc", {"name": "value", "clip_value": 1.0}],
         policies.chain(policies.agc(), policies.value(1.0))),
        ({"name": "agc", "unit_dims": {"*.experts.*": [0, 1]}},
         policies.agc(unit_dims={"*.experts.*": (0, 1)})),
        ({"name": "measure", "norm_type": "inf"}, policies.measure(math.inf)),
        ({"name": "value", "clip_value": math.inf}, policies.value(math.inf)),
    ],
)  # fmt: skip
def test_policies(spec: object, policy: policies.Policy) -> None:
    assert config.load({"policy": spec}) == config.Config(policy)


def test_by_name_alone_leaves_the_others_alone() -> None:
    loaded = config.load({"by_name": {"head.*": ["agc", "measure"]}})
    chain = policies.chain(policies.agc(), policies.measure())
    assert loaded.policy == policies.by_name({"head.*": chain}, default=None)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".001", "0.001", "+1e-3"])
def test_numbers_that_yaml_1_1_takes_for_strings(write: Write, text: str) -> None:
    path = write(f"policy: {{name: agc, eps: {text}}}")
    assert config.load(path).policy == policies.agc(eps=1e-3)


def test_infinity_in_yaml_and_json(write: Write) -> None:
    policy = policies.global_norm(math.inf, math.inf)
    text = "policy: {name: global_norm, max_norm: .inf, norm_type: inf}"
    assert config.load(write(text)).policy == policy
    text = '{"policy": {"name": "global_norm", "max_norm": "inf", "norm_type": Infinity}}'
    assert config.load(write(text, "p.json")).policy == policy


@pytest.mark.parametrize("name", ["p.json", "p.yaml", "p.conf"])
def test_json_is_told_by_extension_or_content(write: Write, name: str) -> None:
    path = write('{"policy": "measure", "$schema": "schema.json"}', name)
    assert config.load(str(path)) == config.Config(policies.measure())


def test_merge_keys_may_be_overridden(write: Write) -> None:
    path = write(
        "policy: &base {name: global_norm, max_norm: 1.0}\n"
        "by_name: {head.*: {<<: *base, max_norm: 2.0}}\n"
    )
    default = policies.global_norm(1.0)
    expected = policies.by_name({"head.*": policies.global_norm(2.0)}, default=default)
    assert config.load(path).policy == expected


def test_a_merge_of_a_merge(write: Write) -> None:
    # PyYAML fills in the inner merge before it builds the mapping: an override is no duplicate.
    path = write(
        "policy: {name: &n measure}\n"
        "by_name:\n"
        "  a: [&base {name: agc, eps: 1}, &mine {<<: *base, eps: 2}]\n"
        "  b: {<<: *mine, eps: 3}\n"
    )
    chain = policies.chain(policies.agc(eps=1), policies.agc(eps=2))
    expected = policies.by_name({"a": chain, "b": policies.agc(eps=3)}, default=policies.measure())
    assert config.load(path).policy == expected


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("policies/*.yaml")), ids=lambda p: p.stem)
def test_the_examples(path: Path) -> None:
    loaded = config.load(path)
    if path.stem in _registry.registered() and path.stem != "agc":
        assert loaded.policy.name == path.stem


def test_there_is_an_example_for_each_policy() -> None:
    stems = {path.stem for path in CONFIGS.glob("policies/*.yaml")}
    # Other tests register policies of their own.
    ours = {
        name
        for name, kind in _registry.registered().items()
        if kind.__module__.startswith("distclip.")
    }
    assert stems >= ours | {"chain", "by_name"}


# ---- the hyperparameter file -----------------------------------------------------------------


def test_hyperparameter_file() -> None:
    loaded = config.load(CONFIGS / "hyperparams_config.json")
    assert loaded == config.Config(policies.global_norm(5.0))


@pytest.mark.parametrize("value", [0, -1.0, None, True, "5", math.nan, [5]])
def test_hyperparameter_that_cannot_be_meant(value: object) -> None:
    message = fault({"gradient_clip_norm": value, "lr": 0.1})
    assert message.startswith("configuration: gradient_clip_norm: must be a number > 0, got")


@pytest.mark.parametrize(
    "key",
    ["policy", "by_name", "on_nonfinite", "log", "norms", "verify_replicas", "fold", "overlap"],
)
def test_hyperparameter_beside_a_configuration(key: str) -> None:
    message = fault({"gradient_clip_norm": 5.0, key: None})
    assert f"but {key} stands beside it; remove gradient_clip_norm" in message


def test_other_keys_are_ignored_only_beside_the_hyperparameter() -> None:
    assert "learning_rate: unknown key" in fault({"policy": "measure", "learning_rate": 0.1})


# ---- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"polcy": "agc"}, ["polcy: unknown key (value 'agc'), did you mean 'policy'?"]),
        ({}, ["policy: missing"]),
        ({"policy": None}, ["policy: missing"]),
        ({"by_name": {}}, ["policy: missing"]),
        ({"policy": []}, ["policy: an empty list"]),
        ({"policy": 1.0}, ["policy: expected a policy", "got 1.0"]),
        ({"policy": "agcc"}, ["policy.name: no policy is called 'agcc'", "mean 'agc'?"]),
        ({"policy": {"agc": {}}}, ["policy.name: missing", "write {name: agc, ...}"]),
        ({"policy": "global_norm"}, ["policy.max_norm: missing; global_norm needs it"]),
        (
            {"policy": ["measure", {"name": "agc", "clip_factr": 0.5}]},
            ["policy[1].clip_factr: unknown key (value 0.5), did you mean 'clip_factor'?"],
        ),
        ({"policy": {"name": "agc", "eps": True}}, ["policy.eps: ", "valid number, got True"]),
        ({"policy": {"name": "agc", "eps": "1e-3"}}, ["policy.eps: ", "number, got '1e-3'"]),
        ({"policy": {"name": "agc", "eps": 0}}, ["policy.eps: must be finite and > 0, got 0"]),
        ({"policy": {"name": "agc", "eps": "inf"}}, ["policy.eps: must be finite"]),
        ({"policy": {"name": "agc", "unit": "rw"}}, ["policy.unit: ", "did you mean 'row'?"]),
        (
            {"policy": {"name": "agc", "unit_dims": {"*.w": [0, True]}}},
            ['policy.unit_dims["*.w"][1]: ', "got True"],
        ),
        ({"policy": {"name": "agc", "unit_dims": {"w": 0}}}, ["unit_dims.w: should be a list"]),
        ({"policy": {"name": "value", "clip_value": -1}}, ["policy.clip_value: must be >= 0"]),
        ({"policy": {"name": "value", "clip_value": math.nan}}, ["policy.clip_value: is NaN"]),
        ({"by_name": {"*.bias": {"name": "agc", "a": 1}}}, ['by_name["*.bias"].a: unknown key']),
        ({"by_name": {3: None}}, ["by_name[3]: keys must be strings"]),
        ({"by_name": []}, ["by_name: ", "got []"]),
        ({"policy": "agc", "on_nonfinite": "skp"}, ["on_nonfinite: ", "did you mean 'skip'?"]),
        ({"policy": "agc", "norms": 1}, ["norms: ", "got 1"]),
        ({"policy": "agc", "norms": "yes"}, ["norms: ", "got 'yes'"]),
        ({"policy": "agc", "log": "run.jsonl"}, ["log: should be a mapping"]),
        ({"policy": "agc", "log": {}}, ["log.jsonl: missing"]),
        ({"policy": "agc", "log": {"jsonl": ""}}, ["log.jsonl: ", "got ''"]),
        ({"policy": "agc", "log": {"jsonl": "r", "every": 0}}, ["log.every: ", "got 0"]),
        ({"policy": "agc", "log": {"jsonl": "r", "evry": 2}}, ["log.evry: ", "mean 'every'?"]),
        ({"policy": "agc", 1: 2}, ['["1"]: unknown key']),
    ],
)
def test_faults_name_path_value_and_mend(raw: Mapping[Any, Any], expected: list[str]) -> None:
    message = fault(raw)
    for part in expected:
        assert part in message


def test_all_faults_at_once_a_line_each(write: Write) -> None:
    path = write(
        """
        policy: [{name: agc, clip_factr: 1, unit: rw}, nothing]
        by_name: {embed: value}
        on_nonfinite: explode
        nroms: true
        """
    )
    first, *lines = fault(path).splitlines()
    assert first == f"{path}: 6 problems"
    assert {line.split(":")[0].strip() for line in lines} == {
        "policy[0].clip_factr", "policy[0].unit", "policy[1].name", "by_name.embed.clip_value",
        "on_nonfinite", "nroms",
    }  # fmt: skip


def test_a_mapping_is_called_by_the_given_name() -> None:
    with pytest.raises(ConfigurationError, match=r"^ds\.json: distclip: policy: missing"):
        config.load({}, name="ds.json: distclip")


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("", "p.yaml", "the file is empty"),
        ("# only this\n", "p.yaml", "nothing but comments"),
        ("- agc\n", "p.yaml", "at the top level, got a list"),
        ("agc", "p.yaml", "at the top level, got a str"),
        ("policy: [agc\n", "p.yaml", "line 2, column 1: not valid YAML"),
        ("policy: agc\npolicy: measure\n", "p.yaml", "line 2: key 'policy' appears twice"),
        ("policy: {name: agc, eps: 1, eps: 2}", "p.yaml", "key 'eps' appears twice"),
        ("by_name: {*.bias: null}", "p.yaml", 'quote a name pattern that starts with "*"'),
        ("policy:\n\t- agc", "p.yaml", "indent with spaces"),
        ("policy: agc\n---\npolicy: agc\n", "p.yaml", "another document"),
        ("policy: !!python/name:os.system", "p.yaml", "python/name:os.system' makes no value"),
        ('{"policy": "agc",}', "p.json", "line 1, column 18: not valid JSON"),
        ('{"policy": "agc", "policy": "measure"}', "p.json", "'policy' appears twice"),
        ("policy: " + "[" * 3000, "p.yaml", "nested too deeply"),
        ('{"policy": ' + "[" * 200_000, "p.json", "nested too deeply"),
        ("policy: \x00", "p.yaml", "not valid YAML"),
    ],
)
def test_unreadable_files(write: Write, text: str, name: str, expected: str) -> None:
    path = write(text, name)
    message = fault(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_missing_file_directory_and_binary(tmp_path: Path) -> None:
    assert "no such configuration file (looked in " in fault("nowhere.yaml")
    assert "no such configuration file" in fault(tmp_path / "nowhere.yaml")
    assert "cannot be read: it is a folder" in fault(tmp_path)
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "it is not UTF-8 text" in fault(tmp_path / "p.yaml")


def test_the_rules_of_yaml_are_changed_for_us_only(write: Write) -> None:
    import yaml

    assert fault(write("policy: agc\nnorms: on")).endswith("got 'on'")
    assert yaml.safe_load("on") is True
    assert yaml.safe_load("1e-3") == "1e-3"


# ---- schema, policies of one's own -----------------------------------------------------------


@dataclass(frozen=True)
class Halve(policies.Policy):
    """Halve the gradients now and then.

    Args:
        every: how often,
            in steps.
        share: of the parameters, 0 to 1.
        limit: none by default.
        key: used in Python only.
    """

    every: int
    share: float = 0.5
    limit: float = math.inf
    key: Callable[[int], int] | None = None
    name: ClassVar[str] = "halve"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigurationError(f"halve: every must be >= 1, got {self.every}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"a share of {self.share} is none")

    def update(self, statistics: Any, state: Any) -> Any:
        return (), state


@pytest.fixture
def halve() -> Iterator[None]:
    policies.register(Halve)
    yield
    _registry._registered.pop("halve")


@pytest.mark.usefixtures("halve")
def test_a_policy_of_ones_own() -> None:
    assert config.load({"policy": {"name": "halve", "every": 1e3}}).policy == Halve(1000)
    assert "policy.every: must be >= 1, got 0" in fault({"policy": {"name": "halve", "every": 0}})
    assert "policy: a share of 2.0" in fault({"policy": {"name": "halve", "every": 1, "share": 2}})
    assert "should be a valid integer" in fault({"policy": {"name": "halve", "every": 1.5}})
    assert config.json_schema()["$defs"]["halve"] == {
        "title": "halve",
        "description": "Halve the gradients now and then.",
        "type": "object",
        "properties": {
            "name": {"const": "halve"},
            "every": {"type": "integer", "minimum": 1, "description": "how often, in steps."},
            "share": {
                "type": "number", "minimum": 0.0, "maximum": 1.0, "default": 0.5,
                "description": "of the parameters, 0 to 1.",
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
    for name, policy in _registry.registered().items():
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


# ---- comparison between ranks ----------------------------------------------------------------


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


# ---- policies of one's own -------------------------------------------------------------------

OWN = """
from dataclasses import dataclass
from typing import ClassVar
from distclip import policies

@policies.register
@dataclass(frozen=True)
class Own(policies.Policy):
    size: float = 1.0
    name: ClassVar[str] = "{name}"

    def update(self, statistics, state):
        return (), state
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_policy_of_ones_own_is_named_after_its_module(folder: Path) -> None:
    (folder / "own_one.py").write_text(OWN.format(name="own_one"))
    document = {"imports": ["own_one"], "policy": {"name": "own_one", "size": 2.0}}
    policy = config.load(document).policy
    assert (policy.name, policy.size) == ("own_one", 2.0)  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match=r"policy\.size: should be"):
        config.load({**document, "policy": {"name": "own_one", "size": "big"}})


@pytest.mark.parametrize(
    ("imports", "message"),
    [
        (["no_such_module"], r"imports\[0\]: no module named 'no_such_module'; it has to be inst"),
        (["own_broken"], r"imports\[0\]: own_broken could not be imported: ZeroDivisionError"),
        (["own_needy"], r"imports\[0\]: no module named 'absent_thing', which own_needy imports"),
        (["my/policies.py"], r"imports\[0\]: must be the name of a module, got 'my/policies.py'; "),
        ("own_one", r"imports: .*list.*got 'own_one'"),
        ([3], r"imports\[0\]: .*got 3"),
    ],
)
def test_what_cannot_be_imported(folder: Path, imports: Any, message: str) -> None:
    (folder / "own_broken.py").write_text("1 / 0")
    (folder / "own_needy.py").write_text("import absent_thing")
    with pytest.raises(ConfigurationError, match=message):
        config.load({"imports": imports, "policy": "measure"})


def test_a_class_defined_anew_takes_its_place_and_another_does_not(folder: Path) -> None:
    space: dict[str, Any] = {"__name__": __name__}
    for _ in range(2):  # a notebook cell, run twice
        exec(OWN.format(name="own_cell"), space)
    assert _registry.registered()["own_cell"] is space["Own"]
    space["__name__"] = "json"
    with pytest.raises(ConfigurationError, match="taken by Own"):
        exec(OWN.format(name="own_cell"), space)
