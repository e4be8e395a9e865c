"""`distclip bench`: what is measured is what its tables say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import targets
from distclip import GradClipper, policies
from distclip.cli.app import app
from distclip.kernels.changing import scale_units_
from distclip.tools.bench import cases as bench_cases
from distclip.tools.bench import peers as bench_peers
from distclip.tools.bench import record as bench_record
from distclip.tools.bench.cases import CASES, OURS, READ, REDUCE, TIGHT, TORCH
from distclip.tools.bench.record import CaseRecord, Record, WayRecord
from distclip.tools.bench.timing import Bench, drawn, extra_bytes, measure

pytestmark = pytest.mark.filterwarnings("ignore")


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def parameters(count: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.randn(64, 64)
    return list(made)


def test_a_run_is_shown_kept_and_drawn(tmp_path: Path) -> None:
    kept, picture = tmp_path / "run.json", tmp_path / "new" / "run.png"
    done = command("small-clipped", "count-1000", "--rounds", "3", "--output", str(kept),
                   "--picture", str(picture))  # fmt: skip
    assert done.exit_code == 0, done.output
    record = bench_record.read(kept)
    assert set(record.cases) == {"small-clipped", "count-1000"}
    assert record.ranks == 2
    assert {"date", "processor", "load before", "load after", "torch"} <= set(record.machine)
    case = record.cases["small-clipped"]
    assert {TORCH, OURS, READ, REDUCE, "torchtitan's algorithm"} <= set(case.ways)
    for way in case.ways.values():
        assert len(way.wall_ms) == len(way.cpu_ms) == 3
        assert min(way.wall_ms) > 0.0
    assert case.gradient_bytes == pytest.approx(4 * 1.2e6 / 2, rel=0.05)  # half on each rank
    assert picture.read_bytes().startswith(b"\x89PNG")

    shown = command("--from", str(kept))
    assert shown.exit_code == 0, shown.output
    for row in bench_record.rows(case):
        assert f"{row.median_ms:.2f}" in shown.output
        assert f"{row.ratio:.2f}" in shown.output
    assert "load before" in shown.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smal"], "no case 'smal'; there are small, "),
        (["small", "--from", "x.json"], "give it no cases"),
        (["--from", "x.json", "--output", "y.json"], "no --output"),
        (["--from", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(arguments: list[str], message: str) -> None:
    done = command(*arguments)
    assert done.exit_code != 0
    told = done.output + str(done.exception)
    assert message in " ".join(told.split())


def test_no_measuring_for_a_picture_that_cannot_be_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench_cases, "run_case", None)
    done = command("small", "--picture", str(tmp_path / "run.png"))
    assert done.exit_code != 0
    assert "need matplotlib" in " ".join((done.output + str(done.exception)).split())


def test_a_file_of_an_older_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"machine": {}, "ranks": 2, "cases": {}}))
    done = command("--from", str(tmp_path / "old.json"))
    assert done.exit_code != 0
    assert "not written by this version" in " ".join((done.output + str(done.exception)).split())


def coefficients_seen() -> list[float]:
    """Of a clipper that is a way in a case whose other ways clip the same gradients."""
    made = parameters()
    clipper = GradClipper(made, policies.global_norm(TIGHT))
    seen: list[float] = []

    def clip() -> None:
        seen.append(float(clipper.clip_().coefficient))

    ways = {OURS: clip, TORCH: bench_peers.torch_clip(made, TIGHT)}
    measure(bench_cases.bench_of(made, ways, clipping=True), 5, 60.0)
    return seen


@pytest.mark.ranks(2)
def test_every_round_clips() -> None:
    seen = coefficients_seen()
    assert len(seen) == 2 + 5 + 1  # warm, measured, and for the memory
    assert len(set(seen)) == 1
    assert seen[0] < 1e-3


@pytest.mark.ranks(2)
def test_all_ranks_take_the_ways_in_the_same_drawn_order() -> None:
    names = ["a", "b", "c", "d"]
    now: list[str] = []
    bench = Bench({name: lambda name=name: now.append(name) for name in names})
    taken = measure(bench, 20, 60.0)
    assert now[8:88] == [name for order in taken.orders for name in order]
    assert all(sorted(order) == names for order in taken.orders)
    assert len({tuple(order) for order in taken.orders}) > 5
    gathered: list[Any] = [None, None]
    torch.distributed.all_gather_object(gathered, taken.orders)
    assert gathered[0] == gathered[1]
    assert drawn(names, 3) == drawn(names, 3)


@pytest.mark.ranks(2)
def test_a_budget_ends_all_ranks_after_the_same_round() -> None:
    import time

    slow = 0.2 if torch.distributed.get_rank() == 1 else 0.0
    taken = measure(Bench({"a": lambda: time.sleep(slow)}), 1000, 1.0)
    counts: list[Any] = [None, None]
    torch.distributed.all_gather_object(counts, len(taken.wall["a"]))
    assert counts[0] == counts[1]
    assert 3 <= counts[0] < 20


def test_memory_counts_what_is_held_at_once() -> None:
    kept = torch.ones(1 << 20)  # not allocated in the round

    def one_after_another() -> None:
        for _ in range(5):
            torch.ones(1 << 18)

    def together() -> None:
        held = [torch.ones(1 << 18) for _ in range(5)]
        del held

    mib = 1 << 20
    assert extra_bytes(lambda: kept.add_(1)) < mib / 10
    assert mib <= extra_bytes(one_after_another) < 1.2 * mib
    assert 5 * mib <= extra_bytes(together) < 5.2 * mib
    # Inside an operation too, and in numpy.
    assert extra_bytes(lambda: torch.linalg.vector_norm(kept * 2)) >= 4 * mib
    assert extra_bytes(lambda: kept.numpy() * 2) >= 4 * mib


def test_agc_of_the_peers_is_the_formula() -> None:
    want = parameters()
    GradClipper(want, policies.agc(0.01)).clip_()
    for formula in (bench_peers.agc_where, bench_peers.agc_coefficient):
        have = parameters()
        formula(have, 0.01)()
        for p, q in zip(have, want, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, q.grad)


def test_a_peer_that_is_not_there_is_named(tmp_path: Path) -> None:
    def absent() -> Any:
        raise ImportError("No module named 'peer'")

    found = bench_cases.bench_of(parameters(), {}, clipping=False, optional={"peer": absent})
    assert found.missing == {"peer": "not measured: No module named 'peer'"}
    case = CaseRecord(
        "title", READ, 4, {"peer": "not measured"}, {READ: WayRecord([1.0], [1.0], 0)}
    )
    Record(bench_record.machine(), 1, {"small": case}).write(tmp_path / "run.json")
    assert bench_record.read(tmp_path / "run.json").cases["small"] == case
    shown = command("--from", str(tmp_path / "run.json"))
    assert "not measured" in shown.output


def written(path: Path, ours: float, extra: int) -> Path:
    ways = {TORCH: WayRecord([8.0, 10.0, 12.0], [1.0] * 3, 0),
            OURS: WayRecord([ours] * 3, [1.0] * 3, extra)}  # fmt: skip
    case = CaseRecord("small", TORCH, 0, {}, ways)
    Record({}, 2, {"small": case}).write(path)
    return path


def test_targets_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert targets.main([str(written(tmp_path / "good.json", 1.0, 2**20))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("reached          10.00 >= 6")
    assert sum(line.startswith("not measured") for line in lines) == len(lines) - 3
    assert targets.main([str(written(tmp_path / "slow.json", 2.5, 2**20 + 1))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "small" in line] == [
        "reached", "MISSED", "not", "MISSED",
    ]  # fmt: skip


def test_rows_are_taken_round_by_round() -> None:
    ways = {"peer": WayRecord([10.0, 30.0, 20.0], [4.0, 4.0, 4.0], 0),
            "way": WayRecord([5.0, 10.0, 20.0], [1.0, 2.0, 8.0], 7)}  # fmt: skip
    peer, way = bench_record.rows(CaseRecord("title", "peer", 0, {}, ways))
    assert (peer.ratio, way.ratio, way.cpu_ratio, way.extra_bytes) == (1.0, 2.0, 2.0, 7)
    (alone,) = bench_record.rows(CaseRecord("title", "absent", 0, {}, {"way": ways["way"]}))
    assert math.isnan(alone.ratio)


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.parametrize(
    "name", ["bf16", "agc-small", "fsdp1", "policies", "agc-plain", "plain-small"]
)
def test_a_case_runs(name: str) -> None:
    bench = CASES[name].build()
    assert CASES[name].peer in bench.ways
    assert any(map(bench_record.is_ours, bench.ways))
    assert not all(map(bench_record.is_ours, bench.ways))
    for way in bench.ways.values():
        bench.before()
        way()


@pytest.mark.parametrize("clipped", [10, 2000, 4096])
def test_rows_are_scaled_without_a_large_copy(clipped: int) -> None:
    rows = torch.ones(4096, 1024)  # 16 MiB
    coefficients = torch.ones(4096, dtype=torch.float64)
    coefficients[:clipped] = 0.5
    assert extra_bytes(lambda: scale_units_([rows], [coefficients], [(0,)])) < 1 << 20
    assert torch.equal(rows, coefficients.float()[:, None].expand_as(rows))
