"""What the documentation says is run: its Python, its configurations, its options, its links.

The ```python blocks of a page are one program, run in order. A block that cannot run here is fenced
as ```python no-run: reason, and must still be valid Python.
"""

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from distclip.config import load
from distclip.errors import ConfigurationError
from distclip.policies import registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.exists()]
PROSE = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]

FENCE = re.compile(r"^( *)(`{3,})(.*)$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is that of its first line of content, counted from 0."""

    language: str
    note: str
    line: int
    text: str


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, dedented as they are nested."""
    fence, indent, first, content, info = "", 0, 0, [], ""
    for number, line in enumerate(text.splitlines()):
        match = FENCE.match(line)
        if not fence and match:
            indent, fence, info = len(match[1]), match[2], match[3].strip()
            first, content = number + 1, []
        elif fence and line.strip() == fence:
            language, _, note = info.partition(" ")
            yield Block(language, note, first, "\n".join(content))
            fence = ""
        elif fence:
            content.append(line[indent:])
    assert not fence, f"the block that starts at line {first} is not closed"


def program(text: str) -> str:
    """The Python of a page, every line where it stands in the page."""
    lines = [""] * (text.count("\n") + 1)
    for block in blocks(text):
        if block.language == "python" and not block.note:
            for offset, line in enumerate(block.text.splitlines()):
                lines[block.line + offset] = line
    return "\n".join(lines) + "\n"


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder to run in; what a page registers, seeds or starts is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    random_state = torch.get_rng_state()
    yield tmp_path
    torch.set_rng_state(random_state)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("page", PAGES, ids=ids)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning 2.6 on torch 2.13
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_python_of_a_page_runs(page: Path, as_before: Path) -> None:
    source = program(page.read_text(encoding="utf-8"))
    if not source.strip():
        pytest.skip("no Python in it")
    if re.search(r"^(import|from) accelerate\b|distclip\.accelerate", source, re.MULTILINE):
        pytest.importorskip("accelerate")
    if re.search(r"^ *import deepspeed\b", source, re.MULTILINE):
        pytest.importorskip("deepspeed")
    if re.search(r"^ *import lightning\b", source, re.MULTILINE):
        pytest.importorskip("lightning")
    file = as_before / f"{page.stem.lower()}_page.py"
    file.write_text(source, encoding="utf-8")
    # As a program of its own, so that functions of the page can be sent to ranks.
    runpy.run_path(str(file), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_what_is_not_run_says_why_and_compiles(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python" and block.note:
            assert re.fullmatch(r"no-run: .{5,}", block.note), block
            ast.parse(block.text)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_configurations_are_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language in ("yaml", "json") and not block.note:
            file = tmp_path / f"line{block.line}.{block.language}"
            file.write_text(block.text, encoding="utf-8")
            load(file)


def test_the_error_examples_are_what_is_said(tmp_path: Path) -> None:
    """In configuration.md a ``yaml refused`` block is followed by the message that it gives."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    found = list(blocks(page))
    refused = [number for number, block in enumerate(found) if block.note == "refused"]
    assert refused
    for number in refused:
        file = tmp_path / "policy.yaml"
        file.write_text(found[number].text, encoding="utf-8")
        with pytest.raises(ConfigurationError) as error:
            load(file)
        said = str(error.value).replace(str(file), "policy.yaml")
        assert said == found[number + 1].text


@pytest.mark.parametrize("page", PROSE, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            if anchor:
                assert anchor in anchors(file.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_on_the_map() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = set(LINK.findall(index))
    assert {page.name for page in PAGES if page.parent.name == "docs"} - {"index.md"} <= listed


@pytest.mark.parametrize("page", PROSE, ids=ids)
def test_tests_that_are_named_exist(page: Path) -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
        assert re.search(rf"^ *(async )?def {name}\b", sources, re.MULTILINE), name
    for path in re.findall(r"`((?:tests|distclip|configs|launch)/[\w/.]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_the_blocks_are_found() -> None:
    text = "a\n```python\nx = 1\n```\n- b\n  ```python no-run: why not\n  y\n  ```\n"
    first, second = blocks(text)
    assert (first.language, first.note, first.line, first.text) == ("python", "", 2, "x = 1")
    assert (second.note, second.text) == ("no-run: why not", "y")
    assert program(text).splitlines()[2] == "x = 1"
    assert "y" not in program(text)


def test_a_page_that_is_wrong_is_seen(as_before: Path) -> None:
    file = as_before / "wrong.py"
    file.write_text(program("text\n```python\nassert 1 == 2\n```\n"), encoding="utf-8")
    with pytest.raises(AssertionError) as error:
        runpy.run_path(str(file), run_name="__main__")
    assert error.traceback[-1].lineno == 2
