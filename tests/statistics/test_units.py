"""Units in flat vectors: what is counted of them, and the memory that deciding on them takes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distclip import GradClipper, policies
from distclip.engine.units import UNITS_CHUNK, decide
from distclip.kernels import measuring
from distclip.kernels.host import blocks
from distclip.kernels.look import Kinds
from distclip.statistics import units
from distclip.statistics.units import Segments
from distclip.tools.bench.timing import extra_bytes


@pytest.mark.parametrize("tensors", [0, 1, 2, 7, 300])
def test_flagged_units_of_each_tensor(tensors: int) -> None:
    draw = np.random.default_rng(tensors)
    for _ in range(20):
        sizes = [0, 1, 3, 100] if tensors > 10 else [0, 1, 3, 8191, 30_001]
        counts = [int(count) for count in draw.choice(sizes, tensors)]
        segments = Segments(counts, torch.device("cpu"))
        flags = torch.from_numpy(draw.random(segments.size) < 0.5)
        wanted = [int(flags[span].sum()) for span in segments.spans]
        assert segments.count(flags).tolist() == wanted


def test_many_units_are_decided_on_as_all_at_once() -> None:
    first, second = policies.agc(0.1), policies.agc(0.02)
    norms, weights = torch.rand(2, 3 * UNITS_CHUNK + 5, dtype=torch.float64)
    norms[[7, UNITS_CHUNK]] = torch.tensor([math.nan, math.inf], dtype=torch.float64)
    once = first.unit_coefficients(norms, weights)
    wanted = once * second.unit_coefficients(norms * once, weights)
    kept = norms.clone()
    found = decide((first, second), {2.0: norms}, {2.0: weights}, weights)  # in their place
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(norms, kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("factor", [1e9, 1e-3])
@pytest.mark.parametrize(
    ("count", "shape", "dtype"),
    [(6, (4608, 683), torch.float32), (144, (512, 512), torch.bfloat16)],
)
def test_the_memory_of_row_agc(
    count: int, shape: tuple[int, int], dtype: torch.dtype, factor: float
) -> None:
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    clip = GradClipper(parameters, policies.agc(factor)).clip_
    for _ in range(2):
        clip()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    gradients = sum(parameter.nbytes for parameter in parameters)
    assert extra_bytes(clip) < (1 << 20) + gradients / 1000


def _clipped(policy: policies.Policy, missing: int) -> tuple[list[Tensor], dict[str, object]]:
    """Gradients of several shapes after clipping, and what the report says."""
    draw = torch.Generator().manual_seed(1)
    shapes = [(7, 3), (2, 5), (0, 4), (40, 2), (5,), (3, 2, 2), (1, 9)]
    parameters = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    for number, parameter in enumerate(parameters):
        if number != missing:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
    named = [(f"p{number}", each) for number, each in enumerate(parameters)]
    report = GradClipper(named, policy).clip_()
    return [p.grad for p in parameters if p.grad is not None], report.to_dict(per_parameter=True)


@pytest.mark.parametrize("at_once", [1, 3, 8, 45])
@pytest.mark.parametrize("missing", [-1, 1, 3])
def test_units_are_decided_on_part_by_part_as_all_at_once(
    at_once: int, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policies.chain(
        policies.by_name({"p3": policies.agc(0.3), "p5": None}, default=policies.agc(0.9)),
        policies.agc(0.5, norm_type=1.0),
    )
    wanted, told = _clipped(policy, missing)
    made: list[slice] = []
    by_parts = measuring.unit_norms_by_parts
    monkeypatch.setattr(units, "AT_ONCE", at_once)
    monkeypatch.setattr(
        measuring, "unit_norms_by_parts", lambda *a, **k: made.extend(a[4]) or by_parts(*a, **k)
    )
    found, report = _clipped(policy, missing)
    assert all(map(torch.equal, found, wanted))
    assert report == told
    assert len(made) > 2 * 2  # of weights of two orders, by two policies


def test_a_step_finds_all_its_tables_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    clip = GradClipper(model, policies.agc(1e-3)).clip_
    made: list[object] = []
    divided = blocks._divided
    monkeypatch.setattr(blocks, "_divided", lambda *a, **k: made.append(a) or divided(*a, **k))
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = len(made)
        assert clip().to_dict()["clipped_fraction"] == 1.0
        assert (len(made) > before) == (step == 0)


def test_a_step_compares_the_kinds_of_gradients_and_of_weights_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    policy = policies.by_name({"*.bias": policies.dreamer_agc(1e-3)}, default=policies.agc(1e-3))
    clip = GradClipper(model, policy).clip_
    compared: list[object] = []
    equal = Kinds.__eq__

    def counting(one: Kinds, other: object) -> bool:
        compared.extend([one] if one is not other else [])
        return equal(one, other)

    monkeypatch.setattr(Kinds, "__eq__", counting)
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        compared.clear()
        clip()
    assert len(compared) == 2
