"""Accelerate: scripts under ``accelerate launch``, each layout once."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
from tests.helpers.processes import ROOT, python
from tests.helpers.shares import at_night
from tests.integrations.accelerated import Reference

SCRIPT = Path(__file__).parent / "scripts" / "train_variants.py"


def run(folder: Path, command: Sequence[str], out: str = "result") -> tuple[dict[str, Any], str]:
    """Start a script; its result and what it wrote to stderr."""
    result = folder / f"{out}.json"
    done = python("-m", *command, str(SCRIPT), str(result), folder=folder)
    return (json.loads(result.read_text()) if result.is_file() else {}), done.stderr


def distclip_run(policy: str) -> list[str]:
    return ["distclip", "run", "--config", str(ROOT / f"configs/policies/{policy}.yaml")]


def launch(config: Path, ranks: int, policy: str, *options: str) -> list[str]:
    launcher = ["accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    return [*launcher, "--num_processes", str(ranks), *options, "-m", *distclip_run(policy)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The result of the script in one process, without a launcher, under a policy."""
    folder = tmp_path_factory.mktemp("alone")
    known: dict[str, dict[str, Any]] = {}

    def result(policy: str) -> dict[str, Any]:
        if policy not in known:
            known[policy], stderr = run(folder, distclip_run(policy), out=policy)
            assert known[policy], stderr
            assert known[policy]["ranks"] == 1
        return known[policy]

    return result


@pytest.mark.parametrize(
    ("config", "ranks", "policy", "kind", "model"),
    [
        # Launched in tools/test_accelerate_cpu.py, too, and trained so on warm ranks.
        pytest.param("ddp_cpu", 2, "agc", "MULTI_CPU", "DistributedDataParallel", marks=at_night),
        pytest.param("fsdp2_cpu", 3, "agc", "FSDP", "FSDPModel", marks=at_night),
        ("fsdp1_cpu", 2, "global_norm", "FSDP", "FullyShardedDataParallel"),
    ],
)
def test_a_launch_trains_as_one_process(
    tmp_path: Path,
    alone: Callable[[str], dict[str, Any]],
    config: str,
    ranks: int,
    policy: str,
    kind: str,
    model: str,
) -> None:
    """Each layout once; each policy under each layout is tested on warm ranks."""
    path = ROOT / "configs" / "accelerate" / f"{config}.yaml"
    result, stderr = run(tmp_path, launch(path, ranks, policy))
    assert result, stderr
    assert (result.pop("ranks"), result.pop("kind")) == (ranks, kind)
    assert result.pop("models") == [model]
    assert stderr.count("the script calls clip_grad_norm_(max_norm=1e-09)") == 1
    reference = alone(policy)
    for variant, weights in result.items():
        found, wanted = torch.tensor(weights), torch.tensor(reference[variant])
        error = (found - wanted).norm() / wanted.norm()
        assert error <= (1e-2 if variant == "bf16" else 1e-6), variant
    assert result["bf16"] != result["fused"]
    # The policy acts, and acts alike, however the script says it.
    assert result["parts"] != result["norm"]
    for variant in ("value", "never", "accumulate"):
        found, wanted = torch.tensor(result[variant]), torch.tensor(result["norm"])
        assert (found - wanted).norm() <= 1e-6 * wanted.norm(), variant


def test_one_process_does_what_the_oracle_says(alone: Callable[[str], dict[str, Any]]) -> None:
    for name, policy in {
        "agc": {"by_name": {"head.*": None}, "default": {"name": "agc", "clip_factor": 0.01}},
        "global_norm": {"name": "global_norm", "max_norm": 1.0},
    }.items():
        torch.manual_seed(0)
        layers = {"body": nn.Linear(13, 33), "middle": nn.Linear(33, 7), "head": nn.Linear(7, 1)}
        model = nn.ModuleDict(layers)
        reference = Reference(model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9))
        data = torch.Generator().manual_seed(1)
        for _ in range(20):
            x = torch.randn(24, 13, generator=data)
            found = model["head"](model["middle"](torch.tanh(model["body"](x))))
            target = x[:, :1].sin() * 9 + x[:, 1:2]
            reference.update(policy, nn.functional.mse_loss(found, target))
        wanted = torch.cat([p.detach().flatten() for p in model.parameters()])
        error = (torch.tensor(alone(name)["norm"]) - wanted).norm()
        assert error <= 1e-6 * wanted.norm(), name


def test_ranks_that_are_not_there_are_refused(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "accelerate" / "fsdp2_cpu.yaml").read_text()
    config = tmp_path / "silent.yaml"
    config.write_text(text.replace("use_cpu: true", "use_cpu: false"))
    result, stderr = run(tmp_path, launch(config, 2, "agc"))

    assert not result
    assert "2 processes were launched for FSDP2" in stderr
    assert "pass --cpu" in stderr
