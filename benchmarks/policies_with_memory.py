"""What policies with a memory do to a training run with bad batches: a picture and its numbers.

The demo's byte-level transformer and text (``launch/train_lm.py``), one process, SGD with momentum,
no warm-up, at the largest learning rate that docs/demo.md found safe without clipping. Every run of
a seed has the same weights, the same batches and the same bad ones. Every run is kept.

    python benchmarks/policies_with_memory.py --numbers numbers.json --picture picture.png
    python benchmarks/policies_with_memory.py --numbers numbers.json --picture picture.png --redraw
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import distclip
from distclip import policies
from distclip.monitor.plots import BEFORE, COLOURS, STYLE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))
from train_lm import HELD_OUT, LanguageModel, Windows, read_text

POLICIES: dict[str, policies.Policy] = {
    "none": policies.measure(),
    "global_norm(1.0)": policies.global_norm(1.0),
    "autoclip(90)": policies.autoclip(90),
    "zclip": policies.zclip(max_norm=None),
    "adagc": policies.adagc(warmup_steps=20),
    "skip_spikes": policies.skip_spikes(window=64, min_history=20),
}
"""Defaults, but: no fixed ceiling for zclip, and warm-ups that suit a short run."""

BATCH, CONTEXT, WIDTH, LAYERS, HEADS = 32, 64, 64, 2, 4
MOMENTUM = 0.9
FIRST_BAD, BAD, FACTOR = 40, 5, 20.0
"""No bad batch before this step; how many; and by what their loss is multiplied."""


def bad_steps(seed: int, steps: int) -> list[int]:
    """The bad batches of a seed; the last of them gives NaN."""
    generator = torch.Generator().manual_seed(1000 + seed)
    chosen = torch.randperm(steps - FIRST_BAD - 10, generator=generator)[:BAD] + FIRST_BAD
    return sorted(chosen.tolist())


def loss_of(model: LanguageModel, windows: Tensor, kind: str) -> Tensor:
    """The mean loss; of a bad batch (random bytes) many times that, or NaN."""
    if kind == "good":
        return model(windows)
    noise = torch.randint(256, windows.shape, generator=torch.Generator().manual_seed(7))
    return model(noise) * (FACTOR if kind == "bad" else math.nan)


def train(policy: policies.Policy, seed: int, rate: float, steps: int, bad: list[int]) -> Any:
    """One run: norms, losses, what was done; ``lost`` is the step at which it became NaN."""
    text = torch.frombuffer(bytearray(read_text(None).encode()), dtype=torch.uint8)
    split = int(len(text) * (1 - HELD_OUT))
    torch.manual_seed(seed)
    model = LanguageModel(CONTEXT, WIDTH, LAYERS, HEADS)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    clipper = distclip.GradClipper(model, policy, on_nonfinite="skip")
    clipper.attach(optimizer)
    reports: list[distclip.ClipReport] = []
    clipper.sinks = (lambda step, report: reports.append(report),)
    windows = Windows(text[:split], CONTEXT, BATCH * steps, seed)
    losses = []
    for step in range(steps):
        batch = torch.stack([windows[step * BATCH + row] for row in range(BATCH)])
        kind = "good" if step not in bad else "nan" if step == bad[-1] else "bad"
        if kind == "good":
            loss = loss_of(model, batch, kind)
            losses.append(loss.item())
        else:
            with torch.no_grad():
                losses.append(model(batch).item())  # of the good batch that it took the place of
            loss = loss_of(model, batch, kind)
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held = Windows(text[split:], CONTEXT, 256, 0)
    with torch.no_grad():
        final = model(torch.stack([held[row] for row in range(256)])).item()
    return {
        "losses": losses,
        "lost": len(losses) - 1 if len(losses) < steps or not math.isfinite(final) else None,
        "held_out": final,
        "bad": bad,
        "before": [report.total_norm.item() for report in reports],
        "after": [report.clipped_norm.item() for report in reports],
        "skipped": [bool(report.skipped) for report in reports],
        "clipped": [report.clipped_fraction.item() for report in reports],
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--numbers", type=Path, required=True, help="where the numbers of all runs go, as JSON")
    add("--picture", type=Path, required=True)
    add("--redraw", action="store_true", help="draw from the numbers that are there")
    add("--seeds", type=int, default=5)
    add("--steps", type=int, default=120)
    add("--lr", type=float, default=0.4)
    return parser.parse_args()


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Every policy and seed, with the bad batches and without any."""
    torch.set_num_threads(1)
    runs: dict[str, dict[str, list[Any]]] = {"bad": {}, "good": {}}
    for label, policy in POLICIES.items():
        for kind, some in runs.items():
            some[label] = []
            for seed in range(options.seeds):
                bad = bad_steps(seed, options.steps) if kind == "bad" else []
                some[label].append(train(policy, seed, options.lr, options.steps, bad))
            print(f"{label:18}{kind:6}{summary(some[label])}", flush=True)
    settings = {key: getattr(options, key) for key in ("seeds", "steps", "lr")}
    return {"settings": {**settings, "torch": torch.__version__}, "runs": runs}


def summary(runs: list[Any]) -> str:
    kept = [run["held_out"] for run in runs if run["lost"] is None]
    spread = statistics.stdev(kept) if len(kept) > 1 else math.nan
    mean = statistics.mean(kept) if kept else math.nan
    return f"{mean:.3f} ± {spread:.3f}, lost {len(runs) - len(kept)} of {len(runs)}"


# ---- the picture -----------------------------------------------------------------------------

LOST = "#D55E00"


def draw(numbers: dict[str, Any], path: Path) -> None:
    """A column a policy: losses and deeds of all seeds, norms before and after of the first."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(15, 6.6), layout="constrained")
        panels = figure.subplots(
            3, len(POLICIES), sharex=True, sharey="row", height_ratios=(3, 3, 1.1), squeeze=False
        )
        settings = numbers["settings"]
        figure.suptitle(
            f"{settings['seeds']} seeds, SGD at learning rate {settings['lr']}, {BAD} bad batches "
            f"in each run ({BAD - 1} of random bytes with {FACTOR:.0f} times the loss, 1 of NaN)",
            x=0.005, ha="left", fontsize=12,
        )  # fmt: skip
        for column, label in enumerate(POLICIES):
            runs = numbers["runs"]["bad"][label]
            colour = COLOURS[column] if column < 5 else "#444444"
            _losses(panels[0][column], label, runs, colour)
            _norms(panels[1][column], runs[0], colour)
            _deeds(panels[2][column], runs, colour)
        panels[0][0].set_ylabel("training loss\n(nats per byte)")
        panels[1][0].set_ylabel("gradient norm\n(first seed)")
        panels[2][0].set_ylabel("seed")
        figure.savefig(path, dpi=80)


def _losses(axes: Any, label: str, runs: list[Any], colour: str) -> None:
    for run in runs:
        axes.plot(run["losses"], color=colour, linewidth=0.8, alpha=0.8)
        if run["lost"] is not None:
            axes.plot(run["lost"], 6.2, "x", color=LOST, markersize=7, clip_on=False)
    lost = sum(run["lost"] is not None for run in runs)
    kept = [run["held_out"] for run in runs if run["lost"] is None]
    found = f"held out {statistics.mean(kept):.3f}" if kept else "every run lost"
    found += f", {lost} of {len(runs)} lost" if lost and kept else ""
    axes.set_title(f"{label}\n{found}", fontsize=10)
    axes.set_ylim(2.2, 6.4)


def _norms(axes: Any, run: dict[str, Any], colour: str) -> None:
    before = [norm if math.isfinite(norm) else math.nan for norm in run["before"]]
    applied = [
        math.nan if skipped else norm
        for norm, skipped in zip(run["after"], run["skipped"], strict=True)
    ]
    axes.semilogy(before, color=BEFORE, linewidth=0.9, label="before")
    axes.semilogy(applied, color=colour, linewidth=1.1, label="applied")
    for step in run["bad"]:
        axes.axvline(step, color=LOST, linewidth=0.6, alpha=0.6, zorder=0)
    axes.set_ylim(0.15, 2e3)
    axes.legend(loc="upper left", handlelength=1.2, fontsize=8, ncols=2)


def _deeds(axes: Any, runs: list[Any], colour: str) -> None:
    """By seed: the bad batches, the steps clipped, and those skipped."""
    for row, run in enumerate(runs):
        clipped = [step for step, share in enumerate(run["clipped"]) if share > 0]
        skipped = [step for step, skip in enumerate(run["skipped"]) if skip]
        axes.plot(run["bad"], [row] * len(run["bad"]), "|", color=LOST, markersize=9, alpha=0.6)
        axes.plot(clipped, [row] * len(clipped), ".", color=colour, markersize=2.5)
        axes.plot(skipped, [row] * len(skipped), "x", color="black", markersize=4, mew=0.9)
    axes.set_yticks(range(len(runs)))
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_xlabel("step")


if __name__ == "__main__":
    options = parse_arguments()
    if not options.redraw:
        options.numbers.write_text(json.dumps(run_all(options)))
    draw(json.loads(options.numbers.read_text()), options.picture)
