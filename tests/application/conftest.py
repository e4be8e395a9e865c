"""Fixtures of several files."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distclip.application import folded


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The divisor of each step that was folded."""
    divisors: list[float] = []
    tell = folded.tell

    def noted(optimizer: Any, name: str, value: Tensor) -> None:
        assert name == "grad_scale"
        assert value.dtype == torch.float32
        assert value.dim() == 0
        divisors.append(value.item())
        tell(optimizer, name, value)

    monkeypatch.setattr(folded, "tell", noted)
    return divisors
