"""The lines of ``distclip run``: at the first step, and at the end."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import distclip
from distclip import policies
from distclip.config import logs
from distclip.policies.compose import summary
from distclip.tools.launch.narration import Narration, describe
from tests.sharded import mesh_of


@pytest.fixture
def narration(monkeypatch: pytest.MonkeyPatch) -> Iterator[Narration]:
    monkeypatch.setattr(logs, "opened", [])  # runs that other tests prepared and never ended
    made = Narration()
    yield made
    if made._follow in logs.opened:
        made.conclude()


def step(model: nn.Module, clipper: Any, factor: float = 1.0) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, factor)
    clipper.clip_()


def test_one_clipper(
    narration: Narration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(3, 1).double()
    log = str(tmp_path / "clip.jsonl")
    document = {"policy": {"name": "global_norm", "max_norm": 4.0}, "on_nonfinite": "skip"}
    clipper = distclip.from_config({**document, "log": {"jsonl": log}}, model)
    assert capsys.readouterr().err == ""
    for number in range(100):
        step(model, clipper, float("nan") if number == 7 else 1.0 + 2.0 * (number >= 90))
        if number == 0:
            line = "distclip: global_norm(4) on 2 parameters, one process, float64\n"
            assert capsys.readouterr().err == line
    assert capsys.readouterr().err == ""
    narration.conclude()
    line = f"distclip: 100 steps, 10 % clipped, 1 skipped, largest norm 6; log: {log}\n"
    assert capsys.readouterr().err == line
    distclip.from_config({"policy": "measure"}, model)
    assert len(narration.followed) == 1


def test_several_clippers(narration: Narration, capsys: pytest.CaptureFixture[str]) -> None:
    models = [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)) for _ in range(3)]
    clippers = [distclip.from_config({"policy": "measure"}, model) for model in models]
    for model, clipper in zip(models[:2], clippers, strict=False):
        step(model, clipper)
    narration.conclude()
    assert capsys.readouterr().err.splitlines() == [
        "distclip: measure(2) on 4 parameters, one process, float32",
        "distclip: 2. measure(2) on 4 parameters (0.weight, 0.bias, ...), one process, float32",
        "distclip: 1. 1 steps, 0 % clipped, 0 skipped, largest norm 3",
        "distclip: 2. 1 steps, 0 % clipped, 0 skipped, largest norm 3",
    ]


def test_models_that_are_gone_are_let_go_and_still_counted(
    narration: Narration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = []
    for fold in range(2):
        model = nn.Linear(3, 1)
        document = {"policy": "measure", "log": {"jsonl": str(tmp_path / f"{fold}.jsonl")}}
        clipper = distclip.from_config(document, model)
        step(model, clipper)
        gone += [weakref.ref(model), weakref.ref(model.weight), weakref.ref(clipper)]
        del model, clipper
    gc.collect()
    assert [reference() for reference in gone] == [None] * 6
    capsys.readouterr()
    narration.conclude()
    line = "1 steps, 0 % clipped, 0 skipped, largest norm 2; log:"
    assert capsys.readouterr().err.splitlines() == [
        f"distclip: {fold + 1}. {line} {tmp_path / f'{fold}.jsonl'}" for fold in range(2)
    ]


@pytest.mark.ranks(2)
def test_layouts() -> None:
    def layout(model: nn.Module) -> str:
        return describe(distclip.GradClipper(model, policies.measure())).split(", ", 1)[1]

    assert layout(nn.Linear(4, 4)) == "DDP over 2 ranks, float32"
    assert layout(fully_shard(nn.Linear(4, 4))) == "FSDP2 over 2 ranks, float32"
    flat = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    assert layout(flat) == "FSDP1 FULL_SHARD over 2 ranks, float32"
    mesh = mesh_of((2,), ("x",))
    parallel = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()})
    assert layout(parallel.bfloat16()) == "DTensor over 2 ranks, bfloat16"
    mixed = nn.Linear(4, 4)
    mixed.weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    mixed.bias.data = mixed.bias.data.double()
    assert layout(mixed) == "DTensor over 2 ranks, float32/float64"
    assert dist.get_world_size() == 2


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (policies.agc(), "agc(0.01)"),
        (policies.agc(0.2, unit="tensor"), "agc(0.2, unit='tensor')"),
        (policies.measure(), "measure(2)"),
        (policies.zclip(max_norm=2), "zclip(2.5, max_norm=2.0)"),
        (
            policies.chain(policies.value(0.5), policies.global_norm(1.0)),
            "chain(value(0.5), global_norm(1))",
        ),
        (
            policies.by_name({"*.bias": None}, default=policies.agc(0.01)),
            "by_name({'*.bias': None}, default=agc(0.01))",
        ),
    ],
)
def test_a_policy_in_short(policy: Any, text: str) -> None:
    assert summary(policy) == text
