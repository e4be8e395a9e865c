"""Train a small byte-level transformer language model on English text, with Accelerate.

The text is the language reference that every CPython carries (`pydoc_data.topics`), or --text FILE.
The same command trains the same model on any number of ranks: the batch size is the global one,
every batch is drawn from --seed, and each rank takes its share of it.

    python train_lm.py
    accelerate launch --config_file CONFIG.yaml train_lm.py --steps 200 --jsonl run.jsonl
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from training import Log, reporter

VOCABULARY = 256  # bytes
HELD_OUT = 0.1  # the last tenth of the text is never trained on
HELD_OUT_WINDOWS = 256


def parse_arguments() -> argparse.Namespace:
    """The options of one training run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, help="a text file to train on (default: Python's own documentation)")
    add("--steps", type=int, default=80)
    add("--batch-size", type=int, default=32, help="windows per step, over all ranks (default: 32)")
    add("--context", type=int, default=64, help="bytes per window (default: 64)")
    add("--width", type=int, default=64)
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=4)
    add("--optimizer", choices=("sgd", "adamw"), default="sgd")
    add("--lr", type=float, default=1.0)
    add("--momentum", type=float, default=0.9, help="of SGD (default: 0.9)")
    add("--weight-decay", type=float, default=0.0)
    add("--warmup", type=int, default=0, help="steps over which the rate rises (default: 0)")
    add(
        "--max-norm",
        type=float,
        help="clip the gradient norm in this script (default: it does not)",
    )
    add("--seed", type=int, default=0)
    add("--jsonl", type=Path, help="write one JSON line per step to this file")
    add("--log-every", type=int, default=10, help="steps between two reports (default: 10)")
    return parser.parse_args()


# ---- text ------------------------------------------------------------------------------------


def read_text(path: Path | None) -> str:
    """The file's text, or Python's own documentation."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


class Windows(Dataset[Tensor]):
    """A fixed sequence of random windows of context + 1 bytes, the same for every rank."""

    def __init__(self, text: Tensor, context: int, count: int, seed: int) -> None:
        if len(text) <= context + 1:
            raise SystemExit(f"the text is too short for windows of {context} bytes")
        generator = torch.Generator().manual_seed(seed)
        self.text, self.length = text, context + 1
        self.starts = torch.randint(len(text) - context, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = self.starts[index]
        return self.text[start : start + self.length].long()


# ---- model -----------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a LayerNorm and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, context, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, context, width))
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class LanguageModel(nn.Module):
    """A decoder-only transformer; returns the mean loss of predicting each next byte."""

    _no_split_modules = ("Block",)  # from this Accelerate makes one FSDP unit per block

    def __init__(self, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, windows: Tensor) -> Tensor:
        tokens, following = windows[:, :-1], windows[:, 1:]
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())


# ---- training --------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW."""
    settings = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=options.momentum, **settings)
    return torch.optim.AdamW(model.parameters(), **settings)


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    batches: DataLoader[Tensor],
    options: argparse.Namespace,
    log: Log,
) -> bool:
    """Train for --steps; False if the loss stopped being a number."""
    pending: list[Tensor] = []
    norms: list[Tensor] = []
    began = time.perf_counter()
    with reporter(accelerator.is_main_process, options.steps) as report:
        for step, windows in enumerate(batches, start=1):
            loss = model(windows)
            accelerator.backward(loss)
            if options.max_norm is not None:
                norms += [accelerator.clip_grad_norm_(model.parameters(), options.max_norm)]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            # The losses stay where they are, and are averaged over the ranks once per report.
            pending.append(loss.detach())
            if step % options.log_every and step != options.steps:
                continue
            losses = accelerator.reduce(torch.stack(pending), "mean").tolist()
            now = time.perf_counter()
            tokens = len(losses) * options.batch_size * options.context
            tokens_per_s = tokens / (now - began)
            for number, value in enumerate(losses):
                norm = {"norm": float(norms[number])} if norms else {}
                at = step - len(losses) + 1 + number
                log.write(step=at, loss=value, tokens_per_s=round(tokens_per_s), **norm)
            report(step, f"loss {losses[-1]:.4f}  {tokens_per_s:,.0f} tokens/s")
            pending, norms, began = [], [], now
            if not math.isfinite(losses[-1]):  # averaged, hence the same on every rank
                return False
    return True


@torch.no_grad()
def held_out_loss(accelerator: Accelerator, model: nn.Module, batches: DataLoader[Tensor]) -> float:
    """The mean loss over text that was not trained on."""
    model.eval()
    losses = torch.stack([model(windows) for windows in batches])
    mean: float = accelerator.reduce(losses, "mean").mean().item()
    return mean


def main() -> None:
    """Train one model, and say how well it does on unseen text."""
    options = parse_arguments()
    # split_batches: the loader's batch size is the global one, and each rank takes its share.
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    if options.batch_size % accelerator.num_processes:
        raise SystemExit(
            f"--batch-size {options.batch_size} cannot be shared by "
            f"{accelerator.num_processes} ranks"
        )
    log = Log(options.jsonl, accelerator.is_main_process)

    data = torch.frombuffer(bytearray(read_text(options.text).encode()), dtype=torch.uint8)
    cut = int(len(data) * (1 - HELD_OUT))
    count = options.steps * options.batch_size
    training = Windows(data[:cut], options.context, count, seed=options.seed)
    # The same windows whatever the seed, so that runs can be compared; whole batches of them.
    held_out_count = max(1, HELD_OUT_WINDOWS // options.batch_size) * options.batch_size
    unseen = Windows(data[cut:], options.context, held_out_count, seed=0)

    torch.manual_seed(options.seed)  # the same initial weights on every rank
    model: nn.Module = LanguageModel(options.context, options.width, options.layers, options.heads)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = make_optimizer(model, options)
    schedule: Any = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (options.warmup + 1))
    )
    accelerator.print(
        f"{parameters:,} parameters, {cut:,} bytes of text, {accelerator.num_processes} ranks"
        f" ({accelerator.distributed_type.value}, {accelerator.device.type})"
    )
    model, optimizer, schedule, batches, held_out = accelerator.prepare(
        model,
        optimizer,
        schedule,
        DataLoader(training, batch_size=options.batch_size),
        DataLoader(unseen, batch_size=options.batch_size),
    )

    began = time.perf_counter()
    finite = train(accelerator, model, optimizer, schedule, batches, options, log)
    seconds = time.perf_counter() - began
    loss = held_out_loss(accelerator, model, held_out) if finite else math.nan
    log.write(held_out_loss=loss, seconds=round(seconds, 2))
    accelerator.print(
        f"held-out loss {loss:.4f} after {seconds:.1f} s"
        if finite
        else "the loss is no longer a number: training stopped"
    )
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
