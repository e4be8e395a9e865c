"""What the pages need to become a site: they are written to be read as files of the repository.

The tests run a page's code blocks, and a block that they do not run says why after its language
(```` ```python no-run: reason````). Links may lead out of docs/. Neither means anything to mkdocs.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = os.environ.get("DISTCLIP_REPOSITORY", "")
"""Address of the repository's files, for example ``https://github.com/OWNER/NAME/blob/main``."""

FENCE = re.compile(r"^( *`{3,}\w+) +[^\n{]+$", re.MULTILINE)
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)\s]*)\)")

_pages: list[Any] = []
"""In the order of the navigation."""


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Plain fences, and links out of docs/ that lead to the repository or are none."""
    folder = (ROOT / "docs" / page.file.src_path).parent
    return OUTSIDE.sub(lambda found: _outside(found, folder), FENCE.sub(r"\1", markdown))


def _outside(found: re.Match[str], folder: Path) -> str:
    text, target = found[1], found[2]
    path = (folder / target.partition("#")[0]).resolve()
    if path.is_relative_to(ROOT / "docs"):
        return found[0]
    if REPOSITORY:
        return f"[{text}]({REPOSITORY}/{path.relative_to(ROOT).as_posix()})"
    name = path.relative_to(ROOT).as_posix()
    return text if text == name else f"{text} (`{name}` in the repository)"


def on_nav(nav: Any, *, files: Any, **_: Any) -> None:
    """Remember the order of the pages for :func:`on_post_build`."""
    _pages[:] = nav.pages


def on_post_build(*, config: Any, **_: Any) -> None:
    """Write ``llms.txt``: the pages by section, with what each is for, for programs that read.

    What a page is for is its row of the map in docs/index.md; else its first sentence.
    """
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.*?\]\(.*) \|$", index, re.MULTILINE)
    purposes = {
        page: purpose for purpose, cell in rows for page in re.findall(r"\]\(([\w/]+\.md)\)", cell)
    }
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    section = None
    for page in _pages:
        title = page.parent.title if page.parent is not None else "Overview"
        if title != section:
            section = title
            lines += ["", f"## {section}", ""]
        purpose = purposes.get(page.file.src_path) or _first_sentence(page.markdown or "")
        lines.append(f"- [{page.title}]({page.url}): {purpose}")
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _first_sentence(markdown: str) -> str:
    text = re.sub(r"^(```.*?^```|[#!|<:].*?)$", "", markdown, flags=re.M | re.S)
    words = " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).split())
    return re.split(r"(?<=[.:])\s", words, maxsplit=1)[0].removesuffix(":")
