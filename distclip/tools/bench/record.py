"""What ``distclip bench`` keeps of a run: every round of every way, and where it was measured."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from distclip._version import __version__
from distclip.common.foreign import in_one_line, read_text
from distclip.errors import DistclipError
from distclip.tools.bench.timing import Taken

FORMAT = 2
MOST_BYTES = 2**26
"""Largest file of a recorded run that is read, in bytes."""
PEERS = (
    "torch", "Accelerate", "FSDP1", "timm", "Composer", "DeepSpeed", "one ", "no clipping",
    "step + one read", "step alone", "step that divides",
)  # fmt: skip
"""How the ways begin that are not distclip's."""


@dataclass(frozen=True)
class WayRecord:
    """The timings of one way in one run.

    Attributes:
        wall_ms: of each round, the slowest rank's time.
        cpu_ms: of each round, the mean over ranks of what their threads computed.
        extra_bytes: of the rank that held most beyond what it held before.
    """

    wall_ms: list[float]
    cpu_ms: list[float]
    extra_bytes: int


@dataclass(frozen=True)
class CaseRecord:
    """The results of one case in one run.

    Attributes:
        title: of its table.
        peer: the way that ratios are against.
        gradient_bytes: of the rank that has most.
        missing: name of a peer that was not measured -> why.
        ways: name -> what was measured.
        ranks: how many, where that is not the run's number.
        numbers: what was found out beside times.
    """

    title: str
    peer: str
    gradient_bytes: int
    missing: dict[str, str]
    ways: dict[str, WayRecord]
    ranks: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def allowed_bytes(self) -> float:
        """What a step may hold beside the gradients: 1 MiB and a thousandth of them."""
        return 2**20 + 1e-3 * self.gradient_bytes


@dataclass(frozen=True)
class Record:
    """A whole run of the benchmark."""

    machine: dict[str, str]
    ranks: int
    cases: dict[str, CaseRecord]

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"format": FORMAT, **asdict(self)}
        cases = [
            f"{json.dumps(name)}: {json.dumps(case)}"  # a line each
            for name, case in document.pop("cases").items()
        ]
        head = json.dumps(document, indent=1).removesuffix("\n}")
        text = head + ',\n "cases": {\n  ' + ",\n  ".join(cases) + "\n }\n}\n"
        path.write_text(text, encoding="utf-8")


def read_record(path: Path) -> Record:
    """Read a recorded run.

    Raises:
        DistclipError: the file is not there, or not one that this version wrote.
    """
    try:
        document = json.loads(read_text(path, MOST_BYTES))
    except (FileNotFoundError, ValueError, RecursionError) as error:
        raise DistclipError(
            f"bench: {in_one_line(path)} cannot be read as JSON: {in_one_line(error, 300)}"
        ) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DistclipError(
            f"bench: {in_one_line(path)} was not written by this version of "
            "`distclip bench --output`; measure again, or read it as the text that it is"
        )
    try:
        cases = {
            name: CaseRecord(
                **{**case, "ways": {n: WayRecord(**w) for n, w in case["ways"].items()}}
            )
            for name, case in document["cases"].items()
        }
        return Record(document["machine"], document["ranks"], cases)
    except (KeyError, TypeError, AttributeError) as error:
        raise DistclipError(
            f"bench: {in_one_line(path)} has been changed by hand, or is torn: "
            f"{type(error).__name__}: {in_one_line(error, 300)}"
        ) from None


def combined_ranks(
    title: str, peer: str, ranks: Sequence[Taken], own_ranks: int | None = None
) -> CaseRecord:
    """One case as all ranks saw it; ``own_ranks``: see :class:`CaseRecord`."""
    first = ranks[0]
    ways = {
        name: WayRecord(
            _rounded(max, [rank.wall[name] for rank in ranks]),
            _rounded(statistics.fmean, [rank.cpu[name] for rank in ranks]),
            max(rank.extra[name] for rank in ranks),
        )
        for name in first.wall
    }
    size = max(rank.gradient_bytes for rank in ranks)
    return CaseRecord(title, peer, size, first.missing, ways, own_ranks, first.numbers)


def _rounded(
    combined: Callable[[Sequence[float]], float], ranks: Sequence[Sequence[float]]
) -> list[float]:
    """Round by round over the ranks, to a tenth of a microsecond."""
    return [round(combined(times), 4) for times in zip(*ranks, strict=True)]


@dataclass(frozen=True)
class Row:
    """One row of a table: the result of one way.

    Attributes:
        name: of the way.
        median_ms: of the wall times; ``low_ms``, ``high_ms``: their quartiles.
        ratio: median over rounds of peer / way, NaN without a peer.
        cpu_ms: median of the CPU times; ``cpu_ratio``: as ``ratio``.
        extra_bytes: see :class:`WayRecord`.
    """

    name: str
    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    cpu_ms: float
    cpu_ratio: float
    extra_bytes: int


def case_rows(case: CaseRecord) -> list[Row]:
    """The rows of a case's table."""
    found = []
    for name, way in case.ways.items():
        low, _, high = (
            statistics.quantiles(way.wall_ms, n=4) if len(way.wall_ms) > 1 else (way.wall_ms * 3)
        )
        found.append(
            Row(
                name,
                statistics.median(way.wall_ms),
                low,
                high,
                ratio(case, case.peer, name),
                statistics.median(way.cpu_ms),
                ratio(case, case.peer, name, cpu=True),
                way.extra_bytes,
            )
        )
    return found


def is_ours(way: str) -> bool:
    """Whether distclip does it, and neither a peer nor the floor."""
    return not way.startswith(PEERS)


def ratio(case: CaseRecord, slow: str, fast: str, *, cpu: bool = False) -> float:
    """How many times faster ``fast`` is, median over rounds; NaN where one was not measured."""
    if slow not in case.ways or fast not in case.ways:
        return math.nan
    above, below = case.ways[slow], case.ways[fast]
    pairs = (
        zip(above.cpu_ms, below.cpu_ms, strict=True)
        if cpu
        else zip(above.wall_ms, below.wall_ms, strict=True)
    )
    return statistics.median(a / b if b else math.nan for a, b in pairs)


def machine() -> dict[str, str]:
    """Where and when this is measured, and what else the machine was doing."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "load before": _load(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "distclip": __version__,
    }


def with_load(found: Mapping[str, str]) -> dict[str, str]:
    """The machine, and its load now that all is measured."""
    return {**found, "load after": _load()}


def _load() -> str:
    """Processes that wanted a core over the last minute, those of the run itself included."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
