"""Errors that are raised one step late: nothing waits, nothing is lost, all ranks alike."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distclip
from distclip import ClipReport, ConfigurationError, GradClipper, policies
from distclip.testing import expected
from tests.engine.nonfinite import (
    BAD,
    OPTIMIZERS,
    CountingScale,
    Decided,
    agree,
    all_bits,
    backward,
    everything,
    poisoned,
    small,
    unchanged,
)
from tests.engine.test_matrix import build
from tests.helpers.watching import same_bits
from tests.sharded import shard, whole

CHAIN = [
    {"name": "agc", "clip_factor": 0.1},
    {"name": "value", "clip_value": 0.05},
    {"name": "global_norm", "max_norm": 0.5},
]


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("layout", ["plain", "fsdp2", "tp", "mixed"])
def test_by_hand(layout: str) -> None:
    """The step with a NaN has gradients of 0, and the next one raises on all ranks alike."""
    for configuration in ({"name": "global_norm", "max_norm": 1.0}, CHAIN):
        for bad in (math.nan, math.inf):
            model = shard(layout, values := poisoned(bad))
            clipper = GradClipper(model.named(), build(configuration), on_nonfinite="error_late")
            model.set_gradients(whole().gradients)
            assert not bool(clipper.clip_().skipped)
            model.set_gradients(values.gradients)
            report = clipper.clip_()
            assert bool(report.skipped)
            assert sorted(report.nonfinite) == sorted(BAD)
            for name, gradient in model.local_gradients():
                assert gradient is None or not gradient.any(), name
            good = whole(seed=1)
            model.set_gradients(good.gradients)
            before = all_bits(model)
            with pytest.raises(distclip.NonFiniteGradientError, match="step 1 ") as caught:
                clipper.clip_()
            assert sorted(caught.value.parameters) == sorted(BAD)
            agree(str(caught.value))
            assert all(map(same_bits, before, all_bits(model)))
            # Once, and the next step is a step like any other.
            want = expected(configuration, good.gradients, values.weights)
            report = clipper.clip_()
            assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
            clipper.raise_late()
            assert clipper.state_dict()["step"] == 3


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_attached(make: Any, first: bool) -> None:
    """On the host the update is left out; the next step raises before it changes anything."""
    model = small()
    optimizer = make(model.parameters())
    GradClipper(model, policies.global_norm(1.0), on_nonfinite="error_late").attach(optimizer)
    if not first:
        backward(model)
        optimizer.step()
    before = everything(model, optimizer)
    backward(model, math.nan)
    optimizer.step()
    assert unchanged(everything(model, optimizer), before)
    backward(model)
    with pytest.raises(distclip.NonFiniteGradientError, match=f"step {int(not first)} "):
        optimizer.step()
    assert unchanged(everything(model, optimizer), before)
    optimizer.step()
    assert not unchanged(everything(model, optimizer), before)


def failed() -> tuple[GradClipper, Any]:
    """A clipper whose last step had a NaN, and its handle."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = GradClipper(model, policies.global_norm(1.0), on_nonfinite="error_late")
    handle = clipper.attach(optimizer)
    backward(model, math.nan)
    optimizer.step()
    return clipper, handle


def test_the_last_step_is_not_lost() -> None:
    clipper, handle = failed()
    with pytest.raises(distclip.NonFiniteGradientError, match="'weight', 'bias'"):
        handle.remove()
    assert not handle.active
    handle.remove()
    for end in ("raise_late", "state_dict"):
        clipper, handle = failed()
        with pytest.raises(distclip.NonFiniteGradientError, match="'weight', 'bias'"):
            getattr(clipper, end)()
        clipper.state_dict()
        handle.remove()


def test_a_step_that_is_taken_back_raises_no_more() -> None:
    model = small()
    state = GradClipper(model, policies.global_norm(1.0)).state_dict()
    clipper, handle = failed()
    clipper.load_state_dict(state)
    handle.remove()


def test_other_modes_have_nothing_to_raise() -> None:
    model = small()
    backward(model, math.nan)
    clipper = GradClipper(model, policies.global_norm(1.0), on_nonfinite="skip")
    clipper.clip_()
    clipper.raise_late()


@pytest.mark.ranks(1, 2)
def test_the_policy_remembers_nothing_of_it() -> None:
    model = shard("fsdp2", values := whole())
    clipper = GradClipper(model.named(), CountingScale(), on_nonfinite="error_late")
    model.set_gradients(values.gradients)
    first = clipper.clip_().total_norm.double()
    model.set_gradients(poisoned(math.nan).gradients)
    clipper.clip_()
    with pytest.raises(distclip.NonFiniteGradientError):
        clipper.raise_late()
    states: Any = clipper.state_dict()["states"]
    torch.testing.assert_close(states[""]["shared"]["sum"], first, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_policy_still_skips(make: Any) -> None:
    model = small()
    optimizer = make(model.parameters())
    GradClipper(model, Decided(1), on_nonfinite="error_late").attach(optimizer)
    backward(model)
    optimizer.step()
    before = everything(model, optimizer)
    backward(model)
    optimizer.step()
    assert unchanged(everything(model, optimizer), before)


def test_the_overflow_of_a_scaler_is_its_own_business() -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    clipper = GradClipper(model, policies.global_norm(1.0), on_nonfinite="error_late")
    clipper.attach(optimizer)
    for factor in (math.inf, 1.0, 1.0):
        model.zero_grad()
        scaler.scale((model(torch.arange(3.0)) * factor).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    clipper.raise_late()


@pytest.mark.parametrize("fused", [True, False])
def test_an_accelerator_is_not_read(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that heed ``found_inf`` change nothing; others step with gradients of 0."""
    from distclip.application import stepping

    def refuse(self: Tensor) -> bool:
        raise AssertionError("a flag was read for the step")

    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0, fused=fused)
    clipper = GradClipper(model, policies.global_norm(1.0), on_nonfinite="error_late")
    clipper.attach(optimizer)
    monkeypatch.setattr(stepping, "reads_on_host", lambda flag: False)
    monkeypatch.setattr(
        GradClipper, "_leaves_out", lambda self, coming: stepping.skips_by_found_inf(optimizer)
    )
    backward(model)
    optimizer.step()
    before = everything(model, optimizer)
    backward(model, math.nan)
    with monkeypatch.context() as patched:
        decide = stepping.StepHandle._decide

        def watched(self: Any, *given: Any) -> None:
            clip = self._clip

            def clipped(*args: Any) -> Any:
                report: ClipReport = clip(*args)
                patched.setattr(Tensor, "__bool__", refuse)
                return report

            self._clip = clipped
            try:
                decide(self, *given)
            finally:
                patched.undo()
                self._clip = clip

        patched.setattr(stepping.StepHandle, "_decide", watched)
        optimizer.step()
    after = everything(model, optimizer)
    assert unchanged(after, before) == fused
    assert all(torch.isfinite(each).all() for each in after)
    with pytest.raises(distclip.NonFiniteGradientError):
        clipper.raise_late()


def test_where_the_host_is_read_anyway_it_is_refused() -> None:
    model = small()
    with pytest.raises(ConfigurationError, match="no use under LaProp"):
        distclip.optim.LaProp(model.parameters(), on_nonfinite="error_late")


def test_a_copy_has_nothing_to_raise() -> None:
    clipper, _ = failed()
    copy.deepcopy(clipper).raise_late()


def test_from_a_configuration() -> None:
    clipper = distclip.from_config({"policy": "measure", "on_nonfinite": "error_late"}, small())
    assert clipper.on_nonfinite == "error_late"


@pytest.mark.ranks(2, 3)
def test_asked_on_one_rank_alone_the_next_step_raises_on_all() -> None:
    """Saving the state of one rank is enough, so one rank alone may come to ask."""
    model = shard("fsdp2", values := whole())
    clipper = GradClipper(model.named(), policies.global_norm(1.0), on_nonfinite="error_late")
    model.set_gradients(poisoned(math.nan).gradients)
    clipper.clip_()
    if dist.get_rank() == 0:
        with pytest.raises(distclip.NonFiniteGradientError):
            clipper.state_dict()
        clipper.state_dict()  # once is enough
    model.set_gradients(values.gradients)
    with pytest.raises(distclip.NonFiniteGradientError):
        clipper.clip_()
    clipper.clip_()
    clipper.raise_late()
