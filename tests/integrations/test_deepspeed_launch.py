"""Training with no line of distclip in the script, under the launchers that people use.

Each run costs seconds: one of each launcher, on the scripts and configurations that ship.
"""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.logs import lines
from tests.helpers.processes import ROOT, run, well

pytest.importorskip("deepspeed")

STEPS, MAX_NORM = 12, 0.25


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def launched(
    command: list[str], folder: Path, json_name: str, *options: str
) -> tuple[list[Any], ...]:
    """What the script, and distclip, wrote at each step."""
    document = json.loads((ROOT / "configs" / "deepspeed" / json_name).read_text())
    document["distclip"]["policy"]["max_norm"] = MAX_NORM  # low enough to clip at every step
    document["distclip"]["log"] = {"jsonl": str(folder / "clip.jsonl"), "every": 1}
    (folder / "ds.json").write_text(json.dumps(document))
    done = run(
        *(*command, "--jsonl", str(folder / "train.jsonl"), *options),
        folder=folder,
        JSON=str(folder / "ds.json"),
        PORT=str(free_port()),
    )
    well(done)
    assert "clipped nothing" not in done.stderr
    trained = [line for line in lines(folder / "train.jsonl") if "loss" in line]
    clipped = [line for line in lines(folder / "clip.jsonl") if "total_norm" in line]
    return trained, clipped


SMALL = ("--steps", str(STEPS), "--width", "32", "--layers", "1")


def check(trained: list[Any], clipped: list[Any]) -> None:
    assert len(trained) == len(clipped) == STEPS
    for line, report in zip(trained, clipped, strict=True):
        # What the engine shows is the norm before clipping, and what was done is the policy's.
        assert line["norm"] == pytest.approx(report["total_norm"], rel=1e-6)
        assert report["coefficient"] == pytest.approx(
            MAX_NORM / (report["total_norm"] + 1e-6), rel=1e-6
        )
        assert report["coefficient"] < 0.9
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.5


def test_the_deepspeed_launcher_with_zero_2(tmp_path: Path) -> None:
    script = str(ROOT / "launch" / "deepspeed_zero3.sh")
    check(*launched(["bash", script], tmp_path, "zero2.json", *SMALL))


def test_torchrun_with_zero_3(tmp_path: Path) -> None:
    """The script of the launcher above, under torchrun and in the stage that cuts the weights."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "distclip", "run", "--cpu", str(ROOT / "launch" / "train_deepspeed.py")),
        *("--deepspeed_config", str(tmp_path / "ds.json")),
    ]
    check(*launched(command, tmp_path, "zero3.json", *SMALL))


def test_accelerate_launch_with_zero_3(tmp_path: Path) -> None:
    """FIELD 14: `clip_grad_norm_`, after the update, gives the norm that the policy has seen.

    Its threshold of 1e-9, which would stop the training, is not heard.
    """
    pytest.importorskip("transformers")  # Accelerate asks for it under any stage
    options = (*SMALL, "--max-norm", "1e-9")
    script = str(ROOT / "launch" / "accelerate_deepspeed.sh")
    check(*launched(["bash", script], tmp_path, "zero3.json", *options))
