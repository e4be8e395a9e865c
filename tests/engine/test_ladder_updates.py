"""A ladder that judges updates: known after the step, acted on before the next clip."""

import copy
from typing import Any

import pytest
import torch

from distclip import (
    ConfigurationError,
    GradClipper,
    LadderExhaustedError,
    RewindRequested,
    policies,
)
from distclip.monitor import UpdateMonitor
from distclip.testing import memory
from tests.engine.test_attendant import Run, everywhere, local
from tests.helpers.logs import logged
from tests.helpers.watching import same_bits

SPIKES = policies.skip_norm(1e6)
UPDATES = policies.skip_spikes(16, min_history=4)
LARGE = 9
"""The step of which the update is 1000 times too large, and the gradient as always."""


class Watched(Run):
    def __init__(self, layout: str, policy: Any, every: int = 1) -> None:
        super().__init__(layout, policy)
        self.norms: list[float] = []
        sinks = (self.clipper.note_update, lambda _, report: self.norms.append(report.total_norm))
        self.monitor = UpdateMonitor(self.model, self.optimizer, every=every, sinks=sinks)

    def step(self, step: int, flip: bool = False, recompute: bool = True) -> None:
        self.optimizer.param_groups[0]["lr"] = 10.0 if step == LARGE else 0.01
        super().step(step)

    def parts(self) -> Any:
        tensors = [local(p) for p in self.model.parameters()]
        tensors += [local(state["momentum_buffer"]) for state in self.optimizer.state.values()]
        return [tensor.detach() for tensor in tensors]


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_large_update_asks_to_go_back_to_before_it(layout: str) -> None:
    """Nothing undoes it but a load: with that, and without its batch, it has never been."""
    run = Watched(layout, policies.ladder(SPIKES, updates=UPDATES, rewinds=1))
    with logged("distclip.ladder") as lines:
        for step in range(LARGE):
            run.step(step)
        kept, saved = [part.clone() for part in run.parts()], run.clipper.state_dict()
        run.step(LARGE)
        assert not all(map(same_bits, kept, run.parts()))  # it was made
        assert run.clipper.rewinds == 0  # asked for, and not raised yet
        moved = [part.clone() for part in run.parts()]
        with pytest.raises(RewindRequested, match="a large update, which was made") as asked:
            run.step(LARGE + 1)
    assert all(map(same_bits, moved, run.parts()))
    assert (asked.value.step, asked.value.batches) == (LARGE, (f"b{LARGE}r{run.rank}",))
    assert len(lines) == 1
    assert f"step {LARGE} (counted from 0), rank {run.rank}: a large update (norm " in lines[0]
    assert "made, and a rewind asked for; used: 1 of 1 rewinds" in lines[0]
    state: memory.Memory = {}
    for step, norm in enumerate(map(float, run.norms)):  # as the oracle has it
        spike, state = memory.skip_spikes(state, norm, None, 16, min_history=4)
        assert spike == (step == LARGE)
    assert all(each == run.norms for each in everywhere(run.norms))

    with torch.no_grad():
        for part, old in zip(run.parts(), kept, strict=True):
            part.copy_(old)
    run.clipper.load_state_dict(saved)
    assert run.clipper.rewinds == 1
    run.step(LARGE + 1)
    other = Watched(layout, policies.ladder(SPIKES, updates=UPDATES))
    for step in (*range(LARGE), LARGE + 1):
        other.step(step)
    assert all(map(same_bits, run.parts(), other.parts()))
    run.step(LARGE)
    with pytest.raises(LadderExhaustedError, match="a large update, which was made"):
        run.step(LARGE + 2)


def test_its_memory_is_in_the_state() -> None:
    policy = policies.ladder(SPIKES, updates=UPDATES)
    run = Watched("plain", policy)
    for step in range(6):
        run.step(step)
    resumed = Watched("plain", policy)
    resumed.clipper.load_state_dict(copy.deepcopy(run.clipper.state_dict()))
    resumed.step(LARGE)
    with pytest.raises(RewindRequested, match="at step 6 or before"):
        resumed.step(LARGE + 1)
    saved = run.clipper.state_dict()
    run.step(LARGE)
    run.clipper.load_state_dict(saved)  # which takes that step back
    run.step(LARGE + 1)
    assert run.clipper.rewinds == 0


def test_no_monitor_is_told_of_once_and_one_of_few_steps_is_one() -> None:
    policy = policies.ladder(SPIKES, updates=UPDATES)
    for every, count in ((0, 1), (100, 0)):
        run = Watched("plain", policy, every or 1)
        if not every:
            run.monitor.remove()
        with logged("distclip.ladder") as lines:
            for step in range(4):
                run.step(step)
        assert [line for line in lines if "got none of the last step" in line] == lines
        assert len(lines) == count


def test_refused() -> None:
    for updates, message in (
        (policies.value(1.0), "updates must be one policy that skips"),
        (policies.skip_norm(1.0, norm_type=3.0), "by 2-norms of updates and by nothing else"),
        (policies.skip_spikes(loss=True), "by 2-norms of updates and by nothing else"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            policies.ladder(SPIKES, updates=updates)
    run, model = Watched("plain", policies.ladder(SPIKES, updates=UPDATES)), torch.nn.Linear(2, 2)
    clipper = GradClipper(model, policies.ladder(SPIKES, updates=UPDATES))
    run.step(0)
    model(torch.ones(1, 2)).sum().backward()
    clipper.clip_()
    with pytest.raises(ConfigurationError, match="of other parameters than this GradClipper"):
        clipper.note_update(0, run.monitor.last)
