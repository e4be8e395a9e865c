"""Clippers whose state is saved."""

import torch
from torch import nn

from distclip import GradClipper, policies
from distclip.policies import Policy

AUTO = policies.autoclip


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def clipper_of(policy: Policy, steps: int = 0, part: nn.Module | None = None) -> GradClipper:
    module = model() if part is None else part
    clipper = GradClipper(module, policy)
    for step in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + step)
        clipper.clip_(loss=1.0)
    return clipper
