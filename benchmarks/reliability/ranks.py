"""Ranks that are killed, stopped, raise or leave; and runs that are resumed after that."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.reliability.ranks_train import reported
from benchmarks.reliability.rows import Row
from distclip.testing import RankError, RankPool
from distclip.tools.simulate.layouts import accelerate_config, free_port

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "benchmarks.reliability.ranks_train"
RANKS = 2
LIMIT = 15.0
"""Seconds in which all other ranks have ended, with a ``stuck_after`` of 4."""

GIVE_UP = 90.0

FAULTS = ("SIGKILL", "SIGSTOP", "os._exit", "raise", "sys.exit")
WHENS = {
    "before": FAULTS,
    "during": ("SIGKILL", "SIGSTOP", "os._exit"),  # Python runs nothing in a collective
    "after": FAULTS,
}
LAUNCHERS = ("pool", "torchrun", "accelerate launch", "distclip simulate")
CASES = [
    (launcher, fault, when)
    for launcher in LAUNCHERS
    for when, faults in WHENS.items()
    for fault in faults
    if launcher != "distclip simulate" or when == "before"  # most of a minute each
]
COUNT = len(CASES) + sum(launcher == "pool" for launcher, _, _ in CASES)
"""Each case once, and those of the pool twice."""


@dataclass
class Outcome:
    """What came of one injection.

    Attributes:
        seconds: from the fault until the last of the other ranks had ended.
        named: whether something that was printed or raised names the rank.
        step: whether an error of distclip names the step.
        resumed: whether the run that went on from the checkpoint took bitwise the same decisions.
        said: what was printed, for a failure.
    """

    seconds: float
    named: bool
    step: bool
    resumed: bool
    said: str

    @property
    def failed(self) -> bool:
        """Whether it did not end as promised."""
        return not (self.seconds <= LIMIT and self.named and self.resumed)


def run(count: int, seed: int) -> list[Row]:
    """``count`` injections, one row for each launcher and fault."""
    draw = random.Random(seed)
    every = [*CASES, *(case for case in CASES if case[0] == "pool")]
    chosen = every if count >= len(every) else draw.sample(every, count)
    jobs = [(*case, number % RANKS, draw.randrange(1, 4)) for number, case in enumerate(chosen)]
    with tempfile.TemporaryDirectory(prefix="distclip-ranks-") as name:
        root = Path(name)
        wanted = through(root / "through")
        found: dict[tuple[str, str], list[Outcome]] = {}
        with ThreadPoolExecutor(3) as threads:
            folders = [root / str(number) for number in range(len(jobs))]
            for job, outcome in zip(
                jobs, threads.map(lambda j, f: inject(f, wanted, *j), jobs, folders), strict=True
            ):
                if outcome.failed:
                    print(job, outcome, file=sys.stderr)
                found.setdefault((job[0], job[1]), []).append(outcome)
    return [row(launcher, fault, outcomes) for (launcher, fault), outcomes in found.items()]


def row(launcher: str, fault: str, outcomes: list[Outcome]) -> Row:
    """What came of all injections of a kind."""
    steps = sum(outcome.step for outcome in outcomes)
    slowest = max(outcome.seconds for outcome in outcomes)
    return Row(
        f"{fault} under {launcher}",
        f"one of two ranks, {_listed(launcher, fault)} the clip",
        len(outcomes),
        f"others ended within {slowest:.1f} s, the rank named; the step named by a CollectiveError "
        f"in {steps} of {len(outcomes)} (else the launcher was first); resumed bitwise the same",
        sum(outcome.failed for outcome in outcomes),
    )


def _listed(launcher: str, fault: str) -> str:
    return " or ".join(when for name, each, when in CASES if (name, each) == (launcher, fault))


def through(folder: Path) -> dict[int, dict[int, Any]]:
    """The decisions of a run to which nothing happens."""
    folder.mkdir()
    with RankPool(RANKS) as pool:
        pool.run(reported, folder, "none", "", 0, 0, timeout=GIVE_UP)
    return logged(folder)


def inject(
    folder: Path,
    wanted: dict[int, dict[int, Any]],
    launcher: str,
    fault: str,
    when: str,
    victim: int,
    at: int,
) -> Outcome:
    """One fault, and the run that goes on from the checkpoint."""
    folder.mkdir()
    if launcher == "pool":
        said = in_pool(folder, fault, when, victim, at)
    else:
        said = launched(folder, launcher, fault, when, victim, at)
    begun = _read(folder / "fault.json").get("time")
    ends = [_read(folder / f"end{rank}.json") for rank in range(RANKS) if rank != victim]
    ended = [end.get("time") or _read(folder / "gone.json")["time"] for end in ends]
    seconds = max(ended) - begun if begun is not None else float("inf")
    errors = [end for end in ends if end.get("error") == "CollectiveError"]
    printed = re.search(rf"\brank *:? {victim}\b|\branks? {victim}\b", re.sub(r" +", " ", said))
    named = printed is not None or any(victim in end["ranks"] for end in errors)
    step = any(end["step"] in (at, at + 1) for end in errors)
    with RankPool(RANKS) as pool:
        pool.run(reported, folder, "none", "", 0, 0, timeout=GIVE_UP)
    return Outcome(seconds, named, step, logged(folder) == wanted, said[-3000:])


def in_pool(folder: Path, *fault: Any) -> str:
    """Under the testing kit; what its error says."""
    with RankPool(RANKS) as pool:
        try:
            pool.run(reported, folder, *fault, timeout=12.0)
        except RankError as error:
            return str(error).splitlines()[0]
        finally:
            _gone(folder)
    return "no error"


def launched(folder: Path, launcher: str, *fault: Any) -> str:
    """Under a launcher, in processes of their own; what it and the ranks print."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(folder / "output.txt", "w+") as output:
        process = subprocess.Popen(
            [*command(folder, launcher), str(folder), *map(str, fault)],
            stdout=output, stderr=output, cwd=ROOT, env=environment,
        )  # fmt: skip
        deadline = time.monotonic() + GIVE_UP
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            _release(folder, fault[2])
            if not any(_runs(folder, rank) for rank in range(RANKS) if rank != fault[2]):
                _gone(folder)
        _gone(folder)
        if process.poll() is None:
            process.kill()
        process.wait()
        output.seek(0)
        return output.read()


def command(folder: Path, launcher: str) -> list[str]:
    """Starts two ranks of the training."""
    loopback = [sys.executable, "-m", "distclip.testing.ranks.loopback"]
    port = str(free_port())
    if launcher == "torchrun":
        return [
            *loopback, "torch.distributed.run", "--nproc-per-node", str(RANKS),
            "--master-addr", "127.0.0.1", "--master-port", port, "-m", TRAIN,
        ]  # fmt: skip
    if launcher == "accelerate launch":
        path = folder / "accelerate.yaml"
        path.write_text(yaml.safe_dump(accelerate_config("ddp", RANKS)))
        return [
            *loopback, "accelerate.commands.launch", "--config_file", str(path),
            "--main_process_ip", "127.0.0.1", "--main_process_port", port, "-m", TRAIN,
        ]  # fmt: skip
    return [
        sys.executable, "-m", "distclip", "simulate", "--layout", "torchrun", "--ranks", str(RANKS),
        "--timeout", "12", "-m", TRAIN,
    ]  # fmt: skip


def _release(folder: Path, victim: int) -> None:
    """End a stopped process when the others have ended: torchrun would wait 30 s for it."""
    others = [folder / f"end{rank}.json" for rank in range(RANKS) if rank != victim]
    pid = _read(folder / "fault.json").get("pid")
    if pid is None or not all(map(Path.exists, others)):
        return
    with contextlib.suppress(OSError, IndexError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        if stat.rpartition(")")[2].split()[0] == "T":
            os.kill(pid, signal.SIGKILL)


def _runs(folder: Path, rank: int) -> bool:
    """Whether a rank has not ended; true before it has begun."""
    pid = _read(folder / f"pid{rank}.json").get("pid")
    if pid is None:
        return True
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


def _gone(folder: Path) -> None:
    """Note when the others were found to have ended, once."""
    path = folder / "gone.json"
    if not path.exists():
        path.write_text(json.dumps({"time": time.time()}))


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {}


def logged(folder: Path) -> dict[int, dict[int, Any]]:
    """Rank -> step -> decisions and weights; the last run counts."""
    return {
        rank: {
            line["step"]: line
            for line in map(json.loads, (folder / f"log{rank}.jsonl").read_text().splitlines())
        }
        for rank in range(RANKS)
    }
