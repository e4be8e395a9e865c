"""Which checkpoint a rewind takes, and what no rank may find out alone."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distclip import ConfigurationError, RewindRequested
from distclip.integrations.checkpoints import FILE
from distclip.integrations.rewinding import Checkpoints, Rewinder


@pytest.mark.ranks(1, 2)
def test_a_damaged_checkpoint_ends_every_rank(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir(exist_ok=True)
    (tmp_path / "3" / FILE).write_bytes(b"torn")
    with pytest.raises(ConfigurationError, match=r"distclip\.pt is damaged .* remove that"):
        Checkpoints(tmp_path).before(RewindRequested("back", 3, ()))


class Torn(Checkpoints):
    """On a file system that only some ranks can read."""

    def __init__(self, folder: Path, unreadable_on: int) -> None:
        super().__init__(folder)
        self.unreadable_on = unreadable_on

    def _files(self) -> Iterator[tuple[str, Path]]:
        if dist.get_rank() == self.unreadable_on:
            raise PermissionError("no access")
        yield from super()._files()


@pytest.mark.ranks(2, timeout=60)
def test_no_rank_waits_for_one_that_cannot_look(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir(exist_ok=True)
    if dist.get_rank() == 0:
        torch.save({"version": 1, "clippers": [{"step": 3}]}, tmp_path / "3" / FILE)
    dist.barrier()
    asked = RewindRequested("back", 3, ())
    assert Torn(tmp_path, 1).before(asked) == (str(tmp_path / "3"), 3)
    with pytest.raises(ConfigurationError, match=r"cannot be looked through \(PermissionError: no"):
        Torn(tmp_path, 0).before(asked)


def test_places_that_are_none_are_refused(tmp_path: Path) -> None:
    def of(left_out: Any, kind: type) -> Rewinder:
        what = "epoch, batch" if kind is tuple else "global_step"
        return Rewinder(Checkpoints(tmp_path), left_out, kind, what, logging.getLogger("x"))

    assert of([(0, 3)], tuple).left_out == {(0, 3)}
    assert of([3], int).left_out == {3}
    for bad, kind, says in (
        (3, tuple, r"3 is no place of a batch; give \(epoch, batch\)"),
        ((0, 3, 1), tuple, r"\(0, 3, 1\) is no place"),
        ((0, "3"), tuple, r"\(0, '3'\) is no place"),
        ("3", int, r"'3' is no place of a batch; give \(global_step\)"),
    ):
        with pytest.raises(ConfigurationError, match=f"left_out: {says}"):
            of([bad], kind)
