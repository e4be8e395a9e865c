"""``distclip simulate``: the user's own script on gloo ranks, under one layout or several."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from distclip import config as configuration
from distclip._foreign import clean
from distclip.errors import ConfigurationError
from distclip.tools.launch.script import Script
from distclip.tools.simulate import agreement, findings, layouts, nodes, shown, watch
from distclip.tools.simulate.rank import Task
from distclip.tools.simulate.shown import Outcome

CONTEXT = {"allow_interspersed_args": False}
DEFAULT = ("ddp", "fsdp2")
OURS = re.compile(r"task\.json|rank\d+\.(jsonl|out|stacks)|node\d+\.log|accelerate\d+\.yaml")
"""Files that a run writes into the folder of a layout."""


def simulate(
    script: Annotated[str, typer.Argument(help="Script, or module with -m.", show_default=False)],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGS", help="Passed to it as they are.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="gloo ranks, over all nodes.")] = 2,
    layout: Annotated[
        list[str] | None,
        typer.Option(help=f"Of: {', '.join(layouts.LAYOUTS)}. May be given several times."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Policy, YAML or JSON.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="End the script after so many optimizer steps.")
    ] = None,
    host_count: Annotated[
        int, typer.Option("--nodes", min=1, help="Nodes, each with a launcher of its own.")
    ] = 1,
    tolerance: Annotated[
        float, typer.Option(help="Relative, between layouts, for losses, norms, coefficients.")
    ] = 1e-4,
    timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds without a sign of life: then it hangs.")
    ] = 60.0,
    allow_branches: Annotated[
        bool, typer.Option("--allow-branches", help="Ranks may run different operations.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write everything as JSON.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Leave journals and output here.")] = None,
    module: Annotated[bool, typer.Option("-m", help="Run a module, as python -m does.")] = False,
) -> None:
    """Run your own training script, unchanged, on gloo ranks of this machine, and compare.

    distclip simulate --ranks 4 --layout ddp --layout fsdp2 --steps 20 train.py --lr 0.1

    The exit code is 1 if ranks or layouts do not do the same, and 0 otherwise.
    """
    # The reference first.
    chosen = sorted(dict.fromkeys(layout or DEFAULT), key=lambda name: name != "single")
    for name in chosen:
        layouts.check(name)
    if ranks % host_count:
        raise ConfigurationError(
            f"simulate: {ranks} ranks cannot be spread over {host_count} nodes"
        )
    program = Script(script, arguments or (), module=module)
    program.check()
    log = None if config is None else _log_of(config, program)
    console = Console()
    if host_count > 1 and (reason := nodes.why_not()):
        console.print(f"no network namespaces here: {reason}", style="dim", markup=False)
    if keep is not None:
        _refuse_foreign(keep, chosen)
    outcomes = []
    with _folder(keep) as root:
        for name in chosen:
            folder = root / name
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.iterdir():  # of an earlier run: `_refuse_foreign` has seen them
                old.unlink()
            task = Task(
                str(folder), script, list(arguments or ()), module,
                None if config is None else str(config.absolute()), steps,
                layouts.uses_accelerate(name), log,
            )  # fmt: skip
            task.save()
            launch = layouts.launch(
                name, folder, ranks, 1 if name == "single" else host_count,
                group_for_single=set(chosen) == {"single", "torchrun"},
            )  # fmt: skip
            with console.status(name) as status:

                def tell(text: str, name: str = name, status: Status = status) -> None:
                    status.update(escape(clean(f"{name}: {text}")))

                ending = watch.run(launch, folder, timeout, tell)
            found = findings.find(ending, branches=not allow_branches)
            outcomes.append(Outcome(name, ending, found))
            if ending.how != "ended":
                break
    _compare(outcomes, tolerance)
    shown.show(outcomes, tolerance, console)
    if skipped := chosen[len(outcomes) :]:
        console.print(f"not run after that: {', '.join(skipped)}", style="dim")
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(shown.as_json(outcomes, tolerance), encoding="utf-8")
        typer.echo(f"written to {clean(json)}")
    if not all(outcome.sound for outcome in outcomes):
        raise typer.Exit(1)


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
    return None if loaded.log is None else Path(loaded.log.jsonl).name


def _compare(outcomes: Sequence[Outcome], tolerance: float) -> None:
    first, *rest = outcomes
    for outcome in rest:
        found = agreement.compare(
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
            if log is None or path.is_dir() or not (OURS.fullmatch(path.name) or path.name == log)
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
