"""Tables and the picture of docs/scale.md, from a recorded trace."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale.model import Network, Way
from benchmarks.scale.tracing import Collective

LAYOUTS = {
    "fsdp2": "FSDP2",
    "hsdp": "HSDP",
    "fsdp2_tp": "FSDP2 over TP 8",
    "fsdp2_ep": "FSDP2, EP 64",
}
MODELS = {"8B": "Llama 3 8B", "405B": "Llama 3 405B", "671B": "DeepSeek-V3 671B"}

GRADIENTS = 405e9 * 4
"""Bytes of the fp32 gradients that the model is drawn for: a model of 405 B parameters."""

DRAWN_FOR = 1137
"""Its parameters."""

RANKS = tuple(2**n for n in range(3, 15))


def size(number: float) -> str:
    """Bytes in words: ``9.1 kB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError


def _collectives(sent: Sequence[dict[str, Any]]) -> str:
    counted = Counter((each["op"], each["ranks"], each["bytes"]) for each in sent)
    return "<br>".join(
        f"{count} {op.replace('all_reduce', 'allreduce')} of {size(given)} over {ranks:,}"
        for (op, ranks, given), count in counted.items()
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def step_table(document: dict[str, Any]) -> str:
    """What a step of distclip sends."""
    rows = []
    for row in document["distclip"]:
        shown = (
            f"{row['ranks']:,}",
            LAYOUTS[row["layout"]],
            MODELS[row["model"]],
            str(row["parameters"]),
        )
        first = "the same" if row["first"] == row["later"] else _collectives(row["first"])
        rows.append((*shown, f"`{row['policy']}`", _collectives(row["later"]), first))
    heads = "ranks", "sharding", "model", "parameters", "policy", "every step", "the first step"
    return _table(heads, rows)


def construction_table(document: dict[str, Any]) -> str:
    """What building a clipper sends."""
    rows = []
    for row in document["distclip"]:
        if row["policy"] == "global_norm":
            heard = sum(each["bytes"] for each in row["construction"]) * row["ranks"]
            rows.append(
                (
                    f"{row['ranks']:,}",
                    LAYOUTS[row["layout"]],
                    str(row["parameters"]),
                    _collectives(row["construction"]),
                    size(heard),
                    f"{row['seconds']:.1f} s",
                )
            )
    heads = "ranks", "sharding", "parameters", "each rank sends", "and receives", "took here"
    return _table(heads, rows)


def peer_table(document: dict[str, Any]) -> str:
    """What the peers send in one call."""
    rows = []
    for row in document["peers"]:
        ops = str(row["ops"]) if row["ops"] else "not taken"
        sent = _collectives(row["collectives"]) or "none"
        shown = f"{row['ranks']:,}", str(row["parameters"]), sent, ops
        rows.append((f"{row['name']} ({row['version']})", *shown))
    return _table(("way", "ranks", "parameters", "one call sends", "ops"), rows)


def ways(document: dict[str, Any]) -> list[Way]:
    """What is drawn: traced on 1,024 ranks, carried to others."""

    def sent(rows: Sequence[dict[str, Any]], key: str) -> list[Collective]:
        (row,) = rows
        return [Collective(**each) for each in row[key]]

    def ours(policy: str, layout: str) -> list[Collective]:
        rows = [r for r in document["distclip"] if r["ranks"] == 1024]
        rows = [r for r in rows if (r["policy"], r["layout"]) == (policy, layout)]
        (parameters,) = {row["parameters"] for row in rows}
        # The message of the larger model: the numbers are per parameter.
        return [
            Collective(c.op, c.ranks, _scaled(c.bytes, policy, parameters))
            for c in sent(rows, "later")
        ]

    def peer(name: str) -> list[Collective]:
        rows = [r for r in document["peers"] if r["ranks"] == 1024]
        return sent([r for r in rows if r["name"] == name], "collectives")

    found = [
        Way("distclip, global_norm, any sharding", ours("global_norm", "fsdp2_tp"), 1024, 1),
        Way("distclip, agc (rows), FSDP2", ours("agc", "fsdp2"), 1024, 2, per_rank=8),
        Way("torch on FSDP2", peer("torch clip_grad_norm_, fsdp2"), 1024, 3),
        Way("torch on FSDP2 over TP 8", peer("torch clip_grad_norm_, fsdp2_tp"), 1024, 3),
        Way("FSDP1's method", peer("FSDP1's clip_grad_norm_"), 1024, 3),
    ]
    names = {row["name"] for row in document["peers"]}
    for name, shown, passes in (
        ("torchtitan, fsdp2 in 8 pipeline stages", "torchtitan, FSDP2 in 8 stages", 3),
        ("DeepSpeed ZeRO-1, bf16", "DeepSpeed ZeRO-1, bf16", 4),
    ):
        if name in names:
            found.append(Way(shown, peer(name), 1024, passes))
    return found


def _scaled(given: int, policy: str, parameters: int) -> int:
    """Bytes of the message with DRAWN_FOR parameters instead."""
    each = 8 * (4 if policy == "agc" else 1)
    return given + each * (DRAWN_FOR - parameters)


def model_table(document: dict[str, Any]) -> str:
    """The modelled times."""
    network, shown = Network(), (1024, 4096, 16384)
    rows = [
        (
            way.name,
            *(
                f"{1e6 * way.talking(ranks, network):.0f} + "
                f"{1e6 * way.reading(ranks, GRADIENTS, network):.0f}"
                for ranks in shown
            ),
        )
        for way in ways(document)
    ]
    return _table(("way", *(f"{ranks:,} ranks, µs" for ranks in shown)), rows)


TABLES = {
    "step": step_table,
    "construction": construction_table,
    "peers": peer_table,
    "model": model_table,
}


def fill(page: str, document: dict[str, Any]) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name}: made by python -m benchmarks\.scale -->\n).*?(<!-- end -->)"
        made = table(document)
        page, found = re.subn(
            pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", page, flags=re.DOTALL
        )
        if found != 1:
            raise ValueError(f"the page has {found} places for the table {name!r}")
    return page


def draw(document: dict[str, Any], file: Path) -> None:
    """Modelled time over ranks: collectives alone, and with the passes over the gradients."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    network = Network()
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, way in enumerate(ways(document)):
        talking = [1e6 * way.talking(ranks, network) for ranks in RANKS]
        reading = [1e6 * way.reading(ranks, GRADIENTS, network) for ranks in RANKS]
        style = {"color": f"C{number}", "label": way.name}
        style["linestyle"] = "-" if way.name.startswith("distclip") else "--"
        left.plot(RANKS, talking, **style)
        both = [a + b for a, b in zip(talking, reading, strict=True)]
        right.plot(RANKS, both, **style)
    left.set_title("collectives", loc="left")
    right.set_title("collectives and passes over 405 B fp32 gradients", loc="left")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("ranks")
        axes.set_ylabel("µs a step")
        axes.grid(alpha=0.3)
    left.set_ylim(bottom=0)
    left.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)
