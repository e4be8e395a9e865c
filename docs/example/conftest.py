"""A complete test project for clipping on several ranks: this file and test_clipping.py."""

import pytest
import torch

pytest_plugins = ["distclip.testing.plugin"]


def build():
    """Your model, as it is before it is sharded."""
    return torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 2))


@pytest.fixture
def build_model():
    """What the fixtures fsdp2_model and zero_engine are made with."""
    return build
