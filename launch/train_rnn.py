"""Train a tanh RNN on the temporal order problem (Hochreiter and Schmidhuber 1997, task 6a).

    python launch/train_rnn.py --policy configs/policies/global_norm.yaml
    accelerate launch --config_file configs/accelerate/ddp_cpu.yaml \
        -m distclip run --config configs/policies/global_norm.yaml launch/train_rnn.py

A sequence of distractors has two symbols, A or B, one in its second tenth and one in its fifth. The
network has to say at the end which of AA, AB, BA, BB it was. Pascanu, Mikolov and Bengio (2013,
https://arxiv.org/abs/1211.5063) show on it that gradients through time explode and that clipping
their norm is what lets SGD learn. The recurrent matrix starts orthogonal, so that the gradient
does not vanish at once.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import Log, Ranks, finish, mean, parser, reporter, share, start

SYMBOLS, CLASSES = 6, 4  # A, B and four distractors; AA, AB, BA, BB
TEST = 2000
LEARNED = 0.99  # accuracy; the paper's criterion, an error below 1 %


def parse_arguments() -> argparse.Namespace:
    """The options of one run."""
    made = parser(__doc__)
    add = made.add_argument
    add("--steps", type=int, default=800)
    add("--batch-size", type=int, default=20, help="over all ranks (default: 20)")
    add("--length", type=int, default=30, help="symbols per sequence (default: 30)")
    add("--width", type=int, default=50)
    add("--lr", type=float, default=0.1)
    add("--evaluate-every", type=int, default=25)
    return made.parse_args()


def draw(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences as one-hot vectors, (count, length, SYMBOLS), and their classes."""

    def between(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    symbols = between(2, SYMBOLS, count, length)
    chosen = between(0, 2, count, 2)
    row = torch.arange(count)
    symbols[row, between(length // 10, 2 * length // 10 + 1, count)] = chosen[:, 0]
    symbols[row, between(4 * length // 10, 5 * length // 10 + 1, count)] = chosen[:, 1]
    return F.one_hot(symbols, SYMBOLS).float(), 2 * chosen[:, 0] + chosen[:, 1]


class Network(nn.Module):
    """A tanh RNN, and a linear layer on its last state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(SYMBOLS, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)
        nn.init.orthogonal_(self.rnn.weight_hh_l0)

    def forward(self, sequences: Tensor) -> Tensor:
        states, _ = self.rnn(sequences)
        logits: Tensor = self.head(states[:, -1])
        return logits


def train(ranks: Ranks, options: argparse.Namespace, log: Log) -> nn.Module:
    """Train for --steps; write accuracies on sequences that are never trained on."""
    generator = torch.Generator().manual_seed(options.seed)
    test, test_classes = draw(TEST, options.length, torch.Generator().manual_seed(12345))
    plain = Network(options.width)
    optimizer = torch.optim.SGD(plain.parameters(), lr=options.lr)
    network, optimizer = ranks.prepare(plain, optimizer)
    learned_at, began = None, time.perf_counter()
    with reporter(ranks.rank == 0, options.steps) as report:
        for step in range(1, options.steps + 1):
            sequences, classes = draw(options.batch_size, options.length, generator)
            logits = network(share(ranks, sequences))
            loss = F.cross_entropy(logits, share(ranks, classes))
            ranks.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if step % options.evaluate_every == 0 or step == options.steps:
                with torch.no_grad():
                    right = plain(test).argmax(dim=1) == test_classes
                accuracy, over_ranks = right.float().mean().item(), mean(ranks, loss)
                if learned_at is None and accuracy >= LEARNED:
                    learned_at = step
                log.write(step=step, loss=over_ranks, accuracy=accuracy)
                report(step, f"loss {over_ranks:.3f}, accuracy {accuracy:.3f}")
    seconds = round(time.perf_counter() - began, 1)
    log.write(accuracy=accuracy, learned_at=learned_at, seconds=seconds)
    return network


def main() -> None:
    """Train one network."""
    options = parse_arguments()
    ranks = start(options)
    finish(ranks, train(ranks, options, Log(options.jsonl, ranks.rank == 0)), options)


if __name__ == "__main__":
    main()
