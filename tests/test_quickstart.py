"""The quick start, followed to the letter in an empty folder."""

import re
from pathlib import Path

import pytest
from test_docs import blocks

from tests.helpers.processes import ROOT, run, well

PAGE = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
NEEDS = {
    "Accelerate": "accelerate",
    "DeepSpeed": "deepspeed",
    "Lightning": "lightning",
    "Transformers": "transformers",
}
SHOWN = [title for title, text in SECTIONS.items() if "```bash" in text]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With every file that the page says to save."""
    for block in blocks(PAGE):
        if named := re.match(r"# ([\w.]+\.(?:py|yaml))\n", block.text):
            (tmp_path / named[1]).write_text(block.text, encoding="utf-8")
        if block.language == "json":
            (tmp_path / "ds.json").write_text(block.text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("title", SHOWN)
def test_a_section(title: str, folder: Path) -> None:
    if (framework := NEEDS.get(re.split(r"[ ,]", title)[0])) is not None:
        pytest.importorskip(framework)
    commands = [block.text for block in blocks(SECTIONS[title]) if block.language == "bash"]
    for command in commands:
        well(run("bash", "-euc", command, folder=folder))
    assert len((folder / "clip.jsonl").read_text(encoding="utf-8").splitlines()) >= 20


def test_every_section_is_run() -> None:
    assert len(SHOWN) >= 6
