"""What recording costs: a sink's time in a step, at `every: 1`, beside the step itself.

    python -m benchmarks.recording

Times are of this thread on the CPU (`time.thread_time`), medians over the steps.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import distclip
from distclip import policies
from distclip.monitor import JsonlSink

STEPS = 30


class Timed:
    """A sink, and how long each of its calls takes."""

    def __init__(self, sink: Any) -> None:
        self.sink = sink
        self.times: list[float] = []

    def __call__(self, step: int, report: distclip.ClipReport) -> None:
        start = time.thread_time()
        self.sink(step, report)
        self.times.append(time.thread_time() - start)


def transformer(width: int, layers: int) -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.0)
    return torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def measure(width: int, layers: int, per_parameter: bool, folder: Path) -> tuple[float, float, int]:
    """Median seconds of a step and of the recording in it, and the number of parameters."""
    model = transformer(width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    path = folder / f"{width}-{per_parameter}.jsonl"
    timed = Timed(JsonlSink(path, per_parameter=per_parameter))
    clipper = distclip.GradClipper(model, policies.global_norm(1.0), sinks=timed)
    clipper.attach(optimizer)
    batch = torch.randn(4, 64, width)
    steps = []
    for _ in range(STEPS):
        start = time.thread_time()
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        steps.append(time.thread_time() - start)
    return statistics.median(steps), statistics.median(timed.times), len(clipper.names)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| model | parameters | step, ms | recording, ms | share | with each parameter's |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for width, layers in ((64, 2), (256, 4)):
            step, recording, count = measure(width, layers, False, Path(folder))
            slow, more, _ = measure(width, layers, True, Path(folder))
            print(
                f"| {layers} layers of {width} | {count} | {1e3 * step:.1f} | "
                f"{1e3 * recording:.3f} | {recording / step:.2%} | {more / slow:.2%} |"
            )


if __name__ == "__main__":
    main()
