"""CPU mode of Accelerate launches: the ranks are real, and a launch without them is refused.

Each launch costs several seconds, so one script checks in one launch what a layout can get wrong.
"""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("accelerate")

from distclip.errors import ConfigurationError, DistclipError
from distclip.tools.launch import accelerate_cpu, accelerate_cpu_asked
from tests.helpers.processes import ROOT, python

CONFIGS = ROOT / "configs" / "accelerate"

# What `distclip run` does with the mode, and nothing else of it.
RUNNER = """
import atexit, runpy, sys
from distclip.tools.launch import accelerate_cpu
from distclip.tools.launch.leaving import let_gloo_finish

atexit.register(let_gloo_finish)  # torch may abort a rank that leaves too soon; `run` waits too

arguments = sys.argv[1:]
cpu = arguments[0] == "--cpu"
active = accelerate_cpu.become_cpu_rank(cpu=cpu)
import accelerate
prepare = accelerate.Accelerator.prepare

def checked(self, *objects, **options):
    if not active:
        accelerate_cpu.check_ranks(self)
    prepared = prepare(self, *objects, **options)
    if active:
        accelerate_cpu.verify_ranks(self, *prepared)
    return prepared

accelerate.Accelerator.prepare = checked
sys.argv = arguments[cpu:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Layer sizes that three ranks cannot divide evenly; two micro-batches a step; clipping that bites.
SCRIPT = """
import json, sys
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FullyShardedDataParallel

STEPS, BATCH, MICRO = 20, 24, 2
accelerator = Accelerator(gradient_accumulation_steps=MICRO)
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(13, 33), torch.nn.Tanh(), torch.nn.Linear(33, 7), torch.nn.Linear(7, 1)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
model, optimizer = accelerator.prepare(model, optimizer)
data = torch.Generator().manual_seed(1)
share = BATCH // accelerator.num_processes
losses = []
for _ in range(STEPS):
    x = torch.randn(BATCH, 13, generator=data)
    mine = x[accelerator.process_index * share :][:share]
    total = torch.zeros(())
    for part in mine.chunk(MICRO):
        with accelerator.accumulate(model):
            target = part[:, :1].sin() * 3 + part[:, 1:2]
            loss = torch.nn.functional.mse_loss(model(part), target)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() / MICRO
    losses.append(accelerator.reduce(total, "mean").item())
if isinstance(model, FullyShardedDataParallel):
    with FullyShardedDataParallel.summon_full_params(model):
        weights = [p.detach().clone() for p in model.parameters()]
else:
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
if accelerator.is_main_process:
    result = {
        "ranks": accelerator.num_processes,
        "kind": accelerator.distributed_type.value,
        "model": type(model).__name__,
        "losses": losses,
        "weights": torch.cat([w.flatten() for w in weights]).tolist(),
    }
    with open(sys.argv[1], "w") as file:
        json.dump(result, file)
accelerator.wait_for_everyone()
accelerator.end_training()
"""


class Workshop:
    """A folder with the runner and the script, and a way to launch them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "stand_in_runner.py").write_text(RUNNER)
        (folder / "train.py").write_text(SCRIPT)

    def start(self, *command: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join((str(ROOT), str(self.folder)))
        return python(*command, folder=self.folder, PYTHONPATH=path)

    def launch(
        self, config: Path, ranks: int, *options: str
    ) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
        out = self.folder / f"{config.stem}.{ranks}.json"
        launcher = ("-m", "accelerate.commands.accelerate_cli", "launch")
        done = self.start(
            *launcher,
            *("--config_file", str(config), "--num_processes", str(ranks)),
            *("-m", "stand_in_runner", *options, "train.py", str(out)),
        )
        return (json.loads(out.read_text()) if out.is_file() else {}), done


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("accelerate_cpu"))


@pytest.fixture(scope="module")
def alone(workshop: Workshop) -> dict[str, Any]:
    """The same training in one process on the whole batch, without any launcher."""
    out = workshop.folder / "alone.json"
    done = workshop.start("train.py", str(out))
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["ranks"] == 1
    return result


@pytest.mark.parametrize(
    ("config", "ranks", "kind", "model"),
    [
        ("ddp_cpu", 2, "MULTI_CPU", "DistributedDataParallel"),
        ("fsdp2_cpu", 2, "FSDP", "FSDPSequential"),  # FSDP1: test_accelerate_launch.py
    ],
)
def test_config_file_alone_gives_real_ranks(
    workshop: Workshop, alone: dict[str, Any], config: str, ranks: int, kind: str, model: str
) -> None:
    result, done = workshop.launch(CONFIGS / f"{config}.yaml", ranks)

    assert done.returncode == 0, done.stderr
    assert (result["ranks"], result["kind"], result["model"]) == (ranks, kind, model)
    assert result["losses"] == pytest.approx(alone["losses"], abs=2e-6)
    assert result["weights"] == pytest.approx(alone["weights"], abs=1e-6)


@pytest.fixture(scope="module")
def silent(workshop: Workshop) -> Path:
    """A configuration that does not say use_cpu, as one for GPUs."""
    text = (CONFIGS / "fsdp2_cpu.yaml").read_text()
    assert "use_cpu: true" in text
    path = workshop.folder / "silent.yaml"
    path.write_text(text.replace("use_cpu: true", "use_cpu: false"))
    return path


def test_the_option_asks_too_and_one_process_will_do(
    workshop: Workshop, silent: Path, alone: dict[str, Any]
) -> None:
    result, done = workshop.launch(silent, 1, "--cpu")

    assert done.returncode == 0, done.stderr
    assert (result["ranks"], result["kind"], result["model"]) == (1, "FSDP", "FSDPSequential")
    assert result["losses"] == pytest.approx(alone["losses"], abs=2e-6)


def test_multi_cpu_that_starts_one_process_is_refused(workshop: Workshop) -> None:
    config = workshop.folder / "multi_cpu.yaml"
    config.write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 4\n")

    result, done = workshop.launch(config, 4)

    assert done.returncode != 0
    assert not result
    assert "asked for 4 processes" in done.stderr
    assert "but started one:" in done.stderr


# ---- without a launch ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "0"}, False),
        ({"DISTCLIP_CPU": "1"}, True),
        ({"DISTCLIP_CPU": "yes"}, True),
        ({"ACCELERATE_USE_CPU": "True"}, True),
        ({"ACCELERATE_USE_CPU": "False"}, False),
        ({"DISTCLIP_CPU": "0", "ACCELERATE_USE_CPU": "true"}, False),
    ],
)
def test_requested(environ: dict[str, str], expected: bool) -> None:
    assert accelerate_cpu.requested(environ) is expected


def test_requested_refuses_a_value_that_is_neither_yes_nor_no() -> None:
    with pytest.raises(ConfigurationError, match="DISTCLIP_CPU='perhaps'"):
        accelerate_cpu.requested({"DISTCLIP_CPU": "perhaps"})


def test_install_does_nothing_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import PartialState

    for name in ("DISTCLIP_CPU", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    before, backend = dict(os.environ), PartialState._prepare_backend

    assert accelerate_cpu.become_cpu_rank() is False
    assert dict(os.environ) == before
    assert PartialState._prepare_backend is backend


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["python", "/bin/accelerate", "launch", "--cpu", "a.py"], ["--cpu", "a.py"]),
        (["python", "-m", "accelerate.commands.launch", "a.py"], ["a.py"]),
        (["accelerate-launch.exe", "a.py"], ["a.py"]),
        (["python", "/bin/accelerate", "config"], None),
        (["torchrun", "launch", "a.py"], None),
    ],
)
def test_launch_is_found_in_a_command_line(command: list[str], expected: list[str] | None) -> None:
    assert accelerate_cpu_asked._launch_arguments(command) == expected


def test_options_of_the_script_are_not_taken_for_the_launcher_s(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("distributed_type: FSDP\nnum_processes: 3\nuse_cpu: true\n")
    arguments = ["--config_file", "a.yaml", "-m", "distclip", "run", "--config", "b.yaml", "--cpu"]

    launch = accelerate_cpu_asked._read_launch(arguments, str(tmp_path))

    assert launch is not None
    assert (launch.use_cpu, launch.num_processes, launch.distributed_type) == (True, 3, "FSDP")


def fake_accelerator(kind: str, ranks: int, device: str = "cpu") -> Any:
    return SimpleNamespace(
        num_processes=ranks,
        device=SimpleNamespace(type=device),
        distributed_type=SimpleNamespace(value=kind),
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(ignored_modules=None)),
        _models=[],
    )


def test_verify_refuses_ranks_that_are_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistclipError, match=r"2 ranks were launched .* no process group"):
        accelerate_cpu.verify_ranks(fake_accelerator("NO", 1))


def test_verify_refuses_another_device() -> None:
    with pytest.raises(DistclipError, match="not cpu"):
        accelerate_cpu.verify_ranks(fake_accelerator("NO", 1, device="cuda"))


def test_verify_refuses_a_model_that_was_not_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version, fault in (("2", "plain tensors, the first 'weight'"), ("1", "no module of it")):
        monkeypatch.setenv("FSDP_VERSION", version)
        with pytest.raises(DistclipError, match=fault):
            accelerate_cpu.verify_ranks(fake_accelerator("FSDP", 1), model)
    with pytest.raises(DistclipError, match="Accelerate runs as MULTI_CPU"):
        accelerate_cpu.verify_ranks(fake_accelerator("MULTI_CPU", 1), model)
