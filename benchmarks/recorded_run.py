"""One run through every sink at once, and whether they all stored the same.

    python -m benchmarks.recorded_run FOLDER

The demo's transformer on the demo's text, 2,000 steps under `global_norm(1.0)` with
`on_nonfinite="skip"`; the loss is 200 times as large at step 1200, and NaN at step 1500. JSON
Lines, TensorBoard, W&B (offline), MLflow (SQLite) and Trackio record every step, those that are
installed. Their files are read back and held against each other, name by name and step by step, and
the page of the log is written. Times are those of this thread on the CPU (`time.thread_time`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import distclip
from benchmarks.recording import Timed
from benchmarks.stores import NAMES, Values, of_mlflow, of_tensorboard, of_trackio, of_wandb
from distclip import monitor, policies
from distclip.monitor import page
from distclip.monitor.reading import read_runs
from distclip.monitor.summary import summaries
from distclip.monitor.tracking import TRACKED_FIELDS

SPIKE, BAD = 1200, 1500
NAME = "distclip"


def every_sink(folder: Path, states: monitor.States) -> dict[str, tuple[Any, Callable[[], Values]]]:
    """Package -> its sink, and what reads back what it has stored."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(folder)}
    os.environ |= {"TRACKIO_DIR": str(folder / "trackio")}
    os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    made: dict[str, tuple[Callable[[], Any], Callable[[], Values]]] = {
        "tensorboard": (
            lambda: monitor.TensorBoardSink(folder / "tensorboard", states=states),
            lambda: of_tensorboard(folder / "tensorboard"),
        ),
        "wandb": (lambda: monitor.WandbSink(NAME, states=states), lambda: of_wandb(folder)),
        "mlflow": (
            lambda: monitor.MLflowSink(NAME, states=states),
            lambda: of_mlflow(folder / "mlflow.db", NAME)[0],
        ),
        "trackio": (
            lambda: monitor.TrackioSink(NAME, states=states),
            lambda: of_trackio(NAME),
        ),
    }
    there = [name for name in made if importlib.util.find_spec(name)]
    return {name: (made[name][0](), made[name][1]) for name in there}


def train(steps: int, sinks: list[Timed]) -> list[float]:
    """Seconds of each step, of this thread, with the recording in it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
    import train_lm

    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(train_lm.read_text(None).encode()), dtype=torch.uint8)
    model = train_lm.LanguageModel(64, 64, 2, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    clipper = distclip.GradClipper(
        model, policies.global_norm(1.0), on_nonfinite="skip", sinks=sinks
    )
    clipper.attach(optimizer)
    times = []
    windows = train_lm.Windows(text, 64, 16 * steps, seed=0)
    for step in range(steps):
        start = time.thread_time()
        batch = torch.stack([windows[16 * step + number] for number in range(16)])
        loss = model(batch)
        loss = loss * (200.0 if step == SPIKE else math.nan if step == BAD else 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.thread_time() - start)
    return times


def of_jsonl(path: Path) -> Values:
    """What the log has, under the names of trackers."""
    (run,) = read_runs(path)
    columns = {TRACKED_FIELDS[name]: getattr(run, name) for name in TRACKED_FIELDS}
    columns["nonfinite"] = run.nonfinite
    return {
        name: dict(zip(run.steps.astype(int).tolist(), map(float, column), strict=True))
        for name, column in columns.items()
    }


def differs(found: Values, want: Values) -> float:
    """The largest relative difference of a value; inf where one is lacking.

    ``nonfinite`` counts parameters in trackers, and is a flag here.
    """
    worst = 0.0
    for name in NAMES:
        mine = found.get(name, {})
        if mine.keys() != want[name].keys():
            return math.inf
        for step, value in want[name].items():
            other = float(mine[step] > 0) if name == "nonfinite" else mine[step]
            if math.isnan(value) and math.isnan(other):
                continue
            off = abs(other - value) / max(abs(value), 1e-30) if other != value else 0.0
            worst = max(worst, math.inf if math.isnan(off) else off)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder for logs and page")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    states = monitor.States()
    trackers = every_sink(folder, states)
    jsonl = monitor.JsonlSink(folder / "clip.jsonl", per_parameter=True, states=states)
    timed = {"jsonl": Timed(jsonl), **{name: Timed(sink) for name, (sink, _) in trackers.items()}}
    step = statistics.median(train(options.steps, [*timed.values()]))
    for each in timed.values():
        each.sink.close()
    want = of_jsonl(folder / "clip.jsonl")
    print("| sink | version | steps | ms a step | share of the step | largest difference | lost |")
    print("|---|---|---|---|---|---|---|")
    for name, each in timed.items():
        version = "" if name == "jsonl" else importlib.metadata.version(name)
        found = want if name == "jsonl" else trackers[name][1]()
        cost = statistics.median(each.times)
        rows = len(found.get("grad_norm", {}))
        print(
            f"| {name} | {version} | {rows} | {1e3 * cost:.2f} | {cost / step:.1%} | "
            f"{differs(found, want):.1g} | {each.sink.lost} |"
        )
    runs = read_runs(folder / "clip.jsonl")
    page.save_page(runs, summaries(runs), folder / "page.html")
    print(f"\nstep: {1e3 * step:.1f} ms with all of it; page: {folder / 'page.html'}")


if __name__ == "__main__":
    main()
