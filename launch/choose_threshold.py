"""Choose a threshold: measure, suggest, and try the suggestion against too small and too large.

1. Runs without clipping, whose norms are recorded (`policy: measure`).
2. `distclip suggest` on these logs: the 90th percentile of the norms.
3. Runs with the suggestion, with 0.1, which is said to slow learning down, and with 100, which is
   said not to prevent explosions.

The system is the recurrent network of `launch/rnn.py`, or with `--system dqn` the DQN of
`launch/dqn.py`. Options that are not listed go to its training script.
"""

from __future__ import annotations

import subprocess
import sys

import dqn
import rnn
import yaml
from study import NO_CLIPPING, Outcome, Study, global_norm, parser

SYSTEMS = {"rnn": rnn.SYSTEM, "dqn": dqn.SYSTEM}
TOO_SMALL, TOO_LARGE = 0.1, 100.0


def suggest(measured: list[Outcome]) -> tuple[str, float]:
    """What `distclip suggest` prints for recorded runs, and the threshold in it."""
    logs = [str(run.clip_log) for run in measured]
    command = [sys.executable, "-m", "distclip", "suggest", *logs]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return printed, yaml.safe_load(printed)["policy"]["max_norm"]


def main() -> None:
    """Measure, suggest, try, show."""
    made = parser(__doc__, seeds=3, output="choose_threshold")
    made.add_argument("--torchrun", action="store_true", help="torchrun in place of Accelerate")
    made.add_argument("--system", choices=SYSTEMS, default="rnn", help="(default: rnn)")
    options, arguments = made.parse_known_args()
    options.output /= options.system
    study = Study(SYSTEMS[options.system], options, arguments)
    results = study.run([NO_CLIPPING])
    printed, threshold = suggest(results[NO_CLIPPING.label])
    study.console.print(printed, markup=False, soft_wrap=True)
    results |= study.run(map(global_norm, (TOO_SMALL, threshold, TOO_LARGE)))
    study.show(results)


if __name__ == "__main__":
    main()
