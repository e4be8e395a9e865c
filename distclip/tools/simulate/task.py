"""What the ranks of a simulated launch are given to do, and the files that they write."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

TASK = "DISTCLIP_SIMULATE"
"""Names the file with the task of a rank."""


@dataclass(frozen=True)
class Task:
    """What the ranks of one launch are to do.

    Attributes:
        folder: where they write.
        script: path, or module.
        arguments: of the script.
        module: whether ``script`` is a module.
        config: policy to run under; None: none, and the script is only watched.
        steps: end after so many optimizer steps; None: when the script ends.
        accelerate: whether Accelerate is to be given gloo ranks on CPU.
        log: name of the file in ``folder`` that the policy's log goes to, if it has one.
    """

    folder: str
    script: str
    arguments: list[str]
    module: bool = False
    config: str | None = None
    steps: int | None = None
    accelerate: bool = False
    log: str | None = None

    def save(self) -> Path:
        """Write the task into its folder."""
        path = Path(self.folder) / "task.json"
        path.write_text(json.dumps(dataclasses.asdict(self)))
        return path

    @classmethod
    def load(cls, path: str) -> Task:
        """Read a task from its folder."""
        return cls(**json.loads(Path(path).read_text()))


def journal_of(folder: Path, rank: int) -> Path:
    """The path of a rank's journal."""
    return folder / f"rank{rank}.jsonl"


def output_of(folder: Path, rank: int) -> Path:
    """The path of a rank's output."""
    return folder / f"rank{rank}.out"


def stacks_of(folder: Path, rank: int) -> Path:
    """The stacks of a rank, when it was asked for them or died of a signal."""
    return folder / f"rank{rank}.stacks"
