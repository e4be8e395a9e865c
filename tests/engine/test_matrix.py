"""Every policy under every sharding, against the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest

from distclip.statistics import collectives
from distclip.testing.cases import LAYOUTS, POLICIES, ROUNDINGS
from distclip.tools.verify.cells import build, faults_of

__all__ = ["LAYOUTS", "POLICIES", "ROUNDINGS", "build", "check"]


def check(
    configuration: Any, layout: str, kind: str, *, roundings: int = 1, seed: int = 0, **options: Any
) -> None:
    """One policy on one sharding, as ``distclip verify`` looks at it."""
    faults = faults_of(configuration, layout, kind, roundings, seed, **options)
    assert not faults, "\n".join(faults)


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_policy(layout: str) -> None:
    for label, configuration in POLICIES.items():
        try:
            check(configuration, layout, "float32", roundings=ROUNDINGS.get(label, 1))
        except Exception as error:
            raise AssertionError(f"policy {label!r}: {error}") from error


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "mixed"])
def test_every_policy_by_an_all_reduce(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """As with many ranks and on accelerators; a few gloo ranks gather instead."""
    monkeypatch.setattr(collectives, "FEW", 0)
    test_every_policy(layout)


@pytest.mark.ranks(2)  # one rank: `distclip verify`, nightly, and the goldens of each policy
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dtype(layout: str, kind: str) -> None:
    for label, configuration in POLICIES.items():
        try:
            check(configuration, layout, kind, roundings=ROUNDINGS.get(label, 1), seed=1)
        except Exception as error:
            raise AssertionError(f"policy {label!r}: {error}") from error


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_dtypes_together_on_four_ranks(layout: str) -> None:
    test_every_dtype(layout, "mixed")
