"""``distclip config`` and the application itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from distclip import config
from distclip._version import __version__
from distclip.cli.app import app, main
from distclip.errors import ConfigurationError

CONFIGS = Path(__file__).parents[2] / "configs"
invoke = typer.testing.CliRunner().invoke


def test_schema() -> None:
    assert json.loads(invoke(app, ["config", "schema"]).output) == config.json_schema()


def test_check_prints_the_whole_policy() -> None:
    result = invoke(app, ["config", "check", str(CONFIGS / "policies" / "by_name.yaml")])
    assert result.exit_code == 0, result.output
    assert '"*.bias": left alone' in result.output
    assert "all others: AGC(clip_factor=0.01, eps=0.001" in result.output
    result = invoke(app, ["config", "check", str(CONFIGS / "policies" / "chain.yaml")])
    assert "one after another:\n    AGC(" in result.output
    assert "on_nonfinite: skip" in result.output
    assert "log: jsonl: runs/clip.jsonl, every: 10, per_parameter: True" in result.output


def test_check_fails_on_a_faulty_file(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("policy: agcc")
    result = invoke(app, ["config", "check", str(tmp_path / "p.yaml")])
    assert isinstance(result.exception, ConfigurationError)


def test_check_reads_what_a_deepspeed_json_says_of_clipping(tmp_path: Path) -> None:
    for file in sorted((CONFIGS / "deepspeed").glob("*.json")):
        result = invoke(app, ["config", "check", str(file)])
        assert result.exit_code == 0, (file, result.output)
        assert "GlobalNorm(max_norm=1.0" in result.output

    def told(document: object) -> str:
        (tmp_path / "ds.json").write_text(json.dumps(document))
        result = invoke(app, ["config", "check", str(tmp_path / "ds.json")])
        return str(result.exception) if result.exception else result.output

    stage = {"zero_optimization": {"stage": 2}}
    assert "GlobalNorm(max_norm=0.5" in told({**stage, "gradient_clipping": 0.5})
    assert "clips nothing" in told(stage)
    misspelt = told({**stage, "distclip": {"policy": {"name": "agc", "clip_facto": 0.1}}})
    assert f"{tmp_path}/ds.json: distclip: policy.clip_facto" in misspelt
    assert f"{tmp_path}/ds.json: dist_clip: unknown key" in told({"dist_clip": {}})
    assert f"{tmp_path}/ds.json: gradient_clipping: must be" in told({"gradient_clipping": "auto"})
    both = told({**stage, "gradient_clipping": 1.0, "distclip": {"policy": "measure"}})
    assert '"gradient_clipping": 1.0 stands beside a "distclip" section' in both
    assert "on_nonfinite: error" in told({"policy": "measure"})  # ours, in JSON


OFFLOAD = {"device": "cpu", "super_offload": True}
ZENFLOW: dict[str, Any] = {"stage": 2, "zenflow": {"topk_ratio": 0.1}}


@pytest.mark.parametrize(
    ("where", "document"),
    [
        ("zero_optimization.zenflow", {"zero_optimization": ZENFLOW}),
        ("zero_optimization.zenflow", {"zero_optimization": {"stage": 2, "zenflow": {}}}),
        (
            "zero_optimization.offload_optimizer.super_offload",
            {"zero_optimization": {"stage": 3, "offload_optimizer": OFFLOAD}},
        ),
        (
            "zero_optimization.offload_optimizer.device",
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        ),
        ("optimizer.type", {"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 1}}),
        ("optimizer.type", {"optimizer": {"type": "Muon"}, "zero_optimization": True}),
        ("optimizer.type", {"optimizer": {"type": "OneBitAdam"}, "zero_optimization": {}}),
        ("fp16.enabled", {"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}),
        ("tensor_parallel.autotp_size", {"tensor_parallel": {"autotp_size": 2}}),
        ("expert_parallel.enabled", {"expert_parallel": {"enabled": True}}),
    ],
)
def test_check_tells_of_a_mode_in_which_nothing_can_be_clipped(
    where: str, document: dict[str, Any], tmp_path: Path
) -> None:
    def told(clipping: float, **changes: Any) -> str:
        found = {"gradient_clipping": clipping, **document, **changes}
        (tmp_path / "ds.json").write_text(json.dumps(found))
        result = invoke(app, ["config", "check", str(tmp_path / "ds.json")])
        return str(result.exception) if result.exception else result.output

    assert f"{tmp_path}/ds.json: {where}: distclip cannot clip here: " in told(1.0)
    assert "clips nothing" in told(0.0)
    quantized = {"stage": 3, "zero_quantized_weights": True}
    bare: dict[str, Any] = dict.fromkeys(document)
    assert "GlobalNorm" in told(1.0, **{**bare, "zero_optimization": quantized})


@pytest.mark.parametrize(
    "document",
    [
        {"fp16": {"enabled": True}, "zero_optimization": True},
        {"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": "0"}},
        {"optimizer": {"type": "Muon"}, "zero_optimization": False},
    ],
)
def test_check_reads_stages_as_deepspeed_does(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"gradient_clipping": 1.0, **document}))
    result = invoke(app, ["config", "check", str(tmp_path / "ds.json")])
    assert result.exit_code == 0, result.exception


LOOSE = """
{
  // what DeepSpeed's reader takes
  "zero_optimization": {"stage": 2,},
  "distclip": {"policy": {"name": "agc", "clip_factor": 0.02,}, %s},  # ours
}
"""


def test_check_reads_a_deepspeed_json_as_deepspeed_does(tmp_path: Path) -> None:
    hjson = pytest.importorskip("hjson")
    file = tmp_path / "ds.json"

    def told(text: str) -> str:
        file.write_text(text)
        result = invoke(app, ["config", "check", str(file)])
        return str(result.exception) if result.exception else result.output

    loose = LOOSE % ""
    assert hjson.loads(loose)["distclip"]["policy"]["clip_factor"] == 0.02
    found = told(loose)
    assert "AGC(clip_factor=0.02" in found
    assert "deepspeed.initialize reads it, Accelerate and the Trainer do not" in found
    assert "plain" not in told('{"zero_optimization": {}, "gradient_clipping": 1.0}')
    assert "distclip: polcy: unknown key" in told(LOOSE % '"polcy": 1')
    assert "'policy' appears twice" in told(LOOSE % '"policy": 1')
    # Of our own files, and of those in which hjson finds no mapping either, JSON's word counts.
    assert "not valid JSON" in told('{"policy": "measure",}')
    assert "not valid JSON" in told('{"zero_optimization": {')


def test_main_tells_a_fault_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["distclip", "config", "check", "nowhere.yaml"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith("distclip: nowhere.yaml: no such configuration file")


def test_version() -> None:
    assert invoke(app, ["--version"]).output == f"distclip {__version__}\n"
