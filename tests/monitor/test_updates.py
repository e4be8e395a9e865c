"""What an optimizer did, against whole tensors stepped by one process and measured in float64."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from distclip import ConfigurationError, GradClipper, NonFiniteGradientError, policies
from distclip.monitor import UpdateMonitor, UpdateReport
from tests.helpers.watching import REDUCTION, loops, watch
from tests.sharded import Whole, mesh_of, shard, whole

LAYOUTS = ("fsdp2", "hsdp", "tp", "mixed", "replicate", "fsdp1", "fsdp1_mixed")


KINDS = ("mixed", "bfloat16", "float32")


def adamw(parameters: Any) -> Optimizer:
    """Without weight decay: where FSDP1 has zeros for a missing gradient, it alone would act."""
    return AdamW(parameters, lr=0.05, weight_decay=0.0)


def sgd(parameters: Any) -> Optimizer:
    """With powers of 2, so that bfloat16 rounds the same elements alike in any shard."""
    return SGD(parameters, lr=0.25, momentum=0.5)


def oracle(
    values: list[Whole], make: Callable[[Any], Optimizer]
) -> list[dict[str, tuple[float, float, float]]]:
    """By step and name: norm, RMS and ratio, of whole tensors that one process steps."""
    weights = {name: nn.Parameter(w.clone()) for name, w in values[0].weights.items()}
    optimizer, found = make(weights.values()), []
    for step in values:
        before = {name: w.detach().double().numpy().copy() for name, w in weights.items()}
        for name, weight in weights.items():
            gradient = step.gradients[name]
            weight.grad = None if gradient is None else gradient.clone()
        optimizer.step()
        found.append({})
        for name, weight in weights.items():
            after = weight.detach().double().numpy()
            moved, size = np.linalg.norm(after - before[name]), np.linalg.norm(after)
            with np.errstate(all="ignore"):
                found[-1][name] = moved, moved / math.sqrt(after.size), moved / size
    return found


def close(report: UpdateReport, want: dict[str, tuple[float, float, float]]) -> None:
    columns = report.update_norms, report.update_rms, report.update_ratios
    for place, column in enumerate(columns):
        expected = {name: row[place] for name, row in want.items()}
        assert column == pytest.approx(expected, rel=1e-5, abs=1e-12, nan_ok=True)
    total = math.hypot(*(row[0] for row in want.values()))
    assert report.total_norm.item() == pytest.approx(total, rel=1e-6)
    together = report.modules(1)["fc"]
    both = math.hypot(*(want[f"fc.{part}"][0] for part in ("weight", "bias")))
    assert together["norm"] == pytest.approx(both, rel=1e-6)
    assert together["rms"] == pytest.approx(both / math.sqrt(13 * 7 + 13), rel=1e-6)


@pytest.mark.ranks(1, 2, 3, 4)
def test_it_is_of_whole_tensors_under_every_sharding() -> None:
    """Among them replicas (hsdp, replicate): counted twice, their norms are sqrt(2) too large."""
    layouts = LAYOUTS if dist.get_world_size() > 1 else ("plain",)
    for number, layout in enumerate(layouts):
        kind = KINDS[number % 3]
        make = adamw if kind == "float32" else sgd
        values = [whole(kind, seed=seed) for seed in range(3)]
        want = oracle(values, make)
        model = shard(layout, values[0])
        optimizer = make(model.parameters.values())
        found = UpdateMonitor(model.named(), optimizer, every=2)
        assert found.last is None
        for step, given in enumerate(values):
            model.set_gradients(given.gradients)
            gradients = [p.grad for p in model.parameters.values()]
            with watch() as seen:
                optimizer.step()
            measured = step % 2 == 0 and layout != "plain"
            assert seen.collective_names == [REDUCTION] * measured, layout
            assert all(
                p.grad is g for p, g in zip(model.parameters.values(), gradients, strict=True)
            )
            assert found.last is not None
            assert found.last.step == step - step % 2
            with watch() as seen:
                close(found.last, want[step - step % 2])
            assert seen.collectives == []


def gathered(model: nn.Module) -> dict[str, Any]:
    """Whole weights, float64, gathered by torch itself."""
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        whole_of: Tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name.removeprefix("module.")] = whole_of.detach().double().numpy().copy()
    return found


@pytest.mark.ranks(2)
def test_ddp_and_fsdp2_beside_an_attached_clipper() -> None:
    for kind in ("ddp", "fsdp2"):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).bfloat16()
        model: nn.Module = layers
        if kind == "ddp":
            model = DistributedDataParallel(layers)
        else:
            fully_shard(layers, mesh=mesh_of((2,), ("dp",)))
        optimizers = adamw(layers[0].parameters()), sgd(layers[2].parameters())
        GradClipper(model, policies.skip_norm(1e6)).attach(optimizers)
        reports: list[tuple[int, UpdateReport]] = []
        found = UpdateMonitor(
            model, optimizers, sinks=lambda step, report, kept=reports: kept.append((step, report))
        )
        for step in range(3):
            before = gathered(model)
            for optimizer in optimizers:
                optimizer.zero_grad()
            data = torch.full((4, 6), 1.0 + dist.get_rank(), dtype=torch.bfloat16)
            (model(data).sum() * (1e9 if step == 1 else 1.0)).backward()  # which is skipped
            for optimizer in optimizers:
                optimizer.step()
            after = gathered(model)
            want = {name: float(np.linalg.norm(after[name] - before[name])) for name in after}
            assert found.last is not None
            assert found.last.update_norms == pytest.approx(want, rel=1e-6), (kind, step)
            assert (found.last.total_norm.item() == 0.0) == (step == 1)
        assert [step for step, _ in reports] == [0, 1, 2]


class Twice(SGD):
    """Runs its hooks twice, and moves on after the inner step."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1.0)
        return result


def test_steps_that_are_unlike_others() -> None:
    weight = nn.Parameter(torch.zeros(4))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    named = [("a.weight", weight), ("a.frozen", frozen)]
    SGD([weight], lr=1.0)  # from now on torch runs hooks in `super().step()` too
    optimizer = Twice([weight], lr=1.0)
    found = UpdateMonitor(named, optimizer)

    def closure() -> float:
        weight.grad = torch.ones(4)
        return 0.0

    def broken() -> float:
        raise RuntimeError("no batch")

    optimizer.step(closure)  # -1 and then +1
    assert found.last is not None
    assert found.last.update_norms == {"a.weight": 0.0, "a.frozen": 0.0}
    with pytest.raises(RuntimeError, match="no batch"):
        optimizer.step(broken)
    optimizer.param_groups[0]["lr"] = 3.0
    optimizer.step(closure)
    assert found.last.step == 2
    shown = json.loads(json.dumps(found.last.to_dict(modules=1)))
    assert shown["update_norm"] == shown["modules"]["a"]["norm"] == 4.0
    assert shown["parameters"]["a.weight"] == {"norm": 4.0, "rms": 2.0, "ratio": 1.0}
    assert shown["weight_norm"] == 4.0  # of what is trained
    with pytest.raises(ConfigurationError, match="depth"):
        found.last.modules(0)
    last = found.last
    found.remove()
    optimizer.step(closure)
    assert found.last is last
    assert not optimizer._optimizer_step_pre_hooks


def test_a_fused_optimizer_goes_on_clipping_as_it_steps() -> None:
    """A hook of somebody else between clipper and step would make the clipper clip before it."""
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = SGD([parameter], lr=1.0, fused=True)
    GradClipper([("w", parameter)], policies.global_norm(1.0)).attach(optimizer)
    found = UpdateMonitor([("w", parameter)], optimizer)
    parameter.grad = torch.ones(4)
    with loops() as looped:
        optimizer.step()
    assert looped["loop scale"] == 0
    assert found.last is not None
    assert found.last.update_norms["w"] == pytest.approx(1.0, rel=1e-5)
    parameter.grad[0] = math.nan
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    assert found.last.step == 0


def test_a_step_that_only_makes_state_is_none() -> None:
    model = nn.Linear(2, 2)
    optimizer = adamw(model.parameters())
    found = UpdateMonitor(model, optimizer)
    assert get_optimizer_state_dict(model, optimizer)["state"]  # torch has stepped to make it
    assert found.last is None


def test_what_cannot_be_meant() -> None:
    model = nn.Linear(2, 2)
    for every in (0, True, 1.5):
        with pytest.raises(ConfigurationError, match="UpdateMonitor: every must be"):
            UpdateMonitor(model, sgd(model.parameters()), every=every)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="steps none"):
        UpdateMonitor(model, sgd(nn.Linear(2, 2).parameters()))

    class Wrapper:
        param_groups = sgd(model.parameters()).param_groups

    with pytest.raises(ConfigurationError, match="Wrapper runs no step hooks"):
        UpdateMonitor(model, Wrapper())  # type: ignore[arg-type]
