"""Faults of configurations: each with its path, value and mend, all at once."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from distclip import config
from distclip.errors import ConfigurationError
from tests.config.writing import Write, fault


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"polcy": "agc"}, ["polcy: unknown key (value 'agc'), did you mean 'policy'?"]),
        (
            {"max_norm": 2.0},
            ["max_norm: unknown key; it belongs to a policy", "norm: 2.0}"],
        ),
        ({"policy": {"name": "chain"}}, ["no policy is called 'chain'", "a list is a chain"]),
        ({}, ["policy: missing"]),
        ({"policy": None}, ["policy: missing"]),
        ({"by_name": {}}, ["policy: missing"]),
        ({"policy": []}, ["policy: an empty list"]),
        ({"policy": 1.0}, ["policy: expected a policy such as", "max_norm: 1.0}, got 1.0"]),
        ({"policy": "agcc"}, ["policy.name: no policy is called 'agcc'", "mean 'agc'?"]),
        ({"policy": {"agc": {}}}, ["policy.name: missing", "write agc"]),
        ({"policy": "global_norm"}, ["policy.max_norm: missing; global_norm needs it"]),
        (
            {"policy": ["measure", {"name": "agc", "clip_factr": 0.5}]},
            ["policy[1].clip_factr: unknown key (value 0.5), did you mean 'clip_factor'?"],
        ),
        ({"policy": {"name": "agc", "eps": True}}, ["policy.eps: ", "a number, got True"]),
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
        ({"policy": "ladder"}, ["policy.spikes: missing; ladder needs it"]),
        ({"policy": {"name": "ladder", "spikes": None}}, ["policy.spikes: expected a policy"]),
        ({"policy": {"name": "ladder", "spikes": "agcc"}}, ["policy.spikes.name: no policy is"]),
        (
            {"policy": ["agc", {"name": "ladder", "spikes": {"name": "skip_norm", "max": 1}}]},
            ["policy[1].spikes.max: unknown key", "policy[1].spikes.max_norm: missing"],
        ),
        (
            {"policy": {"name": "ladder", "spikes": ["skip_spikes"], "skips": -1}},
            ["policy.spikes: must be one policy that skips, such as"],
        ),
        ({"policy": {"name": "ladder", "spikes": "skip_spikes", "skips": -1}}, ["policy.skips: "]),
        ({"by_name": {3: None}}, ["by_name[3]: keys must be strings"]),
        ({"by_name": []}, ["by_name: ", "got []"]),
        ({"policy": "agc", "on_nonfinite": "skp"}, ["on_nonfinite: ", "did you mean 'skip'?"]),
        ({"policy": "agc", "norms": 1}, ["norms: ", "got 1"]),
        ({"policy": "agc", "norms": "yes"}, ["norms: ", "got 'yes'"]),
        ({"policy": "agc", "log": "run.jsonl"}, ["log: should be a mapping"]),
        ({"policy": "agc", "log": {}}, ["log: names no place to write to; give one of jsonl, "]),
        ({"policy": "agc", "log": {"accelerate": False, "every": 2}}, ["log: names no place"]),
        (
            {"policy": "agc", "log": {"jsonl": "r", "states": {"exploding": 5}}},
            ["log.states: ", "expected vanishing <= normal[0]"],
        ),
        (
            {"policy": "agc", "log": {"jsonl": "r", "states": {"explding": 5}}},
            ["log.states.explding: ", "mean 'exploding'? log.states takes normal, exploding, van"],
        ),
        (
            {"policy": "agc", "log": {"jsonl": "r", "noise_scale": {"batch": 8, "micro_batch": 2}}},
            [
                "log.noise_scale.micro_batch: ",
                "mean 'micro_batches'? log.noise_scale takes batch, ",
            ],
        ),
        (
            {
                "policy": "agc",
                "log": {"jsonl": "r", "noise_scale": {"batch": 2, "micro_batches": 4}},
            },
            ["log.noise_scale: batch counts the samples of all micro_batches"],
        ),
        ({"policy": "agc", "log": {"jsonl": ""}}, ["log.jsonl: ", "got ''"]),
        ({"policy": "agc", "log": {"jsonl": "r", "every": 0}}, ["log.every: ", "got 0"]),
        ({"policy": "agc", "log": {"jsonl": "r", "evry": 2}}, ["log.evry: ", "mean 'every'?"]),
        ({"policy": "agc", 1: 2}, ['["1"]: unknown key']),
        ({"name": ["agc"], "clip_factor": []}, ["name: unknown key (value ['agc'])"]),
        ({"policy": ["agc"], "name": {}}, ["name: unknown key (value {})"]),
    ],
)
def test_faults_name_path_value_and_mend(raw: Mapping[Any, Any], expected: list[str]) -> None:
    message = fault(raw)
    for part in expected:
        assert part in message


PLAIN = """
policy: global_norm(1.0) -> {name: global_norm, max_norm: 1.0}
policy: agc(clip_factor=0.02, eps=1) -> {name: agc, clip_factor: 0.02, eps: 1}
policy: {agc: {clip_factor: 0.01}} -> {name: agc, clip_factor: 0.01}
policy: {value: 0.1} -> {name: value, clip_value: 0.1}
policy: {max_norm: 3} -> {name: global_norm, max_norm: 3}
policy: none -> measure
policy: false -> measure
policy: {name: agc, eps: "1e-3"} -> eps: 1e-3
policy: {name: agc, unit_dims: {"*.w": 0}} -> "*.w": [0]
{name: agc, eps: 1} -> policy: {name: agc, eps: 1}
{name: measure} -> policy: measure
{policy: agc, clip_factor: 0.1} -> policy: {name: agc, clip_factor: 0.1}
clip_grad_norm: 1.0 -> policy: {name: global_norm, max_norm: 1.0}
clip_value: 1.0 -> policy: {name: value, clip_value: 1.0}
by_name: "*.norm" -> by_name: {"*.norm": null}
by_name: ["*.norm"] -> by_name: {"*.norm": null}
by_part: kind=norm -> by_part: {"kind=norm": null}
log: clip.jsonl -> log: {jsonl: clip.jsonl}
log: [clip.jsonl] -> log: {jsonl: clip.jsonl}
log: true -> log: {jsonl: runs/clip.jsonl}
log: runs/ -> log: {jsonl: runs/clip.jsonl}
log: wandb -> log: {wandb: my_project}
log: accelerate -> log: {accelerate: true}
log: {tensorboard: true} -> tensorboard: runs/tensorboard
log: {mlflow: true} -> mlflow: my_project
log: {accelerate: yes} -> accelerate: true
log: {jsonl: r, noise_scale: 64} -> noise_scale: {batch: 64}
log: {jsonl: r, noise_scale: true} -> noise_scale: {batch: 256}
log: {jsonl: r, states: 50} -> states: {exploding: 50}
log: {jsonl: r, states: {normal: 20}} -> normal: [1.0, 20]
log: {jsonl: r, modules: true} -> modules: 2
log: {jsonl: r, every: "10"} -> every: 10
ratios: true -> ratios: 10
exponents: 0 -> exponents: 100
stuck_after: 5m -> stuck_after: 600
imports: 1 -> imports: [my_project.clipping]
imports: clipping.py -> imports: [clipping]
imports: [my/clipping.py] -> my.clipping
norms: 0 -> norms: false
fold: "off" -> fold: false
""".strip().splitlines()


@pytest.mark.parametrize("line", PLAIN)
def test_a_plain_value_is_answered_with_the_form_that_is_meant(write: Write, line: str) -> None:
    """And that form is valid in its place."""
    wrong, _, right = line.partition(" -> ")
    assert f"write {right}" in fault(write(wrong))
    right = f"policy: {right}" if right.startswith(("{", "measure")) else right
    if right.partition(":")[0] in config.json_schema()["properties"]:
        document = right if right.startswith("policy") else f"policy: agc\n{right}"
        assert config.examine(write(document)).imports or config.load(write(document))


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

    assert fault(write("policy: agc\nnorms: on")).endswith("got 'on'; write norms: true")
    assert yaml.safe_load("on") is True
    assert yaml.safe_load("1e-3") == "1e-3"
