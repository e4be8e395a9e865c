"""What is remembered from step to step holds no gradient."""

import gc
import weakref

import pytest
import torch
from torch import nn

import distclip
from distclip import GradClipper, policies

POLICIES = [policies.global_norm(1e-3), policies.agc(0.1), policies.value(0.1)]


@pytest.mark.parametrize("policy", POLICIES, ids=["norm", "units", "value"])
@pytest.mark.parametrize("by", ["clipper", "function"])
def test_gradients_are_let_go_of(policy: policies.Policy, by: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    clipper = GradClipper(model, policy)
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
        if by == "clipper":
            clipper.clip_()
        else:
            distclip.clip_grad_norm_(model.parameters(), 1e-3)
        watched = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
        assert len(watched) == 4
        model.zero_grad(set_to_none=True)
        gc.collect()
        assert [ref() for ref in watched] == [None] * 4
