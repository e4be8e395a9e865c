"""Does clipping do on any number of ranks what it does on one?"""

import pytest
import torch

import distclip
from distclip import policies
from distclip.testing import assert_rounded, expected

POLICY = {"name": "agc", "clip_factor": 0.01}


@pytest.mark.ranks(1, 2, 3)
def test_fsdp2(fsdp2_model):
    """AGC under FSDP2 is AGC of the whole gradients."""
    fsdp2_model(torch.randn(16, 7)).square().sum().backward()
    gradients = {name: p.grad.full_tensor() for name, p in fsdp2_model.named_parameters()}
    weights = {name: p.full_tensor() for name, p in fsdp2_model.named_parameters()}
    want = expected(POLICY, gradients, weights)
    report = distclip.GradClipper(fsdp2_model, policies.agc(0.01)).clip_()
    assert abs(report.total_norm.item() / want.total_norm - 1) < 1e-6
    for name, parameter in fsdp2_model.named_parameters():
        clipped = parameter.grad.full_tensor()
        assert_rounded(clipped, want.gradients[name], coefficient_error=3e-7, name=name)


@pytest.mark.ranks(2)
def test_zero(zero_engine):
    """The model trains under ZeRO-3."""
    zero_engine.backward(zero_engine(torch.randn(1, 7)).square().sum())
    zero_engine.step()
    assert zero_engine.global_steps == 1
