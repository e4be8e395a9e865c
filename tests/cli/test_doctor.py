"""``distclip doctor``: it says what is there, and sees ranks that are none."""

import json
import os
from importlib import metadata
from pathlib import Path

import pytest
import torch
import typer.testing
import yaml

from distclip.cli import app as application
from distclip.common.tested import TESTED
from distclip.testing import run_on_ranks
from distclip.tools import doctor
from distclip.tools.simulate.layouts import accelerate_config
from tests.helpers.processes import python

ROOT = Path(__file__).parents[2]
invoke = typer.testing.CliRunner().invoke


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def test_all_is_well_here(tmp_path: Path) -> None:
    result = invoke(application.app, ["doctor", "--json", str(tmp_path / "found.json")])
    told = json.loads((tmp_path / "found.json").read_text())
    assert (result.exit_code, told["sound"]) == (0, True), result.output
    by_name = {line["what"]: line for line in reversed(told["lines"])}
    assert by_name["torch"]["text"].startswith(metadata.version("torch"))
    assert "really distributed" in by_name["2 gloo ranks of this machine"]["text"]
    assert by_name["single"]["state"] == "good"
    assert "ok   torch: " in result.output


def test_ranks_that_are_none_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_sum_of_ones", _one)
    (line,) = doctor.self_check(2)
    assert (line.state, line.text) == ("wrong", "a sum over 2 ranks gave [1, 1]")
    result = invoke(application.app, ["doctor"])
    assert result.exit_code == 1
    assert "BAD  2 gloo ranks" in result.output


def _one() -> int:
    return 1


def test_clipping_that_is_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from distclip.tools.verify import cells as verify_cells

    monkeypatch.setattr(verify_cells, "run_group", _failing)
    (line,) = doctor.self_check(2)
    assert (line.state, line.text) == ("wrong", "clipping is off: by far")


def _failing(*_: object) -> object:
    from distclip.tools.verify.cells import Found

    return [Found("failed", "by far")]


def test_an_accelerate_launch_that_trains_copies(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    config = accelerate_config("fsdp2", 2)
    config["use_cpu"] = False
    config["main_process_port"] = 0
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump(config))
    result = invoke(application.app, ["doctor", "--ranks", "1", "--launch-config", str(path)])
    assert result.exit_code == 1
    assert "2 processes of FSDP on a machine without GPUs would each train alone" in result.output
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(path))
    done = python(
        *launcher, "-m", "distclip", "doctor",
        folder=tmp_path, timeout=120, COLUMNS="500", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode != 0
    assert "BAD  accelerate launch: 2 processes were launched for FSDP2" in done.stdout, done.stderr


def test_within_a_launch() -> None:
    """Ranks that are one world; the group is closed at the end, so this pool is not reused."""
    (first, other) = run_on_ranks(_launched, 2)
    assert first == other == ("good", "2 ranks, their sum is 2; really distributed")


def _launched() -> tuple[str, str]:
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    (line,) = doctor.check_launch()
    return line.state, line.text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"distributed_type": "MULTI_CPU", "num_processes": 4}, "starts one process"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 4}, "would each train alone"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 4, "use_cpu": True}, ""),
        ({"distributed_type": "NO", "num_processes": 1}, ""),
    ],
)
def test_traps_of_a_launch_file(tmp_path: Path, config: dict[str, object], words: str) -> None:
    pytest.importorskip("accelerate")
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **config}))
    (line,) = doctor.launch_file(path)
    assert line.state == ("wrong" if words else "good")
    assert (words or "no trap in") in line.text
    path.write_text("nonsense: 1")
    (line,) = doctor.launch_file(path)
    assert line.state == "wrong"
    assert "Accelerate cannot read it" in line.text
    (line,) = doctor.launch_file(tmp_path / "none.yaml")
    assert "no such file" in line.text


@pytest.mark.parametrize(
    ("version", "wanted", "inside"),
    [
        ("2.13.0+cpu", "<2.14,>=2.13", True),
        ("2.14.0", "<2.14,>=2.13", False),
        ("1.26", ">=1.26", True),
        ("2.9.1", ">=2.13", False),
        ("3.11.7", ">=3.10", True),
        ("2.14.0.dev1", "<2.14", False),
        ("2.14.0rc1", ">=2.13", True),
        ("2.9.0a0+git12ab", ">=2.9", False),
        ("of a fork", ">=2.9", False),
        ("1.0", "", True),
        ("0.19.8", ">=0.16.9,<=0.19.8", True),
    ],
)
def test_ranges(version: str, wanted: str, inside: bool) -> None:
    assert doctor.version_within(version, wanted) == inside


@pytest.mark.parametrize(
    ("version", "state"),
    [("99.9", "note"), ("2.0.1", "wrong"), (torch.__version__, "good")],
)
def test_a_version_beside_the_tested_ones(
    monkeypatch: pytest.MonkeyPatch, version: str, state: str
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    lines = {line.what: line for line in doctor.versions()}
    oldest, newest = TESTED["torch"]
    assert lines["torch"].state == state
    assert lines["torch"].text == f"{version}, tested with {oldest} to {newest}"
