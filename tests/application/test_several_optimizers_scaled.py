"""Several optimizers: gradient scalers, and gradients that are not finite."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import GradClipper, policies
from tests.application.several import (
    KINDS,
    ORDERS,
    Pair,
    Seen,
    assert_same,
    loss_of,
    model_of,
    pair_of,
)
from tests.helpers.watching import bits, same_bits

MAX_NORM = 0.1


def state_of(pair: Pair) -> list[Tensor]:
    return [
        value
        for optimizer in pair
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]


def everything(model: nn.Module, pair: Pair) -> list[Any]:
    return [bits(tensor) for tensor in (*model.parameters(), *state_of(pair))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("unscaled", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("bad", [None, 0, 1])
def test_under_a_gradient_scaler(
    kind: str, order: tuple[int, int], unscaled: tuple[int, ...], bad: int | None
) -> None:
    """The scaler unscales one optimizer at a time; an overflow in one of them skips both."""
    model, reference, seen = model_of(), model_of(), Seen()
    pair, theirs = pair_of(model, kind), pair_of(reference, kind)
    GradClipper(model, policies.global_norm(MAX_NORM), sinks=[seen]).attach(*pair)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    want = []
    for step in range(4):
        scaler.scale(loss_of(model, step)).backward()
        loss_of(reference, step).backward()
        overflow = step == 2 and bad is not None
        if overflow:
            broken = pair[bad].param_groups[0]["params"][0]
            broken.grad.view(-1)[0] = math.inf
        before = everything(model, pair)
        for number in unscaled:
            scaler.unscale_(pair[number])
        if not overflow:
            want.append(nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM).item())
        for number in order:
            scaler.step(pair[number])
            if not overflow:
                theirs[number].step()
        scaler.update()
        if overflow:
            assert all(map(same_bits, before, everything(model, pair)))
        for optimizer in (*pair, *theirs):
            optimizer.zero_grad()
            assert not hasattr(optimizer, "grad_scale")
            assert not hasattr(optimizer, "found_inf")
    assert scaler.get_scale() == (1024.0 if bad is None else 512.0)
    assert [norm for norm in seen.norms if math.isfinite(norm)] == pytest.approx(want, rel=1e-5)
    assert len(seen.norms) <= 4
    assert_same(model, reference)


@pytest.mark.parametrize("mode", ["error", "zero", "pass"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["muon", "fused"])
def test_an_overflow_under_a_scaler_drops_all_steps_in_every_mode(
    kind: str, order: tuple[int, int], mode: Any
) -> None:
    model = model_of()
    pair = pair_of(model, kind)
    GradClipper(model, policies.global_norm(MAX_NORM), on_nonfinite=mode).attach(*pair)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, 0)).backward()
    pair[order[1]].param_groups[0]["params"][0].grad.view(-1)[0] = math.inf
    before = everything(model, pair)
    for number in order:
        scaler.step(pair[number])
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(map(same_bits, before[:4], everything(model, pair)[:4]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", [0, 1])
def test_one_nan_skips_all_of_them(kind: str, order: tuple[int, int], bad: int) -> None:
    model = model_of()
    pair = pair_of(model, kind)
    clipper = GradClipper(model, policies.global_norm(MAX_NORM), on_nonfinite="skip")
    clipper.attach(list(pair))
    for step in range(3):
        loss_of(model, step).backward()
        before = everything(model, pair)
        if step == 1:
            pair[bad].param_groups[0]["params"][0].grad.view(-1)[0] = math.nan
        for number in order:
            pair[number].step()
        same = list(map(same_bits, before, everything(model, pair)))
        assert all(same) if step == 1 else not any(same[:2])
        model.zero_grad()


def test_a_nan_is_an_error_before_any_of_them_steps() -> None:
    model = model_of()
    pair = pair_of(model, "muon")
    GradClipper(model, policies.global_norm(MAX_NORM)).attach(*pair)
    loss_of(model, 0).backward()
    first = pair[0].param_groups[0]["params"][0]
    good = first.grad.clone()
    first.grad.view(-1)[0] = math.nan
    before = everything(model, pair)
    for optimizer in (pair[1], pair[0]):
        with pytest.raises(distclip.NonFiniteGradientError):
            optimizer.step()
    assert all(map(same_bits, before, everything(model, pair)))
    first.grad = good
    for optimizer in pair:
        optimizer.step()
    assert not any(map(same_bits, before[:4], everything(model, pair)[:4]))
