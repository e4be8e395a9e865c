"""LoRA: few trainable parameters beside many frozen ones, single, under FSDP2 and FSDP1."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import distclip
from distclip import GradClipper, policies
from distclip.testing.models.flattened import wrap
from tests.helpers.shards import whole
from tests.helpers.watching import REDUCTION, watch
from tests.sharded import mesh_of

SECONDS = 60
KINDS = pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])


class Adapted(nn.Module):
    """A frozen linear layer, and a trainable one of rank 2 beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def base() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))


def adapted(model: nn.Sequential) -> nn.Sequential:
    torch.manual_seed(2)
    for position in (0, 2):
        model[position] = Adapted(model[position])  # type: ignore[arg-type]
    return model


def sharded(model: nn.Module, kind: str) -> nn.Module:
    if kind == "fsdp1":
        return wrap(model, use_orig_params=True)
    for layer in model.children():
        if isinstance(layer, Adapted):
            fully_shard(layer, mesh=mesh_of((dist.get_world_size(),), ("dp",)))
    return fully_shard(model, mesh=mesh_of((dist.get_world_size(),), ("dp",)))


def loss(model: nn.Module, step: int, *, part: bool = True) -> Tensor:
    world = dist.get_world_size() if part else 1
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
    x = x.chunk(world)[dist.get_rank() if part else 0]
    return (model(x) - x.roll(1, 1)).square().mean()


@pytest.mark.ranks(1, 2, 3, timeout=SECONDS)
@KINDS
@pytest.mark.parametrize("policy", ["agc, global", "by name"])
def test_adapters_train_as_in_one_process(kind: str, policy: str) -> None:
    """Added before wrapping. Frozen parameters have no gradient, and count and cost nothing."""
    chosen: Any = (
        policies.chain(policies.agc(0.05), policies.global_norm(0.1))
        if policy != "by name"
        else policies.by_name({"*.up": policies.global_norm(0.05)}, policies.dreamer_agc(0.05))
    )
    plain, model = adapted(base()), sharded(adapted(base()), kind)
    frozen = {n: v for n, v in whole(model).items() if "base" in n}
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05)
        for m in (plain, model)
    ]
    alone: Any = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
    reports: list[list[float]] = [[], []]
    clippers = [
        GradClipper(m, chosen, process_group=group, verify_replicas="never", sinks=[sink])
        for m, group, sink in (
            (plain, alone, lambda _, report: reports[0].append(report.total_norm.item())),
            (model, None, lambda _, report: reports[1].append(report.total_norm.item())),
        )
    ]
    assert sorted(clippers[0].names) == sorted(clippers[1].names)
    assert len(clippers[1].names) == 8
    for clipper, optimizer in zip(clippers, optimizers, strict=True):
        clipper.attach(optimizer)
    for step in range(6):
        loss(plain, step, part=False).backward()
        loss(model, step).backward()
        optimizers[0].step()
        with watch() as seen:
            optimizers[1].step()
        # FSDP1 gathers nothing here, and frozen parameters bring no message of their own.
        assert seen.collective_names.count(REDUCTION) <= 1
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert reports[1] == pytest.approx(reports[0], rel=1e-5)
    found = whole(model)
    for name, value in plain.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), rtol=2e-5, atol=1e-6)
    for name, value in frozen.items():
        assert torch.equal(found[name], value)


@pytest.mark.ranks(2, 3, timeout=SECONDS)
def test_the_trainable_parameters_alone() -> None:
    """As a list, for a clipper and for the functions: the rest of the model does not matter."""
    model, plain = sharded(adapted(base()), "fsdp2"), adapted(base())
    for module, part in ((plain, False), (model, True)):
        loss(module, 0, part=part).backward()
    mine = [p for p in model.parameters() if p.requires_grad]
    truth = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(distclip.get_total_norm([p.grad for p in mine]), truth)  # type: ignore[misc]
    torch.testing.assert_close(distclip.clip_grad_norm_(mine, 0.3), truth)
    report = GradClipper(mine, policies.global_norm(0.1)).clip_()
    assert report.total_norm.item() == pytest.approx(0.3, rel=1e-5)


@pytest.mark.ranks(1, 2, 3, timeout=SECONDS)
@pytest.mark.parametrize("where", ["all ranks", "one rank"])
def test_adapters_that_come_after_the_clipper(where: str) -> None:
    """Would train unclipped: named on the ranks that have them, and no rank waits."""
    model = sharded(base(), "fsdp2")
    model.requires_grad_(False)
    clipper = GradClipper(model, policies.global_norm(0.1))
    clipper.clip_()
    here = where == "all ranks" or dist.get_rank() == 0
    if here:
        adapter = nn.Linear(6, 2)
        model.append(adapter)  # type: ignore[operator]
        adapter.weight.grad = torch.ones(2, 6)
    match = r"'3.weight' and 1 more came .* adapters such as LoRA" if here else "another rank"
    with pytest.raises(distclip.DistclipError, match=match):
        clipper.clip_()
    if here:
        assert bool((adapter.weight.grad == 1.0).all())  # type: ignore[union-attr]
    dist.barrier()


def test_frozen_newcomers_that_are_trained_later_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    clipper = GradClipper(model, policies.global_norm(0.1))
    model.append(nn.Linear(3, 3).requires_grad_(False))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        clipper.clip_()  # nothing of them is stepped
    model.requires_grad_(True)
    with pytest.raises(distclip.ConfigurationError, match=r"'1.weight' and 1 more came"):
        clipper.clip_()


@pytest.mark.ranks(2, timeout=SECONDS)
def test_offloaded_adapters() -> None:
    """FSDP2's CPUOffloadPolicy: on a CPU everything is there already, and it runs as without."""
    models = []
    for options in ({}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
        model = adapted(base())
        fully_shard(model, mesh=mesh_of((2,), ("dp",)), **options)
        clipper = GradClipper(model, policies.chain(policies.agc(0.05), policies.global_norm(0.1)))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        clipper.attach(optimizer)
        for step in range(3):
            loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(whole(model))
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name])
