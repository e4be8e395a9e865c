"""The drop-ins on ranks that were not given the same: an error on all of them, and no hang."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip.engine import handshake
from distclip.engine.handshake import Agreements
from distclip.statistics import collectives
from tests.helpers.watching import REDUCTION, bits, same_bits, watch
from tests.sharded import mesh_of

SECONDS = 20
"""Of a test; a hang is a failure, and not a long wait."""

CALLS: dict[str, Callable[[list[Tensor]], object]] = {
    "norm": lambda listed: distclip.clip_grad_norm_(listed, 1.0),
    "max norm": lambda listed: distclip.clip_grad_norm_(listed, 1.0, math.inf),
    "agc": lambda listed: distclip.clip_grad_agc_(listed, 0.01),
    "norms": lambda listed: distclip.grad_norms([(f"p{i}", p) for i, p in enumerate(listed)]),
    "total": lambda listed: distclip.get_total_norm([p.grad for p in listed]),  # type: ignore[misc]
    "group": lambda listed: distclip.clip_grad_norm_(listed, 1.0, pipeline_group=dist.group.WORLD),
    "agc group": lambda listed: distclip.clip_grad_agc_(listed, pipeline_group=dist.group.WORLD),
}
PARAMETERS = {name: call for name, call in CALLS.items() if name != "total"}


def sharded(*shape: int, placement: Any = None) -> nn.Parameter:
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    placements = [Shard(0) if placement is None else placement]
    made = [
        distribute_tensor(torch.full(shape, value), mesh, placements, src_data_rank=None)
        for value in (1.0, 9.0)
    ]
    result = nn.Parameter(made[0])
    result.grad = made[1]
    return result


def plain(*shape: int) -> nn.Parameter:
    result = nn.Parameter(torch.ones(shape))
    result.grad = torch.full(shape, 9.0)
    return result


def refused(call: Callable[[], object], kinds: Any, *words: str) -> str:
    with pytest.raises(kinds) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    dist.barrier()
    return str(caught.value)


def unchanged(listed: list[Tensor], act: Callable[[], object]) -> None:
    before = [bits(p.grad) for p in listed]
    act()
    assert all(map(same_bits, before, (bits(p.grad) for p in listed)))


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
@pytest.mark.parametrize("odd", ["fewer", "another shape", "another dtype"])
def test_other_parameters_on_one_rank(odd: str) -> None:
    """Named: how many, of what, where. Nothing has changed, and the right call works after it."""
    mine = dist.get_rank() == 1
    # At the first call of its kind: other tests may have agreed upon the same shapes before.
    size = {"fewer": 61, "another shape": 67, "another dtype": 71}[odd] + 2 * dist.get_world_size()
    for number, (name, call) in enumerate(CALLS.items()):
        right = [sharded(size + number, 3), plain(size)]
        listed: list[Tensor] = list(right)
        if mine and odd == "fewer":
            listed = listed[:1]
        elif mine and odd == "another shape":
            listed[1] = plain(size + 1)
        elif mine:
            listed[1] = nn.Parameter(torch.ones(size, dtype=torch.float64))
            listed[1].grad = torch.ones(size, dtype=torch.float64)
        told = "different parameters"
        kind: Any = distclip.RankMismatchError
        words = (told, "rank 1: ", f"[{size}]") if odd != "another shape" else (told, "rank 1: ")
        unchanged(listed, lambda c=call, x=listed, w=words, k=kind: refused(lambda: c(x), k, *w))
        call(list(right))
        dist.barrier()
        assert name


@pytest.mark.ranks(2, 3, timeout=SECONDS)
@pytest.mark.parametrize("when", ["at first", "later"])
def test_marks_that_one_rank_does_not_understand(when: str) -> None:
    """It raises with the mend, and the others hear of it."""
    mine = dist.get_rank() == 1
    base = (81 if when == "later" else 91) + 20 * dist.get_world_size()
    for number, call in enumerate(PARAMETERS.values()):
        listed: list[Tensor] = [sharded(base + number, 2), plain(7)]
        if when == "later":
            call(listed)
            call(listed)
        marked: Any = listed[1]
        if mine:
            marked.allreduce = False
        message = unchanged_message(listed, call)
        if mine:
            assert "declare_sharded(parameter, process_group)" in message
        else:
            assert "rank 1" in message or "another rank" in message
        if mine:
            del marked.allreduce
        call(listed)
        dist.barrier()


@pytest.mark.ranks(2, 3, timeout=SECONDS)
def test_marks_under_another_threshold_and_on_other_parameters() -> None:
    """The others have agreed on such a call, and reduce: so does the rank that cannot read it."""
    mine = dist.get_rank() == 1
    size = 131 + dist.get_world_size()
    for number, unit in enumerate(("norm", "row", "tensor")):

        def call(listed: list[Tensor], threshold: float, unit: Any = unit) -> object:
            if unit == "norm":
                return distclip.clip_grad_norm_(listed, threshold)
            return distclip.clip_grad_agc_(listed, threshold, unit=unit)

        call([sharded(size + 5 * number, 2), plain(7, 3)], 1.0)
        for threshold in (2.0, 3.0):
            listed: list[Tensor] = [sharded(size + 5 * number, 2), plain(7, 3)]
            marked: Any = listed[1]
            if mine:
                marked.allreduce = False
            message = refused(lambda x=listed, t=threshold: call(x, t), distclip.DistclipError)
            assert ("declare_sharded" in message) if mine else ("another rank" in message)


def unchanged_message(listed: list[Tensor], call: Callable[[list[Tensor]], object]) -> str:
    found: list[str] = []
    unchanged(listed, lambda: found.append(refused(lambda: call(listed), distclip.DistclipError)))
    return found[0]


@pytest.mark.ranks(2, 3, timeout=SECONDS)
@pytest.mark.parametrize("kind", ["sparse rows", "max"])
def test_a_tensor_that_one_rank_cannot_measure(kind: str) -> None:
    """At the first call and later; with a process group too."""
    mine = dist.get_rank() == 1
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    good = distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)])
    bad: Tensor = torch.ones(5, 3)
    if kind == "max":
        bad = distribute_tensor(bad, mesh, [Replicate()])
    right = bad
    if mine and kind == "sparse rows":
        bad = torch.ones(5, 3).to_sparse(layout=torch.sparse_csr)
    elif mine:
        bad = DTensor.from_local(torch.ones(5, 3), mesh, [Partial("max")], run_check=False)
    for group in (None, dist.group.WORLD):
        for _ in range(2):
            message = refused(
                lambda g=group: distclip.get_total_norm([good, bad], pipeline_group=g),
                distclip.UnsupportedGradientError,
            )
            assert ("'1'" in message) if mine else ("another rank" in message), message
        distclip.get_total_norm([good, right], pipeline_group=group)


@pytest.mark.ranks(2, timeout=SECONDS)
def test_ranks_agree_once() -> None:
    """Then a call is one all-reduce, whatever the threshold, also for parameters made anew."""
    for threshold in (1.0, 2.0, 3.0):
        listed: list[Tensor] = [sharded(111, 2), plain(3)]
        with watch() as seen:
            distclip.clip_grad_norm_(listed, threshold)
        # To agree takes two gathers: of sizes, then of what is compared. Then come two norms and a
        # flag.
        assert len(seen.collectives) == (3 if threshold == 1.0 else 1)
        assert seen.collectives[-1] == (REDUCTION, 8 * 3)


@pytest.mark.ranks(2, timeout=SECONDS)
def test_value_clipping_of_shards_talks_to_nobody_even_at_first() -> None:
    """So it may be called where and when one likes, and its errors are this rank's own."""
    p, q = sharded(121, 2), plain(3)
    marked: Any = q
    with watch() as seen:
        distclip.clip_grad_value_([p, q], 0.5)
    assert seen.collectives == []
    if dist.get_rank() == 1:
        marked.allreduce = False
        with watch() as seen, pytest.raises(distclip.UnsupportedGradientError):
            distclip.clip_grad_value_([p, q], 0.5)
        assert seen.collectives == []
    dist.barrier()


@pytest.mark.ranks(2, 3, timeout=SECONDS)
@pytest.mark.parametrize("fault", ["nothing", "freed"])
def test_a_member_without_numbers_goes_where_the_others_are(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """In a group of several backends, which hear nothing of each other: asked once in a group.

    Rank 0 says that its numbers are on an accelerator; the others have none, or cannot be measured.
    """
    asked: list[str] = []
    device_of = Agreements.device

    def device(self: Agreements, group: Any, here: str) -> str:
        return device_of(self, group, "cuda" if dist.get_rank() == 0 else here)

    def device_for(group: Any, preferred: torch.device) -> torch.device:
        asked.append(preferred.type)
        return torch.device("cpu")

    fresh = Agreements()
    monkeypatch.setattr(handshake, "agreements", fresh)
    monkeypatch.setattr(collectives, "is_mixed", lambda group: True)
    monkeypatch.setattr(Agreements, "device", device)
    monkeypatch.setattr(collectives, "device_for", device_for)
    group = dist.group.WORLD
    listed: list[Tensor] = []
    if dist.get_rank() == 0:
        listed = [plain(4)]
    elif fault == "freed":
        listed = [plain(4)]
        assert listed[0].grad is not None
        listed[0].grad.untyped_storage().resize_(0)
    for first in (True, False):
        asked.clear()
        with watch() as seen:
            if fault == "freed":
                with pytest.raises(distclip.UnsupportedGradientError):
                    distclip.clip_grad_norm_(listed, 1.0, pipeline_group=group)
            else:
                norm = distclip.clip_grad_norm_(listed, 1e9, pipeline_group=group)
                assert norm.item() == pytest.approx(18.0, rel=1e-6)
        assert asked[-1] == "cuda"
        assert len(seen.collectives) == (3 if first else 1)
