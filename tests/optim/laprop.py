"""LaProp and its reference."""

import numpy as np
import torch
from torch import Tensor, nn

from distclip.testing.norms import wide
from tests.optim.chain import Chain

SHAPES: dict[str, tuple[int, ...]] = {
    "fc.weight": (7, 5),
    "fc.bias": (7,),
    "conv.weight": (3, 2, 3, 3),
    "scale": (),
    "empty.weight": (0, 4),
    "big.weight": (300, 301),
}


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter((torch.randn(shape, generator=generator) * 0.5).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradients(step: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


def give(model: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, parameter in model.items():
        parameter.grad = values[name].to(parameter.dtype, copy=True)  # clipped in place


def train(model: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give(model, gradients(step))
        optimizer.step()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def follows(model: dict[str, Tensor], chain: Chain, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    for name, value in model.items():
        np.testing.assert_allclose(wide(value), chain.p[name], rtol=rtol, atol=atol, err_msg=name)
