"""Docstrings: each says what the thing is, for a reader who has not read the one before it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "distclip"
BACKWARDS = re.compile(
    r"(Of (it|each|these|those|them|the|this|all)|The same|As well|Also|And|But|Their|Theirs|Its"
    r"|They|Them|It|These|Those)\b"
)
"""How a text begins that leans on the one before it."""


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of the docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", [])
        for child in body if isinstance(body, list) else []:  # that of a lambda is an expression
            value = child.value if isinstance(child, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield child.lineno, value.value


def leaning(source: str) -> list[tuple[int, str]]:
    return [(line, text[:60]) for line, text in texts(source) if BACKWARDS.match(text)]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_no_docstring_leans_on_its_neighbour(path: Path) -> None:
    assert leaning(path.read_text(encoding="utf-8")) == []


def test_one_that_does_is_seen() -> None:
    source = 'a = 1\n"""Numbers."""\nb = 2\n"""Of these."""\ndef f():\n    """The same."""\n'
    assert leaning(source) == [(4, "Of these."), (6, "The same.")]
    assert leaning('class A:\n    b: int\n    """It is."""\n') == [(3, "It is.")]
    assert leaning('"""Offsets."""\nf = lambda: 1\n"""The number."""') == []
