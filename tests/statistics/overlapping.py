"""Models whose gradients are measured during backward."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from distclip import ClipReport, GradClipper
from distclip.testing import expected
from tests.engine.test_matrix import build
from tests.helpers.ranks import everyones
from tests.helpers.shards import full as full
from tests.sharded import mesh_of

GROUPS = ("body", "middle", "spare")
"""Sharded for themselves; the rest belongs to the root."""


TIGHT = {"name": "global_norm", "max_norm": 0.01}


LOOSE = {"name": "global_norm", "max_norm": 1e6}


class Model(nn.Module):
    """Uneven shards, and empty ones on 4 ranks; ``spare`` is used where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 32)
        self.middle = nn.Linear(32, 32)
        self.spare = nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens: Tensor, spare: bool = False) -> Tensor:
        x = torch.tanh(self.body(self.embed(tokens)))
        x = torch.tanh(self.middle(x))
        return self.head(self.spare(x) if spare else x)


def make(mesh: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Model()
    mesh = mesh_of((dist.get_world_size(),), ("dp",)) if mesh is None else mesh
    for name in GROUPS:
        fully_shard(getattr(model, name), mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def loss_of(model: nn.Module, number: int, spare: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
    return model(torch.randint(11, (9,), generator=generator), spare).float().square().mean()


def backward(model: nn.Module, number: int, spare: bool = False, factor: float = 1.0) -> None:
    (loss_of(model, number, spare) * factor).backward()


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: full(p.grad) for name, p in model.named_parameters()}
    return {name: None if g is None else g.detach().double().clone() for name, g in found.items()}


def oracle(
    document: Any, model: nn.Module, gradients: dict[str, Tensor | None], **options: Any
) -> Any:
    weights = {name: full(parameter) for name, parameter in model.named_parameters()}
    return expected(document, gradients, weights, **options)  # type: ignore[arg-type]


def same_on_all_ranks(report: ClipReport) -> None:
    mine = report.coefficient.double().numpy().tobytes()
    assert set(everyones(mine)) == {mine}


def clip_and_check(
    clipper: GradClipper, model: nn.Module, document: Any = TIGHT, early: int | None = None
) -> ClipReport:
    """Clip, and hold the result to the oracle, given the gradients as they were just before."""
    before = gradients_of(model)
    want = oracle(document, model, before)
    report = clipper.clip_()
    compare(report, want, model)
    if early is not None:
        assert clipper.measured_early == early
    return report


def compare(report: ClipReport, want: Any, model: nn.Module) -> None:
    assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
    for name, norm in want.parameter_norms.items():
        assert report.parameter_norms[name] == pytest.approx(norm, rel=1e-6, abs=1e-30), name
    for name, gradient in gradients_of(model).items():
        wanted = want.gradients[name]
        assert (gradient is None) == (wanted is None), name
        if gradient is not None:
            np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-6, atol=1e-12)
    same_on_all_ranks(report)


def used(model: nn.Module, spare: bool = False) -> int:
    return sum(spare or "spare" not in name for name, _ in model.named_parameters())


def warm(model: nn.Module, *, spare: bool = False, document: Any = TIGHT) -> GradClipper:
    """A clipper that has seen one step, and so knows how many gradients come together."""
    clipper = GradClipper(model, build(document), overlap=True)
    backward(model, 0, spare)
    clip_and_check(clipper, model, document, early=0)
    model.zero_grad()
    return clipper


def hooks_on(model: nn.Module) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())  # type: ignore[attr-defined]
