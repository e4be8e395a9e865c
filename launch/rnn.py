"""A recurrent network whose gradients explode: does it learn, with and without clipping?

Runs `launch/train_rnn.py` under `accelerate launch` (or `--torchrun`) on 2 ranks. Options that are
not listed go to that script.
"""

from __future__ import annotations

from study import NO_CLIPPING, Outcome, Study, System, count, global_norm, parser, spread, states


def learned(run: Outcome) -> bool:
    """Whether an error below 1 % was reached."""
    return run.end["learned_at"] is not None


SYSTEM = System(
    title="A tanh RNN on the temporal order problem",
    script="train_rnn.py",
    steps=800,
    shown="accuracy",
    curve="Accuracy on unseen sequences",
    columns={
        "learned (error < 1 %)": lambda runs: count(runs, learned),
        "at step": lambda runs: spread(
            (run.end["learned_at"] for run in runs if learned(run)), digits=0
        ),
        "last accuracy": lambda runs: spread(run.end["accuracy"] for run in runs),
        "norm <0.01 / 1 to 10 / >100": states,
    },
)


def main() -> None:
    """Run everything and show it."""
    made = parser(__doc__, seeds=5, output="rnn")
    made.add_argument("--torchrun", action="store_true", help="torchrun in place of Accelerate")
    options, arguments = made.parse_known_args()
    study = Study(SYSTEM, options, arguments)
    study.show(study.run([NO_CLIPPING, global_norm(1.0)]))


if __name__ == "__main__":
    main()
