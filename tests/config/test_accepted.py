"""Configurations that are accepted, and the policies that they make."""

import math
import re
from pathlib import Path

import pytest

from distclip import config, policies
from distclip.policies import registry
from tests.config.writing import Write, fault

CONFIGS = Path(__file__).parents[2] / "configs"


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
        ([{"name": "ladder", "spikes": "skip_spikes", "skips": 1e1}, "agc"],
         policies.chain(policies.ladder(policies.skip_spikes(), skips=10), policies.agc())),
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
    config.load(path)
    if path.stem in registry.registered():
        assert re.search(rf"(name|policy): {path.stem}\b", path.read_text())


def test_there_is_an_example_for_each_policy() -> None:
    stems = {path.stem for path in CONFIGS.glob("policies/*.yaml")}
    # Other tests register policies of their own.
    ours = {
        name
        for name, kind in registry.registered().items()
        if kind.__module__.startswith("distclip.")
    }
    assert stems >= ours | {"chain", "by_name"}


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
