"""What the training scripts of this folder share: their options, their ranks, their log.

A script runs alone, under `accelerate launch ... -m distclip run`, where the policy comes from the
command line and the script knows nothing of it, or under plain `torchrun` with `--policy FILE`,
where the script clips with a :class:`distclip.GradClipper` of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distclip.tools.launch.leaving import let_gloo_finish


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every training script."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--seed", type=int, default=0)
    add("--jsonl", type=Path, help="write one JSON line per record to this file")
    add("--weights", type=Path, help="save the final weights, whole tensors, to this file")
    add(
        "--policy",
        type=Path,
        help="clip in this script, by this configuration: for torchrun, without Accelerate",
    )
    return made


# ---- ranks -----------------------------------------------------------------------------------


class Ranks(Protocol):
    """The ranks of a run, and what of the training depends on how they were launched."""

    rank: int
    world: int

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """The model and the optimizer, distributed over the ranks."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss that is this rank's share of the mean."""


def start(options: argparse.Namespace) -> Ranks:
    """Join the ranks that a launcher started; one process without a launcher is one rank.

    All ranks get the same random state, so that they make the same initial weights.
    """
    torch.manual_seed(options.seed)
    return WithAccelerate() if options.policy is None else WithTorch(options.policy)


class WithAccelerate:
    """Accelerate's ranks. `distclip run` attaches the policy when `prepare` is called."""

    def __init__(self) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator()
        self.rank = self.accelerator.process_index
        self.world = self.accelerator.num_processes

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        return self.accelerator.prepare(model, optimizer)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)


class WithTorch:
    """The ranks of torchrun under DDP, with a clipper that acts before every optimizer step."""

    def __init__(self, policy: Path) -> None:
        self.policy = policy
        if dist.is_torchelastic_launched():
            dist.init_process_group("gloo")
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        import distclip

        self.clipper = distclip.from_config(self.policy, model)
        self.clipper.attach(optimizer)
        if self.world > 1:
            model = nn.parallel.DistributedDataParallel(model)
        return model, optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def share(ranks: Ranks, batch: Tensor) -> Tensor:
    """This rank's rows of a batch that every rank has drawn; equal shares on all ranks."""
    if len(batch) % ranks.world:
        raise SystemExit(f"a batch of {len(batch)} cannot be shared by {ranks.world} ranks")
    return batch.chunk(ranks.world)[ranks.rank]


def mean(ranks: Ranks, value: Tensor) -> float:
    """The mean over the ranks of a scalar."""
    value = value.detach().clone()
    if ranks.world > 1:
        dist.all_reduce(value)
    return value.item() / ranks.world


def finish(ranks: Ranks, model: nn.Module, options: argparse.Namespace) -> None:
    """Save the weights where they are asked for, and leave the process group."""
    if options.weights is not None:
        whole = {
            name.removeprefix("module."): p.full_tensor() if isinstance(p, DTensor) else p
            for name, p in model.state_dict().items()
        }
        if ranks.rank == 0:
            torch.save(whole, options.weights)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        let_gloo_finish()


# ---- progress --------------------------------------------------------------------------------


class Log:
    """JSON lines, written by the main rank; a value that is not a number is written as null."""

    def __init__(self, path: Path | None, main: bool) -> None:
        self.path = path if main else None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    def write(self, **values: float | None) -> None:
        """Append one record, for whoever follows the file."""
        if self.path is not None:
            sound = {
                k: v if v is not None and math.isfinite(v) else None for k, v in values.items()
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(sound) + "\n")


class Reporter(Protocol):
    """Shows how far the training is."""

    def __call__(self, step: int, note: str) -> None: ...


@contextmanager
def reporter(main: bool, steps: int) -> Iterator[Reporter]:
    """A progress bar on a terminal, plain lines elsewhere, nothing on the other ranks."""
    if not main:
        yield lambda step, note: None
    elif sys.stdout.isatty():
        from rich.progress import Progress

        with Progress() as progress:
            task = progress.add_task("training", total=steps)
            yield lambda step, note: progress.update(task, completed=step, description=note)
    else:
        yield lambda step, note: print(f"step {step:6d}  {note}", flush=True)
