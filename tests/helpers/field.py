"""Defects of other libraries, shown first where they can be."""

import torch
from torch import Tensor, nn


def still_a_defect(happens: bool, what: str) -> None:
    assert happens, f"torch {torch.__version__} no longer {what}: the comparison can go"


def parameter(gradient: Tensor) -> nn.Parameter:
    result = nn.Parameter(torch.ones_like(gradient))
    result.grad = gradient.clone()
    return result


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
