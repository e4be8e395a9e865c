"""The tables and the picture of docs/performance.md, from the recorded runs of ``distclip bench``.

    python -m benchmarks.history

Takes every file of ``benchmarks/results`` that this version of ``distclip bench`` reads and that
was measured on two ranks; a new recorded run needs no more than this command.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from distclip.errors import DistclipError
from distclip.monitor.plots import BEFORE, COLOURS, STYLE, backend
from distclip.tools.bench.record import CaseRecord, Record, ratio, read_record

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "performance.png"
PEERS = (
    "torch ", "torchtitan", "Accelerate", "FSDP1", "DeepSpeed's own", "timm", "Composer",
)  # fmt: skip
"""How the ways begin that distclip takes the place of; other ways do less than clipping."""
PANELS = {
    "Nothing is clipped": (
        "small", "large", "plain-small", "plain-many", "plain-large", "plain-bf16", "fsdp1-large",
    ),
    "Everything is clipped": (
        "small-clipped", "large-clipped", "plain-many-clipped", "plain-large-clipped",
        "ddp-small-clipped", "fsdp1-large-clipped",
    ),
}  # fmt: skip
"""The cases of the picture."""


def recorded() -> dict[str, Record]:
    """File name -> run, the oldest first."""
    found = {}
    for path in RESULTS.glob("*-2-ranks*.json"):
        try:
            record = read_record(path)
        except DistclipError:  # of an earlier format
            continue
        if record.ranks == 2:
            found[path.name] = record
    return dict(sorted(found.items(), key=lambda each: each[1].machine["date"]))


def ways_of(case: CaseRecord) -> tuple[str | None, str | None]:
    """The clipper and the function among the ways of a case."""
    names = [name for name in case.ways if "on_nonfinite" not in name]
    clipper = [name for name in names if name.startswith(("GradClipper(", "distclip global_norm"))]
    function = [name for name in names if name.startswith("distclip ") and "_" in name.split()[1]]
    function = [name for name in function if name not in clipper]
    return next(iter(clipper), None), next(iter(function), None)


def compared(record: Record) -> dict[str, CaseRecord]:
    """The cases of a run with a peer."""
    return {
        name: case
        for name, case in record.cases.items()
        if case.peer in case.ways and case.peer.startswith(PEERS)
    }


def fastest(case: CaseRecord) -> str:
    """The peer that takes the least time."""
    peers = [way for way in case.ways if way.startswith(PEERS)]
    return max(peers, key=lambda way: ratio(case, case.peer, way))


def times(case: CaseRecord | None, peer: str, way: str | None) -> float:
    """How many times as fast as ``peer``; NaN where it was not measured."""
    return math.nan if case is None or way is None else ratio(case, peer, way)


def _cell(number: float) -> str:
    if math.isnan(number):
        return ""
    return f"**{number:.2f}**" if round(number, 2) < 1.0 else f"{number:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def newest(runs: dict[str, Record]) -> str:
    """Every case of the newest run."""
    name, record = list(runs.items())[-1]
    rows = []
    for case in compared(record).values():
        peer = fastest(case)
        found = [times(case, each, way) for way in ways_of(case) for each in (case.peer, peer)]
        others = _cell(found[1]) or _cell(found[3])
        shown = "" if peer == case.peer else f"{others}, {peer}"
        rows.append([case.title, case.peer, _cell(found[0]), _cell(found[2]), shown])
    machine = record.machine
    return (
        f"`benchmarks/results/{name}`: {machine['date'][:10]}, {machine['processor']}, "
        f"torch {machine['torch']}, {record.ranks} gloo ranks.\n\n"
        + _table(["case", "against", "clipper", "function", "against the fastest peer"], rows)
    )


def history(runs: dict[str, Record]) -> str:
    """The clipper's ratio in each run, of every case of the newest run that an earlier one has."""
    *_, last = runs.values()
    rows = []
    for name, case in compared(last).items():
        way, _ = ways_of(case)
        found = [times(run.cases.get(name), case.peer, way) for run in runs.values()]
        if sum(not math.isnan(number) for number in found) > 1:
            rows.append([case.title, *map(_cell, found)])
    return _table(["case", *(_when(run) for run in runs.values())], rows)


def _when(run: Record) -> str:
    return run.machine["date"][:16].replace("T", " ")


def draw(runs: dict[str, Record]) -> None:
    """A line for each case over the runs."""
    matplotlib, figure_class = backend()
    *_, last = runs.values()
    drawn = {name for cases in PANELS.values() for name in cases}
    runs = {name: run for name, run in runs.items() if drawn & run.cases.keys()}
    with matplotlib.rc_context(STYLE):
        figure = figure_class(figsize=(11.0, 4.6), layout="constrained")
        for panel, (title, cases) in zip(
            figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True
        ):
            for name, colour in zip(cases, COLOURS, strict=False):
                case = last.cases[name]
                way, _ = ways_of(case)
                found = [times(run.cases.get(name), case.peer, way) for run in runs.values()]
                label = re.sub(r", (not )?clipping$", "", case.title)
                there = [place for place, number in enumerate(found) if not math.isnan(number)]
                panel.plot(
                    there, [found[place] for place in there], "o-", color=colour, label=label
                )
            panel.axhline(1.0, color=BEFORE, linestyle="--")
            panel.set_yscale("log", base=2)
            panel.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
            panel.set_xticks(range(len(runs)), [_when(run)[5:] for run in runs.values()])
            panel.tick_params("x", labelrotation=30)
            panel.set_title(title)
            panel.legend(loc="lower left", fontsize=7)
            panel.set_ylim(0.3, 5.0)
        figure.supylabel("times as fast as the peer", fontsize=10)
        figure.savefig(PICTURE, dpi=90)


def page(text: str, runs: dict[str, Record]) -> str:
    """The page with its tables made anew."""
    for name, make in {"newest": newest, "history": history}.items():
        pattern = rf"(<!-- {name}: made by python -m benchmarks\.history -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(
            pattern, lambda found, make=make: found[1] + make(runs) + found[2], text, flags=re.S
        )
        assert count == 1, name
    return text


if __name__ == "__main__":
    runs = recorded()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), runs), encoding="utf-8")
    draw(runs)
