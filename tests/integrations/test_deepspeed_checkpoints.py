"""The policy's state goes with DeepSpeed's checkpoints, with no extra call."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

import torch
import torch.distributed as dist

import distclip
from distclip import policies
from distclip.testing import run_on_ranks
from tests.helpers.processes import python, well
from tests.integrations.engines import VERSION, close, engine_of, json_of, step, weights_of
from tests.integrations.test_deepspeed_skips import SkipSecond

pytestmark = pytest.mark.filterwarnings("ignore")


def attached(stage: int, kind: str = "fp32", **options: Any) -> Any:
    engine = engine_of(json_of(stage, kind, **options))
    policy = policies.chain(SkipSecond(), policies.agc(0.05))
    distclip.deepspeed.attach(engine, policy)
    return engine


def count_of(engine: Any) -> float:
    (state,) = (s for s in engine._distclip.clipper._session.states.values() if s)
    return float(state["count"])


@pytest.mark.ranks(2, timeout=240)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path_factory: Any) -> None:
    folder = [str(tmp_path_factory.mktemp("checkpoints")) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    fp32_sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    cells = [(0, "fp32", {}), (1, "fp32", {}), (2, "fp16", {}), (3, "fp32", {}),
             (1, "bf16", fp32_sums)]  # fmt: skip
    if VERSION == (0, 18):  # which cannot load that itself (it has no dp_process_group)
        cells.pop()
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


@pytest.mark.ranks(2, timeout=120)
def test_another_threshold_is_loaded_and_another_policy_refused(tmp_path_factory: Any) -> None:
    """As everywhere else; where it is refused DeepSpeed has not loaded anything either."""
    folder = [str(tmp_path_factory.mktemp("policies")) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)

    def begin(policy: Any) -> Any:
        engine = engine_of(json_of(2))
        distclip.deepspeed.attach(engine, policy)
        return engine

    saved = begin(policies.autoclip(50, window=4))
    for number in range(2):
        step(saved, number)
    saved.save_checkpoint(folder[0])
    want = str(saved._distclip.clipper.state_dict()["states"])
    close(saved)
    engine = begin(policies.autoclip(90, window=4))
    engine.load_checkpoint(folder[0])
    assert str(engine._distclip.clipper.state_dict()["states"]) == want
    close(engine)
    engine = begin(policies.autoclip(50, window=5))
    before = weights_of(engine)
    with pytest.raises(distclip.StateError, match=rf"{folder[0]}.*window was 4 and is 5"):
        engine.load_checkpoint(folder[0])
    assert engine.global_steps == 0
    for name, weight in weights_of(engine).items():
        assert torch.equal(weight, before[name]), name
    assert "load_module_state_dict" not in engine.__dict__
    engine._distclip.remove()  # the mend that the message names
    engine.load_checkpoint(folder[0])
    distclip.deepspeed.attach(engine, policies.autoclip(50, window=5))
    step(engine, 2)
    assert engine.global_steps == 3
    close(engine)


def universal(folder: str, stage: int, *, converted: bool) -> tuple[str, Any]:
    """The policy's state at the third step, and the weights after the fourth."""
    options = {"checkpoint": {"load_universal": True}} if converted else {}
    engine = engine_of(json_of(stage, **options), "adam")
    remembers = policies.chain(policies.adagc(warmup_steps=1), policies.autoclip(50, window=4))
    distclip.deepspeed.attach(engine, remembers)
    if converted:
        engine.load_checkpoint(folder, tag="t_universal")
    else:
        for number in range(3):
            step(engine, number)
        engine.save_checkpoint(folder, tag="t")
    state = str(engine._distclip.clipper.state_dict())
    step(engine, 3)
    weights = weights_of(engine)
    close(engine)
    return state, weights


@pytest.mark.skipif(VERSION < (0, 19), reason="not run with older versions")
def test_universal_checkpoints_keep_it(tmp_path: Path) -> None:
    """To another number of ranks, moments included. ZeRO-0 has no shards to convert."""
    for stage in (3,):  # 1 and 2 went well by hand, and cost seconds each
        folder = str(tmp_path / str(stage))
        state, weights = run_on_ranks(universal, 2, folder, stage, converted=False)[0]
        well(python(
            "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", f"{folder}/t",
            "--output_folder", f"{folder}/t_universal", "--inject_missing_state",
            "--num_extract_workers", "1", "--num_merge_workers", "1", timeout=120,
        ))  # fmt: skip
        for ranks in (2, 3):
            again, resumed = run_on_ranks(universal, ranks, folder, stage, converted=True)[0]
            assert again == state
            for name, weight in weights.items():
                error = float((weight - resumed[name]).abs().max())
                assert error <= (0.0 if ranks == 2 else 1e-6), (stage, ranks, name)
