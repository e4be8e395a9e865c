"""The policy's state goes with DeepSpeed's checkpoints, with no extra call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

import torch
import torch.distributed as dist

import distclip
from distclip import policies
from distclip.testing import run_on_ranks
from tests.integrations.engines import close, engine_of, json_of, step, weights_of
from tests.integrations.test_deepspeed_skips import SkipSecond

pytestmark = pytest.mark.filterwarnings("ignore")


def attached(stage: int, kind: str = "fp32", **options: Any) -> Any:
    engine = engine_of(json_of(stage, kind, **options))
    policy = policies.chain(SkipSecond(), policies.agc(0.05))
    distclip.deepspeed.attach(engine, policy)
    return engine


def count_of(engine: Any) -> float:
    (state,) = (s for s in engine._distclip.clipper._states.values() if s)
    return float(state["count"])


@pytest.mark.ranks(2, timeout=240)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path_factory: Any) -> None:
    folder = [str(tmp_path_factory.mktemp("checkpoints")) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    fp32_sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    cells = [(0, "fp32", {}), (1, "fp32", {}), (2, "fp16", {}), (3, "fp32", {}),
             (1, "bf16", fp32_sums)]  # fmt: skip
    for number, (stage, kind, options) in enumerate(cells):
        where = f"{folder[0]}/{number}"
        through = attached(stage, kind, gradient_clipping=0.75, **options)
        step(through, 0)
        through.save_checkpoint(where, client_state={"mine": 3})
        assert getattr(through.optimizer, "clip_grad", 0.0) == 0.0
        for later in (1, 2):
            step(through, later)
        assert through.skipped_steps == 1

        resumed = attached(stage, kind, gradient_clipping=0.75, **options)
        path, client_state = resumed.load_checkpoint(where)
        assert path is not None
        assert client_state["mine"] == 3
        assert "distclip" not in client_state
        assert count_of(resumed) == 1.0
        assert getattr(resumed.optimizer, "clip_grad", 0.0) == 0.0
        for later in (1, 2):  # the second is skipped, which the state knows
            step(resumed, later)
        assert resumed.skipped_steps == 1, (stage, kind)
        ours = weights_of(resumed)
        for name, weight in weights_of(through).items():
            assert torch.equal(weight, ours[name]), (stage, kind, name)
        close(resumed)

        # Without distclip, DeepSpeed finds its own clipping in the checkpoint.
        plain = engine_of(json_of(stage, kind, gradient_clipping=0.75, **options))
        _, client_state = plain.load_checkpoint(where)
        assert getattr(plain.optimizer, "clip_grad", 0.75) == 0.75, (stage, kind)
        plain.save_checkpoint(where, tag="plain", client_state={"mine": 4})
        close(plain)
        # And of a checkpoint without it the policy begins anew.
        fresh = attached(stage, kind, **options)
        fresh.load_checkpoint(where, tag="plain")
        assert count_of(fresh) == 0.0
        assert getattr(fresh.optimizer, "clip_grad", 0.0) == 0.0
        fresh.load_checkpoint(where, tag="global_step1", load_module_only=True)
        assert count_of(fresh) == 0.0  # the weights of a run that is over
        close(fresh)
        close(through)


def save(folder: str) -> dict[str, Any]:
    engine = attached(1)
    step(engine, 0)
    engine.save_checkpoint(folder)
    state: dict[str, Any] = engine._distclip.clipper.state_dict()
    close(engine)
    return state


def load(folder: str, stage: int) -> dict[str, Any]:
    engine = attached(stage)
    # DeepSpeed itself takes its own moments to the same stage and number of ranks only.
    path, _ = engine.load_checkpoint(folder, load_optimizer_states=False)
    assert path is not None
    state: dict[str, Any] = engine._distclip.clipper.state_dict()
    step(engine, 1)
    assert engine.skipped_steps == 1
    close(engine)
    return state


def test_it_goes_to_another_number_of_ranks_and_another_stage(tmp_path: Path) -> None:
    saved = run_on_ranks(save, 2, str(tmp_path))[0]
    for ranks, stage in [(3, 2), (2, 0)]:
        for state in run_on_ranks(load, ranks, str(tmp_path), stage):
            assert state["step"] == saved["step"] == 1
            assert str(state) == str(saved)
