"""Train the same script under several policies on gloo ranks, and show what came of it.

For each setting and seed a study starts the command that you would start yourself:

    accelerate launch --config_file configs/accelerate/ddp_cpu.yaml \
        -m distclip run --config POLICY.yaml SCRIPT --seed SEED --jsonl LOG

or with --torchrun `torchrun SCRIPT --policy POLICY.yaml ...`, for scripts that take it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from distclip.monitor import plots
from distclip.monitor.reading import read_loss, read_run
from distclip.monitor.runs import Run

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 900.0
"""Seconds until a run counts as hung."""


@dataclass(frozen=True)
class Setting:
    """A configuration of distclip, and options of the script that go with it.

    `{clip_log}` in an option stands for the file of the clip log, for a script that writes it
    itself; the configuration then has `log: null`.
    """

    label: str
    policy: dict[str, Any]
    arguments: tuple[str, ...] = ()


NO_CLIPPING = Setting("no clipping", {"policy": "measure", "on_nonfinite": "pass"})


def global_norm(max_norm: float) -> Setting:
    """Clipping by the norm of all gradients, and NaN passed on, as torch does."""
    policy = {"name": "global_norm", "max_norm": max_norm}
    return Setting(f"global norm {max_norm:g}", {"policy": policy, "on_nonfinite": "pass"})


@dataclass
class Outcome:
    """What one run left behind.

    `log` has the script's records, `clip_log` distclip's; `end` is the script's last word, the
    record without a step.
    """

    label: str
    log: Path
    clip_log: Path
    last_step: int = 0
    end: dict[str, Any] = field(default_factory=dict)

    def norms(self) -> Run:
        """The recorded gradient norms."""
        return read_run(self.clip_log)


Results = dict[str, list[Outcome]]
Columns = dict[str, Callable[[list[Outcome]], str]]


def parser(
    description: str | None, *, seeds: int, output: str, launch: str = "ddp_cpu", ranks: int = 2
) -> argparse.ArgumentParser:
    """A parser with the options of every study; `parse_known_args` leaves the script's options."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder, configuration = ROOT / "runs" / output, ROOT / "configs" / "accelerate"
    add = made.add_argument
    add("--ranks", type=int, default=ranks, help=f"gloo ranks on this machine (default: {ranks})")
    add("--seeds", type=int, default=seeds, help=f"runs per policy (default: {seeds})")
    add("--output", type=Path, default=folder, help=f"(default: runs/{output})")
    add(
        "--launch",
        type=Path,
        default=configuration / f"{launch}.yaml",
        help=f"how Accelerate launches (default: configs/accelerate/{launch}.yaml)",
    )
    return made


@dataclass(frozen=True)
class System:
    """A training script of this folder, and how its runs are shown.

    `steps` is the length of a run, for the progress bar; `shown` the key of the script's records
    that bar and picture show, which the picture calls `curve`. `columns` are a table's, beside
    those of the norms.
    """

    title: str
    script: str
    steps: int
    shown: str
    curve: str
    columns: Columns


class Study:
    """Runs of one system, one after the other, with a progress bar each.

    Args:
        system: what is trained.
        options: those of `parser`.
        arguments: options of the script in every run.
    """

    def __init__(
        self, system: System, options: argparse.Namespace, arguments: Iterable[str] = ()
    ) -> None:
        self.system, self.options, self.arguments = system, options, tuple(arguments)
        self.console = Console(width=None if sys.stdout.isatty() else 160)
        self.began = time.monotonic()

    def run(self, settings: Iterable[Setting]) -> Results:
        """All settings with all seeds; ends the program with a run's output if one fails."""
        settings, options = list(settings), self.options
        options.output.mkdir(parents=True, exist_ok=True)
        self.console.print(
            f"{len(settings)} policies x {options.seeds} seeds on {options.ranks} ranks; "
            f"results in {_shown(options.output)}"
        )
        columns = (
            TextColumn("{task.description:<26}"), BarColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )  # fmt: skip
        results: Results = {setting.label: [] for setting in settings}
        with Progress(*columns, console=self.console) as progress:
            for setting in settings:
                for seed in range(options.seeds):
                    name = f"{setting.label}, seed {seed}"
                    task = progress.add_task(name, total=self.system.steps, note="starting")
                    results[setting.label].append(self._train(setting, seed, progress, task))
        return results

    def show(self, results: Results) -> None:
        """Print a table with a row per policy, and save a picture of all runs."""
        system, folder = self.system, self.options.output
        columns = {**system.columns, **NORMS}
        table = Table(title=f"{system.title}, mean ± standard deviation of the runs")
        table.add_column("policy", no_wrap=True)
        for heading in columns:
            table.add_column(heading, justify="right")
        for label, outcomes in results.items():
            table.add_row(label, *(column(outcomes) for column in columns.values()))
        self.console.print(table)

        runs, curves = [], []
        for outcome in (outcome for outcomes in results.values() for outcome in outcomes):
            runs.append(outcome.norms())
            curves.append(read_loss(outcome.log, runs[-1].group, system.shown))
        title = f"{system.title}: {self.options.ranks} ranks, {self.options.seeds} seeds"
        picture = folder / f"{folder.name}.png"
        plots.save(plots.draw(runs, curves, title=title, quantity=system.curve), picture)
        seconds = time.monotonic() - self.began
        self.console.print(f"picture: {_shown(picture)}   ({seconds:.0f} s)")

    def _train(self, setting: Setting, seed: int, progress: Progress, task: TaskID) -> Outcome:
        stem = f"{setting.label.replace(' ', '-')}_seed{seed}"
        folder = self.options.output
        outcome = Outcome(setting.label, folder / f"{stem}.log.jsonl", folder / f"{stem}.jsonl")
        for old in (outcome.log, outcome.clip_log):
            old.unlink(missing_ok=True)
        policy = folder / f"{stem}.yaml"
        policy.write_text(
            yaml.safe_dump({"log": {"jsonl": str(outcome.clip_log)}, **setting.policy})
        )
        command = [
            *self._launcher(policy), "--seed", str(seed), "--jsonl", str(outcome.log),
            *self.arguments,
            *(word.format(clip_log=outcome.clip_log) for word in setting.arguments),
        ]  # fmt: skip
        output = folder / f"{stem}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
            try:
                self._follow(process, outcome, progress, task)
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
        progress.stop_task(task)
        return outcome

    def _launcher(self, policy: Path) -> list[str]:
        """The command up to the script's own options."""
        # As `torchrun` and `accelerate launch`; the module keeps their stores off the network.
        start = [sys.executable, "-m", "distclip.testing.ranks.loopback"]
        ranks, script = str(self.options.ranks), ROOT / "launch" / self.system.script
        if getattr(self.options, "torchrun", False):
            return [
                *start, "torch.distributed.run", "--nproc-per-node", ranks, str(script),
                "--policy", str(policy),
            ]  # fmt: skip
        return [
            *start, "accelerate.commands.launch", "--config_file", str(self.options.launch),
            "--num_processes", ranks,
            "-m", "distclip", "run", "--config", str(policy), str(script),
        ]  # fmt: skip

    def _follow(
        self, process: subprocess.Popen[bytes], outcome: Outcome, progress: Progress, task: TaskID
    ) -> None:
        deadline = time.monotonic() + LIMIT
        ended, shown = False, self.system.shown
        while not ended:
            ended = process.poll() is not None
            note = ""
            for record in _records(outcome.log):
                if "step" not in record:
                    outcome.end = record
                elif record.get(shown) is not None:
                    outcome.last_step = record["step"]
                    note = f"{shown.replace('_', ' ')} {record[shown]:.3g}"
            if note:
                progress.update(task, completed=outcome.last_step, note=note)
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


# ---- columns ---------------------------------------------------------------------------------


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    known = list(values)
    if not known:
        return "-"
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.{digits}f} ± {deviation:.{digits}f}"


def count(outcomes: list[Outcome], holds: Callable[[Outcome], bool]) -> str:
    """In how many of the runs something holds."""
    return f"{sum(map(holds, outcomes))} of {len(outcomes)}"


def _finite(outcomes: list[Outcome], column: str) -> Any:
    values = np.concatenate([getattr(outcome.norms(), column) for outcome in outcomes])
    return values[np.isfinite(values)]


def _clipped(outcomes: list[Outcome]) -> str:
    return f"{100 * np.concatenate([outcome.norms().clipped for outcome in outcomes]).mean():.0f} %"


NORMS: Columns = {
    "norm before, median": lambda runs: f"{np.median(_finite(runs, 'total_norm')):.2f}",
    "norm before, largest": lambda runs: f"{_finite(runs, 'total_norm').max():.3g}",
    "norm after, largest": lambda runs: f"{_finite(runs, 'clipped_norm').max():.3g}",
    "steps clipped": _clipped,
}
"""What every table shows of the gradient norms of all runs together."""


def states(outcomes: list[Outcome]) -> str:
    """Shares of the steps by norm: below 0.01 (vanishing), from 1 to 10, above 100 (exploding)."""
    norms = _finite(outcomes, "total_norm")
    parts = (norms < 0.01, (norms >= 1) & (norms <= 10), norms > 100)
    return " / ".join(f"{100 * part.mean():.0f}" for part in parts) + " %"


def _shown(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
