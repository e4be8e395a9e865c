"""Logs of several clippers of one configuration: a file each."""

import gc
import json
from pathlib import Path

import pytest
import torch

import distclip
from distclip.config.logs import release_log


def step(clipper: distclip.GradClipper, size: float) -> None:
    for parameter in clipper.here.values():
        parameter.grad = torch.full_like(parameter, size)
    clipper.clip_()


def norms(path: Path) -> list[float]:
    return [json.loads(line)["total_norm"] for line in path.read_text().splitlines()]


def test_from_config_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {"policy": "measure", "log": {"jsonl": str(tmp_path / "runs" / "clip.jsonl")}}
    models = [torch.nn.Linear(1, 1, bias=False) for _ in range(3)]
    clippers = [distclip.from_config(config, model) for model in models]
    for number in range(2):
        for place, clipper in enumerate(clippers):
            step(clipper, 10.0 * place + number)
    folder = tmp_path / "runs"
    found = {path.name: norms(path) for path in folder.iterdir()}
    assert found == {
        "clip.jsonl": [0.0, 1.0],
        "clip.2.jsonl": [10.0, 11.0],
        "clip.3.jsonl": [20.0, 21.0],
    }
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert f"that of 1 parameters (weight) is {folder / 'clip.2.jsonl'}" in told[0]


def test_a_name_is_free_when_its_clipper_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(1, 1, bias=False)
    config = {"policy": "measure", "log": {"jsonl": "clip.jsonl"}}
    first = distclip.from_config(config, model)
    # The same file by another name.
    other = {"policy": "measure", "log": {"jsonl": str(tmp_path / "x" / ".." / "clip.jsonl")}}
    (tmp_path / "x").mkdir()
    second = distclip.from_config(other, model)
    assert second.sinks[0].path.name == "clip.2.jsonl"
    step(first, 1.0)
    del first
    gc.collect()
    again = distclip.from_config(config, model)
    step(again, 2.0)
    assert norms(tmp_path / "clip.jsonl") == [1.0, 2.0]
    release_log(again)
    assert distclip.from_config(config, model).sinks[0].path == Path("clip.jsonl")


def test_a_clipper_that_was_refused_keeps_no_name(tmp_path: Path) -> None:
    config = {"policy": "measure", "log": {"jsonl": str(tmp_path / "clip.jsonl")}}
    try:
        distclip.from_config(config, torch.nn.Linear(1, 1, device="meta"))
    except distclip.DistclipError as error:
        kept = error  # with its traceback, as a notebook keeps it
    clipper = distclip.from_config(config, torch.nn.Linear(1, 1))
    assert clipper.sinks[0].path.name == "clip.jsonl"
    assert kept.__traceback__ is not None
