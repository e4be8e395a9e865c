"""Scripts as people publish them, unchanged, under the integration: 1, 2 and 4 ranks train alike.

Accelerate's and the Trainer's are in ``test_accelerate_launch.py`` and ``test_trainer_launch.py``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import distclip
from distclip.integrations import torch_scripts
from distclip.testing import run_on_ranks
from distclip.tools.launch.script import Script
from tests.helpers.processes import python, well

SCRIPTS = Path(__file__).parent / "scripts"
STEPS = 20
POLICIES: dict[str, dict[str, Any]] = {
    "train_gpt.py": {"name": "agc", "clip_factor": 0.02},
    "train_gan.py": {"name": "zclip", "warmup_steps": 4, "max_norm": None, "z_thresh": 0.5},
    "train_titan.py": {"name": "global_norm", "max_norm": 0.05},
}


def run_here(name: str, folder: str) -> None:
    """What ``distclip run`` does, in a rank that is there already, and that goes on after it."""
    config = distclip.config.load(
        {"policy": POLICIES[name], "log": {"jsonl": f"{folder}/clip.jsonl"}}
    )
    environ = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    main = sys.modules["__main__"]
    with (
        mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
        mock.patch.object(sys, "argv", list(sys.argv)),
        mock.patch.object(sys, "path", list(sys.path)),
        mock.patch.dict(os.environ, environ),
    ):
        scripts = torch_scripts.enable(sys.modules["torch.optim.optimizer"], config)
        assert scripts is not None
        try:
            assert Script(str(SCRIPTS / name), [folder]).run() is None
        finally:
            sys.modules["__main__"] = main
            scripts.remove()


def results(folder: Path) -> tuple[dict[str, torch.Tensor], list[float], list[list[float]]]:
    """Weights of all ranks; norms that the script saw; norms in each log."""
    saved = [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]
    weights = {name: value for each in saved for name, value in each["weights"].items()}
    logs = [
        [json.loads(line)["total_norm"] for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("clip*.jsonl"))
    ]
    return weights, saved[0]["norms"], logs


@pytest.mark.parametrize("name", POLICIES)
def test_it_trains_alike_on_1_2_and_4_ranks(name: str, tmp_path: Path) -> None:
    found = {}
    for world in (1, 2, 4):
        (tmp_path / str(world)).mkdir()
        run_on_ranks(run_here, world, name, str(tmp_path / str(world)))
        found[world] = results(tmp_path / str(world))
    weights, norms, logs = found[1]
    assert [len(log) for log in logs] == [STEPS] * (2 if "gan" in name else 1)
    assert norms == pytest.approx([] if "gan" in name else logs[0], rel=1e-4)
    for world in (2, 4):
        others, their_norms, their_logs = found[world]
        assert others.keys() == weights.keys()
        for parameter, value in weights.items():
            torch.testing.assert_close(others[parameter], value, rtol=1e-3, atol=2e-5)
        assert their_norms == pytest.approx(norms, rel=1e-3)
        for log, reference in zip(their_logs, logs, strict=True):
            assert log == pytest.approx(reference, rel=1e-3)


def test_under_torchrun(tmp_path: Path) -> None:
    """A real launch of 2 ranks: what it says, and the weights that it saves."""
    (tmp_path / "policy.yaml").write_text(
        json.dumps({"policy": POLICIES["train_gpt.py"], "log": {"jsonl": "clip.jsonl"}})
    )
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "distclip", "run", "--config", "policy.yaml"]
    done = python("-m", *command, str(SCRIPTS / "train_gpt.py"), ".", folder=tmp_path)
    well(done)
    lines = [line for line in done.stderr.splitlines() if line.startswith("distclip: ")]
    assert lines == [
        "distclip: agc(0.02) on 24 parameters, DDP over 2 ranks, float32",
        lines[1],
    ]
    assert lines[1].startswith("distclip: 20 steps, ")
    assert lines[1].endswith("log: clip.jsonl")
    weights, norms, logs = results(tmp_path)
    assert len(weights) == 24
    assert norms == pytest.approx(logs[0])
    assert len(norms) == STEPS
