"""Train a small world model on recorded games with DreamerV3's whole optimizer chain.

    python launch/train_dreamer.py
    accelerate launch --config_file configs/accelerate/fsdp2_cpu.yaml --num_processes 2 \
        -m distclip run --config configs/policies/measure.yaml launch/train_dreamer.py

The model is DreamerV3's in small (Hafner et al. 2023, https://arxiv.org/abs/2301.04104): a
recurrent state-space model with categorical latents, symlog reconstruction, KL balancing and free
bits, trained on games of Pendulum-v1 under random actions. The optimizer clips each tensor by AGC,
scales by RMS, then momentum, weight decay, warm-up and schedule: `distclip.optim.dreamer_v3`.
`distclip run` only gives the ranks gloo, and its policy is to measure.

Every rank draws the same batches and the same noise, of which it takes its share: the run is that
of one process, whatever the number of ranks.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import Log, Ranks, finish, mean, parser, reporter, share, start

from distclip.monitor import JsonlSink
from distclip.optim import dreamer_v3

GAME, EPISODE = "Pendulum-v1", 200
GROUPS, CLASSES = 8, 8  # of the categorical latent
FREE_BITS, REPRESENTATION = 1.0, 0.1  # nats below which KL costs nothing; weight of the posterior's


def parse_arguments() -> argparse.Namespace:
    """The options of one run."""
    made = parser(__doc__)
    add = made.add_argument
    add("--steps", type=int, default=300)
    add("--batch-size", type=int, default=16, help="sequences, over all ranks (default: 16)")
    add("--length", type=int, default=16, help="game steps per sequence (default: 16)")
    add("--width", type=int, default=64)
    add("--lr", type=float, default=1e-3)
    add("--agc", type=float, default=0.3, help="clip ratio; 0: no clipping (default: 0.3)")
    add("--weight-decay", type=float, default=1e-2)
    add("--warmup", type=int, default=50)
    add("--episodes", type=int, default=64, help="recorded games, an eighth of them held out")
    add("--evaluate-every", type=int, default=20)
    add("--clip-log", type=Path, help="write the report of the optimizer's clipping to this file")
    return made.parse_args()


# ---- data ------------------------------------------------------------------------------------


def record(episodes: int, seed: int) -> Tensor:
    """Games under random actions: (episodes, EPISODE, observation, action and reward).

    The action of a step is the one that led to its observation and reward.
    """
    games = gymnasium.make_vec(GAME, episodes, vectorization_mode="sync")
    random = np.random.default_rng(seed)
    games.reset(seed=seed)
    steps = []
    for _ in range(EPISODE):
        actions = random.uniform(-2, 2, (episodes, 1)).astype(np.float32)
        observations, rewards, *_ = games.step(actions)
        steps.append(np.concatenate([observations, actions, rewards[:, None]], axis=1))
    return torch.from_numpy(np.stack(steps, axis=1)).float()


def draw(games: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random windows of the games."""
    game = torch.randint(len(games), (count,), generator=generator)
    first = torch.randint(games.shape[1] - length + 1, (count,), generator=generator)
    return games[game[:, None], first[:, None] + torch.arange(length)]


def draw_noise(count: int, length: int, generator: torch.Generator) -> Tensor:
    """Gumbel noise for the latents of a batch."""
    uniform = torch.rand(count, length, GROUPS, CLASSES, generator=generator)
    return -torch.log(-torch.log(uniform.clamp(1e-6, 1 - 1e-6)))


# ---- model -----------------------------------------------------------------------------------


class Head(nn.Sequential):
    """Two layers; a unit of FSDP."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__(
            nn.Linear(inputs, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out.clone()  # FSDP2 warns of outputs that are views, as those of nn.Linear are


def symlog(x: Tensor) -> Tensor:
    """DreamerV3's squashing of targets and inputs."""
    return x.sign() * x.abs().log1p()


class WorldModel(nn.Module):
    """A recurrent state-space model; returns the loss of a batch, and its reconstruction part."""

    _no_split_modules = ("Head",)  # from this Accelerate makes one FSDP unit per head

    def __init__(self, observation: int, action: int, width: int) -> None:
        super().__init__()
        self.action, self.observation = action, observation
        latent = GROUPS * CLASSES
        self.encoder = Head(observation, width, width)
        self.mix = nn.Linear(latent + action, width)
        self.cell = nn.GRUCell(width, width)
        self.posterior = nn.Linear(2 * width, latent)
        self.prior = Head(width, width, latent)
        self.decoder = Head(width + latent, width, observation + 1)

    def forward(self, games: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        observed, actions, rewards = games.split([self.observation, self.action, 1], dim=-1)
        encoded = self.encoder(symlog(observed))
        hidden = encoded.new_zeros(len(games), self.cell.hidden_size)
        latent = encoded.new_zeros(len(games), GROUPS * CLASSES)
        steps = []
        for t in range(games.shape[1]):
            mixed = F.silu(self.mix(torch.cat([latent, actions[:, t]], dim=-1)))
            hidden = self.cell(mixed, hidden)
            logits = _unimix(self.posterior(torch.cat([hidden, encoded[:, t]], dim=-1)))
            latent = _sample(logits, noise[:, t])
            steps.append((hidden, latent, logits))
        hiddens, latents, posterior = (
            torch.stack(part, dim=1) for part in zip(*steps, strict=True)
        )
        prior = _unimix(self.prior(hiddens))
        decoded = self.decoder(torch.cat([hiddens, latents], dim=-1))
        target = symlog(torch.cat([observed, rewards], dim=-1))
        reconstruction = (decoded - target).square().sum(-1).mean()
        dynamics = _kl(posterior.detach(), prior).clamp(min=FREE_BITS).mean()
        representation = _kl(posterior, prior.detach()).clamp(min=FREE_BITS).mean()
        return reconstruction + dynamics + REPRESENTATION * representation, reconstruction


def _unimix(logits: Tensor) -> Tensor:
    """Log probabilities, mixed with 1 % of a uniform distribution."""
    probabilities = logits.unflatten(-1, (GROUPS, CLASSES)).softmax(dim=-1)
    return (0.99 * probabilities + 0.01 / CLASSES).log()


def _sample(logits: Tensor, noise: Tensor) -> Tensor:
    """One-hot samples with straight-through gradients, flat."""
    probabilities = logits.exp()
    drawn = F.one_hot((logits + noise).argmax(dim=-1), CLASSES)
    return (drawn + probabilities - probabilities.detach()).flatten(-2)


def _kl(left: Tensor, right: Tensor) -> Tensor:
    """KL(left | right) of the latents, summed over the groups."""
    return (left.exp() * (left - right)).sum(dim=(-2, -1))


# ---- training --------------------------------------------------------------------------------


def train(ranks: Ranks, options: argparse.Namespace, log: Log) -> nn.Module:
    """Train for --steps."""
    games = record(options.episodes, options.seed)
    held_out, games = games[: len(games) // 8], games[len(games) // 8 :]
    generator = torch.Generator().manual_seed(options.seed)
    fixed = torch.Generator().manual_seed(0)
    unseen = draw(held_out, 64, options.length, fixed)
    unseen_noise = draw_noise(64, options.length, fixed)

    plain = WorldModel(observation=3, action=1, width=options.width)
    chain = dreamer_v3(
        plain,
        lr=options.lr,
        agc=options.agc,
        weight_decay=options.weight_decay,
        warmup=options.warmup,
        schedule="linear",
        anneal=options.steps,
    )
    model, optimizer = ranks.prepare(plain, chain)
    sinks = [] if options.clip_log is None else [JsonlSink(options.clip_log)]
    began = time.perf_counter()
    with reporter(ranks.rank == 0, options.steps) as report:
        for step in range(1, options.steps + 1):
            batch = draw(games, options.batch_size, options.length, generator)
            noise = draw_noise(options.batch_size, options.length, generator)
            loss, _ = model(share(ranks, batch), share(ranks, noise))
            ranks.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            for sink in sinks:
                sink(step - 1, chain.report)
            if step % options.evaluate_every == 0 or step == options.steps:
                with torch.no_grad():
                    total, reconstruction = model(share(ranks, unseen), share(ranks, unseen_noise))
                values = {"loss": mean(ranks, total), "error": mean(ranks, reconstruction)}
                log.write(step=step, **values)
                report(step, f"held-out loss {values['loss']:.3f}")
    log.write(**values, seconds=round(time.perf_counter() - began, 1))
    return model


def main() -> None:
    """Train one model."""
    options = parse_arguments()
    ranks = start(options)
    finish(ranks, train(ranks, options, Log(options.jsonl, ranks.rank == 0)), options)


if __name__ == "__main__":
    main()
