"""The ladder's host in one process: second computations, scalers, notes, running statistics."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distclip import GradClipper, NonFiniteGradientError, RewindRequested, policies
from tests.helpers.logs import logged
from tests.helpers.main_grad import accumulate
from tests.helpers.watching import same_bits


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
