"""The documentation site: every public name and page is on it, and it builds without a warning."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from distclip import errors as all_errors
from tests.helpers.processes import python, well

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NAVIGATION = (ROOT / ".mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
SHOWN_WHOLE = {"distclip.errors", "distclip.policies"}
"""Modules among the public names, whose contents are listed."""


def listed() -> set[str]:
    pages = (page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    return {name for page in pages for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)}


@pytest.mark.parametrize("module", ["", "config", "monitor", "optim", "policies", "testing"])
def test_every_public_name_is_in_the_reference(module: str) -> None:
    place = ".".join(filter(None, ("distclip", module)))
    home = importlib.import_module(place)
    names = getattr(home, "__all__", None) or [
        name
        for name, value in vars(home).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    ]
    errors = {name for name in names if module == "" and hasattr(all_errors, name)}
    wanted = {f"{place}.{name}" for name in {*names} - errors - {"__version__"}}
    assert wanted - listed() - SHOWN_WHOLE == set()


def test_every_page_is_in_the_navigation() -> None:
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert set(re.findall(r"[\w/]+\.md", NAVIGATION)) == pages


@pytest.mark.parametrize(
    "phrase",
    [
        "grad_norm is above max_norm",
        "grad norm is nan",
        "clip_grad_norm_ DTensor mixed",
        "FSDP1 clip slow",
    ],
)
def test_what_people_type_into_a_search_is_a_heading(phrase: str) -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert re.search(rf"^## .*{re.escape(phrase)}", text, re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("needs pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = ("-m", "mkdocs", "build", "-f", ".mkdocs.yml", "--strict", "-d", str(out))
    well(python(*command, folder=ROOT, NO_MKDOCS_2_WARNING="1"))
    return out


def test_it_opens_from_disk_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?(https?:[^\" >]+)", text)
        loaded += re.findall(r"<link[^>]* href=\"?(https?:[^\" >]+)[^>]*stylesheet", text)
        assert not loaded, page.name
        assert "no-run" not in text or page.name == "testing.html", page.name


def test_the_reference_has_signatures_and_no_markup_of_another_tool(site: Path) -> None:
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="distclip.clip_grad_norm_"' in text
    assert "error_if_nonfinite" in text
    assert ":func:" not in text
    assert ":class:" not in text


def test_programs_find_every_page(site: Path) -> None:
    text = (site / "llms.txt").read_text(encoding="utf-8")
    assert {page.replace(".md", ".html") for page in re.findall(r"[\w/]+\.md", NAVIGATION)} == set(
        re.findall(r"\]\(([^)]+)\):", text)
    )
    assert "- [Policies](policies.html): choose a policy" in text
    assert re.findall(r"^## (.*)", text, re.MULTILINE)[:2] == ["Overview", "Start"]
    assert not re.search(r": *$", text, re.MULTILINE)
