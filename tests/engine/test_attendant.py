"""The ladder's host: bad data, a bit flip, a divergence; the same on every rank, over resumes."""

from __future__ import annotations

import contextlib
import copy
import math
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
    NonFiniteGradientError,
    RewindRequested,
    policies,
)
from tests.helpers.logs import logged
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


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def flip_exponent(parameter: Any) -> None:
    bits = local(parameter.grad).view(-1).view(torch.int32)
    bits[:1] ^= 1 << 30


def everywhere(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


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


def tiny(policy: Any, fused: bool = False, **options: Any) -> tuple[Any, Any, GradClipper]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    return model, optimizer, GradClipper(model, policy, **options)


def test_main_gradients_survive_a_second_computation() -> None:
    """Megatron's ``main_grad`` of the next step does not get the spike added."""
    ends = []
    for budgets in ({"skips": 0, "recomputes": 1}, {"skips": 1, "recomputes": 0}):
        policy = policies.ladder(policies.skip_norm(50.0), **budgets)
        model, _, clipper = tiny(policy, on_nonfinite="skip")

        def accumulate(parameter: Any) -> None:
            parameter.main_grad.add_(parameter.grad)
            parameter.grad = None

        for parameter in model.parameters():
            parameter.main_grad = torch.zeros_like(parameter)
            parameter.register_post_accumulate_grad_hook(accumulate)
        with logged("distclip.ladder") as lines:
            for step in range(3):

                def backward(times: float = 1e3 if step == 1 else 1.0) -> None:
                    (model(torch.ones(4, 7)).sum() * times).backward()  # noqa: B023

                for parameter in model.parameters():
                    parameter.main_grad.zero_()
                clipper.note(recompute=backward)
                backward()
                clipper.clip_()
        assert len(lines) == 1 + budgets["recomputes"]
        assert all("results are equal" in line for line in lines[1:])
        ends.append([parameter.main_grad for parameter in model.parameters()])
    assert all(map(same_bits, *ends))


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_scaler(fused: bool) -> None:
    """An overflow is no spike; a loss scale that is left on a second computation is no hardware."""
    policy = policies.ladder(policies.skip_norm(50.0), skips=0, recomputes=2, rewinds=0)
    model, optimizer, clipper = tiny(policy, fused, on_nonfinite="skip")
    clipper.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with logged("distclip.ladder") as lines:
        for step in range(16):

            def backward(times: float, scaled: bool = True) -> None:
                loss = model(torch.ones(4, 7)).sum() * times
                (scaler.scale(loss) if scaled else loss).backward()

            times = 1e3 if step in (11, 13) else 1.0
            optimizer.zero_grad()
            clipper.note(recompute=lambda t=times, s=step == 13: backward(t, s))
            backward(times)
            scaler.step(optimizer)
            scaler.update()
            if step == 9:
                assert scaler.get_scale() < 2.0**127
                assert lines == []
                scaler.update(1024.0)
    assert len(lines) == 4
    assert "results are equal" in lines[1]
    assert "every result is 1024 times the first" in lines[3]


@pytest.mark.parametrize("mode", ["error", "error_late"])
def test_notes_of_a_step_that_raises_are_not_those_of_the_next(mode: Any) -> None:
    policy = policies.ladder(policies.skip_norm(50.0), skips=2)
    model, optimizer, clipper = tiny(policy, on_nonfinite=mode)
    clipper.attach(optimizer)
    raised = 0
    with logged("distclip.ladder") as lines:
        for step, times in enumerate((1.0, math.nan, 1e3, 1e3, 1.0)):
            optimizer.zero_grad()
            clipper.note(batch=step)
            (model(torch.ones(4, 7)).sum() * times).backward()
            try:
                optimizer.step()
            except NonFiniteGradientError:
                raised += 1
    assert raised == 1
    spikes = (3,) if mode == "error_late" else (2, 3)  # that raises in step 2
    found = [line.rpartition("; batches: ")[2] for line in lines if "(norm nan)" not in line]
    assert found == [str(step) for step in spikes]


def test_the_norm_in_the_log_is_that_of_the_report() -> None:
    spikes = policies.skip_norm(50.0, norm_type=math.inf)
    model, optimizer, clipper = tiny(policies.ladder(spikes), on_nonfinite="skip")
    clipper.attach(optimizer)
    (model(torch.ones(4, 7)).sum() * 1e3).backward()
    optimizer.step()
    assert clipper.last_report is not None
    norm = float(clipper.last_report.total_norm)
    with logged("distclip.ladder") as lines:
        clipper.raise_late()
    assert f"a spike (norm {norm:.4g})" in lines[0]


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_goes_on_after_a_rewind(fused: bool) -> None:
    """Norms, and steps, as of the same data before it."""
    policy = policies.ladder(policies.skip_norm(500.0), skips=0, recomputes=0, rewinds=1)
    model, optimizer, clipper = tiny(policy, fused, on_nonfinite="skip")
    clipper.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    norms, asked = [], []
    for step, times in enumerate((1.0, 1e3, 1.0, 1.0)):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(4, 7)).sum() * times).backward()
        try:
            scaler.step(optimizer)
        except RewindRequested:
            asked.append(step)
        scaler.update()
        assert clipper.last_report is not None
        norms.append(float(clipper.last_report.total_norm))
    assert asked == [2]
    assert norms[3] == pytest.approx(norms[0], rel=0.1)


def test_running_statistics_count_a_batch_once() -> None:
    ends = []
    for budgets in ({"skips": 0, "recomputes": 1}, {"skips": 1, "recomputes": 0}):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        policy = policies.ladder(policies.skip_norm(500.0), **budgets)
        clipper = GradClipper(model, policy, on_nonfinite="skip")
        for step in range(3):
            data = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))

            def backward(data: Tensor = data, times: float = 1e3 if step == 1 else 1.0) -> None:
                (model(data).square().sum() * times).backward()  # noqa: B023

            model.zero_grad()
            clipper.note(recompute=backward)
            backward()
            clipper.clip_()
        ends.append(list(model[1].buffers()))
    assert all(map(same_bits, *ends))
