"""The examples of launch/, in a short form: same weights on two ranks as alone, one clip a step."""

import argparse
import importlib
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn

from tests.helpers.logs import lines
from tests.helpers.processes import ROOT, python, well

pytest.importorskip("gymnasium")
pytest.importorskip("accelerate")

HYPERPARAMETERS = ROOT / "configs" / "hyperparams_config.json"
LOOPBACK = ("-m", "distclip.testing.ranks.loopback")
SHORT_DQN = ["--steps", "1200", "--evaluate-every", "600"]  # 25 updates


def module(name: str) -> Any:
    """A file of launch/, whose scripts import each other by name."""
    if str(ROOT / "launch") not in sys.path:
        sys.path.insert(0, str(ROOT / "launch"))
    return importlib.import_module(name)


def options(script: Any, *arguments: str) -> argparse.Namespace:
    before, sys.argv = sys.argv, ["script", *arguments]
    try:
        return script.parse_arguments()
    finally:
        sys.argv = before


class Alone:
    """One process with the whole batch and torch's own clipping."""

    rank, world = 0, 1

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm
        self.clipped = 0

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        def clip(*_: Any) -> None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), self.max_norm)
            self.clipped += bool(norm > self.max_norm)

        optimizer.register_step_pre_hook(clip)
        return model, optimizer

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def policy_file(folder: Path, max_norm: float | None) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "policy.yaml"
    log = {"jsonl": str(folder / "clip.jsonl")}
    policy = "measure" if max_norm is None else {"name": "global_norm", "max_norm": max_norm}
    text = {"policy": policy, "log": log}
    path.write_text(yaml.safe_dump(text))
    return path


def compare(got: nn.Module, want: nn.Module) -> None:
    for (name, p), q in zip(got.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: n + text)


@pytest.mark.ranks(1, 2)
def test_rnn_as_alone(tmp_path: Path) -> None:
    training, train_rnn = module("training"), module("train_rnn")
    if dist.get_rank() == 0:
        policy_file(tmp_path, 0.5)
    dist.barrier()
    given = options(train_rnn, "--steps", "40", "--policy", str(tmp_path / "policy.yaml"))
    network = train_rnn.train(training.start(given), given, training.Log(None, False))
    alone = Alone(0.5)
    torch.manual_seed(given.seed)
    compare(network, train_rnn.train(alone, given, training.Log(None, False)))
    assert alone.clipped > 10  # so that equal weights say something of the clipping
    if dist.get_rank() == 0:
        assert [line["step"] for line in lines(tmp_path / "clip.jsonl")] == list(range(40))


@pytest.mark.ranks(1, 2)
def test_dqn_as_alone(tmp_path: Path) -> None:
    training, train_dqn = module("training"), module("train_dqn")
    if dist.get_rank() == 0:
        policy_file(tmp_path, 0.1)
    dist.barrier()
    given = options(train_dqn, "--seed", "0", "--policy", str(tmp_path / "policy.yaml"), *SHORT_DQN)
    hyper = train_dqn.read_hyperparameters(given)
    network, _ = train_dqn.train(training.start(given), hyper, given, training.Log(None, False))
    alone = Alone(0.1)
    torch.manual_seed(given.seed)
    want, _ = train_dqn.train(alone, hyper, given, training.Log(None, False))
    compare(network, want)
    assert alone.clipped > 10
    if dist.get_rank() == 0:
        assert len(lines(tmp_path / "clip.jsonl")) == 26  # game steps 1000, 1008, ..., 1200


def start(*command: str) -> str:
    return well(python(*command, folder=ROOT))


def test_dqn_under_both_launchers(tmp_path: Path) -> None:
    """The same run under `accelerate launch` and plain torchrun, by the file as it is."""
    script, weights = str(ROOT / "launch" / "train_dqn.py"), "--weights"
    start(
        *LOOPBACK, "accelerate.commands.launch", "--config_file", "configs/accelerate/ddp_cpu.yaml",
        "-m", "distclip", "run", "--config", str(HYPERPARAMETERS), script, *SHORT_DQN,
        weights, str(tmp_path / "accelerate.pt"),
    )  # fmt: skip
    printed = start(
        *LOOPBACK, "torch.distributed.run", "--nproc-per-node", "2", script, *SHORT_DQN,
        "--policy", str(HYPERPARAMETERS), weights, str(tmp_path / "torchrun.pt"),
    )  # fmt: skip
    assert printed.count("mean return over 100 new episodes") == 1  # one of the ranks prints
    one, other = (torch.load(tmp_path / f"{name}.pt") for name in ("accelerate", "torchrun"))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def test_dreamer_under_fsdp2_as_alone(tmp_path: Path) -> None:
    training, train_dreamer = module("training"), module("train_dreamer")
    short = ["--steps", "8", "--warmup", "2", "--episodes", "8", "--evaluate-every", "8"]
    weights, log = tmp_path / "weights.pt", tmp_path / "clip.jsonl"
    start(
        *LOOPBACK, "accelerate.commands.launch",
        "--config_file", "configs/accelerate/fsdp2_cpu.yaml", "--num_processes", "2",
        "-m", "distclip", "run", "--config", str(policy_file(tmp_path / "measured", None)),
        str(ROOT / "launch" / "train_dreamer.py"), *short,
        "--weights", str(weights), "--clip-log", str(log),
    )  # fmt: skip
    torch.manual_seed(0)
    alone = train_dreamer.train(
        Alone(math.inf), options(train_dreamer, *short), training.Log(None, False)
    )
    got = torch.load(weights)
    assert got.keys() == dict(alone.named_parameters()).keys()
    for name, want in alone.named_parameters():
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-6, msg=name)
    records = lines(log)
    assert [record["step"] for record in records] == list(range(8))
    assert min(record["coefficient"] for record in records) < 0.9  # AGC acted
    assert [record["step"] for record in lines(tmp_path / "measured" / "clip.jsonl")] == list(
        range(8)
    )


class InThisProcess:
    """In place of a launched process: the script alone, here."""

    def __init__(self, command: list[str], **_: Any) -> None:
        at = next(i for i, word in enumerate(command) if "/launch/train_" in word)
        config = command[command.index("--config") + 1]
        before, sys.argv = sys.argv, [*command[at:], "--policy", config]
        try:
            runpy.run_path(command[at], run_name="__main__")
        finally:
            sys.argv = before
        self.returncode = 0

    def poll(self) -> int:
        return self.returncode


def test_choosing_a_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choose, study = module("choose_threshold"), module("study")
    monkeypatch.setattr(study.subprocess, "Popen", InThisProcess)
    monkeypatch.setattr(choose, "suggest", lambda runs: (f"{len(runs)} logs", 2.5))
    command = ["x", "--output", str(tmp_path), "--seeds", "2", "--steps", "30"]
    monkeypatch.setattr(sys, "argv", command)
    choose.main()
    shown = capsys.readouterr().out
    assert "2 logs" in shown
    for label in ("no clipping", "global norm 0.1", "global norm 2.5", "global norm 100"):
        (row,) = (line for line in shown.splitlines() if line.startswith(f"│ {label} "))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        largest_after = float(cells[-2])
        assert largest_after <= float(label.split()[-1]) * 1.001 if "norm" in label else True
        assert (cells[-1] == "0 %") == (label in ("no clipping", "global norm 100"))
    assert (tmp_path / "rnn" / "rnn.png").stat().st_size > 10_000


def test_the_suggestion_is_that_of_the_command(tmp_path: Path) -> None:
    choose, study = module("choose_threshold"), module("study")
    log = tmp_path / "measured.jsonl"
    records = [{"step": n, "total_norm": n / 10, "coefficient": 1.0} for n in range(1, 101)]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    printed, threshold = choose.suggest([study.Outcome("no clipping", log, log)])
    assert printed.startswith("# ")
    assert threshold == pytest.approx(9.01)


def test_a_run_that_fails_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rnn, study = module("rnn"), module("study")
    failing = [sys.executable, "-c", "raise SystemExit('out of marbles')"]
    monkeypatch.setattr(study.Study, "_launcher", lambda *_: failing)
    monkeypatch.setattr(sys, "argv", ["x", "--output", str(tmp_path), "--seeds", "1"])
    with pytest.raises(SystemExit, match=r"(?s)out of marbles.*exit code 1.*--seed 0"):
        rnn.main()


@pytest.mark.ranks(2)
def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    training, train_rnn = module("training"), module("train_rnn")
    given = options(train_rnn, "--batch-size", "21", "--policy", "unused.yaml")
    with pytest.raises(SystemExit, match="a batch of 21 cannot be shared by 2 ranks"):
        training.share(training.start(given), torch.zeros(given.batch_size))
