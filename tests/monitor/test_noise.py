"""The gradient noise scale, against the formula on whole tensors and against a known answer."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distclip import ConfigurationError
from distclip.monitor import NoiseScale
from tests.helpers.watching import watch
from tests.sharded import Whole, mesh_of, shard, whole


def oracle(
    steps: list[tuple[Whole, Whole]], batch: float, parts: int, decay: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """By parameter, the averages of tr(S) and of |G|**2, in float64 on whole tensors."""
    noise: dict[str, Any] = {}
    signal: dict[str, Any] = {}
    small = batch / parts
    for first, last in steps:
        for name in first.gradients:
            one, all_of_it = (v.gradients[name] for v in (first, last))
            a = 0.0 if one is None else float(((parts * one.double()) ** 2).sum())
            b = 0.0 if all_of_it is None else float((all_of_it.double() ** 2).sum())
            found = (a - b) / (1 / small - 1 / batch), (batch * b - small * a) / (batch - small)
            for kept, value in zip((noise, signal), found, strict=True):
                kept[name] = decay * kept.get(name, 0.0) + (1 - decay) * value
    return noise, signal


def ratio(noise: float, signal: float) -> float:
    return noise / signal if signal > 0 else math.inf if noise > 0 else math.nan


@pytest.mark.ranks(1, 2, 3, 4)
def test_it_is_of_whole_tensors_under_every_sharding() -> None:
    layouts = ("fsdp2", "hsdp", "mixed", "fsdp1") if dist.get_world_size() > 1 else ("plain",)
    steps = [(whole(seed=n, scale=0.4), whole(seed=n + 9)) for n in (1, 2)]
    noise, signal = oracle(steps, 24, 4, 0.9)
    for layout in layouts:
        model = shard(layout, steps[0][0])
        found = NoiseScale(model.named(), batch=24, micro_batches=4, every=2, decay=0.9)
        assert math.isnan(found.scale)
        for first, last in (steps[0], (whole(), whole()), steps[1]):  # the middle one is not read
            counts = []
            for values in (first, whole(seed=4), whole(seed=5), last):
                model.set_gradients(values.gradients)
                with watch() as seen:
                    found.micro_batch()
                counts.append(len(seen.collectives))
            assert counts[1:3] == [0, 0]
            assert max(counts) <= 1
        assert found.samples == 2
        want = ratio(sum(noise.values()), sum(signal.values()))
        assert found.scale == pytest.approx(want, rel=1e-6), layout
        each = {name: ratio(noise[name], signal[name]) for name in noise}
        assert found.parameter_scales == pytest.approx(each, rel=1e-5, nan_ok=True), layout
        both = [sum(kept[f"fc.{part}"] for part in ("weight", "bias")) for kept in (noise, signal)]
        assert found.module_scales(1)["fc"] == pytest.approx(ratio(*both), rel=1e-6)


def test_a_known_noise_scale_is_found() -> None:
    """Gradients of samples are G + normal noise of variance 4 in 500 elements: 2000 / |G|**2."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(500, generator=generator)
    parameter = nn.Parameter(torch.zeros(500))
    found = NoiseScale([("w", parameter)], batch=64, micro_batches=8, decay=0.99)
    for step in range(400):
        scale = 2.0 ** (step % 5)  # as of a gradient scaler
        parameter.grad = torch.zeros(500)
        for _ in range(8):
            noise = torch.randn(500, generator=generator) * 2.0 / math.sqrt(8)
            parameter.grad += scale * (true + noise) / 8
            found.micro_batch(scale)
    want = 500 * 4.0 / float(true.square().sum())
    assert found.scale == pytest.approx(want, rel=0.05)
    assert found.samples == 400
    parameter.grad = torch.full((500,), math.nan)
    for _ in range(8):
        found.micro_batch()
    assert found.samples == 400
    assert found.scale == pytest.approx(want, rel=0.05)


class Inputs:
    """Micro-batches of each rank, and a model that all ranks have alike."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        self.all = torch.randn(2, dist.get_world_size(), 4, 6)

    def backward(self, model: nn.Module, number: int) -> None:
        (model(self.all[number, dist.get_rank()]).square().mean() / 2).backward()

    def wanted(self) -> float:
        """By one process in float64."""
        model, squares = self.model.double(), []
        for number in range(2):
            (model(self.all[number].flatten(0, 1).double()).square().mean() / 2).backward()
            squares.append(sum(float(p.grad.square().sum()) for p in model.parameters()))
        batch = 8.0 * dist.get_world_size()
        a, b, small = 4 * squares[0], squares[1], batch / 2
        return (a - b) / (1 / small - 1 / batch) / ((batch * b - small * a) / (batch - small))


@pytest.mark.ranks(2)
def test_fsdp2_and_ddp_that_accumulate() -> None:
    batch = 8 * dist.get_world_size()
    for kind in ("ddp", "fsdp2"):
        given = Inputs()
        model: Any = given.model
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            fully_shard(model, mesh=mesh_of((dist.get_world_size(),), ("dp",)))
        found = NoiseScale(model, batch=batch, micro_batches=2)
        for number in range(2):
            given.backward(model, number)
            found.micro_batch()
        assert found.scale == pytest.approx(Inputs().wanted(), rel=1e-3), kind


@pytest.mark.ranks(2)
def test_gradients_that_are_not_reduced_yet_are_refused() -> None:
    given = Inputs()
    model = DistributedDataParallel(given.model)
    found = NoiseScale(model, batch=16, micro_batches=2)
    with model.no_sync():
        given.backward(model, 0)
    with pytest.raises(ConfigurationError, match=r"ranks differ; .*leave out no_sync"):
        found.micro_batch()
    given = Inputs()
    sharded: Any = fully_shard(given.model, mesh=mesh_of((2,), ("dp",)))
    found = NoiseScale(sharded, batch=16, micro_batches=2)
    sharded.set_requires_gradient_sync(False)
    given.backward(sharded, 0)
    with pytest.raises(ConfigurationError, match=r"the first micro-batch left none; .*sync"):
        found.micro_batch()


@pytest.mark.parametrize(
    "bad",
    [{"micro_batches": 1}, {"batch": 3}, {"batch": True}, {"every": 0}, {"decay": 1.0}],
)
def test_what_cannot_be_meant(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(ConfigurationError, match=f"NoiseScale: {name} must be"):
        NoiseScale(nn.Linear(2, 2), **{"batch": 8, "micro_batches": 4, **bad})
    with pytest.raises(ConfigurationError, match="depth"):
        NoiseScale(nn.Linear(2, 2), batch=8, micro_batches=4).module_scales(0)
    assert np.isnan(NoiseScale(nn.Linear(2, 2), batch=8, micro_batches=4).scale)


def test_a_micro_batch_with_a_gradient_of_zero() -> None:
    """As a batch of rollouts without any advantage leaves it; no gradient at all is an error."""
    model = nn.Linear(3, 1, bias=False)
    found = NoiseScale(model, batch=8, micro_batches=2)
    (model(torch.ones(4, 3)).sum() * 0.0).backward()
    found.micro_batch()
    model(torch.ones(4, 3)).sum().backward()
    found.micro_batch()
    assert found.samples == 1
    model.zero_grad()
    with pytest.raises(ConfigurationError, match="left none"):
        found.micro_batch()


def test_a_step_with_fewer_micro_batches_shifts_no_other() -> None:
    scales = []
    for short in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(3, 3, max_norm=0.5), nn.Linear(3, 3), nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found = NoiseScale(model, batch=8, micro_batches=4)
        for step in range(4):
            for number in range(2 if short and step == 0 else 4):
                words = torch.tensor([(step + number) % 3, number % 3])
                ((model(words) - number - step).square().mean() / 4).backward()
                found.micro_batch()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:  # what the long first step counts for
                found._noise, found._signal = found._noise * 0.0, found._signal * 0.0
        assert found.samples == (3 if short else 4)
        scales.append(found.scale)
    assert scales[0] == scales[1]
