"""The demo: does clipping matter here? Real training runs on gloo ranks, a table and a picture.

For each policy and seed it starts the command that you would start yourself:

    accelerate launch --config_file configs/accelerate/fsdp2_cpu.yaml \
        -m distclip run --config POLICY.yaml launch/train_lm.py --seed SEED

The training script knows nothing of distclip. The learning rate is one at which runs without
clipping are lost, and was found by a search: see docs/demo.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from distclip.monitor import plots
from distclip.monitor.runs import read_loss, read_run

ROOT = Path(__file__).resolve().parent.parent
POLICIES: dict[str, dict[str, Any]] = {
    "no clipping": {"policy": "measure", "on_nonfinite": "pass"},
    "global norm 0.5": {"policy": {"name": "global_norm", "max_norm": 0.5}, "on_nonfinite": "pass"},
    "AGC 0.1": {"policy": {"name": "agc", "clip_factor": 0.1}, "on_nonfinite": "pass"},
}
LIMIT = 600.0
"""Seconds until a run counts as hung."""


@dataclass
class Result:
    """What one run left behind."""

    clip_log: Path
    loss_log: Path
    held_out: float = math.nan
    last_step: int = 0


@dataclass
class Options:
    """The command line."""

    ranks: int
    steps: int
    seeds: int
    text: Path | None
    output: Path
    launch: Path
    extra: list[str] = field(default_factory=list)


def parse_arguments() -> Options:
    """Read the command line; what is not known goes on to the training script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, default=4, help="gloo ranks on this machine (default: 4)")
    add("--steps", type=int, default=60, help="training steps (default: 60)")
    add("--seeds", type=int, default=3, help="runs per policy (default: 3)")
    add("--text", type=Path, help="train on this file (default: Python's own documentation)")
    add("--output", type=Path, default=ROOT / "runs" / "demo", help="(default: runs/demo)")
    add(
        "--launch",
        type=Path,
        default=ROOT / "configs" / "accelerate" / "fsdp2_cpu.yaml",
        help="how Accelerate launches (default: configs/accelerate/fsdp2_cpu.yaml)",
    )
    known, extra = parser.parse_known_args()
    return Options(**vars(known), extra=extra)


def main() -> None:
    """Run everything and show it."""
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(
        f"{len(POLICIES)} policies x {options.seeds} seeds, {options.steps} steps each, on "
        f"{options.ranks} ranks; results in {_shown(options.output)}"
    )
    start = time.monotonic()
    results: dict[str, list[Result]] = {label: [] for label in POLICIES}
    columns = (
        TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        for label in POLICIES:
            for seed in range(options.seeds):
                task = progress.add_task(
                    f"{label}, seed {seed}", total=options.steps, note="starting"
                )
                results[label].append(train(options, label, seed, progress, task))
    console.print(summary(results))
    picture = options.output / "demo.png"
    draw(results, picture, options)
    console.print(f"picture: {_shown(picture)}   ({time.monotonic() - start:.0f} s)")


def train(options: Options, label: str, seed: int, progress: Progress, task: TaskID) -> Result:
    """One run in processes of its own; ends the demo with the run's output if it fails."""
    stem = f"{label.replace(' ', '-')}_seed{seed}"
    result = Result(options.output / f"{stem}.jsonl", options.output / f"{stem}.loss.jsonl")
    for old in (result.clip_log, result.loss_log):
        old.unlink(missing_ok=True)
    configuration = options.output / f"{stem}.yaml"
    configuration.write_text(
        yaml.safe_dump({**POLICIES[label], "log": {"jsonl": str(result.clip_log)}})
    )
    command = [
        sys.executable, "-m", "distclip.testing.ranks.loopback", "accelerate.commands.launch",
        "--config_file", str(options.launch), "--num_processes", str(options.ranks),
        "-m", "distclip", "run", "--config", str(configuration),
        str(ROOT / "launch" / "train_lm.py"),
        "--steps", str(options.steps), "--seed", str(seed),
        "--jsonl", str(result.loss_log), "--log-every", "5", *options.extra,
    ]  # fmt: skip
    if options.text is not None:
        command += ["--text", str(options.text)]
    output = options.output / f"{stem}.log"
    with output.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ
        )
        try:
            _follow(process, result, progress, task)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)
    if process.returncode != 0:
        progress.stop()
        sys.exit(
            f"{output.read_text()}\nthe run failed (exit code {process.returncode}): "
            f"{shlex.join(command)}"
        )
    progress.update(
        task,
        completed=result.last_step,
        note="diverged" if math.isnan(result.held_out) else f"held-out loss {result.held_out:.3f}",
    )
    progress.stop_task(task)  # also the clock of a run that was lost on the way
    return result


def _follow(
    process: subprocess.Popen[bytes], result: Result, progress: Progress, task: TaskID
) -> None:
    deadline = time.monotonic() + LIMIT
    ended = False
    while not ended:
        ended = process.poll() is not None
        for record in _records(result.loss_log):
            if "held_out_loss" in record:
                value = record["held_out_loss"]
                result.held_out = math.nan if value is None else value
            elif record.get("loss") is not None:
                result.last_step = record["step"]
                progress.update(task, completed=record["step"], note=f"loss {record['loss']:.3f}")
        if time.monotonic() > deadline:
            sys.exit(f"a run did not end within {LIMIT:.0f} s; its output is beside its log")
        if not ended:
            time.sleep(0.25)


def _records(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log that is still being written."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines if line]


def summary(results: dict[str, list[Result]]) -> Table:
    """One row per policy."""
    table = Table(title="Held-out loss in nats per byte (mean of the runs that were not lost)")
    table.add_column("policy")
    for heading in (
        "held-out loss", "runs lost", "norm before, median", "norm before, largest",
        "norm after, largest", "steps clipped",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for label, runs in results.items():
        kept = [run.held_out for run in runs if not math.isnan(run.held_out)]
        recorded = [read_run(run.clip_log) for run in runs]
        before = [x for run in recorded for x in run.total_norm.tolist() if math.isfinite(x)]
        after = [x for run in recorded for x in run.clipped_norm.tolist() if math.isfinite(x)]
        clipped = [float(x) for run in recorded for x in run.clipped.tolist()]
        table.add_row(
            label,
            f"{statistics.mean(kept):.3f} ± {_spread(kept):.3f}" if kept else "-",
            f"{len(runs) - len(kept)} of {len(runs)}",
            f"{statistics.median(before):.2f}",
            f"{max(before):.3g}",
            f"{max(after):.3g}",
            f"{100 * statistics.mean(clipped):.0f} %",
        )
    return table


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def draw(results: dict[str, list[Result]], picture: Path, options: Options) -> None:
    """Loss, norm before and after clipping, threshold: one panel each, all runs."""
    runs, losses = [], []
    for run in (run for runs_ in results.values() for run in runs_):
        recorded = read_run(run.clip_log)
        runs.append(recorded)
        losses.append(read_loss(run.loss_log, recorded.group))
    title = (
        f"A byte-level transformer on {options.ranks} FSDP2 ranks, SGD at a learning rate "
        f"where clipping matters, {options.seeds} seeds"
    )
    plots.save(plots.draw(runs, losses, title=title), picture)


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    main()
