"""DeepSpeed's features that step otherwise than its wrappers do: right, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed")

import torch

import distclip
from distclip import policies
from distclip.errors import DistclipError
from tests.integrations.engines import (
    VERSION,
    close,
    engine_of,
    json_of,
)
from tests.integrations.test_deepspeed import GLOBAL, train

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(VERSION < (0, 19), reason="came with DeepSpeed 0.19"),
]

CPU: dict[str, Any] = {"device": "cpu", "pin_memory": False}
ZENFLOW = {
    "offload_optimizer": CPU,
    "zenflow": {
        "topk_ratio": 0.1, "select_strategy": "step", "select_interval": 2, "update_interval": 2,
        "overlap_step": False,
    },
}  # fmt: skip


def refused(engine: Any, words: str) -> None:
    """Refused when attached to, and nothing is left behind."""
    before = set(engine.__dict__), set(engine.optimizer.__dict__)
    with pytest.raises(DistclipError, match=words):
        distclip.deepspeed.attach(engine, policies.global_norm(1.0))
    assert (set(engine.__dict__), set(engine.optimizer.__dict__)) == before
    close(engine)


@pytest.mark.ranks(2, timeout=60)
def test_zenflow_is_refused_at_stage_3() -> None:
    """The class of the wrapper does not say so there, as it does at stages 1 and 2."""
    params = {
        "torch_adam": True,
        "lr": 0.05,
        "betas": [0.9, 0.999],
        "eps": 1.0,
        "weight_decay": 0.1,
    }
    document = json_of(3, zero=ZENFLOW, optimizer={"type": "AdamW", "params": params})
    refused(engine_of(document), "ZenFlow steps a few columns .*zenflow")


@pytest.mark.ranks(2, timeout=60)
def test_what_is_not_started_here_is_refused_by_its_marks() -> None:
    """AutoEP (transformers 5.23) and SuperOffload do not start; Muon compiles when it steps."""
    engine = engine_of(json_of(2))
    kept = engine._config.expert_parallel_config
    engine._config.expert_parallel_config = type("Config", (), {"enabled": True})
    with pytest.raises(DistclipError, match=r'AutoEP \("expert_parallel"\) was not run'):
        distclip.deepspeed.attach(engine, policies.global_norm(1.0))
    engine._config.expert_parallel_config = kept
    engine.autotp_size = lambda: 2  # a real one stays in DeepSpeed's globals, for all later tests
    with pytest.raises(DistclipError, match=r'AutoTP \("tensor_parallel"\) cuts weights'):
        distclip.deepspeed.attach(engine, policies.global_norm(1.0))
    del engine.autotp_size
    own = type(engine.optimizer)
    engine.optimizer.__class__ = type("SuperOffloadOptimizer_Stage3", (own,), {})
    with pytest.raises(DistclipError, match=r'SuperOffload steps on the CPU.*"super_offload"'):
        distclip.deepspeed.attach(engine, policies.global_norm(1.0))
    engine.optimizer.__class__ = own
    inner = type(engine.optimizer.optimizer)
    engine.optimizer.optimizer.__class__ = type("MuonWithAuxAdam", (inner,), {})
    with pytest.raises(DistclipError, match="Muon transforms gradients before"):
        distclip.deepspeed.attach(engine, policies.global_norm(1.0))
    engine.optimizer.optimizer.__class__ = inner
    distclip.deepspeed.attach(engine, policies.global_norm(1.0))
    close(engine)


@pytest.mark.ranks(2, 3, timeout=120)
def test_twin_flow_offload_is_as_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the sub-groups step on the accelerator, which has an optimizer of its own."""
    from deepspeed.runtime.zero import stage3

    # DeepSpeed's own Adam would be compiled, and is asked for by its class alone.
    monkeypatch.setattr(stage3, "DeepSpeedCPUAdam", torch.optim.AdamW)
    zero = {"sub_group_size": 60, "offload_optimizer": {**CPU, "ratio": 0.5}}
    train(GLOBAL, json_of(3, zero=zero), "adam", steps=4)
