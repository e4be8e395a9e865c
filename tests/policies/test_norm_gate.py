"""``norm_gate``: the condition is the norm of a part, the effect is on the whole update."""

import math

import numpy as np
import pytest
import torch

from distclip import ConfigurationError, GradClipper, policies
from distclip.config import load
from distclip.testing import expected
from distclip.testing.models.sharded import whole
from distclip.testing.models.sharding import shard

GATE = policies.norm_gate("lm_head.*", 2.0)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(2, 2)
        self.lm_head = torch.nn.Linear(2, 2)


def set_norms(model: Model, body: float, head: float) -> None:
    for part, norm in ((model.body, body), (model.lm_head, head)):
        part.weight.grad = torch.full((2, 2), 0.4 * norm)
        part.bias.grad = torch.tensor([0.6 * norm, 0.0])


def test_the_rule_of_a_golden(frontier: dict[str, np.ndarray]) -> None:
    """Columns 1 and 3 are the part."""
    want = frontier["norm_gate|columns 1 and 3,2"]
    assert 0 < want.sum() < len(want) / 2
    names = ["0", "head.1", "2", "head.3", "4"]
    tensors = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in names]
    policy = policies.norm_gate("head.*", 2.0)
    clipper = GradClipper(list(zip(names, tensors, strict=True)), policy)
    for row, skipped in zip(frontier["in|norms"], want, strict=True):
        for tensor, norm in zip(tensors, row, strict=True):
            tensor.grad = torch.tensor([norm])
        report = clipper.clip_()
        assert bool(report.skipped) == bool(skipped)
        part = report.part_norms["name=head.*"]
        assert part == pytest.approx(float(np.hypot(row[1], row[3])), rel=1e-12)


@pytest.mark.parametrize(
    ("body", "head", "skips"),
    [
        (1e6, 1.9, False),
        (0.0, 2.1, True),
        (0.0, math.inf, True),
        (0.0, math.nan, True),
        (1.0, 0.0, False),
    ],
)
def test_only_the_part_decides_and_everything_is_skipped(
    body: float, head: float, skips: bool
) -> None:
    model = Model()
    policy = policies.chain(GATE, policies.global_norm(1.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    clipper = GradClipper(model, policy, on_nonfinite="pass")
    clipper.attach(optimizer)
    set_norms(model, body, head)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert clipper.last_report is not None
    assert bool(clipper.last_report.skipped) == skips
    same = map(torch.equal, before, model.parameters())
    assert all(same) if skips else not any(same)
    if not skips:  # by the norm of the whole model, the part included
        assert clipper.last_report.clipped_norm.item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.ranks(1, 2, 3)
def test_a_closed_gate_is_closed_on_all_ranks() -> None:
    values = whole()
    document = [
        {"name": "norm_gate", "part": "fc*", "max_norm": 30.0},
        {"name": "global_norm", "max_norm": 1.0},
    ]
    want = expected(document, values.gradients, values.weights)
    assert want.skipped
    policy = load({"policy": document}).policy
    for layout in ("fsdp1", "fsdp2", "fsdp1_orig"):
        model = shard(layout, values)
        model.set_gradients(values.gradients)
        report = GradClipper(model.named(), policy).clip_()
        assert bool(report.skipped), layout
        assert report.part_norms["name=fc*"] == pytest.approx(
            math.hypot(want.parameter_norms["fc.weight"], want.parameter_norms["fc.bias"]), rel=1e-6
        )


def test_a_part_of_another_kind_and_one_that_holds_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model()
    set_norms(model, 10.0, 1.0)
    assert bool(GradClipper(model, policies.norm_gate("kind=matrix", 2.0)).clip_().skipped)
    assert not bool(GradClipper(model, policies.norm_gate("lm_haed.*", 0.0)).clip_().skipped)
    assert "name=lm_haed.*" in caplog.text


def test_impossible_gates() -> None:
    with pytest.raises(ConfigurationError, match="max_norm must be >= 0"):
        policies.norm_gate("lm_head.*", -1.0)
    with pytest.raises(ConfigurationError, match="there is no kind 'head'"):
        policies.norm_gate("kind=head", 1.0)
    with pytest.raises(ConfigurationError, match="a part of a model is a text"):
        policies.norm_gate(3, 1.0)  # type: ignore[arg-type]
