"""What trackers have stored on this machine, read from their own files."""

from __future__ import annotations

import json
import math
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

NAMES = {
    "grad_norm", "grad_norm_clipped", "clip_coefficient", "clip_threshold", "clipped_fraction",
    "step_skipped", "nonfinite",
}  # fmt: skip

Values = dict[str, dict[int, float]]
"""Name -> step -> value."""


def of_tensorboard(folder: Path) -> Values:
    """The event files of a folder."""
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def _records(path: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, as wandb writes it after 7 bytes of header."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block has no room for a header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def of_wandb(folder: Path) -> Values:
    """What offline runs have written below a folder."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # ends the process that writes
    found: Values = {}
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        for data in _records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for key in NAMES & items.keys():
                found.setdefault(key, {})[items["clip_step"]] = float(items[key])
    return found


def of_mlflow(database: Path, experiment: str) -> tuple[Values, set[tuple[str, str]]]:
    """The metrics of an experiment in SQLite; identity and status of its runs."""
    found: Values = {}
    runs: set[tuple[str, str]] = set()
    rows = sqlite3.connect(database).execute(
        "select r.run_uuid, r.status, key, value, step, is_nan from metrics m "
        "join runs r on r.run_uuid = m.run_uuid "
        "join experiments e on e.experiment_id = r.experiment_id where e.name = ?",
        (experiment,),
    )
    for run, status, key, value, step, is_nan in rows:
        runs.add((run, status))
        found.setdefault(key, {})[step] = math.nan if is_nan else value
    return found, runs


def of_trackio(project: str) -> Values:
    """The only run of a project."""
    from trackio.sqlite_storage import SQLiteStorage

    found: Values = {}
    (run,) = SQLiteStorage.get_runs(project)
    for row in SQLiteStorage.get_logs(project, run):
        for key in NAMES & row.keys():
            found.setdefault(key, {})[row["step"]] = float(row[key])
    return found
