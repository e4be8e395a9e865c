"""A picture of each policy: four runs with a planted failure each, beside those without clipping.

Model, text, optimizer and bad batches of ``policies_with_memory.py``; every seed is drawn.

    python benchmarks/policies_gallery.py run --numbers numbers.json [--only zclip adagc]
    python benchmarks/policies_gallery.py draw --numbers numbers.json --folder docs/images
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import policies_with_memory as base
import torch
from torch import Tensor

import distclip
from distclip import policies
from distclip.monitor.plots import BEFORE, COLOURS, STYLE

POLICIES: dict[str, policies.Policy] = {
    "none": policies.measure(),
    "global_norm(1.0)": policies.global_norm(1.0),
    "parameter_norm(0.3)": policies.parameter_norm(0.3),
    "agc(0.1)": policies.agc(0.1),
    "autoclip(90)": policies.autoclip(90),
    "zclip(max_norm=None)": policies.zclip(max_norm=None),
    "adagc(warmup_steps=20)": policies.adagc(warmup_steps=20),
    "group_ema()": policies.group_ema(),
    "running_max(0.9)": policies.running_max(0.9),
    "norm_stabilizer()": policies.norm_stabilizer(),
    "skip_spikes(64, min_history=20)": policies.skip_spikes(64, min_history=20),
    "skip_norm(8.0, clip_norm=1.0)": policies.skip_norm(8.0, clip_norm=1.0),
    'norm_gate("head.*", 8.0)': policies.norm_gate("head.*", 8.0),
}
"""Thresholds were chosen once, above the norms of the first steps, and not tuned."""

FAILURES = {
    "nothing": "no failure",
    "batches": "5 bad batches (one is NaN)",
    "element": "5 gradients with one element of 1e4",
    "rate": "3 times the rate from step 40 on",
}
SEEDS, STEPS, RATE = 3, 90, 0.4


def train(policy: policies.Policy, failure: str, seed: int) -> dict[str, Any]:
    """Losses of the good batches of one run, the held-out loss, how often something was done."""
    text = torch.frombuffer(bytearray(base.read_text(None).encode()), dtype=torch.uint8)
    split = int(len(text) * (1 - base.HELD_OUT))
    torch.manual_seed(seed)
    model = base.LanguageModel(base.CONTEXT, base.WIDTH, base.LAYERS, base.HEADS)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=base.MOMENTUM)
    clipper = distclip.GradClipper(model, policy, on_nonfinite="skip")
    clipper.attach(optimizer)
    windows = base.Windows(text[:split], base.CONTEXT, base.BATCH * STEPS, seed)
    bad = base.bad_steps(seed, STEPS) if failure in ("batches", "element") else []
    losses, skipped, clipped = [], [], 0
    for step in range(STEPS):
        batch = torch.stack([windows[step * base.BATCH + row] for row in range(base.BATCH)])
        planted = failure == "batches" and step in bad
        kind = "good" if not planted else "nan" if step == bad[-1] else "bad"
        loss = base.loss_of(model, batch, "good")
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        (base.loss_of(model, batch, kind) if planted else loss).backward()
        if failure == "element" and step in bad:
            _first(model.blocks[1]).flatten()[step] = 1e4
        if failure == "rate" and step == base.FIRST_BAD:
            optimizer.param_groups[0]["lr"] = 3 * RATE
        optimizer.step()
        optimizer.zero_grad()
        report: Any = clipper.last_report
        if bool(report.skipped):
            skipped.append(step)
        clipped += bool(report.clipped_fraction > 0)
    held = base.Windows(text[split:], base.CONTEXT, 256, 0)
    with torch.no_grad():
        final = model(torch.stack([held[row] for row in range(256)])).item()
    lost = len(losses) < STEPS or not math.isfinite(final)
    return {
        "losses": losses, "held_out": final, "lost": lost, "bad": bad, "skipped": skipped,
        "clipped": clipped,
    }  # fmt: skip


def _first(block: Any) -> Tensor:
    """The gradient of the block's first matrix."""
    return next(p.grad for p in block.parameters() if p.ndim == 2)


def run(options: argparse.Namespace) -> None:
    """Every policy, failure and seed; the file is written after each policy."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for label in options.only or POLICIES:
        found[label] = {
            failure: [train(POLICIES[label], failure, seed) for seed in range(SEEDS)]
            for failure in FAILURES
        }
        options.numbers[0].write_text(json.dumps(found))
        print(
            f"| `{label}` | " + " | ".join(map(summary, found[label].values())) + " |", flush=True
        )


def summary(runs: list[Any]) -> str:
    """Mean held-out loss, lost runs, and steps skipped and clipped per run."""
    kept = [each["held_out"] for each in runs if not each["lost"]]
    text = f"{statistics.mean(kept):.2f}" if kept else "-"
    if len(kept) < len(runs):
        text += f", {len(runs) - len(kept)} of {len(runs)} lost"
    return text


def draw(options: argparse.Namespace) -> None:
    """A picture a policy, a panel a failure."""
    import matplotlib
    from matplotlib.figure import Figure

    found: dict[str, Any] = {}
    for file in options.numbers:
        found |= json.loads(file.read_text())
    for label in list(POLICIES)[1:]:
        with matplotlib.rc_context({**STYLE, "font.size": 8}):
            figure = Figure(figsize=(12, 2.4), layout="constrained")
            panels = figure.subplots(1, len(FAILURES), sharey=True)
            for axes, (failure, words) in zip(panels, FAILURES.items(), strict=True):
                for each in found["none"][failure]:
                    axes.plot(each["losses"], color=BEFORE, linewidth=0.8)
                for each in found[label][failure]:
                    axes.plot(each["losses"], color=COLOURS[0], linewidth=0.9)
                    axes.plot(each["skipped"], [2.15] * len(each["skipped"]), "k|", markersize=5)
                for step in found[label][failure][0]["bad"]:
                    axes.axvline(step, color=base.LOST, linewidth=0.5, alpha=0.5, zorder=0)
                runs = found[label][failure]
                axes.set_title(
                    f"{words}\nheld out {summary(runs)} (none: {summary(found['none'][failure])})",
                    fontsize=8,
                )
                axes.set_ylim(2.1, 6.4)
                axes.set_xlabel("step")
            panels[0].set_ylabel("training loss")
            figure.savefig(options.folder / f"gallery_{slug(label)}.png", dpi=72)


def slug(label: str) -> str:
    """The policy's name."""
    return label.partition("(")[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["run", "draw"])
    parser.add_argument("--numbers", type=Path, nargs="+", required=True)
    parser.add_argument("--only", nargs="+", choices=list(POLICIES))
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    (run if arguments.task == "run" else draw)(arguments)
