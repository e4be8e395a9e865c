"""A DQN on CartPole-v1, with and without clipping: does it solve the game, and what was clipped?

Runs `launch/train_dqn.py` with the hyperparameters of `configs/hyperparams_config.json` under
`accelerate launch` (or `--torchrun`) on 2 ranks, until the greedy policy has a mean return of 475
over 100 episodes. Options that are not listed go to that script.
"""

from __future__ import annotations

import json

from study import NO_CLIPPING, ROOT, Study, System, count, global_norm, parser, spread, states

SYSTEM = System(
    title="DQN on CartPole-v1",
    script="train_dqn.py",
    steps=2500,
    shown="mean_return",
    curve="Mean return of the greedy policy",
    columns={
        "solved": lambda runs: count(runs, lambda run: run.end["solved"]),
        "return over 100 new episodes": lambda runs: spread(
            (run.end["final_return"] for run in runs), digits=0
        ),
        "updates": lambda runs: spread((run.last_step for run in runs), digits=0),
        "norm <0.01 / 1 to 10 / >100": states,
    },
)


def main() -> None:
    """Run everything and show it."""
    made = parser(__doc__, seeds=5, output="dqn")
    made.add_argument("--torchrun", action="store_true", help="torchrun in place of Accelerate")
    options, arguments = made.parse_known_args()
    hyper = json.loads((ROOT / "configs" / "hyperparams_config.json").read_text())
    study = Study(SYSTEM, options, arguments)
    study.show(study.run([NO_CLIPPING, global_norm(hyper["gradient_clip_norm"])]))


if __name__ == "__main__":
    main()
