"""Micro-batch clipping on 1, 2 and 3 ranks, against the float64 oracle."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from distclip import ConfigurationError, GradClipper, MicroBatchClipper, policies
from distclip.config import load
from distclip.testing import expected

DOCUMENTS: dict[str, Any] = {
    "global": {"name": "global_norm", "max_norm": 0.5},
    "skip": {"name": "skip_norm", "max_norm": 5.0, "clip_norm": 0.5},
    "agc": {"name": "agc", "clip_factor": 0.05},
}
MICROBATCHES = 3


class Model(nn.Module):
    """An odd bias, a frozen weight, a branch that only rank 0 goes down, one that nobody does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.branch = nn.Linear(7, 1)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(7, 1)

    def forward(self, x: Tensor, *, branch: bool) -> Tensor:
        hidden = torch.tanh(self.frozen(torch.tanh(self.first(x))))
        return self.head(hidden) + (self.branch(hidden) if branch else 0.0)


def loss_of(model: nn.Module, rank: int, number: int, *, branch: bool = True) -> Tensor:
    """Micro-batches of different sizes, one of them with a gradient 100 times the others'."""
    random = torch.Generator().manual_seed(10 * rank + number)
    x = torch.randn(2 + number + rank, 5, generator=random, dtype=torch.float64)
    y = torch.randn(len(x), 1, generator=random, dtype=torch.float64)
    dtype = next(model.parameters()).dtype
    times = 100.0 if number == 1 and rank != 1 else 1.0
    out = model(x.to(dtype), branch=branch and rank == 0 and number > 0)
    loss: Tensor = (out - y.to(dtype)).square().mean() * times
    return loss


def of_oracle(document: Any, model: nn.Module) -> Any:
    named = dict(model.named_parameters())
    return expected(document, {name: p.grad for name, p in named.items()}, named)


def truth(document: Any, ranks: int) -> dict[str, np.ndarray | None]:
    """Clipped micro-batch by micro-batch in float64, summed, and averaged over the ranks."""
    model = Model().double()
    total: dict[str, np.ndarray | None] = dict.fromkeys(dict(model.named_parameters()))
    for rank in range(ranks):
        for number in range(MICROBATCHES):
            model.zero_grad()
            loss_of(model, rank, number).backward()
            want = of_oracle(document, model)
            for name, gradient in want.gradients.items():
                if gradient is not None and not want.skipped:
                    old = total[name]
                    total[name] = gradient / ranks + (0.0 if old is None else old)
    return total


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("view", [False, True])
def test_each_micro_batch_is_clipped_before_it_is_added(view: bool) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for document in DOCUMENTS.values():
        bare = Model()
        model = DistributedDataParallel(bare, gradient_as_bucket_view=view)
        micro = MicroBatchClipper(model, load({"policy": document}).policy)
        for _ in range(2):  # the second time with gradients left from before
            bare.zero_grad(set_to_none=view)
            for number in range(MICROBATCHES):
                with micro.clip_():
                    loss_of(model, rank, number).backward()
            micro.average_()
            for (name, p), want in zip(
                bare.named_parameters(), truth(document, ranks).values(), strict=True
            ):
                if want is None:
                    assert p.grad is None, name
                    continue
                assert p.grad is not None, name
                np.testing.assert_allclose(p.grad.numpy(), want, rtol=2e-5, atol=2e-6, err_msg=name)


def truth_together(document: Any, ranks: int) -> dict[str, np.ndarray | None]:
    """As :func:`truth`, of micro-batches of all ranks together."""
    model = Model().double()
    total: dict[str, np.ndarray | None] = dict.fromkeys(dict(model.named_parameters()))
    for number in range(MICROBATCHES):
        model.zero_grad()
        for rank in range(ranks):
            (loss_of(model, rank, number, branch=False) / ranks).backward()
        want = of_oracle(document, model)
        for name, gradient in want.gradients.items():
            if gradient is not None and not want.skipped:
                total[name] = gradient + (0.0 if total[name] is None else total[name])
    return total


@pytest.mark.ranks(2, 3, 4)
def test_under_fsdp2_a_micro_batch_is_that_of_all_ranks() -> None:
    """Sharded, and on 4 ranks replicated too; whatever the script says of synchronisation."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    if ranks == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for document in DOCUMENTS.values():
        model: Any = Model()
        for part in (model.first, model):
            fully_shard(part, mesh=mesh)
        micro = MicroBatchClipper(model, load({"policy": document}).policy)
        for _ in range(2):
            for number in range(MICROBATCHES):
                model.set_requires_gradient_sync(number == 1)
                model.set_is_last_backward(number == 2)
                with micro.clip_():
                    loss_of(model, rank, number, branch=False).backward()
            micro.average_()  # which has nothing to do
            for (name, p), want in zip(
                model.named_parameters(), truth_together(document, ranks).values(), strict=True
            ):
                assert (p.grad is None) == (want is None), name
                if want is not None:
                    found = p.grad.full_tensor().numpy()
                    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-6, err_msg=name)
                p.grad = None


@pytest.mark.ranks(2)
@pytest.mark.parametrize("reduced_in", [None, torch.float64])
def test_a_backward_that_fsdp2_has_not_reduced(reduced_in: Any) -> None:
    model: Any = Model()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(reduce_dtype=reduced_in))
    micro = MicroBatchClipper(model, policies.global_norm(1.0))
    model.set_requires_gradient_sync(False)
    loss_of(model, 0, 0, branch=False).backward()
    with pytest.raises(ConfigurationError, match="has not reduced yet"), micro.clip_():
        loss_of(model, 0, 1, branch=False).backward()


def test_it_is_not_the_clipped_sum() -> None:
    """A check must be able to fail: the sum is another one, and so is no clipping at all."""
    want = truth(DOCUMENTS["global"], 1)["head.weight"]
    model = Model()
    for number in range(MICROBATCHES):
        loss_of(model, 0, number).backward()
    for _ in range(2):
        assert model.head.weight.grad is not None
        assert want is not None
        assert np.abs(model.head.weight.grad.numpy() - want).max() > 0.1 * np.abs(want).max()
        GradClipper(model, policies.global_norm(0.5)).clip_()


def test_an_error_in_a_micro_batch_leaves_what_was_there() -> None:
    model = Model()
    micro = MicroBatchClipper(model, policies.global_norm(0.5))
    with micro.clip_():
        loss_of(model, 0, 0).backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    loss = loss_of(model, 0, 1)
    loss.backward(retain_graph=False)
    for old, p in zip(before, model.parameters(), strict=True):
        p.grad = None if old is None else old.clone()
    with pytest.raises(RuntimeError, match="a second time"), micro.clip_():
        loss.backward()
    for old, p in zip(before, model.parameters(), strict=True):
        assert (p.grad is None) == (old is None)
        assert old is None or (p.grad is not None and torch.equal(old, p.grad))


def test_nan_is_handed_on_and_found_in_the_sum() -> None:
    model = Model()
    micro = MicroBatchClipper(model, policies.global_norm(0.5))
    with micro.clip_():
        (loss_of(model, 0, 0) * float("nan")).backward()
    with micro.clip_():
        loss_of(model, 0, 1).backward()
    report = GradClipper(model, policies.global_norm(1.0), on_nonfinite="skip").clip_()
    assert bool(report.skipped)


def test_under_a_scaler_the_threshold_is_of_unscaled_gradients() -> None:
    plain, scaled = Model(), Model()
    for model, scale in ((plain, 1.0), (scaled, 1024.0)):
        micro = MicroBatchClipper(model, policies.global_norm(0.5))
        with micro.clip_(None if scale == 1.0 else torch.tensor(scale)):
            (loss_of(model, 0, 1) * scale).backward()
        assert micro.last_report is not None
        assert micro.last_report.clipped_norm.item() == pytest.approx(0.5, rel=1e-4)
    for one, other in zip(plain.parameters(), scaled.parameters(), strict=True):
        if one.grad is not None:
            assert other.grad is not None
            torch.testing.assert_close(other.grad, one.grad * 1024.0)


@pytest.mark.ranks(2)
def test_what_has_no_gradient_of_its_own_is_refused() -> None:
    flat = FullyShardedDataParallel(
        nn.Linear(5, 7), device_id=torch.device("cpu"), use_orig_params=True
    )
    with pytest.raises(ConfigurationError, match="no rank has the gradient of its micro-batch"):
        MicroBatchClipper(flat, policies.global_norm(1.0))
    in_part: Any = Model()
    fully_shard(in_part.first)
    with pytest.raises(ConfigurationError, match=r"'branch\.weight' lies outside of fully_shard"):
        MicroBatchClipper(in_part, policies.global_norm(1.0))
    outside = Model().requires_grad_(False)
    outside.first.requires_grad_(True)
    fully_shard(outside.first)
    micro = MicroBatchClipper(outside, policies.global_norm(1.0))
    outside.head.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"'head\.weight' lies outside"), micro.clip_():
        pass


def test_engines_and_memories_are_refused() -> None:
    engine = nn.Linear(2, 2)
    engine.zero_optimization_stage = lambda: 2  # as a DeepSpeedEngine has it
    with pytest.raises(ConfigurationError, match=r"distclip.deepspeed.attach\(engine\)"):
        MicroBatchClipper(engine, policies.global_norm(1.0))
    with pytest.raises(ConfigurationError, match="zclip remembers norms"):
        MicroBatchClipper(Model(), policies.chain(policies.value(1.0), policies.zclip()))


def test_a_layer_that_is_unfrozen_later() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    model[0].requires_grad_(False)
    micro = MicroBatchClipper(model, policies.global_norm(1.0))
    model[0].requires_grad_(True)
    truth = [torch.zeros_like(p) for p in model.parameters()]
    for number in range(1, 4):
        x = torch.full((4, 3), float(number), dtype=torch.float64)
        found = torch.autograd.grad(model(x).sum() * 10, list(model.parameters()))
        norm = torch.cat([each.flatten() for each in found]).norm()
        truth = [t + each / norm for t, each in zip(truth, found, strict=True)]
        with micro.clip_():
            (model(x).sum() * 10).backward()
    for parameter, expect in zip(model.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.grad, expect, rtol=1e-6, atol=1e-9)


def test_main_gradients_are_refused() -> None:
    model: Any = nn.Linear(3, 2)
    micro = MicroBatchClipper(model, policies.global_norm(1.0))
    model.bias.main_grad = torch.zeros(2)
    with pytest.raises(ConfigurationError, match="'bias' accumulates its gradients in main_grad"):
        MicroBatchClipper(model, policies.global_norm(1.0))
    with pytest.raises(ConfigurationError, match="main_grad"), micro.clip_():
        model(torch.ones(1, 3)).sum().backward()


@pytest.mark.ranks(2)
def test_a_forward_outside_of_the_block() -> None:
    model = DistributedDataParallel(nn.Linear(3, 2))
    micro = MicroBatchClipper(model, policies.global_norm(1.0))
    with micro.clip_():
        pass  # a rank without a micro-batch
    loss = model(torch.ones(1, 3)).sum()
    with pytest.raises(ConfigurationError, match="move the forward into the block"), micro.clip_():
        loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    with micro.clip_():
        model(torch.ones(1, 3)).sum().backward()
    micro.average_()
