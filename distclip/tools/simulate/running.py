"""Behind ``distclip simulate``: a script under one layout after another, in folders of its own."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distclip import config as configuration
from distclip.errors import ConfigurationError
from distclip.tools.launch.script import Script
from distclip.tools.simulate import agreement, findings, layouts, watch
from distclip.tools.simulate.shown import LayoutOutcome
from distclip.tools.simulate.task import Task

RUN_FILES = re.compile(r"task\.json|rank\d+\.(jsonl|out|stacks)|node\d+\.log|accelerate\d+\.yaml")
"""Files that a run writes into the folder of a layout."""


@dataclass(frozen=True)
class Simulation:
    """One simulation: a script under one or several layouts.

    Attributes:
        script: path, or module.
        arguments: of the script.
        module: whether ``script`` is a module.
        ranks: over all nodes.
        nodes: each with a launcher of its own.
        config: the policy to run under; None for none.
        steps: end after so many optimizer steps; None: when the script ends.
        tolerance: relative, between layouts.
        timeout: seconds without a sign of life.
        branches: whether ranks may run different operations.
        keep: where journals and output are left; None: nowhere.
    """

    script: str
    arguments: Sequence[str]
    module: bool
    ranks: int
    nodes: int
    config: Path | None
    steps: int | None
    tolerance: float
    timeout: float
    branches: bool
    keep: Path | None

    def run(
        self,
        chosen: Sequence[str],
        tell: Callable[[str], None],
        ended: Callable[[LayoutOutcome], None] = lambda outcome: None,
    ) -> list[LayoutOutcome]:
        """Run layouts in turn, up to the first that does not come to its end; compare them.

        Args:
            chosen: layouts; the first is the reference.
            tell: gets a line on what is going on.
            ended: called after each layout.

        Raises:
            ConfigurationError: something that cannot be run, before anything is.
        """
        for name in chosen:
            layouts.check_layout(name)
        if self.ranks % self.nodes:
            raise ConfigurationError(
                f"simulate: {self.ranks} ranks cannot be spread over {self.nodes} nodes"
            )
        program = Script(self.script, self.arguments, module=self.module)
        program.check()
        log = None if self.config is None else _log_of(self.config, program)
        if self.keep is not None:
            _refuse_foreign(self.keep, chosen)
        outcomes: list[LayoutOutcome] = []
        with _folder(self.keep) as root:
            for name in chosen:
                launch = self._prepared(name, root / name, log, set(chosen))
                outcomes.append(self._ended(launch, root / name, tell))
                ended(outcomes[-1])
                if outcomes[-1].ending.how != "ended":
                    break
        _compare(outcomes, self.tolerance)
        return outcomes

    def _ended(
        self, launch: layouts.Launch, folder: Path, tell: Callable[[str], None]
    ) -> LayoutOutcome:
        ending = watch.follow_launch(
            launch, folder, self.timeout, lambda text: tell(f"{launch.layout}: {text}")
        )
        found = findings.find(ending, branches=not self.branches)
        return LayoutOutcome(launch.layout, ending, found)

    def _prepared(
        self, layout: str, folder: Path, log: str | None, chosen: set[str]
    ) -> layouts.Launch:
        """The launch of one layout, with its task in its folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():  # of an earlier run: `_refuse_foreign` has seen them
            old.unlink()
        task = Task(
            str(folder), self.script, list(self.arguments), self.module,
            None if self.config is None else str(self.config.absolute()), self.steps,
            layouts.uses_accelerate(layout), log,
        )  # fmt: skip
        task.save()
        return layouts.launch(
            layout, folder, self.ranks, 1 if layout == "single" else self.nodes,
            group_for_single=chosen == {"single", "torchrun"},
        )  # fmt: skip


def _log_of(config: Path, program: Script) -> str | None:
    """Read a configuration as the ranks will: it may import modules beside the program.

    Returns:
        Name of the file that its ``log`` section writes, if there is one.
    """
    path, argv = list(sys.path), sys.argv
    program.prepare()
    try:
        loaded = configuration.load(config)
    finally:
        sys.path[:], sys.argv = path, argv
    return Path(loaded.log.jsonl).name if loaded.log and loaded.log.jsonl else None


def _compare(outcomes: Sequence[LayoutOutcome], tolerance: float) -> None:
    first, *rest = outcomes
    for outcome in rest:
        found = agreement.compare_layouts(
            (first.layout, first.ending.ranks), (outcome.layout, outcome.ending.ranks), tolerance
        )
        if found is not None and outcome.ending.how == "ended":
            outcome.findings.append(found)


def _refuse_foreign(keep: Path, chosen: Sequence[str]) -> None:
    """Refuse a folder of a layout that holds anything but what an earlier run wrote there."""
    for folder in (keep / name for name in chosen):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise ConfigurationError(
                f"simulate: --keep {keep}: {folder} is in the way of the journals of layout "
                f"{folder.name!r}, which need a folder of that name; give a new folder"
            )
        found = list(folder.iterdir()) if folder.exists() else []
        log = _earlier_log(folder / "task.json")
        foreign = [
            path.name
            for path in found
            if log is None
            or path.is_dir()
            or not (RUN_FILES.fullmatch(path.name) or path.name == log)
        ]
        if foreign:
            reason = "was not made by simulate" if log is None else "also holds files of yours"
            raise ConfigurationError(
                f"simulate: --keep {keep}: the folder {folder} {reason} "
                f"({', '.join(sorted(foreign)[:3])}{', ...' if len(foreign) > 3 else ''}), and "
                f"would be emptied for the journals of layout {folder.name!r}; nothing was "
                f"deleted. Give a new folder, or move these files away"
            )


def _earlier_log(task: Path) -> str | None:
    """Name of the log of the run that left this task, empty without one; None: no run did."""
    try:
        return Task.load(str(task)).log or ""
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="distclip-simulate-") as folder:
        yield Path(folder)
