"""A recorded run as a picture, for a notebook."""

from __future__ import annotations

import functools
import io
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(*runs: str | os.PathLike[str], title: str = "") -> Figure:
    """The picture of ``distclip report``; a notebook shows it.

    ::

        distclip.monitor.plot("runs/clip.jsonl")

    Args:
        runs: JSONL files that ``JsonlSink`` wrote; at least one.
        title: above everything.

    Raises:
        ConfigurationError: a file that cannot be read, or no file.
        DistclipError: matplotlib is not installed.
    """
    from distclip.errors import ConfigurationError
    from distclip.monitor import plots
    from distclip.monitor.reading import read_runs

    if not runs:
        raise ConfigurationError("plot: give the path of a log at least")
    found: list[Any] = [run for path in runs for run in read_runs(path)]
    figure: Any = plots.draw(found, title=title)
    figure._repr_png_ = functools.partial(_png, figure)
    return figure  # type: ignore[no-any-return]


def _png(figure: Figure) -> bytes:
    """What IPython asks an object for; of figures it knows by itself only pyplot's."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
