"""How the package is built: how many rooms, how long its files and functions are."""

from __future__ import annotations

import ast

import pytest

from tests.helpers.sources import SOURCES, WRITTEN, parsed

ROOT_MODULES = {
    "__init__.py", "__main__.py", "_version.py", "clipper.py", "errors.py", "functional.py",
    "options.py", "report.py",
}  # fmt: skip
"""What the public names of ``distclip`` are read from, and nothing else; at most 10."""

MOST_ROOMS = 24
"""The most folders with modules that the package may have, itself included."""

NAMESPACES = {"accelerate.py", "deepspeed.py", "lightning.py", "transformers.py"}
"""Public import names, ``distclip.lightning``, at the root since an import name is a place.

Only a file there is found alike by ``import distclip.lightning``, ``from distclip.lightning import
X``, ``runpy``, type checkers and editors: a finder in ``sys.meta_path`` or an entry of
``sys.modules`` is seen at run time only, and after ``import distclip``. None has code of its own:
each is the same few lines, which hand on the module of ``distclip/integrations``.
"""


def test_the_root_has_the_public_surface_only() -> None:
    found = {name for name in SOURCES if "/" not in name}
    assert found == ROOT_MODULES | NAMESPACES
    assert len(ROOT_MODULES) <= 10


def test_the_house_has_few_rooms() -> None:
    assert len({name.rpartition("/")[0] for name in SOURCES}) <= MOST_ROOMS


def test_a_framework_at_the_root_has_no_code_of_its_own() -> None:
    bodies = {
        "\n".join(map(ast.unparse, parsed(name).body[1:])).replace(name[:-3], "NAME")
        for name in NAMESPACES
    }
    assert len(bodies) == 1
    assert len(bodies.pop().splitlines()) <= 10


LONG_FILES = {
    "distclip/clipper.py": "the docstrings of the public class, which are its reference",
}
"""Files of more than 400 lines, each with the reason. One that is shorter again has to leave."""


def long_functions(source: str) -> list[str]:
    """Functions of over 60 lines without docstring, and without a comment ``# Long: reason``."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = lines[node.lineno - 1 : node.end_lineno]
            prose = len((ast.get_docstring(node, clean=False) or "").splitlines())
            size = len(text) - prose
            if (size > 60) != any(line.strip().startswith("# Long: ") for line in text):
                found.append(f"{node.name}, {size} lines")
    return found


def prose_lines(source: str) -> int:
    """Lines of all docstrings, those of attributes too."""
    return sum(
        (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@pytest.mark.parametrize("name", LONG_FILES)
def test_a_long_file_is_so_by_its_docstrings(name: str) -> None:
    assert WRITTEN[name].count("\n") - prose_lines(WRITTEN[name]) <= 400


def test_no_file_is_long_without_a_reason() -> None:
    assert {name for name, text in WRITTEN.items() if text.count("\n") > 400} == set(LONG_FILES)


def test_no_function_is_long_without_a_reason() -> None:
    """And none gives the reason that is short."""
    found = {name: long for name, text in WRITTEN.items() if (long := long_functions(text))}
    assert not found


def test_a_long_function_is_seen() -> None:
    long = "def f():\n" + "    x = 1\n" * 61
    assert long_functions(long) == ["f, 62 lines"]
    assert not long_functions(long.replace("    x = 1", "    # Long: a table.", 1) + "    x = 1\n")
    assert not long_functions('def f():\n    """A."""\n' + "    x = 1\n" * 59)
    assert long_functions("def f():\n    # Long: no longer.\n    x = 1\n")
    assert prose_lines('class A:\n    """One\n\n    two."""\n    x = 1\n    """Three."""\n') == 4
