"""What the host spends, per step, on launching the kernels of an accelerator.

``python -m benchmarks.launches``. No accelerator is needed: the tensors lie on the CPU; a launch
is replaced by a function that does nothing. So this is the time of distclip's own Python (choosing
a way for each tensor, finding or making the tables of addresses), without that of Triton's
launcher, which is a constant for each of the few launches. Times are those that the thread had a
core, the least of all rounds, so that a busy machine hardly shows. "Kept" are steps whose gradients
stay where they were; in "moved" steps every address is new, and the table with it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from distclip.kernels.device import changes, multi_tensor, norms

COUNTS = (300, 2_000, 20_000)
CPU = torch.device("cpu")


class Launched:
    """A kernel that is launched and does nothing."""

    def __init__(self) -> None:
        self.times = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: object, **constants: object) -> None:
        self.times += 1


@contextmanager
def nothing_launched() -> Iterator[dict[str, Launched]]:
    """The Triton path for tensors of the CPU, with kernels that do nothing."""
    names = ("measure_chunk", "combine", "measure_rows", "scale", "scale_rows")
    kernels = {name: Launched() for name in names}
    with (
        mock.patch.object(multi_tensor, "_kernels", return_value=SimpleNamespace(**kernels)),
        mock.patch.object(multi_tensor, "is_usable", return_value=True),
        mock.patch.object(multi_tensor, "_triton_dtype", lambda dtype: dtype),
    ):
        yield kernels


def step(tensors: list[Tensor]) -> None:
    """Norms of all tensors, and one coefficient for all."""
    found = norms.norms(tensors, 2.0)
    changes.scale_(tensors, found[:1].expand(len(tensors)))


def rows_step(tensors: list[Tensor]) -> None:
    """Norms of all rows, and a coefficient for each."""
    found = norms.row_norms(tensors, 2.0)
    counts = [tensor.size(0) for tensor in tensors]
    changes.scale_units_(tensors, list(torch.split(found, counts)), [(0,)] * len(tensors))


def timed(run: Callable[[list[Tensor]], None], sets: list[list[Tensor]], rounds: int) -> float:
    """Least microseconds of this thread in a step, over sets of tensors in turn."""
    times = []
    for number in range(rounds + 2):
        tensors = sets[number % len(sets)]
        began = time.thread_time()
        run(tensors)
        times.append(1e6 * (time.thread_time() - began))
    return min(times[2:])


def made(count: int) -> list[Tensor]:
    """Small matrices, each in its own memory."""
    return [torch.empty(4, 16) for _ in range(count)]


def measured(rounds: int) -> list[dict[str, Any]]:
    found = []
    with nothing_launched() as kernels:
        for count in COUNTS:
            kept = [made(count)]
            row: dict[str, Any] = {"tensors": count}
            for name, run in (("whole", step), ("rows", rows_step)):
                for kernel in kernels.values():
                    kernel.times = 0
                row[f"{name}, kept, us"] = timed(run, kept, rounds)
                row[f"{name}, launches"] = sum(k.times for k in kernels.values()) / (rounds + 2)
                moved = [made(count) for _ in range(rounds + 2)]  # each is met once
                row[f"{name}, moved, us"] = timed(run, moved, rounds)
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "torch": torch.__version__,
        "load": os.getloadavg(),
        "rounds": chosen.rounds,
        "steps": measured(chosen.rounds),
    }
    for row in result["steps"]:
        per = {k: v / row["tensors"] for k, v in row.items() if k.endswith("us")}
        print(row["tensors"], {name: f"{value:.2f} a tensor" for name, value in per.items()})
    if chosen.output is not None:
        chosen.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
