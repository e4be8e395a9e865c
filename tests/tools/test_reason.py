"""The reason of a failed rank, as torch's launcher shows it."""

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from distclip.tools.launch import reason
from distclip.tools.launch.script import Script

pytestmark = pytest.mark.usefixtures("process")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "rank0" / "error.json"
    monkeypatch.setenv(reason.ERROR_FILE_VARIABLE, str(path))
    return path


def shown(path: Path) -> str:
    """The end of the launcher's report."""
    failure = ProcessFailure(0, 4321, 1, str(path))
    return str(ChildFailedError("train.py", {0: failure})).split("traceback : ")[1]


def test_the_launcher_shows_it_last(file: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise ValueError('no data\\x1b[2J\\nat all')")
    assert Script(str(script), []).run() == 1
    first, *_ = shown(file).splitlines()
    assert first == r"ValueError: no data\x1b[2J\nat all"


def test_what_the_script_has_left_stays(file: Path) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps({"message": "mine", "timestamp": 1}))
    reason.leave("ours")
    assert shown(file).startswith("mine")


def test_without_a_launcher_and_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(reason.ERROR_FILE_VARIABLE, raising=False)
    reason.leave("nobody reads this")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(reason.ERROR_FILE_VARIABLE, str(tmp_path / "file" / "error.json"))
    reason.leave("no folder")


def test_a_script_that_ends_well_leaves_none(file: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit(0)")
    assert Script(str(script), []).run() == 0
    assert not file.exists()
    assert reason.reason_of(KeyboardInterrupt()) == "KeyboardInterrupt"
