"""Two cases of the campaign that docs/reliability.md records, and that it can fail."""

from pathlib import Path

import pytest

from benchmarks.reliability import ranks


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[int, object]]:
    return ranks.through(tmp_path_factory.mktemp("campaign") / "through")


@pytest.mark.parametrize(("fault", "when"), [("SIGKILL", "during"), ("sys.exit", "after")])
def test_a_rank_that_leaves(
    tmp_path: Path, wanted: dict[int, dict[int, object]], fault: str, when: str
) -> None:
    outcome = ranks.inject(tmp_path / "run", wanted, "pool", fault, when, 1, 2)
    assert not outcome.failed, outcome
    assert sorted(ranks.logged(tmp_path / "run")[0]) == list(range(6))
    # A resumed run that decides otherwise in one bit would be seen.
    other = {rank: dict(steps) for rank, steps in wanted.items()}
    other[0][5] = {**dict(other[0][5]), "clip": "0"}  # type: ignore[call-overload]
    assert ranks.logged(tmp_path / "run") not in (other, {})
