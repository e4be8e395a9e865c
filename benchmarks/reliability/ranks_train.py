"""A training run in which something happens to one rank; the clip is its only collective."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distclip import CollectiveError, GradClipper, policies

STUCK_AFTER = 4.0
"""Seconds; above a second, so that ranks have time to write that they wait."""


def train(folder: str, fault: str, when: str, victim: int, at: int, steps: int = 6) -> None:
    """Train, from the newest checkpoint that all ranks have; a faulty rank stops in step ``at``."""
    rank, root = dist.get_rank(), Path(folder)
    torch.manual_seed(rank)
    stage = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    stages = [nn.ModuleDict({f"stage{rank}": stage})]
    clipper = GradClipper(stages, policies.adagc(warmup_steps=2), stuck_after=STUCK_AFTER)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=0.01)
    seen: list[str] = []
    clipper.sinks = (lambda _, report: seen.append(_bits(report.parameter_coefficients)),)
    clipper.attach(optimizer)
    first = _load(root, stage, optimizer, clipper)
    for step in range(first, steps):
        optimizer.zero_grad()
        data = torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * rank + step))
        (stage(data).square().sum() * (step + 1)).backward()
        here = fault != "none" and step == at
        if here and when == "before" and rank == victim:
            happen(fault, root)
        if here and when == "during":
            if rank == victim:
                threading.Timer(0.3, happen, (fault, root)).start()
            else:
                time.sleep(1.0)  # the victim waits in the collective meanwhile
        optimizer.step()
        weights = _bits(stage.state_dict())
        with open(root / f"log{rank}.jsonl", "a") as log:
            log.write(json.dumps({"step": step, "clip": seen[-1], "weights": weights}) + "\n")
        _save(root, step, stage, optimizer, clipper)
        if here and when == "after" and rank == victim:
            happen(fault, root)


def happen(fault: str, root: Path) -> None:
    """What goes wrong, with a note of the time."""
    (root / "fault.json").write_text(json.dumps({"time": time.time(), "pid": os.getpid()}))
    if fault == "raise":
        raise ValueError("on purpose")
    if fault == "sys.exit":
        sys.exit(3)
    if fault == "os._exit":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, fault))


def reported(root: Path, *arguments: Any) -> None:
    """Train, and note how it ended."""
    end: dict[str, Any] = {"error": ""}
    (root / f"pid{dist.get_rank()}.json").write_text(json.dumps({"pid": os.getpid()}))
    try:
        train(str(root), *arguments)
    except BaseException as error:
        end["error"] = type(error).__name__
        if isinstance(error, CollectiveError):
            end |= {"step": error.step, "ranks": error.ranks}
        raise
    finally:
        end["time"] = time.time()
        (root / f"end{dist.get_rank()}.json").write_text(json.dumps(end))


def _save(root: Path, step: int, stage: nn.Module, optimizer: Any, clipper: GradClipper) -> None:
    saved = {
        "stage": stage.state_dict(),
        "optimizer": optimizer.state_dict(),
        "clipper": clipper.state_dict(),
    }
    path = root / f"step{step}-rank{dist.get_rank()}.pt"
    torch.save(saved, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _load(root: Path, stage: nn.Module, optimizer: Any, clipper: GradClipper) -> int:
    """The first step to take."""
    step = 0
    while all((root / f"step{step}-rank{r}.pt").exists() for r in range(dist.get_world_size())):
        step += 1
    dist.barrier()  # all have looked
    if step:
        saved = torch.load(root / f"step{step - 1}-rank{dist.get_rank()}.pt", weights_only=True)
        stage.load_state_dict(saved["stage"])
        optimizer.load_state_dict(saved["optimizer"])
        clipper.load_state_dict(saved["clipper"])
    return step


def _bits(tensors: Any) -> str:
    digest = hashlib.sha256()
    for name, value in tensors.items():
        bits = torch.as_tensor(value).detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + bits.numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Under a launcher: FOLDER FAULT WHEN VICTIM AT."""
    # The limit of everything that is not a clip.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=10))
    folder, fault, when, victim, at = sys.argv[1:6]
    torch.set_num_threads(1)
    reported(Path(folder), fault, when, int(victim), int(at))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
