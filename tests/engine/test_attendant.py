"""The ladder's host: bad data, a bit flip, a divergence; the same on every rank, over resumes."""

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distclip import (
    CollectiveError,
    GradClipper,
    LadderExhaustedError,
    RewindRequested,
    policies,
)
from tests.helpers.logs import logged
from tests.helpers.ranks import everyones
from tests.helpers.shards import local
from tests.helpers.watching import same_bits

BAD = range(10, 20)
"""Steps whose data is bad, in the runs that have some."""
SPIKES = policies.skip_spikes(16, min_history=6, clip_sigma=3.0)
ALL = policies.ladder(SPIKES, clips=1, skips=1, recomputes=1, rewinds=1)


class Run:
    """A tiny training; ``bad``: steps whose data is bad, on rank 0."""

    def __init__(self, layout: str, policy: Any, bad: Any = (), lr: float = 0.01) -> None:
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
        if layout == "ddp":
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        elif layout == "fsdp2":
            fully_shard(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.5)
        self.clipper = GradClipper(self.model, policy, on_nonfinite="skip")
        self.clipper.attach(self.optimizer)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.bad = bad

    def backward(self, step: int) -> None:
        random = torch.Generator().manual_seed(100 * step + self.rank)
        data = torch.randn(4, 7, generator=random)
        target = torch.randn(4, 3, generator=random)
        scale = 1e3 if step in self.bad and self.rank == 0 else 1.0
        (self.model(data) - scale * target).square().mean().backward()

    def step(self, step: int, flip: bool = False, recompute: bool = True) -> None:
        self.optimizer.zero_grad()
        again = (lambda: self.backward(step)) if recompute else None
        self.clipper.note(batch=f"b{step}r{self.rank}", recompute=again)
        self.backward(step)
        if flip:  # as a flip on one rank before the reduction, where gradients are replicated
            flip_exponent(next(iter(self.model.parameters())))
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [local(p).detach().clone() for p in self.model.parameters()]


def flip_exponent(parameter: Any) -> None:
    bits = local(parameter.grad).view(-1).view(torch.int32)
    bits[:1] ^= 1 << 30


def everywhere(value: Any) -> list[Any]:
    return everyones(value) if dist.is_initialized() else [value]


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_bad_data(layout: str) -> None:
    """Clip, skip, compute again, rewind, abort, at the same steps on every rank."""
    run = Run(layout, ALL, BAD)
    with logged("distclip.ladder") as lines:
        for step in range(14):
            before = run.weights()
            run.step(step)
            moved = not all(map(same_bits, before, run.weights()))
            assert moved == (step < 11), step
        saved = run.clipper.state_dict()
        # The errors come before anything changes.
        with pytest.raises(RewindRequested, match=r"step 13 .* at step 10 or before") as asked:
            run.step(14)
        assert all(map(same_bits, before, run.weights()))
        assert asked.value.step == 10
        assert asked.value.batches == tuple(f"b{step}r{run.rank}" for step in range(10, 14))
        run.step(14)
        with pytest.raises(LadderExhaustedError, match=r"step 14 .*all budgets"):
            run.step(15)
    told = [
        "left to be clipped",
        "skipped; used",
        "skipped, and to be computed again",
        "computed again, and the results are equal",
        "a rewind asked for",
        "the run ended",
    ]
    assert len(lines) == len(told)
    for line, part, step in zip(lines, told, (10, 11, 12, 12, 13, 14), strict=True):
        assert part in line
        assert f"step {step} (counted from 0), rank {run.rank}: " in line
        assert line.endswith(f"batches: b{step}r{run.rank}")
    assert "largest: " in lines[0]
    assert ".weight" in lines[0]
    steps = [line.replace(f"rank {run.rank}", "").replace(f"r{run.rank}", "") for line in lines]
    assert all(each == steps for each in everywhere(steps))
    budgets_survive(layout, run, saved)


def budgets_survive(layout: str, run: Run, saved: Any) -> None:
    """A new process has used its rewind, if it was asked for; one that goes back has, too.

    ``saved`` is of before the error: a request that ended with its process counts as none.
    """
    resumed = Run(layout, ALL, BAD)
    resumed.clipper.load_state_dict(saved)
    resumed.step(14)
    with pytest.raises(RewindRequested, match="step 14 ") as asked:
        resumed.step(15)
    assert asked.value.step == 10  # where the episode began, in the first process
    other = Run(layout, ALL, BAD)
    other.clipper.load_state_dict(resumed.clipper.state_dict())
    other.step(15)
    with pytest.raises(LadderExhaustedError):
        other.step(16)
    fresh = Run(layout, ALL).clipper
    run.clipper.load_state_dict(fresh.state_dict())
    shared: Any = run.clipper.state_dict()["states"]["" if "" in saved["states"] else "0"]
    assert int(shared["shared"]["rewinds"]) == 1
    assert int(shared["shared"]["skips"]) == 0


@pytest.mark.parametrize("rung", ["recomputes", "rewinds"])
def test_what_was_asked_for_and_not_done_is_not_used(rung: str) -> None:
    """In a state that is saved, in a copy, and after a load in the same process."""
    policy = policies.ladder(SPIKES, **{**dict.fromkeys(policies.Ladder.rungs, 0), rung: 1})

    def used(clipper: GradClipper) -> int:
        states: Any = clipper.state_dict()["states"]
        return int(states[""]["shared"][rung])

    first, second = Run("plain", policy, (10,)), Run("plain", policy, (10,))
    for step in range(11):
        first.step(step)
        second.step(step)
    assert used(copy.deepcopy(first.clipper)) == used(first.clipper) == first.clipper.rewinds == 0
    with contextlib.suppress(RewindRequested):
        first.step(11)
    assert used(first.clipper) == 1
    second.clipper.load_state_dict(second.clipper.state_dict())
    second.step(11)
    assert used(second.clipper) == 0


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_second_computation_leaves_no_trace(layout: str) -> None:
    """Bit by bit the run that only skips."""
    ends = []
    for budgets in ({"skips": 0, "recomputes": 1}, {"skips": 1, "recomputes": 0}):
        run = Run(layout, policies.ladder(SPIKES, **budgets), (10,))
        for step in range(15):
            run.step(step)
        ends.append(run.weights() + [s["momentum_buffer"] for s in run.optimizer.state.values()])
    assert all(same_bits(local(a), local(b)) for a, b in zip(*ends, strict=True))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_bit_flip(layout: str) -> None:
    run = Run(layout, policies.ladder(SPIKES, skips=0, recomputes=1))
    with logged("distclip.ladder") as lines:
        for step in range(12):
            run.step(step, flip=step == 10 and (layout == "ddp" or run.rank == 1))
    assert "to be computed again" in lines[0]
    assert "the results differ (norm " in lines[1]
    assert "points at hardware: " in lines[1]
    assert "weight" in lines[1]
    assert "bias" not in lines[1]
    assert len(lines) == 2


@pytest.mark.ranks(2)
def test_a_rank_that_cannot_compute_again() -> None:
    run = Run("ddp", policies.ladder(SPIKES, skips=0, recomputes=1), (10,))
    with logged("distclip.ladder") as lines:
        for step in range(12):
            run.step(step, recompute=run.rank == 0)
    assert "not computed again, since on some rank" in lines[1]


@pytest.mark.ranks(2)
def test_a_rank_whose_second_computation_fails() -> None:
    """Its own error there, and its name elsewhere: nobody waits for it in the next collective."""
    run = Run("fsdp2", policies.ladder(SPIKES, skips=0, recomputes=1), (10,))

    def fails(step: int) -> None:
        run.backward(step)
        if run.rank == 1:
            raise KeyError("row 12")

    for step in range(11):
        run.optimizer.zero_grad()
        run.clipper.note(recompute=lambda step=step: fails(step))
        run.backward(step)
        run.optimizer.step()
    before = run.weights()
    error: Any = KeyError if run.rank == 1 else CollectiveError
    with pytest.raises(error, match="row 12") as raised:
        run.step(11)
    if run.rank == 0:
        assert "step 10 " in str(raised.value)
        assert "has failed on rank 1, whose own error says where: KeyError" in str(raised.value)
        assert raised.value.ranks == (1,)
    assert all(map(same_bits, before, run.weights()))
    run.step(11)  # the ranks are still together


@pytest.mark.ranks(1, 2)
def test_a_divergence() -> None:
    """Norms that grow from step to step until nothing is finite, and weights that stay."""
    run = Run("fsdp2", policies.ladder(SPIKES, skips=2, recomputes=1, rewinds=1), lr=60.0)
    seen = []
    for step in range(200):
        try:
            run.step(step)
        except (RewindRequested, LadderExhaustedError) as error:
            seen.append((step, type(error).__name__))
            if isinstance(error, LadderExhaustedError):
                break
    assert [name for _, name in seen] == ["RewindRequested", "LadderExhaustedError"], seen
    assert all(each == seen for each in everywhere(seen))
    assert all(bool(weight.isfinite().all()) for weight in run.weights())


def test_the_last_decision_is_logged() -> None:
    run = Run("plain", ALL, (10,))
    with logged("distclip.ladder") as lines:
        for step in range(11):
            run.step(step)
        assert lines == []
        run.clipper.raise_late()
        run.clipper.raise_late()
    assert len(lines) == 1
    assert "step 10" in lines[0]
