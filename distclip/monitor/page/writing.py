"""The page as one file: styles, scripts and numbers inside it, nothing loaded from anywhere.

Names and values from a log are data: they are in a JSON block in which no tag can end it, and the
page's script puts them into the document as text only. A content security policy lets no script run
but the two that are written here, and no address be reached.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from distclip.common.foreign import in_one_line
from distclip.errors import ConfigurationError
from distclip.monitor.page.data import page_data
from distclip.monitor.runs import Run
from distclip.monitor.summary import Summary


def html(
    runs: Sequence[Run], summaries: Sequence[Summary], *, refresh: int = 0, version: str = ""
) -> str:
    """The page.

    Args:
        runs: at least one.
        summaries: of the same runs.
        refresh: seconds after which the page asks its server whether there is another version, and
            loads it; 0: never, and no address can be reached.
        version: what the server calls this one.
    """
    scripts = [_part("uPlot.iife.min.js"), _part("page.js")]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    # "<" of a name could end the block, or begin a comment in it.
    numbers = {**page_data(runs, summaries), "refresh": refresh, "version": version}
    data = json.dumps(numbers, allow_nan=False, separators=(",", ":"))
    reached = "; connect-src 'self'" if refresh else ""
    fields = {
        "POLICY": f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'{reached}",
        "STYLES": _part("uPlot.min.css") + _part("page.css"),
        "DATA": data.replace("<", "\\u003c").replace("&", "\\u0026"),
        "UPLOT": scripts[0],
        "SCRIPT": scripts[1],
    }
    page = ""
    for piece in _part("page.html").split("@@"):  # in one pass: no field is looked for in another
        page += fields.get(piece, piece)
    return page


def save_page(
    runs: Sequence[Run], summaries: Sequence[Summary], path: str | os.PathLike[str]
) -> None:
    """Write the page.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html(runs, summaries), encoding="utf-8", newline="\n")
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{in_one_line(path)}: the page cannot be written: {in_one_line(error, 300)}"
        ) from None


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
