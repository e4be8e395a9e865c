"""``distclip verify``: what it says, and that it can say no."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import typer.testing

from distclip import policies
from distclip._version import __version__
from distclip.cli.app import app
from distclip.clipper import GradClipper
from distclip.errors import ConfigurationError
from distclip.layouts import dtensor
from distclip.policies import GlobalNorm
from distclip.testing import expected
from distclip.testing.cases import DTYPES, MATRIX_LAYOUTS, POLICIES, ROUNDINGS
from distclip.tools import check
from distclip.tools.verify import cells as verify_cells
from distclip.tools.verify import model as verify_model
from distclip.tools.verify import running
from distclip.tools.verify.cells import Found

ROOT = Path(__file__).parents[2]
run_group = verify_cells.run_group


def invoke(*arguments: str) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(app, ["verify", *arguments])


def test_a_quick_run_and_its_outputs(tmp_path: Path) -> None:
    files = {name: tmp_path / "new" / name for name in ("json", "junit", "markdown")}
    options = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    result = invoke("--quick", "--layouts", "plain,fsdp2", *options)
    assert result.exit_code == 0, result.output
    assert f"{2 * len(running.QUICK) * 2} passed, 0 failed, 0 not run" in result.output
    assert "not run: layouts not asked for: hsdp" in result.output
    document = json.loads(files["json"].read_text())
    assert document["passed"] == len(document["cells"]) == 28
    assert document["distclip"] == __version__
    assert {cell["ranks"] for cell in document["cells"]} == {2}
    assert {cell["status"] for cell in document["cells"]} == {"passed"}
    assert any("hsdp" in line for line in document["left_out"])
    suite = ElementTree.parse(files["junit"]).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("28", "0", "0")
    assert len(suite.findall("testcase")) == 28
    assert "| global | yes | yes |" in files["markdown"].read_text()


def replicas_counted_twice(layout: str, dtype: str, labels: Sequence[str], seed: int) -> Any:
    """On the ranks: a layout adapter that owns every replica."""
    describe = dtensor.describe

    def wrong(*arguments: Any) -> Any:
        entry, pieces = describe(*arguments)
        return entry, [piece.__class__(*_owned(piece)) for piece in pieces]

    dtensor.describe = wrong  # type: ignore[assignment]
    try:
        return run_group(layout, dtype, labels, seed)
    finally:
        dtensor.describe = describe


def _owned(piece: Any) -> list[Any]:
    values = {name: getattr(piece, name) for name in type(piece).__slots__}
    return list({**values, "share": 1.0}.values())


def a_permille_off(layout: str, dtype: str, labels: Sequence[str], seed: int) -> Any:
    """On the ranks: a policy whose coefficient is wrong by one permille."""
    update = GlobalNorm.update

    def wrong(self: Any, statistics: Any, state: Any) -> Any:
        actions, state = update(self, statistics, state)
        for action in actions:
            action.coefficients.mul_(0.999)
        return actions, state

    GlobalNorm.update = wrong  # type: ignore[method-assign]
    try:
        return run_group(layout, dtype, labels, seed)
    finally:
        GlobalNorm.update = update  # type: ignore[method-assign]


def one_rank_dies(layout: str, dtype: str, labels: Sequence[str], seed: int) -> Any:
    """On the ranks: an error on one of them, at one policy, while the other waits."""
    if "agc" in labels and torch.distributed.get_rank() == 1:
        raise ValueError("out of step")
    if "agc" in labels:
        torch.distributed.barrier()
    return run_group(layout, dtype, labels, seed)


def test_a_wrong_layout_adapter_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verify_cells, "run_group", replicas_counted_twice)
    out = tmp_path / "out.json"
    result = invoke("--quick", "--layouts", "plain,tp", "--json", str(out))
    assert result.exit_code == 1, result.output
    assert "FAILED" in result.output
    cells = json.loads(out.read_text())["cells"]
    status = {(cell["layout"], cell["policy"]): cell["status"] for cell in cells}
    assert status["tp", "global"] == "failed"
    assert {status["plain", policy] for policy in running.QUICK} == {"passed"}
    assert "total_norm is" in next(c["detail"] for c in cells if c["status"] == "failed")


def test_a_wrong_policy_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verify_cells, "run_group", a_permille_off)
    out = tmp_path / "out.xml"
    result = invoke(
        "--ranks",
        "2",
        "--layouts",
        "fsdp2",
        "--dtypes",
        "float32",
        "--policies",
        "global,agc,measure",
        "--junit",
        str(out),
    )
    assert result.exit_code == 1, result.output
    assert "2 passed, 1 failed" in result.output
    suite = ElementTree.parse(out).getroot()
    (failed,) = (case for case in suite if case.find("failure") is not None)
    assert (failed.get("classname"), failed.get("name")) == ("fsdp2.float32.2ranks", "global")
    assert "is not the expected" in (failed[0].text or "") or "should be" in (failed[0].text or "")


def test_a_rank_out_of_step_is_one_failed_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_cells, "run_group", one_rank_dies)
    result = invoke(
        "--ranks", "2", "--layouts", "plain", "--dtypes", "float32", "--policies", "agc,global"
    )
    assert result.exit_code == 1
    assert "1 passed, 1 failed" in result.output
    assert "out of step" in result.output


MODEL = "tests.cli.verify_user_model"


def test_a_users_model(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = invoke(
        "--model",
        f"{MODEL}:model",
        "--batch",
        f"{MODEL}:batch",
        "--json",
        str(out),
        "--policies",
        "global,agc,dreamer,value",
    )
    assert result.exit_code == 0, result.output
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 2 * 4 * 2 * 4
    told: dict[str, set[str]] = {}
    for cell in cells:
        told.setdefault(cell["status"], set()).add(f"{cell['layout']} {cell['ranks']}")
        assert cell["status"] != "not run" or cell["detail"]
    ran = {"ddp 2", "ddp 4", "fsdp1 2", "fsdp1 4", "fsdp2 2", "fsdp2 4", "hsdp 4"}
    assert told["passed"] == ran
    assert set(told) == {"passed", "not run"}
    assert "hsdp 2" in told["not run"]
    assert "needs an even number of ranks" in " ".join(result.output.split())


def test_a_model_that_is_another_one_each_time() -> None:
    result = invoke(
        "--model",
        f"{MODEL}:noisy",
        "--batch",
        f"{MODEL}:batch",
        "--policies",
        "global",
        "--layouts",
        "ddp",
        "--dtypes",
        "float32",
        "--ranks",
        "2",
    )
    assert result.exit_code == 1
    assert "is not that of one process" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layouts", "fspd2"], "--layouts 'fspd2'; there are plain, fsdp2"),
        (["--policies", "x"], "--policies 'x'"),
        (["--dtypes", "int8"], "--dtypes 'int8'"),
        (["--ranks", "0"], "--ranks '0'"),
        (["--ranks", "two"], "--ranks 'two'"),
        (["--model", "a:b"], "go together"),
        (["--model", "nowhere:f", "--batch", "nowhere:g"], "nowhere"),
        (["--model", f"{MODEL}:f", "--batch", f"{MODEL}:batch"], "no attribute 'f'"),
        (["--model", f"{MODEL}:AT_RANDOM", "--batch", f"{MODEL}:batch"], "is no function"),
    ],
)
def test_what_cannot_be_meant(arguments: list[str], words: str) -> None:
    result = invoke(*arguments)
    assert isinstance(result.exception, ConfigurationError)
    assert words in str(result.exception)


def test_names_with_a_comma_and_patterns() -> None:
    known = list(POLICIES)
    chosen = running._chosen("--policies", "chain agc, global,agc", known)
    assert chosen == ["chain agc, global", "agc"]
    assert running._chosen("--policies", "agc*, value", known) == [
        *(name for name in known if name.startswith("agc")),
        "value",
    ]


def test_the_worst_of_the_ranks_is_told() -> None:
    good, bad = Found("passed", "", 1.0), Found("failed", "x", 2.0)
    assert verify_cells.merged_results([[good], [bad]]) == [Found("failed", "x", 2.0)]
    assert verify_cells.merged_results([[bad], [good]]) == [Found("failed", "x", 2.0)]
    assert verify_cells.merged_results([[good], [good._replace(seconds=3.0)]])[0].seconds == 3.0


def test_loss_of_what_a_model_gives() -> None:
    one = torch.ones(())
    assert verify_model.loss_of({"loss": one}) is one
    assert verify_model.loss_of((one, 3)) is one
    assert verify_model.loss_of(torch.full((2, 2), 3.0)).item() == 9.0
    with pytest.raises(ConfigurationError, match="gave a str"):
        verify_model.loss_of("x")


@pytest.mark.parametrize(
    ("policy", "wrong", "words"),
    [
        # What the parameters are called has nothing to do with it.
        (policies.by_name({"value*": None}, policies.global_norm(1.0)), 2.0, "should be"),
        (policies.by_name({"agc*": None}, policies.global_norm(1.0)), 2.0, "should be"),
        (policies.value(0.1), 2.0, ""),
        (policies.chain(policies.agc(0.1), policies.agc(0.01)), 0.5, "should be at most"),
        (policies.chain(policies.agc(0.1), policies.agc(0.01)), 2.0, ""),
        (policies.agc(0.1), 2.0, "should be"),
    ],
    ids=["named value", "named agc", "value", "agc twice", "agc twice, bound", "agc"],
)
def test_a_wrong_coefficient_is_seen_by_what_the_policy_is(
    policy: policies.Policy, wrong: float, words: str
) -> None:
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in ("value", "agc", "agc2", "w")}
    for parameter in parameters.values():
        parameter.grad = torch.full((2,), 3.0)
    gradients = {name: np.full(2, 3.0) for name in parameters}
    weights = {name: np.ones(2) for name in parameters}
    want = expected(check.in_words(policy), gradients, weights)
    report = GradClipper(list(parameters.items()), policy).clip_()
    assert verify_cells.judge(policy, report, want, iter(()), exact=True, roundings=1) == []
    want = dataclasses.replace(want, coefficient=want.coefficient * wrong)
    faults = verify_cells.judge(policy, report, want, iter(()), exact=True, roundings=1)
    assert ["coefficient is" in fault and words in fault for fault in faults] == [True] * bool(
        words
    )


def test_the_cases_fit_together() -> None:
    assert set(ROUNDINGS) <= set(POLICIES)
    assert set(running.QUICK) <= set(POLICIES)


def test_the_committed_table_is_not_stale() -> None:
    """Layouts, policies, dtypes and version are those of today; else run the command it names."""
    text = (ROOT / "docs" / "verified.md").read_text(encoding="utf-8")
    rows = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    assert rows[0] == ["policy", *MATRIX_LAYOUTS]
    assert [row[0] for row in rows[1:]] == list(POLICIES)
    assert {mark for row in rows[1:] for mark in row[1:]} == {"yes"}
    assert f"* dtypes: {', '.join(DTYPES)}\n" in text
    assert f"* ranks: {', '.join(map(str, running.RANKS))}\n" in text
    assert f"distclip {__version__}," in text
    cells = len(POLICIES) * len(MATRIX_LAYOUTS) * len(DTYPES) * len(running.RANKS)
    assert f"* cells: {cells} passed, 0 failed, 0 not run" in text
    assert re.search(r"\d{4}-\d\d-\d\d", text)
