"""Under ``torch.set_default_device`` numbers are made where they are used."""

import pytest
import torch
from torch import nn

from distclip import GradClipper, clip_grad_norm_, clip_grad_value_, grad_norms, policies
from tests.engine.test_again import POLICIES, bits, told


@pytest.mark.parametrize("name", [*POLICIES, "rows"])
def test_the_default_device_is_not_where_numbers_are(name: str) -> None:
    """As under torch.set_default_device("cuda"), with gradients on the host."""
    policy = policies.agc(1e-3) if name == "rows" else POLICIES[name]
    both = [[nn.Parameter(torch.ones(3, 4) * n) for n in (1.0, 2.0)] for _ in range(2)]
    clippers = [GradClipper(list(zip("ab", each, strict=True)), policy) for each in both]
    for step in range(4):
        outcomes = []
        for parameters, clipper in zip(both, clippers, strict=True):
            for parameter in parameters:
                parameter.grad = torch.full((3, 4), 5.0 + step)
            with torch.device("meta" if clipper is clippers[1] and step else "cpu"):
                report = clipper.clip_()
            outcomes.append(repr(told(report)))
        assert outcomes[0] == outcomes[1], step
        assert bits(clippers[0]) == bits(clippers[1])


def test_functions_leave_the_default_device_alone() -> None:
    parameter = nn.Parameter(torch.ones(4))
    for _ in range(4):
        parameter.grad = torch.full((4,), 3.0)
        with torch.device("meta"):
            assert clip_grad_norm_([parameter], 1.0).item() == 6.0
            clip_grad_value_([parameter], 0.25)
            assert grad_norms([("weight", parameter)])["weight"].item() == 0.5
        assert parameter.grad.tolist() == [0.25] * 4
