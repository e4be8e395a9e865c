"""The demo: does clipping matter here? Real training runs on gloo ranks, a table and a picture.

For each policy and seed it starts the command that you would start yourself:

    accelerate launch --config_file configs/accelerate/fsdp2_cpu.yaml \
        -m distclip run --config POLICY.yaml launch/train_lm.py --seed SEED

The training script knows nothing of distclip. The learning rate is one at which runs without
clipping are lost, and was found by a search: see docs/demo.md. Options that are not listed go to
that script.
"""

from __future__ import annotations

from pathlib import Path

from study import NO_CLIPPING, Outcome, Setting, Study, System, count, global_norm, parser, spread

AGC = Setting("AGC 0.1", {"policy": {"name": "agc", "clip_factor": 0.1}, "on_nonfinite": "pass"})


def lost(run: Outcome) -> bool:
    """Whether the loss stopped being a number."""
    return run.end["held_out_loss"] is None


def main() -> None:
    """Run everything and show it."""
    made = parser(__doc__, seeds=3, output="demo", launch="fsdp2_cpu", ranks=4)
    made.add_argument("--steps", type=int, default=60, help="training steps (default: 60)")
    made.add_argument("--text", type=Path, help="a file (default: Python's own documentation)")
    options, arguments = made.parse_known_args()
    arguments += ["--steps", str(options.steps), "--log-every", "5"]
    if options.text is not None:
        arguments += ["--text", str(options.text)]
    system = System(
        title="A byte-level transformer, SGD at a learning rate where clipping matters",
        script="train_lm.py",
        steps=options.steps,
        shown="loss",
        curve="Loss",
        columns={
            "held-out loss, nats per byte": lambda runs: spread(
                run.end["held_out_loss"] for run in runs if not lost(run)
            ),
            "runs lost": lambda runs: count(runs, lost),
        },
    )
    study = Study(system, options, arguments)
    study.show(study.run([NO_CLIPPING, global_norm(0.5), AGC]))


if __name__ == "__main__":
    main()
