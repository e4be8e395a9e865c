"""Train the language model of train_lm.py with DeepSpeed's own engine.

The script knows nothing of distclip: what clips is the "distclip" section of the JSON.

    deepspeed --num_gpus 2 --module distclip run launch/train_deepspeed.py \
        --deepspeed_config configs/deepspeed/zero2.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from train_lm import LanguageModel, Windows, read_text


def parse_arguments() -> argparse.Namespace:
    """DeepSpeed's own options, and those of the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, help="a text file to train on (default: Python's own documentation)")
    add("--steps", type=int, default=60)
    add("--context", type=int, default=64, help="bytes per window (default: 64)")
    add("--width", type=int, default=64)
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=4)
    add("--lr", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    add("--jsonl", type=Path, help="write one JSON line per step to this file")
    add("--local_rank", type=int, default=-1, help="given by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    """Train one model; rank 0 says how it goes."""
    options = parse_arguments()
    deepspeed.init_distributed()
    data = torch.frombuffer(bytearray(read_text(options.text).encode()), dtype=torch.uint8)
    torch.manual_seed(options.seed)  # the same initial weights on every rank
    model = LanguageModel(options.context, options.width, options.layers, options.heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    engine, *_ = deepspeed.initialize(args=options, model=model, optimizer=optimizer)

    rank, world = dist.get_rank(), dist.get_world_size()
    share = engine.train_micro_batch_size_per_gpu()
    windows = Windows(data, options.context, options.steps * share * world, options.seed)
    log = options.jsonl.open("w", encoding="utf-8") if options.jsonl and rank == 0 else None
    for step in range(options.steps):
        first = (step * world + rank) * share
        batch = torch.stack([windows[place] for place in range(first, first + share)])
        loss: Tensor = engine(batch.to(engine.device))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float() / world
        dist.all_reduce(mean)
        value = mean.item()
        norm = float(engine.get_global_grad_norm())
        if log is not None:
            log.write(json.dumps({"step": step, "loss": value, "norm": norm}) + "\n")
        if rank == 0 and (step % 10 == 9 or step + 1 == options.steps):
            print(f"step {step + 1:5d}  loss {value:.4f}  norm {norm:.3f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
