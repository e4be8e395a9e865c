"""The source of the package, and of all Python of the repository, for tests that read it."""

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "distclip"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
"""Path within the package -> where the file is."""

ROOT = PACKAGE.parent
WRITTEN = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in ("distclip", "tests", "benchmarks", "launch", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
"""Path within the repository -> text."""


@functools.cache
def parsed(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"), filename=name)
