"""Judge a kept run of ``distclip bench`` by what this project has set out to reach.

    distclip bench --output run.json
    python -m benchmarks.targets run.json

Ratios are medians over the rounds of one run. A target whose case is not in the file is not
measured. The exit code is 1 if any is missed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distclip import policies
from distclip.tools.bench import ways
from distclip.tools.bench.record import CaseRecord, Record, is_ours, ratio, read_record

ROOT = Path(__file__).resolve().parent.parent
AGC, DREAMER, PARAMETER = (
    repr(policy(ways.LOOSE))
    for policy in (policies.agc, policies.dreamer_agc, policies.parameter_norm)
)
FOLDED = "step + distclip, folded"
PEERS = (
    "torch clip_", "torch get_total_norm", "torch _foreach_norm", "torchtitan", "Accelerate",
    "FSDP1", "DeepSpeed's own", "timm", "Composer",
)  # fmt: skip
"""How the ways begin that distclip takes the place of."""
WITHOUT_PEER = {"zero": ("distclip agc",), "agc-plain": (ways.OURS,)}
"""How a case's name begins -> ways that do what no peer in it does."""
LINES_BEFORE = 3696
"""Of statistics/ and kernels/ at d4783b8, before host gradients were measured by compiled loops."""


@dataclass(frozen=True)
class Target:
    """``bound`` is the least (``at_least``) or the most that ``value`` may be."""

    what: str
    value: float
    bound: float
    at_least: bool

    @property
    def verdict(self) -> str:
        if math.isnan(self.value):
            return "not measured"
        reached = self.value >= self.bound if self.at_least else self.value <= self.bound
        return "reached" if reached else "MISSED"


def targets(record: Record) -> list[Target]:
    """All of them, NaN for what the record lacks."""
    return [
        *_times_torch(record),
        *_floors(record),
        *_adaptive(record),
        *_threads(record),
        *_precision(record),
        Target("20,000 parameters: of 1,000", _growth(record), 25.0, False),
        Target("lines of statistics/ and kernels/, less than before",
               LINES_BEFORE - _lines(), 800, True),
        *_not_slower(record),
        *_memory(record),
    ]  # fmt: skip


def _faster(record: Record, name: str, peer: str = ways.TORCH, way: str = ways.OURS) -> float:
    """How many times faster a way is, round by round."""
    case = record.cases.get(name)
    return math.nan if case is None else ratio(case, peer, way)


def _slower(record: Record, name: str, floor: str, way: str = ways.OURS) -> float:
    """How many times the floor a way takes, round by round."""
    return _faster(record, name, way, floor)


def _of_sum(record: Record, name: str, way: str, *parts: tuple[float, str]) -> float:
    """How many times the sum of other ways, each so many times, a way takes, round by round."""
    case = record.cases.get(name)
    if case is None or not {way, *(part for _, part in parts)} <= set(case.ways):
        return math.nan
    floors = [[count * spent for spent in case.ways[part].wall_ms] for count, part in parts]
    return statistics.median(
        spent / sum(floor)
        for spent, floor in zip(case.ways[way].wall_ms, zip(*floors, strict=True), strict=True)
    )


def _times_torch(record: Record) -> Iterator[Target]:
    for name, ours, drop_in in (("plain-small", 3.0, 2.0), ("plain-many", 3.0, 2.0),
                                ("plain-bf16", 2.0, None), ("plain-fp16", 2.0, None),
                                ("bf16", 2.0, None), ("fp16", 2.0, None),
                                ("small", 6.0, None), ("small-clipped", 5.0, None),
                                ("large", 2.5, None)):  # fmt: skip
        yield Target(f"{name}: times torch", _faster(record, name), ours, True)
        if drop_in is not None:
            value = _faster(record, name, way=ways.DROP_IN)
            yield Target(f"{name}: drop-in, times torch", value, drop_in, True)


def _floors(record: Record) -> Iterator[Target]:
    yield Target("large: of one read + one all-reduce",
                 _of_sum(record, "large", ways.OURS, (1, ways.READ), (1, ways.REDUCE)),
                 1.15, False)  # fmt: skip
    yield Target("large-clipped: of one read + one multiply",
                 _slower(record, "large-clipped", ways.READ_MULTIPLY), 1.1, False)  # fmt: skip
    for name in ("plain-bf16", "plain-fp16"):
        yield Target(f"{name}: of one read", _slower(record, name, ways.READ), 1.6, False)
    yield Target("folded step: of the step + one read",
                 _slower(record, "fold", ways.FOLD_PEER, FOLDED), 1.1, False)  # fmt: skip


def _adaptive(record: Record) -> Iterator[Target]:
    for told, way in (("row AGC", AGC), ("dreamer_agc", DREAMER), ("parameter_norm", PARAMETER)):
        for name, bound in (("agc-large", 2.4), ("agc-bf16", 3.0)):
            value = _slower(record, name, ways.READ, way)
            yield Target(f"{name}: {told}, of one read", value, bound, False)
    value = _of_sum(record, "agc-plain-many", ways.OUR_AGC, (2, ways.OURS), (1, ways.READ_WEIGHTS))
    yield Target("agc-plain-many: row AGC, of 2 global_norm + one read of the weights",
                 value, 1.0, False)  # fmt: skip


def _threads(record: Record) -> Iterator[Target]:
    """Large tensors gain from a second thread as ``sum()`` does; small ones lose nothing."""
    for name in ("small", "many", "large", "bf16", "fp16"):
        case = record.cases.get(f"threads-{name}")
        sums = math.nan if case is None else _gain(case, ways.READ)
        for told, way in (("GradClipper", ways.OURS), ("drop-in", ways.DROP_IN)):
            gain = math.nan if case is None else _gain(case, way)
            if name in ("small", "many"):  # 5% is what such a ratio varies by
                yield Target(f"threads-{name}: {told}, gain of two threads", gain, 0.95, True)
            else:
                yield Target(f"threads-{name}: {told}, gain of two threads, of that of sum()",
                             gain / sums, 1.0, True)  # fmt: skip


def _gain(case: CaseRecord, way: str) -> float:
    return ratio(case, ways.on_threads(way, 1), ways.on_threads(way, 2))


def _precision(record: Record) -> Iterator[Target]:
    """The largest error over the cases whose gradients are fp32."""
    errors = [
        case.numbers[ways.NORM_ERROR]
        for name, case in record.cases.items()
        if ways.NORM_ERROR in case.numbers and not {"bf16", "fp16"} & set(name.split("-"))
    ]
    value = max(errors, default=math.nan)
    yield Target("fp32 gradients: relative error of the norm", value, 1e-9, False)


def _growth(record: Record) -> float:
    medians = [
        statistics.median(record.cases[name].ways[ways.OURS].wall_ms)
        for name in ("count-20000", "count-1000")
        if name in record.cases
    ]
    return medians[0] / medians[1] if len(medians) == 2 else math.nan


def _lines() -> int:
    """Of the checkout that this file is in, not of the run."""
    return sum(
        len(path.read_text(encoding="utf-8").splitlines())
        for room in ("statistics", "kernels")
        for path in (ROOT / "distclip" / room).rglob("*.py")
    )


def _not_slower(record: Record) -> Iterator[Target]:
    """Every way of distclip's against the fastest of the peers that it takes the place of."""
    for name, case in record.cases.items():
        alone = next((ours for kind, ours in WITHOUT_PEER.items() if name.startswith(kind)), ())
        for way in case.ways:
            threads = _threads_of(way)
            peers = [p for p in case.ways if p.startswith(PEERS) and _threads_of(p) == threads]
            if peers and is_ours(way) and way not in alone:
                compared: Callable[[str], float] = lambda peer: ratio(case, peer, way)  # noqa: B023, E731
                fastest = min(peers, key=compared)
                yield Target(f"{name}: {way}, times {fastest}", compared(fastest), 1.0, True)


def _threads_of(way: str) -> str:
    return way.rpartition(", ")[2] if " thread" in way else ""


def _memory(record: Record) -> Iterator[Target]:
    """The worst way of distclip's in each case, as a share of what is allowed."""
    for name, case in record.cases.items():
        if name.startswith(("zero", "fold")):  # a step allocates more than its clipping does
            continue
        held = {way: taken.extra_bytes for way, taken in case.ways.items() if is_ours(way)}
        worst = max(held, key=lambda way: held[way])
        what = f"{name}: extra memory of {worst}, of what is allowed"
        yield Target(what, held[worst] / case.allowed_bytes, 1.0, False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="written by `distclip bench --output`")
    record = read_record(parser.parse_args(arguments).file)
    judged = targets(record)
    for target in judged:
        sign = ">=" if target.at_least else "<="
        value = f"{target.value:8.2g}" if 0 < target.value < 0.01 else f"{target.value:8.2f}"
        print(f"{target.verdict:12s}  {value} {sign} {target.bound:<5g} {target.what}")
    counts = {verdict: sum(target.verdict == verdict for target in judged)
              for verdict in ("reached", "MISSED", "not measured")}  # fmt: skip
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(any(target.verdict == "MISSED" for target in judged))


if __name__ == "__main__":
    raise SystemExit(main())
