"""The page: what is in it, that nothing of a log runs, and how it behaves in a browser."""

import base64
import hashlib
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_records import record, write

from distclip.errors import ConfigurationError
from distclip.monitor import page
from distclip.monitor.page.data import page_data
from distclip.monitor.reading import read_runs
from distclip.monitor.summary import summaries
from distclip.monitor.thinning import sparkline, thinned
from tests.helpers.command import command
from tests.helpers.processes import in_browser

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!--<script>",
    "\x1b[2J\u202e\u2028\udc80",
    "@@SCRIPT@@",
    '"};alert(1);{"',
]


def of(path: Path) -> str:
    runs = read_runs(path)
    return page.html(runs, summaries(runs))


def long_run(path: Path, steps: int = 400) -> Path:
    lines = []
    for step in range(steps):
        norm = 50.0 if step == 300 else 0.5 + 0.1 * (step % 10)
        parameters = {
            f"model.layers.{i}.{name}": {"norm": norm * (i + 1), "coefficient": 1.0 / (i + 1)}
            for i in range(3)
            for name in ("weight", *HOSTILE)
        }
        lines.append(record(step, norm, parameters=parameters))
    lines[350] = record(350, None, skipped=True, nonfinite=HOSTILE)
    return write(path, lines)


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self._open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            place = len(self.found) - 1
            self.texts[place] = self.texts.get(place, "") + data


def parsed(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    return tags


def test_a_page_loads_nothing_and_runs_only_its_own_scripts(tmp_path: Path) -> None:
    text = of(long_run(tmp_path / "r.jsonl"))
    tags = parsed(text)
    assert not [a for _, a in tags.found if a.keys() & {"src", "href", "onerror", "onload"}]
    assert {tag for tag, _ in tags.found} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "button", "main",
        "noscript", "p", "script",
    }  # fmt: skip
    scripts = [n for n, (tag, _) in enumerate(tags.found) if tag == "script"]
    assert len(scripts) == 3
    policy = next(a["content"] for _, a in tags.found if "http-equiv" in a) or ""
    assert "default-src 'none'" in policy
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    runs = [tags.texts[n] for n in scripts if tags.found[n][1].get("type") is None]
    assert allowed == {
        base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in runs
    }
    data = json.loads(tags.texts[scripts[0]])
    names = [p["name"] for p in data["runs"][0]["parameters"]["most_clipped"]]
    assert "model.layers.2.<!--<script>" in names  # shown as it is, as text


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_in_their_block(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r", [record(1, None, nonfinite=[name], run=name, state=name)])
    text = of(path)
    text.encode()
    assert text.count("</script>") == 3
    assert text.count("<script") == 3 + text.count("<script>document.title")


def test_numbers_of_a_page_are_json_whatever_the_log_holds(tmp_path: Path) -> None:
    odd = {"clipped_norm": None, "coefficient": None, "threshold": None, "clipped_fraction": None}
    path = write(tmp_path / "r", [record(1, None, **odd), record(2, 0.0), record(3, 1e300)])
    runs = read_runs(path)
    json.dumps(page_data(runs, summaries(runs)), allow_nan=False)
    only = read_runs(write(tmp_path / "s", [record(1, None, **odd)]))
    assert page_data(only, summaries(only))["runs"][0]["histogram"] is None


def test_candidates_say_what_they_would_have_clipped(tmp_path: Path) -> None:
    runs = read_runs(write(tmp_path / "r", [record(s, 1.0 + s) for s in range(100)]))
    (run,) = page_data(runs, summaries(runs))["runs"]
    for candidate in run["candidates"]:
        above = np.mean(np.arange(1.0, 101.0) > candidate["threshold"])
        assert candidate["share"] == pytest.approx(above)
    assert [c["threshold"] for c in run["candidates"][:3]] == [50.5, 75.25, 90.1]


def test_thinning_keeps_every_peak() -> None:
    values = np.random.default_rng(0).random(100_000)
    values[[5, 77_777]] = 9.0, -9.0
    values[40_000:50_000] = np.nan
    steps = np.arange(100_000.0)
    x, (thin,) = thinned(steps, [values], 1000)
    assert len(x) == len(thin) == 1000
    assert (np.diff(x) > 0).all()
    assert (np.nanmax(thin), np.nanmin(thin)) == (9.0, -9.0)
    assert abs(x[np.nanargmax(thin)] - 5) <= 200
    assert np.isnan(thin[(x > 40_200) & (x < 49_800)]).all()
    assert thinned(steps[:10], [values[:10]], 1000)[0] is not None


def test_sparkline() -> None:
    assert sparkline(np.array([1.0, 10.0, 100.0])) == "▁▅█"
    assert sparkline(np.array([1.0, np.nan])) == "▁x"
    assert sparkline(np.array([0.0, np.inf])) == "xx"
    spike = np.ones(6000)
    spike[3000] = 1000.0
    assert sparkline(spike).count("█") == 1
    assert len(sparkline(spike)) == 60


def test_a_long_run_of_many_parameters_makes_a_small_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for step in range(30):
        norms = rng.random(3000)
        parameters = {
            f"model.layers.{i // 60}.block.{i % 60}.weight": {"norm": n, "coefficient": 0.5}
            for i, n in enumerate(norms.tolist())
        }
        lines.append(record(step, parameters=parameters))
    runs = read_runs(write(tmp_path / "r", lines))
    data = page_data(runs, summaries(runs))["runs"][0]["parameters"]
    assert len(data["heat"]["names"]) == 50
    assert data["heat"]["names"][1] == "model.layers.1.block"
    first = np.linalg.norm([v["norm"] for v in list(lines[0]["parameters"].values())[60:120]])
    assert data["heat"]["rows"][1][0] == pytest.approx(first, rel=0.01)
    assert len(of(tmp_path / "r")) < 400_000


def test_the_command(tmp_path: Path) -> None:
    path, out = long_run(tmp_path / "r.jsonl"), tmp_path / "new" / "page.html"
    result = command("report", str(path), "-o", str(out))
    assert result.code == 0, result.err
    assert f"page: {out}" in result.out
    assert "steps by state: normal 398, spike 1, nonfinite 1; spike score 0.5%" in result.out
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    wrong = command("report", str(path), "--loss", str(path), "-o", str(out))
    assert wrong.code == 2
    assert "--loss" in wrong.err
    runs = read_runs(path)
    with pytest.raises(ConfigurationError, match="the page cannot be written"):
        page.save_page(runs, summaries(runs), "/dev/full/x.html")


def test_in_a_browser(tmp_path: Path) -> None:
    runs = [*read_runs(long_run(tmp_path / "r.jsonl")), *read_runs(long_run(tmp_path / "s.jsonl"))]
    page.save_page(runs, summaries(runs), tmp_path / "p.html")
    found = parsed(in_browser((tmp_path / "p.html").as_uri()))
    tags: list[tuple[str, dict[str, Any]]] = found.found
    text = " ".join(found.texts.values())
    assert [a for tag, a in tags if tag == "title"] == [{}]
    assert "owned" not in [found.texts.get(n) for n, (tag, _) in enumerate(tags) if tag == "title"]
    assert not [tag for tag, _ in tags if tag == "img"]
    canvases = sum(tag == "canvas" for tag, _ in tags)
    assert canvases == 2 + 2 * 3  # norms and shares of both; norms, histogram, heat map of each
    assert "First NaN or inf: step 350" in text
    assert "<img src=x" in text  # as text
