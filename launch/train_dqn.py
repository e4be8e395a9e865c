"""Train a DQN (Mnih et al. 2015) on CartPole-v1, with the hyperparameters of a JSON file.

    python launch/train_dqn.py --policy configs/hyperparams_config.json
    accelerate launch --config_file configs/accelerate/ddp_cpu.yaml \
        -m distclip run --config configs/hyperparams_config.json launch/train_dqn.py
    torchrun --nproc-per-node 2 launch/train_dqn.py --policy configs/hyperparams_config.json

The threshold of the clipping is `gradient_clip_norm` of the same file, which distclip reads.

Every rank plays the same game from the same seed, so that all hold the same replay buffer, and
draws the same batches, of which it takes its share: the run is that of one process, whatever the
number of ranks. CartPole costs less than the exchange of its transitions would.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import Log, Ranks, finish, parser, reporter, share, start

ROOT = Path(__file__).resolve().parent.parent
GAME = "CartPole-v1"
SOLVED = 475.0  # gymnasium's own threshold for this game: mean return over 100 episodes
EPISODES = 100
CONFIRM, FINAL = 1_000_000, 2_000_000  # seeds of games that are played for nothing else


@dataclass(frozen=True)
class Hyperparameters:
    """The file's keys. Steps are steps of the game; `gradient_clip_norm` is read by distclip."""

    learning_rate: float
    discount_factor: float
    batch_size: int
    replay_buffer_size: int
    min_replay_size: int
    target_update_interval: int
    hidden_sizes: list[int]
    epsilon_start: float
    epsilon_end: float
    epsilon_decay_steps: int
    gradient_clip_norm: float
    max_episodes: int
    seed: int

    def epsilon(self, step: int) -> float:
        """The probability of a random action."""
        progress = min(1.0, step / self.epsilon_decay_steps)
        return self.epsilon_start + progress * (self.epsilon_end - self.epsilon_start)


def parse_arguments() -> argparse.Namespace:
    """The options of one run."""
    made = parser(__doc__)
    add = made.add_argument
    made.set_defaults(seed=None)  # the file's
    add("--hyperparameters", type=Path, default=ROOT / "configs" / "hyperparams_config.json")
    add("--update-every", type=int, default=8, help="game steps per update (default: 8)")
    add("--evaluate-every", type=int, default=500, help="game steps (default: 500)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value for a key of the file; may be given several times",
    )
    add("--steps", type=int, help="stop after so many game steps (default: at max_episodes)")
    return made.parse_args()


def read_hyperparameters(options: argparse.Namespace) -> Hyperparameters:
    """Those of the file, with the changes of --set."""
    values = json.loads(options.hyperparameters.read_text())
    for change in options.set:
        key, _, value = change.partition("=")
        if key not in values or key == "gradient_clip_norm":
            raise SystemExit(
                f"--set {change}: no key {key!r} to change; those of the file: {[*values]}"
            )
        values[key] = json.loads(value)
    return Hyperparameters(**values)


class Replay:
    """The last `size` transitions."""

    def __init__(self, size: int, width: int, seed: int) -> None:
        self.states = torch.zeros(size, width)
        self.following = torch.zeros(size, width)
        self.actions = torch.zeros(size, dtype=torch.long)
        self.rewards = torch.zeros(size)
        self.ends = torch.zeros(size)
        self.count = 0
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return min(self.count, len(self.ends))

    def add(self, state: Any, action: int, reward: float, following: Any, ended: bool) -> None:
        at = self.count % len(self.ends)
        self.states[at] = torch.from_numpy(state)
        self.following[at] = torch.from_numpy(following)
        self.actions[at], self.rewards[at], self.ends[at] = action, reward, float(ended)
        self.count += 1

    def draw(self, size: int) -> Tensor:
        """Indices of a batch, the same on every rank."""
        return torch.randint(len(self), (size,), generator=self.generator)


def make_network(inputs: int, hidden: list[int], actions: int) -> nn.Sequential:
    """Q values of all actions."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, actions))


def loss_of(
    network: nn.Module, target: nn.Module, replay: Replay, at: Tensor, discount: float
) -> Tensor:
    """Huber loss of the temporal difference, as in the DQN paper."""
    with torch.no_grad():
        best = target(replay.following[at]).max(dim=1).values
        wanted = replay.rewards[at] + discount * (1 - replay.ends[at]) * best
    found = network(replay.states[at]).gather(1, replay.actions[at, None]).squeeze(1)
    return F.smooth_l1_loss(found, wanted)


@torch.no_grad()
def evaluate(network: nn.Module, seed: int) -> float:
    """Mean return of the greedy policy over 100 episodes, all played at once."""
    games = gymnasium.make_vec(GAME, EPISODES, vectorization_mode="vector_entry_point")
    states, _ = games.reset(seed=seed)
    returns, playing = np.zeros(EPISODES), np.ones(EPISODES, dtype=bool)
    while playing.any():
        states, rewards, ended, cut, _ = games.step(
            network(torch.from_numpy(states)).argmax(1).numpy()
        )
        returns += rewards * playing
        playing &= ~(ended | cut)
    return float(returns.mean())


def train(
    ranks: Ranks, hyper: Hyperparameters, options: argparse.Namespace, log: Log
) -> tuple[nn.Module, bool]:
    """Play and learn until the greedy policy solves the game; whether it did."""
    game = gymnasium.make(GAME)
    random = np.random.default_rng(options.seed)
    replay = Replay(hyper.replay_buffer_size, game.observation_space.shape[0], options.seed)
    plain = make_network(game.observation_space.shape[0], hyper.hidden_sizes, game.action_space.n)
    target = copy.deepcopy(plain)
    optimizer = torch.optim.Adam(plain.parameters(), lr=hyper.learning_rate)
    network, optimizer = ranks.prepare(plain, optimizer)

    step = episode = updates = 0
    state, _ = game.reset(seed=options.seed)
    limit = options.steps or hyper.max_episodes * game.spec.max_episode_steps
    with reporter(ranks.rank == 0, limit) as report:
        while step < limit and episode < hyper.max_episodes:
            if random.random() < hyper.epsilon(step):
                action = int(random.integers(game.action_space.n))
            else:
                with torch.no_grad():
                    action = int(plain(torch.from_numpy(state)).argmax())
            following, reward, ended, cut, _ = game.step(action)
            replay.add(state, action, float(reward), following, ended)
            state, step = following, step + 1
            if ended or cut:
                state, _ = game.reset()
                episode += 1

            if len(replay) >= hyper.min_replay_size and step % options.update_every == 0:
                at = share(ranks, replay.draw(hyper.batch_size))
                loss = loss_of(network, target, replay, at, hyper.discount_factor)
                ranks.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                updates += 1
            if step % hyper.target_update_interval == 0:
                target.load_state_dict(plain.state_dict())
            if step % options.evaluate_every == 0:
                # All ranks have bitwise the same weights, and come to the same decision.
                mean_return = evaluate(plain, seed=options.seed)
                log.write(step=updates, game_step=step, episode=episode, mean_return=mean_return)
                report(step, f"episode {episode}, mean return {mean_return:.0f}")
                # The best of many evaluations is partly luck: other episodes have to confirm it.
                if mean_return >= SOLVED and evaluate(plain, seed=CONFIRM + step) >= SOLVED:
                    return network, True
    return network, False


def main() -> None:
    """Train one network, and play 100 new episodes with it."""
    options = parse_arguments()
    hyper = read_hyperparameters(options)
    if options.seed is None:
        options.seed = hyper.seed
    ranks = start(options)
    log = Log(options.jsonl, ranks.rank == 0)
    began = time.perf_counter()
    network, solved = train(ranks, hyper, options, log)
    seconds = time.perf_counter() - began
    final = evaluate(network, seed=FINAL + options.seed)
    log.write(solved=solved, final_return=final, seconds=round(seconds, 1))
    if ranks.rank == 0:
        how = "solved" if solved else "not solved"
        print(f"{how} after {seconds:.0f} s; mean return over 100 new episodes: {final:.1f}")
    finish(ranks, network, options)


if __name__ == "__main__":
    main()
