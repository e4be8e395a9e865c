"""One row of a reliability table, and the record that a campaign leaves."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent.parent / "results" / "reliability"


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of fault, or one kind of input.

    Attributes:
        fault: what goes wrong, or what is fed in, in a few words.
        how: how it is injected: enough for a reader to do the same.
        times: how often.
        outcome: what came of it; the worst case where the cases differ.
        failures: how many of ``times`` did not end as promised.
    """

    fault: str
    how: str
    times: int
    outcome: str
    failures: int = 0


def record(campaign: str, rows: Sequence[Row], *, seed: int, seconds: float) -> dict[str, Any]:
    """A campaign's document, with where and when it was run."""
    return {
        "campaign": campaign,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seed": seed,
        "seconds": round(seconds),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def save(document: dict[str, Any]) -> Path:
    """Write a document to where :func:`load_all` finds it; the newest run of a campaign counts."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{document['campaign']}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def load_all() -> dict[str, dict[str, Any]]:
    """Campaign -> its recorded document."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def table(document: dict[str, Any]) -> str:
    """The document as a Markdown table, with its caption."""
    lines = [
        "| fault or input | how it is injected | times | outcome |",
        "|---|---|---|---|",
        *(
            f"| {row['fault']} | {row['how']} | {row['times']:,} | {row['outcome']}"
            f"{' (' + format(row['failures'], ',') + ' failed)' if row['failures'] else ''} |"
            for row in document["rows"]
        ),
        "",
        f"Recorded {document['date']} on {document['machine']}, torch "
        f"{document['versions']['torch']}, seed {document['seed']}, {document['seconds']:,} s: "
        f"`python -m benchmarks.reliability {document['campaign']}`.",
    ]
    return "\n".join(lines)
