"""Every policy under every sharding, against the float64 oracle."""

import itertools
from typing import Any

import pytest

from distclip.statistics import collectives
from distclip.testing.cases import MATRIX_LAYOUTS, POLICIES, ROUNDINGS
from distclip.tools.verify.cells import build, faults_of
from tests.helpers.shares import WHOLE, share

__all__ = ["MATRIX_LAYOUTS", "POLICIES", "ROUNDINGS", "build", "check"]


def check(
    configuration: Any, layout: str, kind: str, *, roundings: int = 1, seed: int = 0, **options: Any
) -> None:
    """One policy on one sharding, as ``distclip verify`` looks at it."""
    faults = faults_of(configuration, layout, kind, roundings, seed, **options)
    assert not faults, "\n".join(faults)


def check_all(some: dict[str, Any], layout: str, kind: str, seed: int = 0) -> None:
    assert some
    for label, configuration in some.items():
        try:
            check(configuration, layout, kind, roundings=ROUNDINGS.get(label, 1), seed=seed)
        except Exception as error:
            raise AssertionError(f"policy {label!r}: {error}") from error


NUMBERS = {layout: number for number, layout in enumerate(MATRIX_LAYOUTS)}
KINDS = ["bfloat16", "float16", "mixed"]


@pytest.mark.ranks(1, 2, 3, 4)
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_every_policy(layout: str, world_size: int) -> None:
    """Under each layout on two numbers of ranks, and on each number under half of the layouts."""
    check_all(share(POLICIES, NUMBERS[layout], world_size, of=2), layout, "float32")


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "mixed"])
def test_every_policy_by_an_all_reduce(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """As with many ranks and on accelerators; a few gloo ranks gather instead."""
    monkeypatch.setattr(collectives, "FEW_RANKS", 0)
    check_all(POLICIES, layout, "float32")


@pytest.mark.ranks(2)  # one rank: `distclip verify`, nightly, and the goldens of each policy
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_every_dtype(layout: str, kind: str) -> None:
    """Each policy under each layout in one of the kinds."""
    check_all(share(POLICIES, NUMBERS[layout], KINDS.index(kind), of=3), layout, kind, seed=1)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_all_dtypes_together_on_four_ranks(layout: str) -> None:
    check_all(share(POLICIES, NUMBERS[layout], of=3), layout, "mixed", seed=1)


def test_the_cases_together_meet_every_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WHOLE, raising=False)
    for number in range(len(MATRIX_LAYOUTS)):
        kinds = [share(POLICIES, number, kind, of=3) for kind in range(3)]
        assert sorted(itertools.chain(*kinds)) == sorted(POLICIES)
        for low in (1, 2, 3):
            ranks = [share(POLICIES, number, low + more, of=2) for more in range(2)]
            assert sorted(itertools.chain(*ranks)) == sorted(POLICIES)
    monkeypatch.setenv(WHOLE, "1")
    assert share(POLICIES, 1, 2, of=3) == POLICIES
