"""What a notebook shows of a report and of a clipper: small tables, without colours of their own.

Names and values are foreign text: nothing of them becomes markup.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from distclip.common.foreign import in_one_line

LARGEST_LISTED = 10
"""Parameters in the table of the largest ones."""


def report_html(values: Mapping[str, Any]) -> str:
    """A table of one report in HTML, from what ``ClipReport.to_dict`` returns."""
    rows = [
        ("norm before clipping", _number(values["total_norm"])),
        ("norm after clipping", _number(values["clipped_norm"])),
        ("smallest coefficient", _number(values["coefficient"])),
    ]
    if not math.isnan(values["threshold"]):
        rows.append(("threshold", _number(values["threshold"])))
    rows.append(("share of the parameters clipped", f"{values['clipped_fraction']:.1%}"))
    if values["skipped"]:
        rows.append(("update", "skipped"))
    if bad := values["nonfinite"]:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        rows.append(("NaN or inf in", ", ".join(in_one_line(name, 200) for name in bad[:5]) + more))
    rows += [(f"norm of part {in_one_line(p, 200)}", _number(n)) for p, n in _of(values, "parts")]
    return _table("Clipping of one step", (), rows) + _largest(dict(_of(values, "parameters")))


def clipper_html(rows: Sequence[tuple[str, str]], values: Mapping[str, Any] | None) -> str:
    """Of what a clipper says of itself, and its last report."""
    last = "" if values is None else report_html(values)
    return _table("Gradient clipper", (), rows) + last


def _of(values: Mapping[str, Any], key: str) -> Any:
    return values.get(key, {}).items()


def _largest(parameters: Mapping[str, Mapping[str, float]]) -> str:
    """The parameters with the largest norms, those that are not finite first."""

    def size(name: str) -> float:
        norm = parameters[name]["norm"]
        return math.inf if math.isnan(norm) else norm

    if not parameters:
        return ""
    names = sorted(parameters, key=size, reverse=True)[:LARGEST_LISTED]
    rows = [
        (
            in_one_line(name, 200),
            *(_number(parameters[name][key]) for key in ("norm", "coefficient")),
        )
        for name in names
    ]
    table = _table("", ("parameter", "norm before", "coefficient"), rows)
    title = f"Largest norms, {len(rows)} of {len(parameters)} parameters"
    return f"<details><summary>{title}</summary>{table}</details>"


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    left = ' style="text-align: left"'
    top = f"<caption{left}>{html.escape(caption)}</caption>" if caption else ""
    if heads:
        top += "<tr>" + "".join(f'<th scope="col">{html.escape(h)}</th>' for h in heads) + "</tr>"
    body = "".join(
        f'<tr><th scope="row"{left}>{html.escape(row[0])}</th>'
        + "".join(f"<td{left}>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table>{top}{body}</table>"


def _number(value: float) -> str:
    return f"{value:.4g}"
