"""The table of peers in docs/field.md is what `benchmarks.peers` writes, and true of torch."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import peers

PAGE = Path(__file__).parents[1] / "docs" / "field.md"
SMALL = [fault for fault in peers.FAULTS if fault.ranks == 1 and "million" not in fault.title]


def rows() -> list[list[str]]:
    """The cells of the table in the page, without the rule below its head."""
    text = PAGE.read_text(encoding="utf-8").split(peers.BEGIN)[1].split(peers.END)[0]
    found = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found]


def test_its_form_is_that_of_the_program() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.search(r"Run on 20\d\d-\d\d-\d\d by `python -m benchmarks\.peers ", text)
    head, *body = rows()
    for cell, peer in zip(head[1:], peers.PEERS, strict=True):
        assert re.fullmatch(rf"{peer.package} \d[\w.]*: {re.escape(peer.call)}", cell)
    assert [row[0].removesuffix(", 2 ranks") for row in body] == [f.title for f in peers.FAULTS]
    assert all(len(row) == len(head) and all(row) for row in body)
    for row in body:
        infinite = "raises `NonFiniteGradientError`, gradients as they were"
        assert row[-1] == (infinite if "inf" in row[0].split() else peers.RIGHT)


@pytest.mark.parametrize("package", ["torch", "distclip"])
@pytest.mark.parametrize("fault", SMALL, ids=lambda fault: fault.title)
def test_its_cells_are_what_torch_and_distclip_do(package: str, fault: peers.Fault) -> None:
    head, *body = rows()
    place = next(n for n, cell in enumerate(head) if cell.startswith(f"{package} "))
    recorded = head[1].split()[1].rstrip(":")
    if recorded != torch.__version__.split("+")[0]:
        pytest.skip(f"the table is of torch {recorded}")
    cells = next(row for row in body if row[0] == fault.title)
    assert peers.said([peers.answer(package, fault.title)], fault.whole()) == cells[place]


def test_what_is_wrong_is_said() -> None:
    whole = [torch.tensor([3.0, 4.0])]
    right = peers.Answer(norm=5.0, squares=1.0, elements=2)
    assert peers.said([right], whole) == peers.RIGHT
    for answer, told in (
        (peers.Answer(norm=5.001, squares=1.0, elements=2), "norm 5.001 for 5"),
        (peers.Answer(norm=None, squares=1.0, elements=2), "no norm"),
        (peers.Answer(norm=float("nan"), squares=1.0, elements=2), "norm nan for 5"),
        (peers.Answer(norm=5.0, squares=4.0, elements=2), "norm 2 after clipping to 1"),
        (peers.Answer(norm=5.0, elements=2, zero=2), "2 of 2 elements become 0"),
        (peers.Answer(norm=5.0, squares=1.0, elements=2, nan=1), "1 of 2 elements become NaN"),
    ):
        assert peers.said([answer], whole) == told
    halves = [peers.Answer(norm=5.0, squares=0.5, elements=1)] * 2
    assert peers.said(halves, whole) == peers.RIGHT
    assert peers.said([halves[0], peers.Answer("no answer")], whole) == (
        "rank 0 returns; rank 1 no answer"
    )


def test_only_what_is_between_the_marks_is_written(tmp_path: Path) -> None:
    page = tmp_path / "field.md"
    page.write_text(f"a\n{peers.BEGIN}\nold\n{peers.END}\nb\n")
    peers.put(page, "new")
    assert page.read_text() == f"a\n{peers.BEGIN}\n\nnew\n\n{peers.END}\nb\n"
