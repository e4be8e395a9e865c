"""A model whose parameters several optimizers share out."""

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from distclip import ClipReport

Pair = tuple[Optimizer, Optimizer]


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def pair_of(model: nn.Module, kind: str) -> Pair:
    """The matrices' optimizer and that of the rest; fused ones read found_inf and grad_scale."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    fused = {"muon": (False, False), "fused": (True, True), "mixed": (True, False)}[kind]
    first: Optimizer
    if kind == "muon":
        first = torch.optim.Muon(matrices, lr=1e-2)
    else:
        first = AdamW(matrices, lr=1e-2, eps=1.0, fused=fused[0])
    return first, AdamW(rest, lr=1e-2, eps=1.0, fused=fused[1])


KINDS = ["muon", "fused", "mixed"]


ORDERS = [(0, 1), (1, 0)]


def loss_of(model: nn.Module, step: int, factor: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(16, 8, generator=generator)).square().sum() * factor


def assert_same(model: nn.Module, reference: nn.Module) -> None:
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-7)


class Seen:
    """The reports of a clipper, as a sink."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def __call__(self, step: int, report: ClipReport) -> None:
        self.norms.append(report.total_norm.item())
