"""`distclip bench`: what is measured is what its tables say."""

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import profiling, targets
from distclip import GradClipper, policies
from distclip.cli.app import app
from distclip.kernels.changing import scale_units_
from distclip.tools.bench import cases as bench_cases
from distclip.tools.bench import peers as bench_peers
from distclip.tools.bench import record as bench_record
from distclip.tools.bench import ways as bench_ways
from distclip.tools.bench.cases import CASES, GROUPS
from distclip.tools.bench.models import SMALL, exact_norm, fsdp2
from distclip.tools.bench.record import CaseRecord, Record, WayRecord
from distclip.tools.bench.timing import Bench, drawn, extra_bytes, time_ways
from distclip.tools.bench.ways import NORM_ERROR, OURS, READ, REDUCE, TIGHT, TORCH
from tests.helpers.ranks import everyones

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
    done = command("small-clipped", "fsdp1-small", "--rounds", "3", "--output", str(kept),
                   "--picture", str(picture))  # fmt: skip
    assert done.exit_code == 0, done.output
    record = bench_record.read_record(kept)
    assert set(record.cases) == {"small-clipped", "fsdp1-small"}
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
    for row in bench_record.case_rows(case):
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
    time_ways(bench_ways.bench_of(made, ways, clipping=True), 5, 60.0)
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
    taken = time_ways(bench, 20, 60.0)
    assert now[8:88] == [name for order in taken.orders for name in order]
    assert all(sorted(order) == names for order in taken.orders)
    assert len({tuple(order) for order in taken.orders}) > 5
    gathered = everyones(taken.orders)
    assert gathered[0] == gathered[1]
    assert drawn(names, 3) == drawn(names, 3)


@pytest.mark.ranks(2)
def test_a_budget_ends_all_ranks_after_the_same_round() -> None:
    import time

    slow = 0.2 if torch.distributed.get_rank() == 1 else 0.0
    taken = time_ways(Bench({"a": lambda: time.sleep(slow)}), 1000, 1.0)
    counts = everyones(len(taken.wall["a"]))
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

    found = bench_ways.bench_of(parameters(), {}, clipping=False, optional={"peer": absent})
    assert found.missing == {"peer": "not measured: No module named 'peer'"}
    case = CaseRecord(
        "title", READ, 4, {"peer": "not measured"}, {READ: WayRecord([1.0], [1.0], 0)}
    )
    Record(bench_record.machine(), 1, {"small": case}).write(tmp_path / "run.json")
    assert bench_record.read_record(tmp_path / "run.json").cases["small"] == case
    shown = command("--from", str(tmp_path / "run.json"))
    assert "not measured" in shown.output


def case_of(peer: str, extra: int = 0, **ways: float) -> CaseRecord:
    """Three rounds in which each way, by the name of its constant, takes the same time."""
    found = {getattr(bench_ways, name): WayRecord([spent] * 3, [1.0] * 3, extra)
             for name, spent in ways.items()}  # fmt: skip
    return CaseRecord("title", peer, 0, {}, found)


Judge = Callable[..., tuple[int, dict[str, str]]]


@pytest.fixture
def judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Judge:
    """Exit code of the judgement of a record of these cases, and what is printed of each target."""
    path = tmp_path / "run.json"

    def judge(**cases: CaseRecord) -> tuple[int, dict[str, str]]:
        Record({}, 2, {name.replace("_", "-"): case for name, case in cases.items()}).write(path)
        code = targets.main([str(path)])
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].endswith(" not measured")
        return code, {line.split(maxsplit=4)[-1]: line for line in lines[:-1]}

    return judge


def test_targets_are_judged(judged: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_lines", lambda: 0)
    ours = {OURS: WayRecord([1.0] * 3, [1.0] * 3, 2**20)}
    good = CaseRecord("small", TORCH, 0, {}, {TORCH: WayRecord([8.0, 10.0, 12.0], [1.0] * 3, 0),
                                              **ours})  # fmt: skip
    code, told = judged(small=good)
    assert code == 0
    assert told["small: times torch"].startswith("reached          10.00 >= 6")
    assert told[f"small: {OURS}, times {TORCH}"].startswith("reached          10.00 >= 1")
    assert sum(not line.startswith("not measured") for line in told.values()) == 4

    slow = case_of(TORCH, 2**20 + 1, TORCH=2.0, OURS=2.5)
    code, told = judged(small=slow)
    assert code == 1
    assert [line.split()[0] for what, line in told.items() if what.startswith("small:")] == [
        "MISSED", "MISSED", "MISSED",
    ]  # fmt: skip


def test_floors_are_added_up_round_by_round(judged: Judge) -> None:
    _, told = judged(
        large=case_of(TORCH, OURS=3.3, READ=2.0, REDUCE=1.0),
        large_clipped=case_of(TORCH, OURS=3.3, READ_MULTIPLY=3.0),
        agc_plain_many=case_of(READ, OUR_AGC=7.0, OURS=2.0, READ_WEIGHTS=3.0),
    )
    assert told["large: of one read + one all-reduce"].split()[:2] == ["reached", "1.10"]
    assert told["large-clipped: of one read + one multiply"].split()[:2] == ["reached", "1.10"]
    of_two = told["agc-plain-many: row AGC, of 2 global_norm + one read of the weights"]
    assert of_two.split()[:2] == ["reached", "1.00"]


def test_threads_are_held_against_what_a_sum_gains(judged: Judge) -> None:
    def case(ours: float) -> CaseRecord:
        spent = {(READ, 1): 4.0, (READ, 2): 2.0, (OURS, 1): 4.0, (OURS, 2): ours,
                 (TORCH, 1): 8.0, (TORCH, 2): 3.0}  # fmt: skip
        ways = {
            bench_ways.on_threads(way, threads): WayRecord([ms] * 3, [1.0] * 3, 0)
            for (way, threads), ms in spent.items()
        }
        return CaseRecord("title", bench_ways.on_threads(READ, 1), 0, {}, ways, ranks=1)

    _, told = judged(threads_large=case(2.5), threads_small=case(4.0))
    large = told["threads-large: GradClipper, gain of two threads, of that of sum()"]
    assert large.split()[:2] == ["MISSED", "0.80"]
    small = told["threads-small: GradClipper, gain of two threads"]
    assert small.split()[:2] == ["reached", "1.00"]
    two = f"threads-large: {OURS}, 2 threads, times {TORCH}, 2 threads"
    assert told[two].split()[:2] == ["reached", "1.20"]


def test_a_way_is_held_against_the_fastest_peer_that_does_the_same(judged: Judge) -> None:
    spent = {"timm's formula": 9.0, "Composer's formula": 4.0, bench_ways.OUR_AGC: 5.0, OURS: 20.0}
    ways = {name: WayRecord([ms] * 3, [1.0] * 3, 0) for name, ms in spent.items()}
    own = {name: WayRecord([ms] * 3, [1.0] * 3, 0)
           for name, ms in (("DeepSpeed's own clipping", 1.0), ("distclip agc", 2.0))}  # fmt: skip
    _, told = judged(
        agc_plain_small=CaseRecord("title", "timm's formula", 0, {}, ways),
        zero_1=CaseRecord("title", "DeepSpeed's own clipping", 0, {}, own),
    )
    line = told[f"agc-plain-small: {bench_ways.OUR_AGC}, times Composer's formula"]
    assert line.split()[:2] == ["MISSED", "0.80"]
    assert not [what for what in told if what.startswith((f"agc-plain-small: {OURS}", "zero-1"))]


def test_the_norms_error_is_judged_where_gradients_are_fp32(judged: Judge) -> None:
    def case(error: float) -> CaseRecord:
        ways = {OURS: WayRecord([1.0], [1.0], 0)}
        return CaseRecord("title", TORCH, 0, {}, ways, numbers={NORM_ERROR: error})

    what = "fp32 gradients: relative error of the norm"
    _, told = judged(small=case(1e-10), plain_bf16=case(1e-3))
    assert told[what].split()[:2] == ["reached", "1e-10"]
    _, told = judged(small=case(1e-10), large=case(1e-8))
    assert told[what].split()[:2] == ["MISSED", "1e-08"]


@pytest.mark.ranks(2)
def test_the_norms_error_is_measured_in_float64() -> None:
    for made in (fsdp2(SMALL).parameters, parameters()):
        assert bench_ways.norm_error(made) < 1e-12
        with pytest.MonkeyPatch.context() as patch:  # a difference in the ninth digit is seen
            exact = exact_norm(made)
            patch.setattr(bench_ways, "exact_norm", lambda _, exact=exact: exact * (1 + 2e-9))
            assert bench_ways.norm_error(made) > 1e-9


def test_rows_are_taken_round_by_round() -> None:
    ways = {"peer": WayRecord([10.0, 30.0, 20.0], [4.0, 4.0, 4.0], 0),
            "way": WayRecord([5.0, 10.0, 20.0], [1.0, 2.0, 8.0], 7)}  # fmt: skip
    peer, way = bench_record.case_rows(CaseRecord("title", "peer", 0, {}, ways))
    assert (peer.ratio, way.ratio, way.cpu_ratio, way.extra_bytes) == (1.0, 2.0, 2.0, 7)
    (alone,) = bench_record.case_rows(CaseRecord("title", "absent", 0, {}, {"way": ways["way"]}))
    assert math.isnan(alone.ratio)


RUN = (
    "small-clipped", "agc-small", "agc-fsdp1", "fsdp1-small", "fsdp1-views-clipped", "ddp-small",
    "plain-small-clipped", "agc-plain-small-clipped", "agc-plain-many", "policies",
    "function-value-fsdp2-small", "function-total-fsdp2-small", "function-norms-plain-small",
    "threads-small",
)  # fmt: skip
"""One case of every kind, the small one."""


@pytest.mark.ranks(2, timeout=120)
@pytest.mark.parametrize("name", RUN)
def test_a_case_runs(name: str) -> None:
    bench = CASES[name].build()
    assert CASES[name].peer in bench.ways
    assert any(map(bench_record.is_ours, bench.ways))
    assert not all(map(bench_record.is_ours, bench.ways))
    for way in bench.ways.values():
        bench.before()
        getattr(way, "before", lambda: None)()
        way()


@pytest.mark.ranks(2)
def test_half_precision_is_held_against_norms_in_float32() -> None:
    build = functools.partial(fsdp2, SMALL, torch.bfloat16)
    bench = bench_ways.clip_norm(build, TIGHT, rows=True)
    exact = exact_norm(build().parameters)
    bench.before()
    norms: Any = bench.ways[bench_ways.TORCH_ROWS]()
    squares = sum(float(norm) ** 2 for norm in norms)
    total = torch.tensor(squares, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    assert float(total) ** 0.5 == pytest.approx(exact, rel=1e-5)


def test_every_layout_and_dtype_is_a_case() -> None:
    for group in ("plain", "ddp", "fsdp1", "fsdp2"):
        names = GROUPS[group]
        for kind in ("small", "large", "bf16", "fp16"):
            prefix = "" if group == "fsdp2" else f"{group}-"
            assert {f"{prefix}{kind}", f"{prefix}{kind}-clipped"} <= set(names)
    assert {"threads", "zero", "agc", "function", "count"} <= set(GROUPS)


@pytest.mark.ranks(2)
def test_gradients_that_nothing_clips_count_as_changed_before_every_way() -> None:
    for name in ("small", "plain-small"):
        bench = CASES[name].build()
        owner: GradClipper = bench.ways[OURS].__self__  # type: ignore[attr-defined]
        bench.ways[OURS]()
        assert owner._session._last.is_repeated()
        bench.before()
        assert not owner._session._last.is_repeated()


@pytest.mark.ranks(2)
def test_a_profile_names_the_functions_of_a_step() -> None:
    plain, profiled, lines = profiling.take("small", OURS, 3)
    assert plain > 0.0
    assert profiled > 0.0
    assert sum("distclip/clipper.py" in where for where, *_ in lines) > 2
    alone = sum(own for _, _, own, _ in lines)
    assert alone / 1e3 < 3 * profiled + 50.0  # of one step, not of all


@pytest.mark.parametrize("clipped", [10, 2000, 4096])
def test_rows_are_scaled_without_a_large_copy(clipped: int) -> None:
    rows = torch.ones(4096, 1024)  # 16 MiB
    coefficients = torch.ones(4096, dtype=torch.float64)
    coefficients[:clipped] = 0.5
    assert extra_bytes(lambda: scale_units_([rows], coefficients, [(0,)], [4096])) < 1 << 20
    assert torch.equal(rows, coefficients.float()[:, None].expand_as(rows))
