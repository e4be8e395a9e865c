"""A Trainer script under ``distclip run``, unchanged: DDP and ZeRO-2, and on from a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.helpers.processes import python, well
from tests.integrations.test_trainer import SPEC, WRONG_BY_ITSELF, close


def launched(folder: Path, before: list[str], after: list[str]) -> Any:
    script = str(Path(__file__).parent / "scripts" / "train_trainer.py")
    done = python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "distclip", "run", "--cpu", *before, script, str(folder / "out"), *after),
        folder=folder,
    )
    well(done)
    assert "clipped nothing" not in done.stderr
    assert "no state of distclip" not in done.stderr
    assert "is not used" in done.stderr
    assert (folder / "out" / "checkpoint-3" / "distclip.pt").exists()
    return torch.load(folder / "out" / "result.pt")


def check(result: Any) -> None:
    from tests.integrations.trainers import reference

    want, norms = reference(SPEC, 4)
    assert result["whole"]["ranks"] == 2
    close(result["whole"]["weights"], want)
    assert result["whole"]["norms"] == pytest.approx(norms, rel=1e-5)
    assert result["resumed"]["norms"] == result["whole"]["norms"]
    for name, weight in result["whole"]["weights"].items():
        assert torch.equal(weight, result["resumed"]["weights"][name]), name


def test_ddp_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(json.dumps({"policy": SPEC}))
    check(launched(tmp_path, ["--config", "policy.json"], []))


def test_zero_2_under_torchrun_with_auto_in_the_json(tmp_path: Path) -> None:
    if pytest.importorskip("deepspeed").__version__.startswith("0.18.0"):
        pytest.skip(WRONG_BY_ITSELF)
    document = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "SGD", "params": {"lr": 0.3}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "distclip": {"policy": [*SPEC[:2], {**SPEC[2], "max_norm": "auto"}]},
    }
    (tmp_path / "ds.json").write_text(json.dumps(document))
    check(launched(tmp_path, [], ["ds.json"]))
