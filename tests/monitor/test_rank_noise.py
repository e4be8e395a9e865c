"""The noise scale from gradients before their reduction, against the formula in one process."""

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import ConfigurationError, GradClipper, StateError, policies
from distclip.monitor import RankNoiseScale
from distclip.monitor.page.data import page_data
from distclip.monitor.reading import read_runs
from distclip.monitor.summary import summaries
from distclip.monitor.table import show_runs
from distclip.monitor.tracking import metrics, tensors
from tests.helpers.logs import lines
from tests.helpers.watching import watch
from tests.sharded import mesh_of


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and some empty; a parameter that is only used by some
    samples, one that is not trained, and one that no sample uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 1)
        self.frozen, self.unused = nn.Linear(6, 6), nn.Linear(3, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.tanh(self.first(self.frozen(x))))
        return found


def samples(step: int, ranks: int, micro_batches: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(micro_batches, ranks, 4, 6, generator=generator)


def wanted(steps: list[int], ranks: int, micro_batches: int, decay: float) -> dict[str, float]:
    """By parameter, and of all as "": by one process, in float64, a gradient for each part."""
    model, parts, batch = Net().double(), ranks * micro_batches, 4.0 * ranks * micro_batches
    noise: dict[str, float] = {}
    signal: dict[str, float] = {}
    for step in steps:
        gradients: dict[str, list[torch.Tensor]] = {}
        for x in samples(step, ranks, micro_batches).double().flatten(0, 1):
            model.zero_grad()
            model(x).square().mean().backward()
            for name, parameter in model.named_parameters():
                grad = parameter.grad
                gradients.setdefault(name, []).append(
                    torch.zeros_like(parameter) if grad is None else grad.clone()
                )
        for name, each in gradients.items():
            small = float(np.mean([float(g.square().sum()) for g in each]))
            large = float(torch.stack(each).mean(0).square().sum())
            found = (
                (small - large) / (parts / batch - 1 / batch),
                (batch * large - batch / parts * small) / (batch - batch / parts),
            )
            for kept, value in zip((noise, signal), found, strict=True):
                kept[name] = decay * kept.get(name, 0.0) + (1 - decay) * value
    ratios = {k: noise[k] / signal[k] if signal[k] > 0 else math.nan for k in noise}
    ratios = {k: math.inf if signal[k] <= 0 < noise[k] else v for k, v in ratios.items()}
    return {**ratios, "": sum(noise.values()) / sum(signal.values())}


def ddp(model: nn.Module) -> Any:
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp2(model: Any, **options: Any) -> Any:
    line = mesh_of((dist.get_world_size(),), ("dp",))
    for part in (model.first, model.second):
        fully_shard(part, mesh=line, **options)
    return fully_shard(model, mesh=line, **options)


def hsdp(model: Any) -> Any:
    world = dist.get_world_size()
    shape = (world // 2, 2) if world % 2 == 0 else (world, 1)
    return fully_shard(model, mesh=mesh_of(shape, ("outer", "inner")))


def fsdp2_tp(model: Any) -> Any:
    mesh = mesh_of((dist.get_world_size() // 2, 2), ("dp", "tp"))
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    return fully_shard(model, mesh=mesh["dp"])


def train(
    model: Any,
    noise: RankNoiseScale,
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    ranks: int,
    micro_batches: int,
    scale: float = 1.0,
) -> Any:
    """One step; gives what was sent in it."""
    data = samples(step, ranks, micro_batches)[:, dist.get_rank() * ranks // dist.get_world_size()]
    with watch() as seen:
        for number, x in enumerate(data):
            last = number == micro_batches - 1
            waits = model.no_sync() if hasattr(model, "no_sync") and not last else None
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            with waits or contextlib.nullcontext():
                (scale * model(x).square().mean() / micro_batches).backward()
        if scale != 1.0:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.ranks(1, 2, 3, 4)
def test_it_is_what_one_process_finds_in_float64() -> None:
    world = dist.get_world_size()
    kinds: dict[str, Callable[[Any], Any]] = {"ddp": ddp, "fsdp2": fsdp2}
    if world > 2:
        kinds["hsdp"] = hsdp
    if world == 4:
        kinds["fsdp2_tp"] = fsdp2_tp
    for kind, wrap in kinds.items():
        ranks = world // 2 if kind == "fsdp2_tp" else world
        for micro_batches in (1, 2)[world == 1 :]:
            model = wrap(Net())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            clipper = GradClipper(model, policies.global_norm(0.1), verify_replicas="never")
            batch = 4 * ranks * micro_batches
            noise = RankNoiseScale(
                clipper, batch=batch, micro_batches=micro_batches, every=2, decay=0.9
            )
            clipper.attach(optimizer)
            sent = [
                train(model, noise, optimizer, n, ranks=ranks, micro_batches=micro_batches)
                for n in range(5)
            ]
            steps = [0, 2, 4] if kind == "ddp" else [2, 4]
            assert noise.samples == len(steps), kind
            assert noise.step == 4
            want = wanted(steps, ranks, micro_batches, 0.9)
            assert noise.scale == pytest.approx(want.pop(""), rel=1e-4), kind
            found = dict(noise.parameter_scales)
            assert found == pytest.approx(want, rel=1e-3, nan_ok=True), (kind, micro_batches)
            # One message more than in a step between, 16 bytes a parameter.
            if world > 1:
                more = [*sent[4].collectives]
                for each in sent[3].collectives:
                    more.remove(each)
                assert [size for _, size in more] == [16 * len(clipper.names)], kind


@pytest.mark.ranks(2)
def test_mixed_precision_a_scaler_and_uneven_steps() -> None:
    """Gradients in bfloat16, 1,024 times too large; a step of another number of backwards."""
    model = fsdp2(Net(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clipper = GradClipper(model, policies.measure())

    class Scaler:
        def get_scale(self) -> float:
            return 1024.0

    noise = RankNoiseScale(clipper, batch=8, decay=0.0, scaler=Scaler())
    clipper.attach(optimizer)
    for step in range(2):
        train(model, noise, optimizer, step, ranks=2, micro_batches=1, scale=1024.0)
    assert noise.samples == 1
    want = wanted([1], 2, 1, 0.0)[""]
    assert noise.scale == pytest.approx(want, rel=0.1)
    with pytest.warns(UserWarning, match="step 2 had 2 backwards and not micro_batches=1"):
        train(model, noise, optimizer, 2, ranks=2, micro_batches=2, scale=1024.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of this it has warned already
        train(model, noise, optimizer, 3, ranks=2, micro_batches=2, scale=1024.0)
    assert noise.samples == 1
    # One rank has no input: the step is left out on both.
    x = samples(4, 2, 1)[0, 0]
    (model(x).sum() * 1024.0).backward()
    if dist.get_rank() == 0:
        noise._seen._calls.clear()
    optimizer.step()
    assert noise.samples == 1
    noise.close()
    train(model, noise, optimizer, 5, ranks=2, micro_batches=1)
    assert noise.samples == 1


@pytest.mark.ranks(2)
def test_gradients_that_are_no_mean_are_left_out_with_a_warning() -> None:
    for kind, spoil, says in (
        ("summed", lambda g: g.mul_(40.0), "averaged and not summed"),
        ("scaled", lambda g: g.mul_(2.0**-12), "give it, RankNoiseScale"),
    ):
        model = ddp(Net())
        clipper = GradClipper(model, policies.measure())
        noise = RankNoiseScale(clipper, batch=8)
        model(samples(0, 2, 1)[0, dist.get_rank()]).square().mean().backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                spoil(parameter.grad)
        with pytest.warns(UserWarning, match=says) if dist.get_rank() == 0 else _quiet():
            clipper.clip_()
        assert noise.samples == (kind == "scaled")


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.ranks(2)
def test_what_cannot_be_seen_or_meant_is_refused() -> None:
    flat = FullyShardedDataParallel(
        Net().requires_grad_(True), use_orig_params=True, device_id=torch.device("cpu")
    )
    clipper = GradClipper(flat, policies.measure())
    with pytest.raises(
        ConfigurationError, match=r"'first.weight' is neither .* monitor.NoiseScale"
    ):
        RankNoiseScale(clipper, batch=8)
    model = ddp(Net())
    clipper = GradClipper(model, policies.measure())
    for bad, says in (
        ({"batch": 1}, "batch=1 is less than one sample"),
        ({"batch": True}, "batch must be"),
        ({"every": 0}, "every must be"),
        ({"decay": 1.0}, "decay must be"),
        ({"micro_batches": 0}, "micro_batches must be"),
    ):
        with pytest.raises(ConfigurationError, match=f"RankNoiseScale: {says}"):
            RankNoiseScale(clipper, **{"batch": 8, **bad})
    with pytest.raises(ConfigurationError, match="norms=False"):
        RankNoiseScale(GradClipper(model, policies.measure(), norms=False), batch=8)
    with pytest.raises(ConfigurationError, match="order inf"):
        RankNoiseScale(GradClipper(model, policies.global_norm(1.0, norm_type=math.inf)), batch=8)
    assert clipper.sinks == ()


def test_one_part_is_refused_and_sparse_gradients_are_left_out() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    model = nn.Sequential(embedding, nn.Linear(3, 1))
    clipper = GradClipper(model, policies.measure())
    with pytest.raises(ConfigurationError, match="one part of a step"):
        RankNoiseScale(clipper, batch=8)
    noise = RankNoiseScale(clipper, batch=8, micro_batches=2)
    for number in range(2):
        (model(torch.tensor([number, 2])).square().mean() / 2).backward()
    with pytest.warns(UserWarning, match=r"'0.weight' is left out: .* sparse"):
        clipper.clip_()
    assert noise.samples == 1
    assert math.isnan(noise.parameter_scales["0.weight"])
    assert not math.isnan(noise.parameter_scales["1.weight"])
    assert not math.isnan(noise.scale)


def accumulated(model: nn.Module, clipper: GradClipper, steps: range) -> None:
    """Steps of two micro-batches, the same ones for the same numbers."""
    for step in steps:
        model.zero_grad()
        torch.manual_seed(step)
        for _ in range(2):
            (model(torch.randn(4, 4)).square().mean() / 2).backward()
        clipper.clip_()


def test_the_averages_are_saved_and_go_on() -> None:
    def after(steps: range, state: Any = None) -> RankNoiseScale:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        clipper = GradClipper(model, policies.measure())
        noise = RankNoiseScale(clipper, batch=8, micro_batches=2)
        if state is not None:
            noise.load_state_dict(state)
        accumulated(model, clipper, steps)
        return noise

    whole, half = after(range(6)), after(range(3))
    resumed = after(range(3, 6), half.state_dict())
    assert resumed.state_dict() == whole.state_dict()
    assert resumed.samples == 6
    state = half.state_dict()
    for bad, says in (
        ({}, "none that"),
        ({**state, "noise": {"weight": 1.0}}, "'bias' is in one of them only"),
        ({**state, "signal": {"weight": math.nan, "bias": 1.0}}, "not finite"),
    ):
        with pytest.raises(StateError, match=says):
            half.load_state_dict(bad)
    assert half.state_dict() == state


def logged(path: Path, steps: range, state: Any = None) -> tuple[GradClipper, nn.Module]:
    """Train by a configuration; gives the clipper, and the model that it must not outlive."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    document = {
        "policy": {"name": "skip_spikes", "sigma": 100.0},
        "log": {"jsonl": str(path), "noise_scale": {"batch": 8, "micro_batches": 2, "every": 2}},
    }
    clipper = distclip.from_config(document, model)
    if state is not None:
        clipper.load_state_dict(state)
    accumulated(model, clipper, steps)
    return clipper, model


def test_a_configuration_logs_it_and_checkpoints_keep_it(tmp_path: Path) -> None:
    whole, _model = logged(tmp_path / "whole.jsonl", range(7))
    half, _model_of_half = logged(tmp_path / "half.jsonl", range(3))
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed, _model_of_resumed = logged(tmp_path / "resumed.jsonl", range(3, 7), state)
    assert resumed.last_report is not None
    assert whole.last_report is not None
    assert resumed.last_report.noise_scale == whole.last_report.noise_scale
    # The checksum is of all that is in it.
    assert resumed.state_dict()["version"] == whole.state_dict()["version"]
    shown = lines(tmp_path / "whole.jsonl")
    found = [line["noise_scale"] for line in shown]
    assert len(found) == 7
    assert found[0] == found[1] != found[2] == found[3]  # sampled in every second step
    assert metrics(whole.last_report.to_dict())["grad_noise_scale"] == found[-1]
    assert tensors(whole.last_report)["grad_noise_scale"] == pytest.approx(found[-1])
    runs = read_runs(tmp_path / "whole.jsonl")
    text = io.StringIO()
    show_runs(summaries(runs), text)
    assert f"gradient noise scale {found[-1]:.3g} samples at step 6" in text.getvalue()
    drawn = page_data(runs, summaries(runs))["runs"][0]
    assert drawn["noise_scale"] == pytest.approx(found, rel=1e-4)
    assert len(drawn["steps"]) == 7


def test_a_state_of_another_follower_begins_anew_and_no_state_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clipper, model = logged(tmp_path / "a.jsonl", range(3))
    state = clipper.state_dict()
    plain = GradClipper(model, clipper.policy)
    plain.load_state_dict(state)  # nothing follows there
    (noise,) = (sink for sink in clipper.sinks if isinstance(sink, RankNoiseScale))
    before = noise.state_dict()
    clipper.load_state_dict(plain.state_dict())
    assert noise.state_dict() == before
    other = nn.Sequential(nn.Linear(4, 1))
    measured = GradClipper(other, policies.measure())
    following = RankNoiseScale(measured, batch=8, micro_batches=2)
    measured.load_state_dict(state)
    assert following.samples == 0
    assert "the averages begin anew: RankNoiseScale: the state is of other" in caplog.text


def test_one_spike_does_not_take_over_the_average() -> None:
    """A step with 200 times the loss; without it the average would be that step for long."""
    found = []
    for spike in (1.0, 200.0):
        torch.manual_seed(0)
        model = nn.Linear(50, 1)
        clipper = GradClipper(model, policies.measure())
        noise = RankNoiseScale(clipper, batch=64, micro_batches=8)
        for step in range(60):
            model.zero_grad()
            for _ in range(8):
                x = torch.randn(8, 50)
                loss = (model(x) - x.sum(1, keepdim=True) - torch.randn(8, 1)).square().mean() / 8
                (loss * (spike if step == 40 else 1.0)).backward()
            clipper.clip_()
        found.append(noise.scale)
    assert found[1] == pytest.approx(found[0], rel=0.25)
