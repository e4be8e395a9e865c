"""A user's own model for ``distclip verify --model``."""

from typing import Any

import torch
from torch import Tensor, nn

AT_RANDOM = 0


class Tiny(nn.Module):
    """Embedding, convolution over time, a frozen and an unused layer; gives a loss as HF does."""

    def __init__(self, *, noisy: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Conv1d(6, 5, 3)
        self.norm = nn.LayerNorm(5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 3)
        self.noisy = noisy

    def forward(self, tokens: Tensor, target: Tensor) -> dict[str, Tensor]:
        hidden = self.mix(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        hidden = self.frozen(self.norm(hidden))
        if self.noisy:
            global AT_RANDOM
            AT_RANDOM += 1
            hidden = hidden * AT_RANDOM
        return {"loss": (self.head(hidden).mean(1) - target).square().mean() * 100.0}


def model() -> nn.Module:
    return Tiny()


def noisy() -> nn.Module:
    return Tiny(noisy=True)


def no_module() -> Any:
    return 3


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens": torch.randint(11, (4, 8), generator=generator),
        "target": torch.randn(4, 3, generator=generator),
    }
