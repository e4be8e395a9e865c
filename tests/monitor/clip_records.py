"""Records as a ``JsonlSink`` writes them, for the tests in this folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def record(step: int, norm: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    """One step of ``global_norm(1.0)``."""
    coefficient = 1.0 if norm is None else min(1.0, 1.0 / max(norm, 1e-9))
    return {
        "step": step,
        "total_norm": norm,
        "clipped_norm": None if norm is None else norm * coefficient,
        "coefficient": coefficient,
        "threshold": 1.0,
        "skipped": False,
        "clipped_fraction": float(coefficient < 1),
        "nonfinite": [],
        **changes,
    }


def write(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write records as JSONL."""
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return path
