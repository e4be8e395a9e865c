"""DreamerV3's optimizer chain on a small world model under FSDP2, with and without its clipping.

Runs `launch/train_dreamer.py` under `accelerate launch` on 2 ranks. The optimizer,
`distclip.optim.dreamer_v3`, clips by itself; without its clipping the norms are those that
`distclip run` measures. Options that are not listed go to that script.
"""

from __future__ import annotations

from study import NO_CLIPPING, Setting, Study, System, parser, spread, states

SETTINGS = [
    Setting("no clipping", NO_CLIPPING.policy, ("--agc", "0")),
    Setting("AGC 0.3", {**NO_CLIPPING.policy, "log": None}, ("--clip-log", "{clip_log}")),
]

SYSTEM = System(
    title="A world model with DreamerV3's optimizer",
    script="train_dreamer.py",
    steps=300,
    shown="loss",
    curve="Loss on unseen games",
    columns={
        "loss on unseen games": lambda runs: spread(run.end["loss"] for run in runs),
        "squared error, symlog": lambda runs: spread(run.end["error"] for run in runs),
        "norm <0.01 / 1 to 10 / >100": states,
    },
)


def main() -> None:
    """Run everything and show it."""
    options, arguments = parser(
        __doc__, seeds=3, output="dreamer", launch="fsdp2_cpu"
    ).parse_known_args()
    study = Study(SYSTEM, options, arguments)
    study.show(study.run(SETTINGS))


if __name__ == "__main__":
    main()
