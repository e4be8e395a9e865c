"""Which policy a DeepSpeed JSON means, and what is said of one that cannot be meant."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

import deepspeed.runtime.config
import deepspeed.runtime.engine
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip import policies
from distclip.config import Config
from distclip.errors import ConfigurationError
from distclip.integrations import deepspeed as integration
from distclip.integrations import deepspeed_json, hooks
from tests.helpers.ranks import everyones
from tests.integrations.engines import (
    Reference,
    backward,
    close,
    engine_of,
    json_of,
    step,
    weights_of,
)

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parents[2]
POLICY = {"name": "global_norm", "max_norm": 0.5}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown policy": (
        {"distclip": {"policy": {"name": "agcc"}}},
        "DeepSpeed JSON: distclip: policy.name: no policy is called 'agcc', did you mean 'agc'?",
    ),
    "unknown key": (
        {"distclip": {"policy": POLICY, "on_nonfinit": "skip"}},
        "did you mean 'on_nonfinite'?",
    ),
    "wrong type": (
        {"distclip": {"policy": {"name": "agc", "clip_factor": "x"}}},
        "policy.clip_factor: should be a number, got 'x'",
    ),
    "no mapping": ({"distclip": [POLICY]}, "distclip: should be a mapping of keys to values"),
    "both": (
        {"distclip": {"policy": POLICY}, "gradient_clipping": 1.0},
        'remove "gradient_clipping" .* or remove the section',
    ),
    "inside": (
        {"zero_optimization": {"stage": 2, "distclip": {"policy": POLICY}}},
        'zero_optimization.distclip: .* inside "zero_optimization".* move it to the top level',
    ),
    "underscore": ({"dist_clip": {"policy": POLICY}}, 'dist_clip: unknown key.*mean "distclip"'),
    "capitals": ({"distClip": {"policy": POLICY}}, 'distClip: unknown key.*mean "distclip"'),
    "misspelt": ({"disclip": {"policy": POLICY}}, 'disclip: unknown key.*mean "distclip"'),
    "misspelt inside": (
        {"zero_optimization": {"stage": 2, "dist-clip": {"policy": POLICY}}},
        'zero_optimization.dist-clip: .* inside "zero_optimization".* as "distclip"',
    ),
    "auto": (
        {"distclip": {"policy": {**POLICY, "max_norm": "auto"}}},
        'distclip.policy.max_norm: "auto" has no value here; write a number',
    ),
    "auto in a list": (
        {"distclip": {"policy": [POLICY, {"name": "value", "clip_value": "auto"}]}},
        r'distclip\.policy\[1\]\.clip_value: "auto" has no value here',
    ),
    "gradient_clipping auto": (
        {"gradient_clipping": "auto"},
        "gradient_clipping: must be a number > 0, got 'auto'.*Trainer takes its max_grad_norm; "
        "Accelerate, .*DeepSpeedPlugin.*deepspeed.initialize alone it has no value",
    ),
    "gradient_clipping negative": ({"gradient_clipping": -1.0}, "must be a number > 0, got -1.0"),
    "gradient_clipping bool": ({"gradient_clipping": True}, "must be a number > 0, got True"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_place(mistake: str) -> None:
    document, words = MISTAKES[mistake]
    with pytest.raises(ConfigurationError, match=words):
        deepspeed_json.configured(document)


def test_what_is_meant() -> None:
    configured = deepspeed_json.configured
    one = Config(policy=policies.global_norm(0.5))
    assert configured({"distclip": {"policy": POLICY}}) == one
    assert configured({"distclip": {"policy": POLICY}, "gradient_clipping": 0.0}) == one
    assert configured({"gradient_clipping": 0.5}) == one
    assert configured({}, policies.global_norm(0.5)) == one
    assert configured({}, {"policy": POLICY}) == one
    assert configured({"gradient_clipping": 3}, one) is one  # what is given takes its place
    for nothing in ({}, {"gradient_clipping": 0}, {"gradient_clipping": 0.0}):
        assert configured(nothing) is None
    with pytest.raises(ConfigurationError, match=r"another policy was given .* remove one"):
        configured({"distclip": {"policy": POLICY}}, one)
    with pytest.raises(ConfigurationError, match=r"missing\.yaml: no such configuration"):
        configured({}, "missing.yaml")


def test_auto_is_the_threshold_of_a_framework_above() -> None:
    section = {"policy": [{**POLICY, "max_norm": "auto"}, {"name": "value", "clip_value": 1.0}]}
    document: dict[str, Any] = {"distclip": section, "train_batch_size": "auto"}
    deepspeed_json.resolve_auto(document, 0.7)
    assert document["distclip"]["policy"][0]["max_norm"] == 0.7
    assert document["train_batch_size"] == "auto"  # not ours
    assert deepspeed_json.configured(document) is not None
    for nothing in (None, "auto", True):
        with pytest.raises(ConfigurationError, match=r"distclip\.policy\[0\]\.max_norm"):
            deepspeed_json.resolve_auto({"distclip": section}, nothing)
    deepspeed_json.resolve_auto({"gradient_clipping": "auto"}, None)  # no section: nothing to do


def test_auto_is_the_trainers_max_grad_norm(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    module = transformers.integrations.deepspeed
    original = module.HfTrainerDeepSpeedConfig.trainer_config_process
    try:
        deepspeed_json.resolve_for_trainer(module)
        document = {
            "distclip": {"policy": {**POLICY, "max_norm": "auto"}},
            "zero_optimization": {"stage": 2},
            "train_micro_batch_size_per_gpu": 4,
        }
        made = module.HfTrainerDeepSpeedConfig(document)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_grad_norm=0.7, use_cpu=True, report_to=[]
        )
        made.trainer_config_process(arguments)
        assert made.config["distclip"]["policy"]["max_norm"] == 0.7
    finally:
        module.HfTrainerDeepSpeedConfig.trainer_config_process = original


@contextmanager
def enabled(config: Any = None) -> Iterator[None]:
    """As under ``distclip run``, for a while."""
    module = deepspeed.runtime.engine
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [
            (module.DeepSpeedEngine, "__init__"),
            (deepspeed.runtime.config.DeepSpeedConfig, "_initialize_params"),
        ]:
            patch.setattr(owner, name, getattr(owner, name))
        integration.enable(module, config)
        hooks._hooks.pop("transformers.integrations.deepspeed", None)
        yield


@pytest.mark.ranks(2, timeout=120)
def test_initialize_under_run_takes_the_section_up_or_refuses_on_all_ranks() -> None:
    with enabled():
        initialize_with_mistakes()
        initialize_without()


def initialize_with_mistakes() -> None:
    for label, (changes, words) in MISTAKES.items():
        document = {**json_of(2), **copy.deepcopy(changes)}
        if label == "inside":
            document["zero_optimization"] |= changes["zero_optimization"]
        with pytest.raises(Exception, match=words) as error:
            engine_of(document)
        assert len(set(everyones(str(error.value)))) == 1


def initialize_without() -> None:
    # An engine for inference steps nothing, and needs no policy.
    assert deepspeed.initialize(model=nn.Linear(2, 2), config=json_of(0))[0] is not None
    with pytest.raises(ConfigurationError, match='neither a "distclip" section nor'):
        engine_of(json_of(2))
    for changes, threshold in [
        ({"distclip": {"policy": POLICY}}, 0.5),
        ({"gradient_clipping": 0.25}, 0.25),
    ]:
        for stage in (0, 3):
            engine = engine_of({**json_of(stage), **changes})
            assert hooks.activated >= {"deepspeed"}
            backward(engine, 0)
            engine.step()
            report = engine._distclip.last_report
            assert float(report.threshold) == threshold
            assert float(report.clipped_norm) == pytest.approx(threshold, rel=1e-5)
            close(engine)


@pytest.mark.ranks(2, timeout=120)
def test_an_engine_whose_json_says_0_is_not_clipped() -> None:
    """Two engines of one process, one with and one without, each with its own JSON."""
    for stage in range(4):
        with enabled():
            clipped = engine_of({**json_of(stage), "gradient_clipping": 0.25})
            free = engine_of({**json_of(stage), "gradient_clipping": 0.0})
        assert getattr(free, "_distclip", None) is None
        reference = Reference({"name": "measure"})
        for number in range(2):
            step(free, number)
            assert reference.train(number).total_norm > 1.0  # DeepSpeed's default would show
            step(clipped, number)
        for name, weight in weights_of(free).items():
            assert torch.allclose(weight.double(), reference.weights()[name], atol=1e-6)
        assert float(clipped._distclip.last_report.clipped_norm) == pytest.approx(0.25, rel=1e-5)
        close(clipped)
        close(free)


@pytest.mark.ranks(1, timeout=120)
def test_0_beside_a_policy_leaves_the_clipping_to_the_policy() -> None:
    off = {**json_of(2), "gradient_clipping": 0.0}
    cases = [({**off, "distclip": {"policy": POLICY}}, None), (off, Config(policies.agc(0.5)))]
    for document, config in cases:
        with enabled(config):
            engine = engine_of(document)
        wanted = policies.global_norm(0.5) if config is None else config.policy
        assert engine._distclip.config.policy == wanted
        close(engine)
    engine = engine_of(off)
    with pytest.raises(ConfigurationError, match='neither a "distclip" section nor'):
        distclip.deepspeed.attach(engine)  # whoever asks for clipping has to say which
    distclip.deepspeed.attach(engine, policies.agc(0.5))
    close(engine)


@pytest.mark.ranks(2, timeout=120)
def test_two_engines_of_one_json_write_two_logs(tmp_path: Path) -> None:
    log = {"jsonl": str(tmp_path / "clip.jsonl")}
    document = {**json_of(2), "distclip": {"policy": POLICY, "log": log}}
    with enabled():
        engines = [engine_of(document), engine_of(document)]
    norms: list[list[float]] = [[], []]
    for number in range(2):
        for place, engine in enumerate(engines):
            step(engine, number + 10 * place)
            norms[place].append(float(engine._distclip.last_report.total_norm))
    engines[0]._distclip.remove()
    third = distclip.deepspeed.attach(engines[0])  # goes on with the name that is free again
    step(engines[0], 5)
    norms[0].append(float(third.last_report.total_norm))
    dist.barrier()
    for name, wanted in zip(("clip.jsonl", "clip.2.jsonl"), norms, strict=True):
        lines = (tmp_path / name).read_text().splitlines()
        assert [json.loads(line)["total_norm"] for line in lines] == pytest.approx(wanted)
    assert len(list(tmp_path.iterdir())) == 2
    dist.barrier()
    for engine in engines:
        close(engine)


CONFIGS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


@pytest.mark.ranks(2, timeout=120)
def test_the_configurations_that_ship_train() -> None:
    assert {f"zero{stage}.json" for stage in range(4)} <= {path.name for path in CONFIGS}
    for path in CONFIGS:
        document = json.loads(path.read_text())
        with enabled():
            engine = engine_of({**document, "steps_per_print": 10**9}, "adam")
        backward(engine, 0)
        engine.step()
        report = engine._distclip.last_report
        assert float(report.coefficient) == pytest.approx(1.0 / float(report.total_norm), rel=1e-5)
        assert engine.was_step_applied(), path.name
        close(engine)


def test_the_launch_files_name_what_is_there() -> None:
    yaml = pytest.importorskip("yaml")
    for name in ("deepspeed.yaml", "deepspeed_cpu.yaml"):
        document = yaml.safe_load((ROOT / "configs" / "accelerate" / name).read_text())
        assert document["distributed_type"] == "DEEPSPEED"
        assert (ROOT / document["deepspeed_config"]["deepspeed_config_file"]).is_file()
