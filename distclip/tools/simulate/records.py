"""What the ranks of a launch wrote, read again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distclip.tools.simulate.task import journal_of, output_of


class ShardBox(NamedTuple):
    """A box of a logical parameter that a rank holds."""

    name: str
    offsets: tuple[int, ...]
    extents: tuple[int, ...]


class Sums(NamedTuple):
    """Fingerprint and sum of squares of the local gradient (None: none) and of the weights."""

    gradient: int | None
    squares: float | None
    weights: int
    weight_squares: float


@dataclass
class Step:
    """One optimizer step of one rank, and what led to it.

    Attributes:
        samples: fingerprints of those that the model was called with.
        sizes: how many in each call.
        epoch: how often a DataLoader had been started.
        modules: names, in the order in which they were run.
        operations: how often each is in the graphs of the losses.
        losses: what was differentiated.
        clips: reports of clipping.
        norm: DeepSpeed's, if there was one.
        world: size of the process group.
        pieces: what this rank holds.
        unseen: what could not be read of them.
        done: whether the step came to its end.
    """

    samples: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    epoch: int = 0
    modules: list[str] = field(default_factory=list)
    operations: dict[str, int] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    clips: list[dict[str, Any]] = field(default_factory=list)
    norm: float | None = None
    world: int | None = None
    pieces: dict[ShardBox, Sums] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    done: bool = False

    @property
    def begun(self) -> bool:
        """Whether the optimizer's step was reached."""
        return self.world is not None


@dataclass
class Rank:
    """The journal of one rank.

    Attributes:
        number: its rank.
        steps: in order; the last may be incomplete.
        pid: None: it never started.
        code: with which the script ended; None: it did not.
        error: what it raised, one line.
        trace: with the traceback.
        failed_at: when it raised, seconds since the epoch.
        ended_at: when the script ended.
        output: what it printed.
        events: lines written so far.
        stopped: whether its process was stopped (SIGSTOP) when the launch was given up.
    """

    number: int
    steps: list[Step] = field(default_factory=list)
    pid: int | None = None
    code: int | None = None
    error: str = ""
    trace: str = ""
    failed_at: float = math.inf
    ended_at: float = math.inf
    output: str = ""
    events: int = 0
    stopped: bool = False
    _known: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """How many steps the rank has taken."""
        return sum(step.done for step in self.steps)

    @property
    def completed(self) -> list[Step]:
        """Steps that were begun, with all that led to them."""
        return [step for step in self.steps if step.begun]

    def place(self) -> tuple[int, int, int, bool]:
        """How far it has come: steps, and what of the next."""
        last = self.steps[self.done] if len(self.steps) > self.done else Step()
        return self.done, len(last.sizes), len(last.losses), last.begun

    def take(self, record: dict[str, Any]) -> None:
        """Add one line of the journal."""
        self.events += 1
        event = record["event"]
        if event == "start":
            self.pid = record["pid"]
        elif event == "end":
            self.code, self.ended_at = record["code"], record["time"]
        elif event == "raised":
            self.error, self.trace = record["error"], record["trace"]
            self.failed_at = record["time"]
        else:
            while len(self.steps) <= record["step"]:
                self.steps.append(Step())
            self._take(event, self.steps[record["step"]], record)

    def _take(self, event: str, step: Step, record: dict[str, Any]) -> None:
        if event == "forward":
            step.samples += record["samples"]
            step.sizes.append(len(record["samples"]))
            step.epoch = record["epoch"]
            step.modules = [*step.modules, *self._full("modules", record)]
        elif event == "backward":
            step.losses.append(record["loss"])
            for name, count in self._full("operations", record):
                step.operations[name] = step.operations.get(name, 0) + count
        elif event == "clip":
            step.clips.append(record)
        elif event == "norm":
            step.norm = record["norm"]
        elif event == "step":
            step.world = record["world"]
            step.unseen = record["unseen"]
            for name, offsets, extents, *sums in record["pieces"]:
                step.pieces[ShardBox(name, tuple(offsets), tuple(extents))] = Sums(*sums)
        elif event == "stepped":
            step.done = True

    def _full(self, what: str, record: dict[str, Any]) -> Any:
        return self._known.setdefault(record[what], record.get(f"{what}_are"))


class Reader:
    """Follows the journals of a launch."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder = folder
        self.ranks = [Rank(number) for number in range(world)]
        self._offsets = [0] * world

    def read(self) -> bool:
        """Take in what is new; whether there was something."""
        found = False
        for rank in self.ranks:
            path = journal_of(self.folder, rank.number)
            if not path.exists():
                continue
            with open(path, "rb") as file:
                file.seek(self._offsets[rank.number])
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]  # a line may still be on its way
            self._offsets[rank.number] += len(whole)
            for line in whole.splitlines():
                rank.take(json.loads(line))
                found = True
        return found

    def read_output(self) -> None:
        """Read what the ranks printed."""
        for rank in self.ranks:
            rank.output = written(output_of(self.folder, rank.number))


def written(path: Path) -> str:
    """What has been written to a file; nothing if there is none."""
    return path.read_text(errors="replace") if path.exists() else ""
