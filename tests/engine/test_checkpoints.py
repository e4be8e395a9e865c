"""Saved states: what they mean to another policy, damage, oddities, and several of them at once."""

import copy
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from distclip import GradClipper, StateError, policies
from distclip.integrations.checkpoints import FILE, Shelf
from distclip.policies import Policy, RunningMax
from tests.engine.saved import AUTO, clipper_of
from tests.engine.test_trajectory import alike
from tests.helpers.logs import logged

NORM = policies.global_norm


@dataclass(frozen=True)
class Own(Policy):
    """Of a user who says nothing about what the memory depends on."""

    limit: float = 1.0
    name: ClassVar[str] = "own"

    def init(self, parameters: Any) -> Any:
        return {"steps": torch.zeros((), dtype=torch.int64)}

    def update(self, statistics: Any, state: Any) -> Any:
        return [], {"steps": state["steps"] + 1}


@dataclass(frozen=True)
class Declared(Own):
    memory_fields: ClassVar[frozenset[str] | None] = frozenset()
    name: ClassVar[str] = "declared"


@dataclass(frozen=True)
class Wider(AUTO):
    """A field that AutoClip knows nothing of."""

    name: ClassVar[str] = "wider"
    extra: float = 1.0


@dataclass(frozen=True)
class Overriding(AUTO):
    """It keeps its own books, so what AutoClip says of its memory is not said of this one's."""

    name: ClassVar[str] = "overriding"

    def update(self, statistics: Any, state: Any) -> Any:
        return super().update(statistics, state)


SILENT, LINE, REFUSED = "silent", "line", "refused"


CHANGES: list[tuple[Policy, Policy, str, str]] = [
    (NORM(1.0), NORM(1.0), SILENT, ""),
    (NORM(1.0), NORM(2.0), LINE, r"under GlobalNorm\(max_norm=1.0.*max_norm=2.0.*has no memory"),
    (policies.value(1.0), policies.agc(), LINE, "has no memory"),
    (policies.adagc(), NORM(1.0), LINE, "the memory of '' is left out"),
    (NORM(1.0), policies.adagc(), REFUSED, "AdaGC.* remembers only here"),
    (AUTO(10), AUTO(10), SILENT, ""),
    (AUTO(10), AUTO(50), LINE, r"with its memory: percentile was 10.0 and is 50.0$"),
    (AUTO(10, window=20), AUTO(10, window=30), REFUSED, "window was 20 and is 30"),
    (AUTO(10, window=20), AUTO(10), REFUSED, "window was 20 and is None"),
    (policies.zclip(), policies.zclip(3.0, max_norm=5.0), LINE, "max_norm was 1.0 and is 5.0"),
    (policies.zclip(), policies.zclip(alpha=0.9), REFUSED, "alpha was 0.97 and is 0.9"),
    (policies.adagc(), policies.adagc(2.0, floor=1e-5), LINE, "lambda_rel was 1.05 and is 2.0"),
    (policies.adagc(), policies.adagc(beta=0.9), REFUSED, "beta was 0.98 and is 0.9"),
    (policies.skip_spikes(), policies.skip_spikes(sigma=4.0), LINE, "sigma was 6.0 and is 4.0"),
    (policies.skip_spikes(), policies.skip_spikes(loss=True), REFUSED, "loss was False and is Tru"),
    (policies.zclip(), policies.adagc(), REFUSED, "ZClip was saved, and this is AdaGC"),
    (Own(1.0), Own(2.0), REFUSED, "limit was 1.0 and is 2.0"),
    (Declared(1.0), Declared(2.0), LINE, "limit was 1.0 and is 2.0"),
    (Wider(10), Wider(20), LINE, "percentile was 10.0 and is 20.0"),
    (Wider(10), Wider(10, extra=2.0), REFUSED, "extra was 1.0 and is 2.0"),
    (Overriding(10), Overriding(20), REFUSED, "percentile was 10.0 and is 20.0"),
    (RunningMax(0.5), RunningMax(0.6), REFUSED, "theta was 0.5 and is 0.6"),
    (
        policies.chain(AUTO(50, window=9), NORM(1.0)),
        policies.chain(AUTO(50, window=9), NORM(2.0)),
        LINE,
        "only policies without memory differ",
    ),
    (
        policies.chain(policies.adagc(), AUTO(50)),
        policies.chain(AUTO(50), policies.adagc()),
        REFUSED,
        "at '0' AdaGC was saved, and this is AutoClip",
    ),
    (
        policies.by_name({"*bias": None}, default=policies.zclip()),
        policies.by_name({"*bias": None, "0*": None}, default=policies.zclip()),
        REFUSED,
        "responsible for other parameters",
    ),
]


def by_the_clipper(state: Any, clipper: GradClipper, folder: Path) -> None:
    clipper.load_state_dict(state)


def by_a_shelf(state: Any, clipper: GradClipper, folder: Path) -> None:
    """As Accelerate and the Trainer, where the clipper is there already."""
    torch.save({"version": 1, "clippers": [state]}, folder / FILE)
    Shelf(clipper.policy).load([clipper], folder)


def before_there_is_a_clipper(state: Any, clipper: GradClipper, folder: Path) -> None:
    torch.save({"version": 1, "clippers": [state]}, folder / FILE)
    shelf = Shelf(clipper.policy)
    shelf.load([], folder)  # what does not fit is refused here, not at some later step
    shelf.hand_over(clipper)


WAYS = [by_the_clipper, by_a_shelf, before_there_is_a_clipper]


@pytest.mark.parametrize("way", WAYS)
def test_a_memory_that_means_the_same_is_loaded_and_another_one_is_refused(
    way: Callable[..., None], tmp_path: Path
) -> None:
    for before, after, outcome, message in CHANGES:
        saved = clipper_of(before, 4)
        clipper = clipper_of(after, 1)
        own: Any = clipper.state_dict()
        if outcome == REFUSED:
            with pytest.raises(StateError, match=message) as caught:
                way(saved.state_dict(), clipper, tmp_path)
            assert alike(clipper.state_dict(), own)
            text = str(caught.value)
            anew = "do not call load_state_dict" if way is by_the_clipper else f"remove {tmp_path}"
            assert "Configure the policy as it was saved" in text
            assert f"empty memory, {anew}" in text
            continue
        with logged() as lines:
            way(saved.state_dict(), clipper, tmp_path)
        assert len(lines) == (outcome == LINE), (before, after, lines)
        if lines:
            assert re.search(message, lines[0]), lines[0]
        state: Any = clipper.state_dict()
        assert state["step"] == 4
        wanted: Any = saved.state_dict()["states"] if own["states"] else {}
        assert alike(state["states"], wanted), (before, after)


@pytest.mark.ranks(2, 3)
def test_one_rank_says_what_has_changed() -> None:
    saved = clipper_of(AUTO(10), 3)
    with logged() as lines:
        clipper_of(AUTO(20)).load_state_dict(saved.state_dict())
    assert len(lines) == (dist.get_rank() == 0)


def test_the_state_of_a_policy_without_memory_fits_another_model() -> None:
    saved = clipper_of(NORM(1.0), 3)
    other = clipper_of(NORM(1.0), part=nn.Linear(5, 5))
    other.load_state_dict(saved.state_dict())
    assert other.state_dict()["step"] == 3


@pytest.mark.parametrize("which", ["policy", "shape", "damaged", "odd"])
@pytest.mark.parametrize("late", [False, True])
def test_several_clippers_are_loaded_all_or_none(which: str, late: bool, tmp_path: Path) -> None:
    policy = policies.adagc(warmup_steps=2)
    parts = [nn.Linear(3, 2), nn.Linear(4, 2), nn.Linear(5, 2)]
    saved: list[Any] = [clipper_of(policy, 3, part).state_dict() for part in parts]
    clippers = [clipper_of(policy, 1, part) for part in parts]
    shelf = Shelf(policy)
    waiting = clipper_of(policy, 2, nn.Linear(6, 2)).state_dict()
    shelf.load_state_dict({"version": 1, "clippers": [waiting]}, [], shelf._source)
    before = copy.deepcopy(shelf.state_dict(clippers))
    bad: dict[str, Any] = {
        "policy": clipper_of(policies.zclip(), 3, parts[2]).state_dict(),
        "shape": clipper_of(policy, 3, nn.Linear(7, 2)).state_dict(),
        "damaged": {**saved[2], "step": 4},
        "odd": {"parameters": 3},
    }
    torch.save({"version": 1, "clippers": [*saved[:2], bad[which]]}, tmp_path / FILE)
    here = clippers[:2] if late and which != "shape" else clippers
    with pytest.raises(StateError, match=str(tmp_path / FILE)):
        shelf.load(here, tmp_path)
    assert alike(shelf.state_dict(clippers), before)
    torch.save({"version": 1, "clippers": saved}, tmp_path / FILE)  # and all of them
    shelf.load(clippers, tmp_path)
    assert alike(shelf.state_dict(clippers)["clippers"], saved)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("through", ["torch.save", "dcp"])
def test_a_state_from_before_there_were_checksums_loads(through: str, tmp_path: Path) -> None:
    policy = policies.chain(AUTO(10, window=4), policies.adagc())
    saved = clipper_of(policy, 3)
    state: Any = saved.state_dict()
    old = {**state, "version": 1, "policy": repr(policy)}
    clipper = clipper_of(policy)
    if through == "dcp":
        dcp.save({"clipper": old}, checkpoint_id=str(tmp_path))
        dcp.load({"clipper": clipper}, checkpoint_id=str(tmp_path))
    else:
        file = io.BytesIO()
        torch.save(old, file)
        file.seek(0)
        clipper.load_state_dict(torch.load(file, weights_only=True))
    assert alike(clipper.state_dict(), state)
    # It does not say what its memory depends on.
    with pytest.raises(StateError, match="an older distclip wrote it"):
        clipper_of(policies.chain(AUTO(20, window=4), policies.adagc())).load_state_dict(old)
    clipper_of(NORM(2.0)).load_state_dict(old)


@pytest.mark.ranks(1)
def test_it_goes_through_distributed_checkpoints_to_another_threshold(tmp_path: Path) -> None:
    saved = clipper_of(AUTO(10, window=4), 3)
    dcp.save({"clipper": saved}, checkpoint_id=str(tmp_path))
    clipper = clipper_of(AUTO(20, window=4))
    dcp.load({"clipper": clipper}, checkpoint_id=str(tmp_path))
    assert alike(clipper.state_dict()["states"], saved.state_dict()["states"])
