"""Policies with a memory in ``accelerator.save_state`` and ``load_state``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from distclip import StateError, policies
from tests.integrations.test_accelerate import batch, loss_of, make, sgd, start

pytest.importorskip("accelerate")
POLICY = policies.chain(policies.adagc(warmup_steps=3), policies.autoclip(50, window=20))


def begin(layout: str, policy: Any = POLICY) -> Any:
    import distclip

    accelerator = start(layout)
    handle = distclip.accelerate.attach(accelerator, policy)
    model = make()
    model, optimizer = accelerator.prepare(model, sgd(model))
    return accelerator, handle, model, optimizer


def steps(run: Any, first: int, last: int) -> list[Any]:
    accelerator, handle, model, optimizer = run
    taken = []
    for number in range(first, last):
        accelerator.backward(loss_of(model, batch(number)))
        optimizer.step()
        optimizer.zero_grad()
        taken.append(repr(handle.last_report.to_dict()))  # thresholds may be NaN
    return taken


@pytest.mark.ranks(2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_resumed_run_decides_as_one_that_was_not_stopped(layout: str, tmp_path: Path) -> None:
    run = begin(layout)
    steps(run, 0, 6)
    run[0].save_state(str(tmp_path / "at6"))
    want = steps(run, 6, 10)
    resumed = begin(layout)
    resumed[0].load_state(str(tmp_path / "at6"))  # before there is a clipper
    assert steps(resumed, 6, 10) == want
    resumed[0].load_state(str(tmp_path / "at6"))  # and in the middle
    assert steps(resumed, 6, 10) == want
    resumed[1].remove()
    assert not resumed[0]._save_model_state_pre_hook


@pytest.mark.ranks(1)
def test_other_policies_and_older_checkpoints(tmp_path: Path) -> None:
    run = begin("ddp")
    steps(run, 0, 2)
    run[0].save_state(str(tmp_path / "new"))
    other = begin("ddp", policies.zclip())
    other[0].load_state(str(tmp_path / "new"))
    with pytest.raises(StateError, match=r"belongs to Chain.* clipper's policy is ZClip"):
        steps(other, 2, 3)
    (tmp_path / "new" / "distclip.pt").unlink()
    older = begin("ddp")
    logger = logging.getLogger("distclip")
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore
    logger.addHandler(handler)
    older[0].load_state(str(tmp_path / "new"))
    logger.removeHandler(handler)
    assert any("no distclip.pt" in message for message in messages)
    steps(older, 2, 3)
