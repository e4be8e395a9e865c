"""``distclip simulate``, with real launchers: the script is run as it stands.

Each launch costs seconds; what is made of a launch is tested on warm ranks, in
test_simulate_findings.py.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from distclip.cli import app as application
from distclip.errors import ConfigurationError
from distclip.tools.simulate import layouts, nodes
from tests.helpers.shares import WHOLE

invoke = typer.testing.CliRunner().invoke

ACCELERATE = """
import argparse, json, os
import torch
from accelerate import Accelerator

parser = argparse.ArgumentParser()
parser.add_argument("--ranks")
options = parser.parse_args()
accelerator = Accelerator()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(13, 33), torch.nn.Tanh(), torch.nn.Linear(33, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
model, optimizer = accelerator.prepare(model, optimizer)
data = torch.Generator().manual_seed(1)
share = 24 // accelerator.num_processes
for _ in range(100):
    x = torch.randn(24, 13, generator=data)[accelerator.process_index * share :][:share]
    accelerator.backward(torch.nn.functional.mse_loss(model(x), x[:, :1].sin() * 3))
    accelerator.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
raise AssertionError("--steps has not ended the script")
"""

TORCHRUN = """
import os, sys, time
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, fault = dist.get_rank(), sys.argv[1]
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(5, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
if fault == "nodes":
    with open(f"network{rank}", "w") as file:
        file.write(os.readlink("/proc/self/ns/net") + os.environ["GROUP_RANK"])
for step in range(4):
    if rank == 1 and step == 2 and fault == "crash":
        raise ValueError("of mine")
    if rank == 1 and step == 2 and fault == "hang":
        time.sleep(1000)
    model(torch.randn(4, 5)).square().mean().backward()
    optimizer.step()
dist.barrier()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "accelerated.py").write_text(ACCELERATE)
    (tmp_path / "plain.py").write_text(TORCHRUN)
    (tmp_path / "policy.yaml").write_text(
        "policy: {name: global_norm, max_norm: 0.1}\nlog: {jsonl: real/clip.jsonl}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def simulate(*arguments: str) -> tuple[int, str, dict[str, Any]]:
    result = invoke(application.app, ["simulate", "--json", "found.json", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output, json.loads(Path("found.json").read_text())


def clipped_alike(told: Any, count: int) -> None:
    """Every layout took the decisions of the first one, and those were to clip."""
    first, *others = [each["steps"] for each in told["layouts"]]
    assert len(first) == count
    assert all(0 < step["coefficient"] < 1 for step in first)
    for steps in others:
        for step, wanted in zip(steps, first, strict=True):
            assert step == pytest.approx(wanted, rel=1e-5)


def test_one_script_under_several_layouts(folder: Path) -> None:
    pytest.importorskip("accelerate")
    code, shown, told = simulate(
        *("--layout", "fsdp2", "--layout", "single", "--layout", "ddp", "--ranks", "2"),
        *("--config", "policy.yaml", "--steps", "3", "--keep", "kept"),
        *("accelerated.py", "--ranks", "the script's own"),
    )
    assert code == 0, shown
    assert [each["layout"] for each in told["layouts"]] == ["single", "fsdp2", "ddp"]
    assert [each["ranks"] for each in told["layouts"]] == [1, 2, 2]
    clipped_alike(told, 3)
    assert "fsdp2: sound; 3 steps on 2 rank(s)" in shown
    # The log of a real run is left alone.
    assert not (folder / "real").exists()
    assert len((folder / "kept" / "ddp" / "clip.jsonl").read_text().splitlines()) == 3


def test_the_same_script_under_zero(folder: Path) -> None:
    """Stage 2 cuts gradients, stage 3 weights too; DeepSpeed steps, and the policy clips in it."""
    stages = ["zero2", "zero3"] if os.environ.get(WHOLE) else ["zero3"]
    pytest.importorskip("accelerate")
    pytest.importorskip("deepspeed")
    code, shown, told = simulate(
        *("--layout", "single", *(word for stage in stages for word in ("--layout", stage))),
        *("--ranks", "2"),
        *("--config", "policy.yaml", "--steps", "3", "accelerated.py"),
    )
    assert code == 0, shown
    assert [each["layout"] for each in told["layouts"]] == ["single", *stages]
    clipped_alike(told, 3)


def test_a_crash_ends_all_with_its_traceback_first(folder: Path) -> None:
    code, shown, told = simulate("--layout", "torchrun", "--keep", "kept", "plain.py", "crash")
    end = time.time()
    assert code == 1
    finding, same = told["layouts"][0]["findings"]
    assert (same["kind"], same["fault"]) == ("same data", False)  # a remark
    assert (finding["kind"], finding["ranks"], finding["step"]) == ("raised", [1], 2)
    assert finding["text"] == "rank 1 raised ValueError: of mine"
    head, trace, *_ = finding["detail"].splitlines()
    assert head == "---- rank 1 ----"
    assert trace.startswith("Traceback")
    lines = (folder / "kept" / "torchrun" / "rank1.jsonl").read_text().splitlines()
    raised = next(r for r in map(json.loads, lines) if r["event"] == "raised")
    assert end - raised["time"] < 15
    assert shown.index("plain.py") < shown.index("rank 0")


def test_a_hang_ends_with_every_stack(folder: Path) -> None:
    code, shown, told = simulate("--layout", "torchrun", "--timeout", "4", "plain.py", "hang")
    assert code == 1
    finding = told["layouts"][0]["findings"][0]
    assert (finding["kind"], finding["ranks"], finding["step"]) == ("hung", [1], 2)
    assert "rank 1 is in no collective" in finding["text"]
    assert f"rank 1: after 2 steps, at {folder}/plain.py:18 in <module>" in finding["text"]
    assert f"rank 0: after 2 steps, at {folder}/plain.py:19 in <module>, in backward" in shown
    assert "---- rank 0 ----" in finding["detail"]


def test_two_nodes(folder: Path) -> None:
    code, shown, told = simulate("--nodes", "2", "--layout", "torchrun", "plain.py", "nodes")
    assert code == 0, shown
    where = {(folder / f"network{rank}").read_text() for rank in (0, 1)}
    assert {text[-1] for text in where} == {"0", "1"}  # agents of their own
    possible = not nodes.why_not()
    assert told["layouts"][0]["isolated_nodes"] == possible
    assert len({text[:-1] for text in where}) == 1 + possible
    assert ("a network namespace of its own" in shown) == possible
    assert ("no network namespaces here" in shown) != possible


def test_what_cannot_be_simulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(ConfigurationError) as error:
            simulate(*arguments)
        return str(error.value)

    assert "no layout 'fsdp3'; there are single, torchrun" in refused("--layout", "fsdp3", "x.py")
    assert "3 ranks cannot be spread" in refused("--ranks", "3", "--nodes", "2", "plain.py")
    assert "no script 'x.py'" in refused("--layout", "torchrun", "x.py")
    monkeypatch.setattr(layouts.importlib.util, "find_spec", lambda name: None)
    told = refused("--layout", "zero3", "plain.py")
    assert "needs accelerate, which is not installed: pip install 'distclip[accelerate]'" in told
    monkeypatch.setattr(
        layouts.importlib.util, "find_spec", lambda name: None if name == "deepspeed" else object()
    )
    assert "pip install 'distclip[deepspeed]'" in refused("--layout", "zero3", "plain.py")


def test_why_there_are_no_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes.shutil, "which", lambda name: None if name == "ip" else name)
    assert nodes.why_not() == "ip not installed"


def test_a_launch_inherits_nothing_of_a_launch() -> None:
    around = {"RANK": "3", "ACCELERATE_USE_FSDP": "true", "DISTCLIP_CONFIG": "x", "HOME": "/h"}
    assert layouts.inherited(around) == {"HOME": "/h"}


KEPT = {"mine.txt": "precious", "rank0.jsonl": "also mine"}


@pytest.mark.parametrize("name", KEPT)
def test_keep_deletes_nothing_that_it_did_not_write(folder: Path, name: str) -> None:
    """Whatever is in the way: a folder that no run made, a file of the user's beside a run's."""
    mine = folder / "work" / "single" / name
    mine.parent.mkdir(parents=True)
    mine.write_text(KEPT[name])
    with pytest.raises(ConfigurationError, match=r"was not made by simulate .*new folder"):
        simulate("--layout", "single", "--keep", "work", "plain.py")
    assert mine.read_text() == KEPT[name]
    assert list((folder / "work").rglob("*")) == [mine.parent, mine]


def test_keep_is_used_again_but_for_files_of_others(folder: Path) -> None:
    (folder / "noop.py").write_text("print('run')")
    arguments = ("--layout", "single", "--config", "policy.yaml", "--keep", "kept", "noop.py")
    simulate(*arguments)
    (folder / "kept" / "single" / "clip.jsonl").write_text("the log of the run\n")
    simulate(*arguments)
    assert not (folder / "kept" / "single" / "clip.jsonl").exists()
    assert (folder / "kept" / "single" / "rank0.out").read_text() == "run\n"
    for mine in ("notes.txt", "sub/notes.txt"):
        path = folder / "kept" / "single" / mine
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
        with pytest.raises(ConfigurationError, match=f"files of yours.*{mine.partition('/')[0]}"):
            simulate(*arguments)
        assert path.read_text() == "precious"
        path.unlink()
        if path.parent.name == "sub":
            path.parent.rmdir()
    (folder / "other").mkdir()
    (folder / "other" / "single").write_text("a file")
    with pytest.raises(ConfigurationError, match="in the way"):
        simulate("--layout", "single", "--keep", "other", "noop.py")
    assert (folder / "other" / "single").read_text() == "a file"
