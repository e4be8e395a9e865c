"""A picture of one or several runs: loss, norms, share clipped. Needs matplotlib (extra ``plot``).

The runs of one group (a setting with several seeds) share a colour: thin lines for the runs, a
thick one for their mean. The colours are those of Okabe and Ito, which colour-blind readers tell
apart.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distclip.common.foreign import in_one_line
from distclip.errors import ConfigurationError, DistclipError
from distclip.monitor.runs import Curve, Floats, Run
from distclip.monitor.thinning import running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
BEFORE = "#999999"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def draw(
    runs: Sequence[Run], losses: Sequence[Curve] = (), *, title: str = "", quantity: str = "Loss"
) -> Figure:
    """Draw the picture; a ``matplotlib.figure.Figure``, not bound to any window.

    Args:
        runs: at least one.
        losses: of the same groups as the runs, or none.
        title: above everything; the names of the groups when empty.
        quantity: what ``losses`` are, such as the return of a policy.

    Raises:
        DistclipError: matplotlib is not installed.
    """
    matplotlib, figure_class = backend()
    runs = [dataclasses.replace(run, group=_plain(run.group)) for run in runs]
    losses = [dataclasses.replace(curve, group=_plain(curve.group)) for curve in losses]
    groups = list(dict.fromkeys([run.group for run in runs]))
    colours = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}
    with matplotlib.rc_context(STYLE):
        figure, loss, norms, share = _panels(figure_class, len(groups), bool(losses))
        figure.suptitle(
            title or "Gradient clipping: " + ", ".join(groups), x=0.01, ha="left", fontsize=13
        )
        if loss is not None:
            _loss(loss, losses, colours, quantity)
        # A panel of norms for each group, on one scale: before and after of several groups on top
        # of each other cannot be told apart.
        for panel, (group, members) in zip(norms, _grouped(runs), strict=True):
            _norms(panel, members, colours[group])
            if len(groups) > 1:
                panel.set_title(f"Gradient norm, {group}")
        _keep_in_view(norms, [run.total_norm for run in runs])
        _share(share, runs, colours)
        named = [*norms, *([share] if len(groups) > 1 else []), *([loss] if loss else [])]
        for panel in named:
            _legend(panel)
    return figure


def _plain(name: str) -> str:
    """A name that matplotlib shows as it is: no formula, and not hidden from the legend."""
    shown = name.replace("\\", "\\\\").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure; the format is that of the file's name (png, svg, pdf).

    Raises:
        ConfigurationError: an unknown format, or a file that cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{in_one_line(path)}: the picture cannot be written: {in_one_line(error, 300)}"
        ) from None


def backend() -> tuple[Any, Any]:
    """The matplotlib module and its ``Figure`` class.

    Raises:
        DistclipError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise DistclipError(
            "pictures need matplotlib, which is not installed: pip install 'distclip[plot]'"
        ) from None
    return matplotlib, Figure


def _panels(
    figure_class: Any, groups: int, losses: bool
) -> tuple[Figure, Axes | None, list[Axes], Axes]:
    """An empty figure: panels for the loss (if any), for each group's norms, for the share."""
    if groups == 1:
        rows = 3 if losses else 2
        figure: Figure = figure_class(figsize=(10, 2.6 * rows + 0.6), layout="constrained")
        column = list(figure.subplots(rows, 1, sharex=True))
        column[-1].set_xlabel("optimizer step")
        return figure, column[0] if losses else None, [column[-2]], column[-1]
    figure = figure_class(figsize=(max(10, 4.4 * groups), 7.6), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    top, bottom = halves
    upper = list(top.subplots(1, 2 if losses else 1, squeeze=False)[0])
    lower = list(bottom.subplots(1, groups, sharex=True, sharey=True, squeeze=False)[0])
    for panel in (*upper, *lower):
        panel.set_xlabel("optimizer step")
    return figure, upper[0] if losses else None, lower, upper[-1]


def _keep_in_view(panels: Sequence[Axes], curves: Sequence[Floats]) -> None:
    """Cut the scale off above the curves that end finite, where others blow up beside them."""
    sound = [curve[np.isfinite(curve)] for curve in curves if np.isfinite(curve[-1:]).all()]
    starts = [curve[np.isfinite(curve)][:1] for curve in curves]
    kept = np.concatenate([*sound, *starts]) if sound else np.array([])
    known = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    if not kept.size or not known.size:
        return
    logarithmic = panels[0].get_yscale() == "log"
    top = kept.max() * (30.0 if logarithmic else 1.15)
    if known.max() <= top:
        return
    for panel in panels:
        if logarithmic:
            panel.set_ylim(top=top)
        else:
            panel.set_ylim(known.min() - 0.05 * (top - known.min()), top)
        _, highest = panel.dataLim.intervaly
        if highest > top:
            panel.annotate(
                f"goes on to {highest:.1g}", (0.98, 0.03 if logarithmic else 0.6),
                xycoords="axes fraction", ha="right", fontsize=9, color="#444444",
            )  # fmt: skip


def _loss(axes: Axes, losses: Sequence[Curve], colours: dict[str, str], quantity: str) -> None:
    for group, members in _grouped(losses):
        _curves(axes, members, colours.get(group, "#000000"), group)
    axes.set_title(quantity)
    known = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in losses])
    explodes = known.size > 0 and 0.0 < known.min() < known.max() / 1000
    if explodes:
        axes.set_yscale("log")
    axes.set_ylabel(quantity.lower() + (" (log scale)" if explodes else ""))
    _keep_in_view([axes], [curve.values for curve in losses])


def _norms(axes: Axes, runs: Sequence[Run], colour: str) -> None:
    # After clipping lies on top of before wherever nothing was clipped: what shows of the grey
    # line are the peaks that were cut.
    _curves(axes, _curves_of(runs, lambda run: run.total_norm), BEFORE, "before clipping")
    _curves(axes, _curves_of(runs, lambda run: run.clipped_norm), colour, "after clipping")
    for level, label in _thresholds(runs):
        axes.axhline(level, color="#000000", linewidth=1.2, linestyle=(0, (5, 2)), label=label)
    _marks(axes, runs)
    axes.set_yscale("log")
    axes.set_title("Gradient norm")
    axes.set_ylabel("norm (log scale)")


def _thresholds(runs: Sequence[Run]) -> list[tuple[float, str]]:
    """The constant thresholds that are norms; those of other measures have no place here."""
    levels = {
        float(run.threshold[np.isfinite(run.threshold)][-1])
        for run in runs
        if run.threshold_is_norm
    }
    return [(level, f"threshold {level:.3g}") for level in sorted(levels)]


def _marks(axes: Axes, runs: Sequence[Run]) -> None:
    """A mark at the top for each step with NaN or inf, which has no norm to draw."""
    steps = [step for run in runs for step in run.steps[run.nonfinite | run.skipped]]
    if steps:
        axes.plot(
            steps, [0.98] * len(steps), "v", transform=axes.get_xaxis_transform(),
            color="#000000", markersize=5, clip_on=False, linestyle="none",
            label="skipped or not finite",
        )  # fmt: skip


def _share(axes: Axes, runs: Sequence[Run], colours: dict[str, str]) -> None:
    for group, members in _grouped(runs):
        curves = _curves_of(members, lambda run: running_mean(100 * run.clipped_fraction, 50))
        _curves(axes, curves, colours[group], group)
    axes.set_title("Clipped share of the parameters")
    axes.set_ylabel("running mean, %")
    axes.set_ylim(-2, 102)


def _curves_of(runs: Iterable[Run], value: Callable[[Run], Floats]) -> list[Curve]:
    return [Curve(run.group, run.steps, value(run)) for run in runs]


def _curves(axes: Axes, curves: Sequence[Curve], colour: str, label: str) -> None:
    """Each curve, thin if there are several, and then their mean, thick."""
    if len(curves) == 1:
        axes.plot(curves[0].steps, curves[0].values, color=colour, linewidth=1.4, label=label)
        return
    for curve in curves:
        axes.plot(curve.steps, curve.values, color=colour, alpha=0.4, linewidth=0.7)
    steps, mean = _mean(curves)
    axes.plot(steps, mean, color=colour, linewidth=2, label=f"{label}, mean of {len(curves)}")


def _legend(axes: Axes) -> None:
    """Above the panel, at the right of its title's line: never on the curves."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=min(len(labels), 2),
        handlelength=1.6, borderaxespad=0.1, columnspacing=1.2,
    )  # fmt: skip
    rows = -(-len(labels) // 2)
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=6 + 15 * rows)


def _mean(curves: Sequence[Curve]) -> tuple[Floats, Floats]:
    """The mean over the steps that all curves have; NaN where all are NaN."""
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    values = np.array([curve.values[np.isin(curve.steps, steps)] for curve in curves])
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=0)
    count = known.sum(axis=0)
    return steps, np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _grouped(items: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    return list(groups.items())
