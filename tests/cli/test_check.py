"""``distclip run --check``: right clipping passes, and a clipping that is off is seen."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from distclip import DistclipError, GradClipper, clipper, policies
from distclip.application import folded
from distclip.integrations import hooks
from distclip.tools import check
from distclip.tools.check import StepCheck

POLICIES = [
    policies.global_norm(0.1),
    policies.agc(0.01),
    policies.chain(policies.value(0.05), policies.agc(0.01), policies.global_norm(0.05)),
    policies.by_name({"*.bias": None}, default=policies.parameter_norm(0.01)),
    policies.group_norm(0.1),
]


@dataclass(frozen=True)
class Own(policies.Policy):
    """A policy that the reference does not know."""

    name: ClassVar[str] = "own"

    @property
    def needs(self) -> Any:
        return policies.measure().needs

    def update(self, statistics: Any, state: Any) -> Any:
        return policies.global_norm(0.1).update(statistics, state)


@contextmanager
def checking(steps: int = 2) -> Iterator[StepCheck]:
    made = StepCheck(steps).install()
    try:
        yield made
    finally:
        clipper.watchers.remove(made)


@contextmanager
def watched() -> Iterator[Any]:
    """As in a process without DeepSpeed, whatever a test before has left on this warm rank."""
    with mock.patch.object(hooks, "activated", set()), checking() as watching:
        yield watching


def trained(layout: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 3), nn.Linear(3, 1))
    model[3].requires_grad_(False)  # type: ignore[index]
    if layout == "ddp":
        model = DistributedDataParallel(model)
    elif layout == "fsdp1":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif layout == "fsdp2":
        fully_shard(model)
    elif layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")))
    model(torch.randn(5, 7)).square().sum().backward()
    return model


def layouts(world_size: int) -> list[str]:
    return ["ddp", "fsdp1", "fsdp2", *(["hsdp"] if world_size == 4 else [])]


@pytest.mark.ranks(1, 3, 4)
def test_right_clipping_passes(world_size: int) -> None:
    for layout in layouts(world_size):
        for policy in [*POLICIES, Own()]:
            model = trained(layout)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            ours = GradClipper(model, policy, optimizer=optimizer)
            with watched() as watching:
                for _ in range(3):
                    ours.clip_()
            assert watching.checked == 2, (layout, policy)


@pytest.mark.ranks(1, 3)
def test_clipping_that_is_off_is_seen_on_all_ranks(world_size: int) -> None:
    hooks.activated.discard("deepspeed")  # of a test before, on the same warm rank

    class Wrong(StepCheck):
        """The last rank changes one element of its gradients once they are clipped."""

        def after(self, clipper: GradClipper, report: Any, loss_scale: Any) -> None:
            if dist.get_rank() == world_size - 1:
                for parameter in clipper.here.values():
                    gradient: Any = parameter.grad
                    if gradient is not None:
                        local = getattr(gradient, "_local_tensor", gradient)
                        if local.numel():
                            local.view(-1)[0] *= 1 + 1e-5
            super().after(clipper, report, loss_scale)

    for layout in layouts(world_size)[-2 if world_size == 1 else 1 :]:
        for policy in (policies.agc(0.01), Own()):
            ours = GradClipper(trained(layout), policy)
            watching = Wrong(1).install()
            try:
                with pytest.raises(DistclipError, match="did not do what it does to the gathered"):
                    ours.clip_()
            finally:
                clipper.watchers.remove(watching)


@pytest.mark.ranks(1, 3)
def test_a_folded_step_is_checked_as_it_is_run(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    divisors: list[float] = []
    off = [1.0]

    def divisor_of(*given: Any) -> torch.Tensor | None:
        divisor = folded_divisor_of(*given)
        assert divisor is not None
        divisors.append(float(divisor))
        return divisor * off[0]

    folded_divisor_of = folded.divisor_of
    monkeypatch.setattr(folded, "divisor_of", divisor_of)
    for layout in ("ddp", "fsdp1", "fsdp2"):
        for scaler in (None, torch.amp.GradScaler("cpu", init_scale=8.0)):
            for wrong in (False, True):
                off[:], divisors[:] = [1.0], []
                model = trained(layout)
                optimizer = torch.optim.AdamW(model.parameters(), fused=True)
                handle = GradClipper(model, policies.global_norm(0.1)).attach(optimizer)
                if scaler is not None:
                    scaler.scale(torch.ones(()))  # makes its state
                    for parameter in model.parameters():
                        if parameter.grad is not None:
                            parameter.grad.mul_(8.0)
                step = optimizer.step if scaler is None else partial(scaler.step, optimizer)
                off[0] = 1 - 1e-4 * wrong
                with watched() as watching:
                    if wrong:
                        with pytest.raises(DistclipError, match="did not do what it does"):
                            step()
                    else:
                        step()
                        assert watching.checked == 1
                assert len(divisors) == 1, (layout, scaler)
                handle.remove()


@pytest.mark.ranks(2)
def test_stages_and_missing_gradients() -> None:
    rank = dist.get_rank()
    stage = nn.Linear(3, 2 + rank)
    stage.register_module(f"only{rank}", nn.Linear(2, 2))
    named = [(f"stage{rank}.{name}", p) for name, p in stage.named_parameters()]
    for _, parameter in named:
        parameter.grad = torch.full_like(parameter, 0.5)
    with watched() as watching:
        GradClipper([nn.ModuleDict({f"stage{rank}": stage})], policies.global_norm(0.1)).clip_()
        assert watching.checked == 1
    model = nn.Linear(3, 2)
    model.bias.grad = torch.ones(2) if rank else None
    ours = GradClipper(model, policies.global_norm(0.1))
    with watched(), pytest.raises(DistclipError, match="rank 1 has a gradient of 'bias', unlike"):
        ours.clip_()


def test_scaled_gradients_and_skipped_steps() -> None:
    model = nn.Linear(3, 2)
    ours = GradClipper(model, policies.global_norm(0.1), on_nonfinite="skip")
    for value in (8.0, float("nan")):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        with watched() as watching:
            report = ours.clip_before_step(torch.tensor(4.0))
        assert watching.checked == 1
        assert bool(report.skipped) == (value != 8.0)


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "activated", {"deepspeed"})
    model = nn.Linear(3, 2)
    with checking(), pytest.raises(DistclipError, match="DeepSpeed keeps its gradients to itself"):
        GradClipper(model, policies.global_norm(0.1)).clip_()


def test_what_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    watching = StepCheck(1)
    watching.conclude()
    assert "nothing was clipped, so nothing was checked" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    check.say("x")
    assert capsys.readouterr().err == ""


def test_policies_in_words() -> None:
    assert check.in_words(policies.agc(0.1, unit_dims={"e.*": [0, 1]})) == {
        "name": "agc", "clip_factor": 0.1, "eps": 1e-3, "unit": "row", "unit_dims": {"e.*": (0, 1)},
        "norm_type": 2.0,
    }  # fmt: skip
    assert check.in_words(policies.chain(policies.measure(), Own())) is None
