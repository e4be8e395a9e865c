"""DeepSpeed's features that step otherwise than its wrappers do: right, or refused by name."""

import functools
from typing import Any

import pytest

pytest.importorskip("deepspeed")

import torch

import distclip
from distclip import policies
from distclip.errors import DistclipError
from tests.integrations.engines import (
    VERSION,
    Replay,
    backward,
    close,
    engine_of,
    gradients_of,
    json_of,
    step,
    weights_of,
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
    """AutoEP (transformers 5.23) and SuperOffload do not start."""
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
    distclip.deepspeed.attach(engine, policies.global_norm(1.0))
    close(engine)


UNCOMPILED = functools.partial(torch.compiler.set_stance, "force_eager")
"""DeepSpeed has the Newton-Schulz iteration compiled, by a C++ compiler."""


def muon_of(stage: int, kind: str = "fp32") -> Any:
    options = {"lr": 0.02, "momentum": 0.9, "torch_adam": True}  # its own Adam would be compiled
    document = json_of(stage, kind, optimizer={"type": "Muon", "params": options},
                       zero={"reduce_scatter": False})  # fmt: skip
    return engine_of(document)


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_is_refused_under_zero(stage: int) -> None:
    """DeepSpeed's norm is of updates: a hundredth of the gradients has nearly the same."""
    norms = []
    for times in (1.0, 0.01):
        engine = muon_of(stage)
        with UNCOMPILED():
            step(engine, 0, times=times)
        norms.append(float(engine.get_global_grad_norm()))
        if times == 1.0:
            close(engine)
    assert norms[1] > 0.5 * norms[0]
    refused(engine, "Muon under ZeRO 1 to 3: DeepSpeed puts the orthogonalised update")


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_muon_without_zero_steps_with_clipped_gradients(kind: str) -> None:
    """Against DeepSpeed's own Muon, stepped with what the oracle makes of the same gradients."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    engine = muon_of(0, kind)
    handle = distclip.deepspeed.attach(engine, {"policy": GLOBAL})
    mirror = Replay(GLOBAL, engine)
    by_muon = {n for n, p in engine.module.named_parameters() if p.use_muon and p.requires_grad}
    assert by_muon == {"fc.weight", "out.weight", "unused.weight"}  # DeepSpeed's choice
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups]
    for group in groups:
        group["params"] = [
            p for n, p in mirror.named.items() if (n in by_muon) == group["use_muon"]
        ]
    kept = mirror.optimizer.state  # of a dummy step within `initialize`
    mirror.optimizer = MuonWithAuxAdam(groups, torch.optim.AdamW, {})
    mirror.optimizer.state.update(kept)
    for number in range(5):
        backward(engine, number, times=(1.0, 8.0)[number % 2])
        with UNCOMPILED():
            want = mirror.step(gradients_of(engine))
            engine.step()
        assert float(handle.last_report.total_norm) == pytest.approx(want.total_norm, rel=1e-6)
        assert want.clipped_norm < 0.9 * want.total_norm
    for name, weight in weights_of(engine).items():
        # Where a norm is off by 1e-7, fp16 rounds the other way now and then.
        torch.testing.assert_close(weight, mirror.weights()[name], rtol=0, atol=5 * 0.02 * 2e-3)
    close(engine)


@pytest.mark.ranks(2, 3, timeout=120)
def test_twin_flow_offload_is_as_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the sub-groups step on the accelerator, which has an optimizer of its own."""
    from deepspeed.runtime.zero import stage3

    # DeepSpeed's own Adam would be compiled, and is asked for by its class alone.
    monkeypatch.setattr(stage3, "DeepSpeedCPUAdam", torch.optim.AdamW)
    zero = {"sub_group_size": 60, "offload_optimizer": {**CPU, "ratio": 0.5}}
    train(GLOBAL, json_of(3, zero=zero), "adam", steps=4)
