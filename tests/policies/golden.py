"""Outputs of the reference codes (optax, torch, timm, DreamerV3), reproduced to their rounding.

The arrays were made in float32 by running those codes; see the keys of ``golden_clip.npz``.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distclip import GradClipper
from distclip.policies import Policy

GOLDEN = Path(__file__).parent.parent / "golden" / "golden_clip.npz"


TENSORS = [
    "lin",
    "vec",
    "conv",
    "scal",
    "zerop",
    "zerog",
    "tinyp",
    "emb",
    "conv1d",
    "col",
    "conv3d",
]


RTOL = 1e-6
"""Relative; the float32 codes themselves are off by up to 2.1e-7 from float64."""


def parameters(golden: dict[str, np.ndarray], names: list[str] = TENSORS) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name in names:
        result[name] = nn.Parameter(torch.from_numpy(golden[f"in|p|{name}"].copy()))
        result[name].grad = torch.from_numpy(golden[f"in|g|{name}"].copy())
    return result


def assert_golden(
    have: dict[str, Tensor], golden: dict[str, np.ndarray], key: str, *, rtol: float = RTOL
) -> None:
    for name, parameter in have.items():
        want = torch.from_numpy(golden[f"{key}|{name}"])
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad,
            want.reshape(parameter.shape),
            rtol=rtol,
            atol=0.0,
            equal_nan=True,
            msg=lambda text, name=name: f"{key}|{name}: {text}",
        )


def clip(golden: dict[str, np.ndarray], policy: Policy) -> dict[str, Tensor]:
    have = parameters(golden)
    GradClipper(have.items(), policy, on_nonfinite="pass").clip_()
    return have
