"""``launch/try_versions.py``: its table, and that a failing test is seen."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from distclip.common import tested
from distclip.common.tested import TESTED

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "try_versions", ROOT / "launch" / "try_versions.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "try_versions", module)
    spec.loader.exec_module(module)
    return module


def cells(script: ModuleType) -> dict[str, dict[str, str]]:
    """Row -> column -> text, of the page as it is."""
    columns = script._columns()
    lines = script._lines_of(script.PAGE)
    found = {name: [cell.strip() for cell in line.split("|")[1:-1]] for name, line in lines.items()}
    assert all(len(row) == len(columns) for row in found.values())
    return {name: dict(zip(columns, row, strict=True)) for name, row in found.items()}


@pytest.mark.parametrize("package", TESTED)
def test_the_tested_ranges_are_those_of_the_page(package: str, script: ModuleType) -> None:
    assert package in script.PACKAGES
    versions = [row[package] for row in cells(script).values() if row[package] != "-"]
    assert {tested.place(package, version) for version in versions} == {0}
    newest = TESTED[package].newest
    assert any(f"{version}.".startswith(f"{newest}.") for version in versions)


def test_nothing_of_the_page_has_failed(script: ModuleType) -> None:
    assert "failed" not in script.PAGE.read_text()
    assert script._page(script._lines_of(script.PAGE)) == script.PAGE.read_text()


def test_a_row_replaces_its_line_and_no_other(script: ModuleType, tmp_path: Path) -> None:
    first, second, *_ = (row.name for row in script.ROWS)
    page = tmp_path / "versions.md"
    assert script._lines_of(page) == {}
    page.write_text(script._page({second: script._line([second, "old"])}))
    both = {**script._lines_of(page), first: script._line([first, "new"])}
    page.write_text(script._page(both))
    assert script._lines_of(page) == {first: f"| {first} | new |", second: f"| {second} | old |"}
    table = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert table[2:] == [both[first], both[second]]  # in the order of the script


def test_every_part_exists_in_both_sizes(script: ModuleType) -> None:
    assert script.PARTS["quick"].keys() == script.PARTS["all"].keys()
    for parts in script.PARTS.values():
        for arguments in parts.values():
            files = [each for each in arguments if each.startswith("tests/")]
            assert files
            assert all((ROOT / each).exists() for each in files)


def test_failures_are_counted(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "test_some.py"
    path.write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    arguments = ["--rootdir", str(tmp_path), "-c", "/dev/null", str(path)]
    result = script._tests(Path(sys.executable), arguments, tmp_path / "report.xml")
    assert result == ("1 passed, **1 failed**", False)
    path.write_text("def test_a(): pass\n")
    assert script._tests(Path(sys.executable), arguments, tmp_path / "2.xml") == ("1 passed", True)
    path.write_text("raise OSError\n")
    text, good = script._tests(Path(sys.executable), arguments, tmp_path / "3.xml")
    assert ("1 failed" in text, good) == (True, False)
