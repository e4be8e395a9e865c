"""Judge a kept run of ``distclip bench`` by what this project has set out to reach.

    distclip bench --output run.json
    python -m benchmarks.targets run.json

Ratios are medians over the rounds of one run. A target whose case is not in the file is said to be
not measured. The exit code is 1 if any is missed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distclip import policies
from distclip.tools.bench import cases
from distclip.tools.bench.record import Record, is_ours, ratio, read

AGC, DREAMER = (repr(policy(cases.LOOSE)) for policy in (policies.agc, policies.dreamer_agc))
FOLDED = "step + distclip, folded"


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

    def faster(name: str, peer: str, way: str = cases.OURS) -> float:
        case = record.cases.get(name)
        return math.nan if case is None else ratio(case, peer, way)

    def slower(name: str, floor: str, way: str = cases.OURS) -> float:
        """How many times the floor a way takes, round by round."""
        return faster(name, way, floor)

    found = [
        Target("small, not clipping: times torch (first goal)",
               faster("small", cases.TORCH), 3.0, True),
        Target("small, not clipping: times torch", faster("small", cases.TORCH), 6.0, True),
        Target("small, clipping: times torch", faster("small-clipped", cases.TORCH), 4.0, True),
        Target("large, not clipping: times torch", faster("large", cases.TORCH), 2.5, True),
        Target("large, clipping: times torch", faster("large-clipped", cases.TORCH), 1.5, True),
        Target("large, not clipping: of one read + one all-reduce", _of_floor(record), 1.25, False),
        Target("row AGC on large: of one read", slower("agc-large", cases.READ, AGC), 2.4, False),
        Target("dreamer_agc on large: of one read",
               slower("agc-large", cases.READ, DREAMER), 2.4, False),
        Target("bf16: times torch vector_norm(dtype=float32)",
               faster("bf16", cases.TORCH_ROWS), 3.0, True),
        Target("bf16, one large tensor: times torch vector_norm(dtype=float32)",
               faster("bf16-embedding", cases.TORCH_ROWS), 3.0, True),
        Target("20,000 parameters: of 1,000", _growth(record), 25.0, False),
        Target("folded step: of the step + one read",
               slower("fold", cases.FOLD_PEER, FOLDED), 1.1, False),
    ]  # fmt: skip
    return [*found, *_memory(record)]


def _of_floor(record: Record) -> float:
    case = record.cases.get("large")
    if case is None:
        return math.nan
    ours, read_, reduce_ = (case.ways[w].wall_ms for w in (cases.OURS, cases.READ, cases.REDUCE))
    return statistics.median(a / (b + c) for a, b, c in zip(ours, read_, reduce_, strict=True))


def _growth(record: Record) -> float:
    medians = [
        statistics.median(record.cases[name].ways[cases.OURS].wall_ms)
        for name in ("count-20000", "count-1000")
        if name in record.cases
    ]
    return medians[0] / medians[1] if len(medians) == 2 else math.nan


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
    record = read(parser.parse_args(arguments).file)
    judged = targets(record)
    for target in judged:
        sign = ">=" if target.at_least else "<="
        print(f"{target.verdict:12s}  {target.value:8.2f} {sign} {target.bound:<5g} {target.what}")
    return int(any(target.verdict == "MISSED" for target in judged))


if __name__ == "__main__":
    raise SystemExit(main())
