"""Steps that torch makes to give a fresh optimizer its state are no steps of training."""

import copy
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW, Optimizer

import distclip
from distclip import ClipReport, GradClipper, policies
from distclip.policies import Policy
from tests.helpers.watching import same_bits
from tests.sharded import mesh_of

POLICIES = {
    "adagc": policies.adagc(warmup_steps=3),
    "zclip": policies.zclip(warmup_steps=3),
    "autoclip": policies.autoclip(percentile=50.0),
}


class Run:
    """A model in training, with an attached clipper of a policy with memory."""

    def __init__(self, policy: Policy, sharded: bool = False, several: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        if sharded:
            fully_shard(self.model, mesh=mesh_of((torch.distributed.get_world_size(),), ("dp",)))
        listed = list(self.model.parameters())
        self.optimizers: list[Optimizer] = (
            [AdamW(listed[:2], lr=0.1, eps=1.0), AdamW(listed[2:], lr=0.1, eps=1.0)]
            if several
            else [AdamW(listed, lr=0.1, eps=1.0)]
        )
        self.steps: list[int] = []
        self.clipper = GradClipper(self.model, policy, sinks=[self.note])
        self.clipper.attach(self.optimizers)

    def note(self, step: int, report: ClipReport) -> None:
        self.steps.append(step)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.model.zero_grad()
            data = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            (self.model(data).square().sum() * 4.0**step).backward()
            for optimizer in self.optimizers:
                optimizer.step()


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("label", POLICIES)
@pytest.mark.parametrize("several", [False, True])
def test_a_resumed_run_decides_bit_by_bit_as_an_uninterrupted_one(
    label: str, several: bool
) -> None:
    sharded = torch.distributed.is_initialized()
    one = Run(POLICIES[label], sharded, several)
    # A fresh optimizer, as of a run that saves before its first step.
    get_state_dict(one.model, one.optimizers)
    assert one.steps == []
    one.train(0, 4)
    kept = get_state_dict(one.model, one.optimizers), one.clipper.state_dict()
    saved = [copy.deepcopy(kept) for _ in range(2)]  # what is kept goes on being trained
    one.train(4, 7)
    for clipper_first, ((model, optimizers), memory) in enumerate(saved):
        other = Run(POLICIES[label], sharded, several)
        if clipper_first:
            other.clipper.load_state_dict(memory)
        set_state_dict(
            other.model, other.optimizers, model_state_dict=model, optim_state_dict=optimizers
        )
        if not clipper_first:
            other.clipper.load_state_dict(memory)
        assert other.steps == []
        other.train(4, 7)
        assert other.steps == [4, 5, 6]
        pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
        assert all(same_bits(a.detach(), b.detach()) for a, b in pairs)
        states = [run.clipper.state_dict()["states"] for run in (one, other)]
        assert str(states[0]) == str(states[1])


def test_stateless_optimizers_train_and_make_fake_steps_too() -> None:
    model = nn.Linear(4, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    steps: list[int] = []
    clipper = GradClipper(
        model, policies.global_norm(1.0), sinks=[lambda step, _: steps.append(step)]
    )
    clipper.attach(optimizer)
    get_optimizer_state_dict(model, optimizer)
    assert steps == []
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        model.zero_grad()
        get_optimizer_state_dict(model, optimizer)
    assert steps == [0, 1]


def test_a_first_step_with_zero_gradients_and_no_learning_rate_is_a_step() -> None:
    """As of warm-up: it is not taken for a fake one by its numbers."""
    model = nn.Linear(4, 2)
    optimizer = AdamW(model.parameters(), lr=0.0)
    steps: list[int] = []
    clipper = GradClipper(
        model, policies.global_norm(1.0), sinks=[lambda step, _: steps.append(step)]
    )
    clipper.attach(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert steps == [0]


def test_under_accelerate() -> None:
    accelerator: Any = accelerate.Accelerator(cpu=True)
    handle = distclip.accelerate.attach(accelerator, policies.adagc(warmup_steps=2))
    model = nn.Linear(4, 2)
    model, optimizer = accelerator.prepare(model, AdamW(model.parameters(), lr=0.1))
    try:
        get_optimizer_state_dict(model, optimizer.optimizer)
        assert handle.last_report is None
        accelerator.backward(model(torch.ones(1, 4)).sum())
        optimizer.step()
        assert handle.last_report is not None
    finally:
        handle.remove()
