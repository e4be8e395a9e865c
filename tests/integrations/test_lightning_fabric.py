"""Fabric: one clip per step, whether or not the script calls ``fabric.clip_gradients``."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

import distclip
from distclip.integrations import charge
from distclip.testing import run_on_ranks
from tests.integrations.accelerated import Halve, batch, fused, loss_of, make, same, sgd
from tests.integrations.lightning_runs import REMEMBERS, SPEC, reference

pytestmark = pytest.mark.filterwarnings("ignore")


def step(fabric: Any, model: Any, optimizer: Any, number: int, calls: str = "") -> Any:
    from tests.integrations.lightnings import mine

    optimizer.zero_grad()
    fabric.backward(loss_of(model, mine(batch(number), fabric.world_size)))
    norm = None
    if "n" in calls:
        norm = fabric.clip_gradients(model, optimizer, max_norm=1e-9)
    if "t" in calls:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
    if "v" in calls:
        assert fabric.clip_gradients(model, optimizer, clip_val=1e-9) is None
    optimizer.step()
    return norm


@pytest.mark.ranks(1, 2, timeout=180)
def test_weights_are_those_of_the_oracle(world_size: int) -> None:
    from tests.integrations.lightnings import fabric_of, prepared, whole

    want, norms = reference(20)
    for layout in ["ddp", "fsdp2"][:world_size]:
        for calls in ("", "nv"):
            callback = distclip.lightning.ClipCallback({"policy": SPEC})
            fabric = fabric_of(layout, [callback])
            model, optimizer = prepared(fabric, layout)
            found = [step(fabric, model, optimizer, number, calls) for number in range(20)]
            same(whole(model.module), want)
            if calls:
                assert [float(norm) for norm in found] == pytest.approx(norms, rel=1e-5)
            ((names,),) = [[c.names for c in callback.handle.memory()[1]]]
            assert names == tuple(dict(make().named_parameters()))
            assert float(callback.last_report.total_norm) == pytest.approx(norms[-1], rel=1e-5)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("kind", [sgd, fused])
@pytest.mark.parametrize("calls", ["", "n"])
def test_a_scaler_has_unscaled_before(kind: Any, calls: str) -> None:
    from lightning.fabric.plugins.precision import MixedPrecision

    from tests.integrations.lightnings import fabric_of, prepared, whole

    class Full(MixedPrecision):  # type: ignore[misc]
        def forward_context(self) -> Any:
            return torch.autocast("cpu", enabled=False)

        def convert_input(self, data: Any) -> Any:
            return data

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    callback = distclip.lightning.ClipCallback({"policy": SPEC})
    fabric = fabric_of("ddp", [callback], plugins=[Full("16-mixed", "cpu", scaler)])
    model, optimizer = prepared(fabric, "ddp", kind)
    found = [step(fabric, model, optimizer, number, calls) for number in range(8)]
    want, norms = reference(8, kind)
    same(whole(model.module), want)
    if calls:
        assert [float(norm) for norm in found] == pytest.approx(norms, rel=1e-5)
    assert scaler.get_scale() > 1024


@pytest.mark.ranks(1, 2)
def test_torchs_functions_become_the_policy(world_size: int) -> None:
    """As ``distclip run`` has it, which replaces these functions."""
    from tests.integrations.lightnings import fabric_of, prepared, whole
    from tests.integrations.scripted import running

    want, norms = reference(4)
    for layout in ["ddp", "fsdp2"][:world_size]:
        with running(Halve()) as scripts:
            callback = distclip.lightning.ClipCallback({"policy": SPEC})
            fabric = fabric_of(layout, [callback])
            model, optimizer = prepared(fabric, layout)
            found = [
                step(fabric, model, optimizer, number, "tn"[number % 2 :]) for number in range(4)
            ]
            assert scripts.last_report is None
        same(whole(model.module), want)
        assert [float(norm) for norm in found] == pytest.approx(norms, rel=1e-5)
        assert [c.state_dict()["step"] for c in callback.handle.memory()[1]] == [4]
        callback.handle.remove()
        assert charge.charge_of(optimizer.optimizer) is None


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("calls", ["", "n"])
def test_a_call_whose_step_was_left_out_does_not_count(calls: str, world_size: int) -> None:
    from tests.integrations.lightnings import fabric_of, mine, prepared, whole

    want, norms = reference(2)
    for layout in ["ddp", "fsdp2"][:world_size]:
        callback = distclip.lightning.ClipCallback({"policy": SPEC})
        fabric = fabric_of(layout, [callback])
        model, optimizer = prepared(fabric, layout)
        fabric.backward(loss_of(model, mine(batch(5), fabric.world_size)))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        for number in range(2):
            step(fabric, model, optimizer, number, calls)
            assert float(callback.last_report.total_norm) == pytest.approx(norms[number], rel=1e-5)
        same(whole(model.module), want)


@pytest.mark.ranks(1)
def test_gradients_of_two_optimizers_in_one_buffer() -> None:
    """A change of one gradient counts as one of the others, and they are clipped once."""
    from tests.integrations.lightnings import fabric_of

    callback = distclip.lightning.ClipCallback({"policy": SPEC})
    fabric = fabric_of("ddp", [callback])
    nets = make(0), make(1)
    pairs = [fabric.setup(net, sgd(net)) for net in nets]
    parameters = [p for net in nets for p in net.parameters()]
    buffer = torch.ones(sum(p.numel() for p in parameters))
    parts = buffer.split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.grad = part.view_as(p)
    fabric.clip_gradients(*pairs[0], max_norm=1.0)
    pairs[1][1].step()  # clips
    pairs[0][1].step()
    assert [c.state_dict()["step"] for c in callback.handle.memory()[1]] == [1, 1]


@pytest.mark.ranks(1)
def test_two_optimizers_and_what_is_undone() -> None:
    from tests.integrations.lightnings import fabric_of

    callback = distclip.lightning.ClipCallback({"policy": SPEC})
    fabric = fabric_of("ddp", [callback])
    nets = make(0), make(1)
    pairs = [fabric.setup(net, sgd(net)) for net in nets]
    for number in range(6):
        for model, optimizer in pairs:
            step(fabric, model, optimizer, number)
    for seed, net in enumerate(nets):
        same(
            {name: p.detach() for name, p in net.named_parameters()},
            reference(6, net=lambda seed=seed: make(seed))[0],
        )
    callback.handle.remove()
    assert {"clip_gradients", "save", "load"}.isdisjoint(vars(fabric))
    model, optimizer = pairs[0]
    step(fabric, model, optimizer, 0, "n")
    norms = [p.grad.norm() for p in nets[0].parameters()]
    assert torch.stack(norms).norm() == pytest.approx(1e-9, rel=1e-2)  # Fabric's own clipping


@pytest.mark.ranks(1)
def test_one_callback_in_two_fabrics(tmp_path: Path) -> None:
    """Each has its own clipping, state and checkpoint; also after the first was detached."""
    from tests.integrations.lightnings import fabric_of, prepared, whole

    callback = distclip.lightning.ClipCallback({"policy": SPEC})
    want, norms = reference(3)
    fabrics, handles, pairs = [], [], []
    for _ in range(2):
        fabrics.append(fabric_of("ddp", [callback]))
        pairs.append(prepared(fabrics[-1], "ddp"))
        handles.append(callback.handle)
    assert handles[0] is not handles[1]
    for number in range(3):
        for fabric, pair in zip(fabrics, pairs, strict=True):
            norm = step(fabric, *pair, number, "n")
            assert float(norm) == pytest.approx(norms[number], rel=1e-5)
    for number, (fabric, pair) in enumerate(zip(fabrics, pairs, strict=True)):
        same(whole(pair[0].module), want)
        fabric.save(tmp_path / f"{number}", {"model": pair[0]})
        saved = torch.load(tmp_path / f"{number}", weights_only=True)["distclip"]
        assert [state["step"] for state in saved["clippers"]] == [3]
        handles[number].remove()
    fabric = fabric_of("ddp", [callback])
    pair = prepared(fabric, "ddp")
    for number in range(3):
        step(fabric, *pair, number)
    same(whole(pair[0].module), want)
    callback.handle.remove()


def decisions_of(folder: str, layout: str, first: int) -> list[float]:
    """Steps ``first`` to 7 on whatever ranks there are, with a checkpoint after step 3."""
    from tests.integrations.lightnings import fabric_of, prepared

    callback = distclip.lightning.ClipCallback(REMEMBERS)
    fabric = fabric_of(layout, [callback])
    model, optimizer = prepared(fabric, layout)
    state = {"model": model, "optimizer": optimizer}
    if first:
        assert fabric.load(f"{folder}/state", state) == {}
    found = []
    for number in range(first, 8):
        step(fabric, model, optimizer, number)
        found.append(float(callback.last_report.coefficient))
        if number == 3:
            fabric.save(f"{folder}/state", state)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_decisions_survive_a_restart(layout: str, tmp_path: Path) -> None:
    through = run_on_ranks(decisions_of, 2, str(tmp_path), layout, 0, timeout=200)[0]
    assert len(set(through)) > 3
    for ranks in (2, 1) if layout == "ddp" else (2,):
        for each in run_on_ranks(decisions_of, ranks, str(tmp_path), layout, 4, timeout=200):
            assert each == pytest.approx(through[4:], rel=1e-5)
