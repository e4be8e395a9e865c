"""The Trainer: one clip per update whatever is underneath, and decisions that survive a restart."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import distclip
from distclip import ConfigurationError, policies
from distclip.config import Config
from tests.helpers.logs import logged
from tests.integrations.accelerated import SkipAbove

POLICY = policies.agc(0.05)
SPEC: list[dict[str, Any]] = [
    {"name": "agc", "clip_factor": 0.5},
    {"name": "adagc", "warmup_steps": 2},
    {"name": "global_norm", "max_norm": 0.4},
]
REMEMBERS = policies.chain(
    policies.skip_spikes(window=8, min_history=3, sigma=2.0, loss=True),
    policies.adagc(warmup_steps=2),
    policies.autoclip(50, window=5),
)

WRONG_BY_ITSELF = (
    "DeepSpeed 0.18.0 trains with other gradients than the batch's when stage 2 accumulates, "
    "without distclip too (norm 0.337 where 0.488 is right)"
)


def close(a: Any, b: Any, bound: float = 2e-6) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].double() - b[name].double()).abs().max() <= bound, name


@pytest.mark.ranks(1, 2, timeout=180)
def test_weights_and_logged_norms_are_those_of_the_oracle(tmp_path: Path) -> None:
    from tests.integrations.trainers import norms_of, reference, train, trainer_of, weights_of

    want, norms = reference(SPEC, 4)
    for layout in ("ddp", "fsdp2"):
        for options, meshes in (({}, False), ({"max_grad_norm": 0.0}, False), ({}, True)):
            callback = distclip.transformers.ClipCallback({"policy": SPEC})
            trainer = trainer_of(tmp_path, layout, [callback], **options)
            trainer._mixed_mesh_grads = meshes  # then it clips without its Accelerator
            with logged() as messages:
                train(trainer)
            # Of the Trainer's own call nothing is said as if the script had made it.
            first = trainer.is_world_process_zero()
            assert [m.partition(" by ")[0] for m in messages] == ["the Trainer clips"] * first
            close(weights_of(trainer), want)
            assert norms_of(trainer) == pytest.approx(norms, rel=1e-5)
            assert float(callback.last_report.coefficient) < 0.9
            lines = [line for line in trainer.state.log_history if "loss" in line]
            last = callback.last_report
            assert [line["grad_norm"] for line in lines] == norms_of(trainer)
            assert lines[-1]["grad_norm_clipped"] == float(last.clipped_norm) < norms[-1]
            assert lines[-1]["clip_coefficient"] == float(last.coefficient)
            assert "log" not in vars(trainer)
            assert trainer.accelerator._distclip is None  # detached


@pytest.mark.ranks(1, 2, timeout=180)
def test_a_resumed_run_decides_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    from tests.integrations.trainers import (
        Watch,
        distclip_run,
        train,
        trainer_of,
        weights_of,
    )

    def run(layout: str, folder: Path, launcher: bool, **options: Any) -> Any:
        if launcher:
            watch = Watch(lambda: trainer.accelerator._distclip.last_report)
            trainer = trainer_of(folder, layout, [watch], updates=8, save_strategy="steps",
                                 save_steps=5)  # fmt: skip
            with distclip_run(Config(policy=REMEMBERS)):
                train(trainer, **options)
        else:
            callback = distclip.transformers.ClipCallback(REMEMBERS)
            watch = Watch(lambda: callback.last_report)
            trainer = trainer_of(folder, layout, [callback, watch], updates=8,
                                 save_strategy="steps", save_steps=5)  # fmt: skip
            train(trainer, **options)
        return watch.decisions, weights_of(trainer)

    for layout, launcher in (("ddp", False), ("ddp", True), ("fsdp2", False)):
        folder = tmp_path / f"{layout}-{launcher}"
        decisions, weights = run(layout, folder, launcher)
        assert len(decisions) == 8
        at5 = folder / "checkpoint-5"
        with logged() as messages:
            resumed, again = run(layout, folder, launcher, resume_from_checkpoint=str(at5))
        assert resumed == decisions[5:]
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        assert not any("no state of distclip" in message for message in messages)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        (at5 / "distclip.pt").unlink()  # as before distclip was in use
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    with logged() as messages:
        anew, _ = run(layout, folder, launcher, resume_from_checkpoint=str(at5))
    assert any("no state of distclip" in message for message in messages)
    assert anew != decisions[5:]


@pytest.mark.ranks(1, 2, timeout=180)
def test_a_skipped_step_leaves_weights_and_scheduler_alone(tmp_path: Path) -> None:
    from tests.integrations.trainers import LR, Watch, model, train, trainer_of, weights_of

    callback = distclip.transformers.ClipCallback(SkipAbove(0.0))
    watch = Watch(lambda: callback.last_report)
    trainer = trainer_of(tmp_path, "ddp", [callback, watch], lr_scheduler_type="linear")
    train(trainer)
    assert watch.rates == [LR] * 4
    close(weights_of(trainer), dict(model().named_parameters()), 0.0)


@pytest.mark.ranks(1)
def test_a_short_last_update_is_no_spike_of_the_loss(tmp_path: Path) -> None:
    """The Trainer divides a loss by the number of micro-batches, which is smaller there."""
    from tests.integrations.trainers import InOrder, train, trainer_of

    class Steady(InOrder):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **{**kwargs, "num_items_in_batch": None})
            return loss - loss.detach() + 3.0

    callback = distclip.transformers.ClipCallback(REMEMBERS)
    seen: list[float] = []
    trainer = trainer_of(tmp_path, "ddp", [callback], count=10, updates=3, kind=Steady)
    trainer.model_accepts_loss_kwargs = False
    trainer.add_callback(distclip_losses(callback, seen))
    train(trainer)
    assert seen == pytest.approx([3.0] * 3)  # of 4 micro-batches, of 1, and of 4


def distclip_losses(callback: Any, seen: list[float]) -> Any:
    from transformers import TrainerCallback

    class Losses(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            (clipper,) = callback._handle._clippers.known.values()
            state = clipper.state_dict()["states"]
            seen.append(next(float(s["shared"]["losses"][len(seen)]) for s in state.values()
                             if "losses" in s["shared"]))  # fmt: skip

    return Losses()


@pytest.mark.ranks(1)
def test_what_cannot_be_meant_is_said_before_training(tmp_path: Path) -> None:
    from tests.integrations.trainers import distclip_run, train, trainer_of

    make = distclip.transformers.ClipCallback
    with pytest.raises(ConfigurationError, match="no policy, and neither"):
        train(trainer_of(tmp_path, "ddp", [make()]))
    with pytest.raises(ConfigurationError, match="2 ClipCallbacks"):
        train(trainer_of(tmp_path, "ddp", [make(POLICY), make(POLICY)]))
    with (
        distclip_run(Config(policy=POLICY)),
        pytest.raises(ConfigurationError, match="has a distclip policy already"),
    ):
        train(trainer_of(tmp_path, "ddp", [make(POLICY)]))
    callback = make(POLICY)
    with pytest.raises(distclip.DistclipError, match=r"not started by transformers\.Trainer"):
        callback.on_train_begin(None, None, None)


@pytest.mark.ranks(2, timeout=240)
def test_deepspeed_underneath(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from tests.integrations import engines  # no compiler

    if engines.VERSION == (0, 18):
        pytest.skip(WRONG_BY_ITSELF)
    from tests.integrations.trainers import (
        LR,
        Watch,
        model,
        norms_of,
        reference,
        train,
        trainer_of,
        weights_of,
    )

    def run(policy: Any, json: dict[str, Any], **options: Any) -> Any:
        callback = distclip.transformers.ClipCallback(policy)
        watch = Watch(lambda: callback.last_report)
        section = {"deepspeed": json, "save_strategy": "steps", "save_steps": 3}
        trainer = trainer_of(tmp_path, "zero2", [callback, watch], max_grad_norm=0.4, **section)
        with logged() as messages:
            train(trainer, **options)
        assert trainer.model_wrapped._config.zero_optimization_stage == 2
        found = watch.decisions, weights_of(trainer), norms_of(trainer), messages
        engines.close(trainer.model_wrapped)
        return found

    want, norms = reference(SPEC, 4)
    auto = [*SPEC[:2], {**SPEC[2], "max_norm": "auto"}]  # max_grad_norm, here the same 0.4
    for policy, json in (
        ({"policy": SPEC}, {"gradient_clipping": "auto"}),
        (None, {"distclip": {"policy": auto}}),
    ):
        decisions, weights, seen, _ = run(policy, json)
        close(weights, want)
        assert seen == pytest.approx(norms, rel=1e-5)
        at3 = str(tmp_path / "checkpoint-3")
        resumed, again, _, messages = run(policy, json, resume_from_checkpoint=at3)
        assert resumed == decisions[3:]
        assert all(torch.equal(weights[name], again[name]) for name in weights)
        assert not any("no state of distclip" in message for message in messages)

    for stage in (0, 2):
        callback = distclip.transformers.ClipCallback(SkipAbove(0.0))
        watch = Watch(lambda callback=callback: callback.last_report)
        options = {"deepspeed": {"zero_optimization": {"stage": stage}, "optimizer": None}}
        trainer = trainer_of(
            tmp_path, "zero2", [callback, watch], lr_scheduler_type="linear", **options
        )
        train(trainer)
        assert watch.rates == [LR] * 4, stage
        close(weights_of(trainer), dict(model().named_parameters()), 0.0)
        engines.close(trainer.model_wrapped)


def test_importing_the_integration_changes_nothing() -> None:
    import importlib.util

    from transformers import Trainer

    from distclip.integrations import transformers as integration

    before = Trainer.train
    spec = importlib.util.spec_from_file_location("distclip_again", integration.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert Trainer.train is before
    again.ClipCallback.__new__(again.ClipCallback)  # as unpickling does
    assert Trainer.train is not before
    Trainer.train = before
