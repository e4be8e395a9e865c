"""A new layout is one file (``made_up.py`` beside this one) and one line in ``LAYOUTS``."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import GradClipper, policies
from distclip.layouts import detect
from distclip.layouts.piece import Layout
from distclip.testing import expected
from tests.layouts.made_up import FAST, SLOW, Part

SHAPES = {"rows": (5, 4), "columns": (3, 7), "uneven": (4, 3), "absent": (4, 4), "plain": (4,)}
CUTS = {
    1: {"rows": (0, [5]), "columns": (1, [7]), "uneven": (0, [4]), "absent": (0, [4])},
    2: {"rows": (0, [3, 2]), "columns": (1, [3, 4]), "uneven": (0, [4, 0]), "absent": (0, [2, 2])},
}
NORM = {"name": "global_norm", "max_norm": 0.5}
AGC = {"name": "agc", "clip_factor": 0.05}

WAYS: dict[str, tuple[dict[str, Any], Callable[[Any], Tensor]]] = {
    "clipper, global_norm": (
        NORM,
        lambda named: GradClipper(named, policies.global_norm(0.5)).clip_().total_norm,
    ),
    "clipper, agc": (AGC, lambda named: GradClipper(named, policies.agc(0.05)).clip_().total_norm),
    "clip_grad_norm_": (NORM, lambda named: distclip.clip_grad_norm_([p for _, p in named], 0.5)),
    "clip_grad_agc_": (AGC, lambda named: distclip.clip_grad_agc_([p for _, p in named], 0.05)),
}


def drawn(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def made(weights: dict[str, Tensor]) -> list[tuple[str, Any]]:
    """Parameters of this rank."""
    cuts = CUTS[dist.get_world_size()]
    named: list[tuple[str, Any]] = [(n, Part.of(weights[n], *cut)) for n, cut in cuts.items()]
    return [*named, ("plain", nn.Parameter(weights["plain"].clone()))]


def give(named: list[tuple[str, Any]], gradients: dict[str, Tensor | None]) -> None:
    """This rank's parts of whole gradients."""
    for name, parameter in named:
        gradient = gradients[name]
        if isinstance(parameter, Part):
            parameter.collected = None if gradient is None else parameter.part_of(gradient).clone()
        elif gradient is not None:
            parameter.grad = gradient.clone()


@contextmanager
def listed(layout: Layout) -> Iterator[None]:
    """The one line, on this rank."""
    detect.LAYOUTS.insert(0, layout)
    try:
        yield
    finally:
        detect.LAYOUTS.remove(layout)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_against_the_oracle(way: str, fast: bool) -> None:
    document, act = WAYS[way]
    weights = drawn(1)
    named = made(weights)
    for seed in (2, 3):  # at the second step functions know the parameters already
        gradients: dict[str, Tensor | None] = {**drawn(seed), "absent": None}
        give(named, gradients)
        want = expected(document, gradients, weights)
        with listed(FAST if fast else SLOW):
            total = act(named)
        assert total.item() == pytest.approx(want.total_norm, rel=1e-6)
        compare(named, want.gradients)


def compare(named: list[tuple[str, Any]], wanted: Mapping[str, Any]) -> None:
    for name, parameter in named:
        want = wanted[name]
        found = parameter.grad
        if isinstance(parameter, Part):
            assert found is None
            found = parameter.collected
            want = None if want is None else parameter.part_of(torch.from_numpy(want)).numpy()
        assert (found is None) == (want is None)
        if found is not None:
            np.testing.assert_allclose(found.double().numpy(), want, rtol=1e-5, err_msg=name)


@pytest.mark.ranks(1)
def test_without_the_line_its_gradients_are_not_seen() -> None:
    named, gradients = made(drawn(1)), drawn(2)
    give(named, dict(gradients))
    total = distclip.clip_grad_norm_([parameter for _, parameter in named], math.inf)
    assert total.item() == pytest.approx(gradients["plain"].norm().item())
