"""``group_norm``: by the optimizer's parameter groups."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from distclip import (
    ConfigurationError,
    GradClipper,
    policies,
)
from tests.engine.bad_input import refused


def test_group_norm_without_an_optimizer() -> None:
    model = nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), 9.0)
    policy = policies.group_norm(1.0)
    refused(
        lambda: GradClipper(model, policy).clip_(), ConfigurationError, "group_norm", "'weight'"
    )
    assert (model.weight.grad == 9.0).all()
    optimizer = SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1)
    report = GradClipper(model, policy, optimizer=optimizer).clip_()
    assert report.clipped_norm.item() == pytest.approx(1.0)
