"""A device that is none: torch's PrivateUse1 backend, computed on the CPU, but strict.

Registered in Python (``torch.utils.backend_registration``), for the whole process: run
``python -m tests.helpers.pretend`` in one of its own. As on a real accelerator an op that is given
tensors of two devices raises, but for 0-dim ones of the CPU. It shows where tensors lie, and
nothing about speed, streams or kernels.
"""

import functools
import math
import traceback
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"


class Pretended(torch.Tensor):
    """A tensor on that device; ``raw`` has its values."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def pretended(raw: Tensor) -> Pretended:
    made: Any = torch._C._acc.create_empty_tensor(raw.shape, raw.dtype)  # type: ignore[attr-defined]
    made.__class__ = Pretended
    if 0 in raw.stride():  # torch takes views by the strides of `made`, which has its own
        raw = raw.contiguous()
    made.raw = raw
    return made


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any op: on the raw tensors. A result that is an argument stays that argument."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if any(not isinstance(each, Pretended) and each.dim() for each in tensors):
        raise RuntimeError(f"{op}: tensors on two devices")
    known = {id(each.raw): each for each in tensors if isinstance(each, Pretended)}

    def enter(value: Any) -> Any:
        if isinstance(value, Pretended):
            return value.raw
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def leave(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else pretended(value)

    return tree_map(leave, op(*tree_map(enter, args), **tree_map(enter, kwargs)))


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Between devices, and within this one. A copy to the host reads it, if the host waits."""
    if isinstance(source, Pretended) and not isinstance(target, Pretended) and not non_blocking:
        note_read()
    raw = [t.raw if isinstance(t, Pretended) else t for t in (source, target)]
    raw[1].copy_(raw[0])
    return target


reads: list[str] = []
"""Where a value of the device has been read on the host."""


def note_read() -> None:
    reads.append("".join(traceback.format_stack(limit=12)))


def read_on_host(tensor: Tensor) -> Any:
    note_read()
    return tensor.raw.item()


def register() -> list[torch.library.Library]:
    """Make the device known. Keep what is returned."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(compute, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for key in ("PrivateUse1", "CPU"):
        aten.impl("_copy_from", copy_from, key)
    # torch makes these of an empty result that it then resizes, of which a fallback hears nothing,
    # or calls their overload for tensors with numbers.
    for name in ("abs", "aminmax", "remainder.Scalar"):
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        aten.impl(name, functools.partial(compute, op), "PrivateUse1")
    aten.impl("_local_scalar_dense", read_on_host, "PrivateUse1")
    return [everything, aten]


def main() -> None:
    """Gradients on the CPU, with statistics and coefficients on the device, and a mix of both."""
    kept = register()
    from distclip import policies
    from distclip.policies import RunningMax
    from tests.engine.test_matrix import POLICIES, build

    there = torch.device(NAME)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 300, generator=generator)
    rows[1] = 0.0  # measured again: float32 partial sums are zero, or too small to be sure of
    rows[2] *= 1e-25
    with pytest.raises(RuntimeError, match=r"same device|two devices"):  # it is strict
        torch.ones(2).to(there) + torch.ones(2)
    # So a layout has to bring such gradients from elsewhere, as an engine that offloads does.
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2).to(there).grad = torch.ones(2)
    check_measuring(rows, torch.randn(5, generator=generator))
    check_changing(rows)
    running = RunningMax(0.75)
    chosen = {label: build(configuration) for label, configuration in POLICIES.items()}
    chosen["running max"] = running
    chosen["running max between"] = policies.chain(chosen["global"], running, chosen["parameter"])
    for mode in ("pass", "zero", "skip"):
        for label, policy in chosen.items():
            check(label, policy, mode, generator)
    with torch.inference_mode(False), torch.no_grad():
        for fused in (True, False):
            check_late(fused)
    del kept
    print("all equal")


def check_measuring(rows: Tensor, short: Tensor) -> None:
    from distclip.kernels import measuring as local

    cpu, there = torch.device("cpu"), torch.device(NAME)
    for order in (1.0, 2.0, 3.0, math.inf):
        want, have = (
            local.norms([rows, short, None], order, device=device) for device in (cpu, there)
        )
        assert have.device.type == NAME
        assert torch.equal(read(have), want), ("norms", order)
        bounds = np.array([0.5, math.inf, math.inf])
        wanted, found = (
            local.clamped_norms([rows, short, None], order, bounds, device=device, raw=True)
            for device in (cpu, there)
        )
        for want, each in zip(wanted, found, strict=True):
            assert want is not None
            assert each is not None
            assert each.device.type == NAME
            assert torch.equal(read(each), want), ("clamped norms", order)
        want, have = (
            local.unit_norms([rows, short], [(0,), ()], [6, 1], order, device=device)
            for device in (cpu, there)
        )
        assert have.device.type == NAME
        assert torch.equal(read(have), want), ("unit norms", order)


def check_changing(rows: Tensor) -> None:
    from distclip.kernels import changing as inplace

    there = torch.device(NAME)
    factors = torch.tensor([1.0, 0.5, 1.0, 0.25, 1.0, 1.0], dtype=torch.float64)
    for chosen in (factors, factors / 2):  # few rows are changed, or all
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            want = rows.to(dtype)
            have = want.clone()
            inplace.scale_units_([want], chosen, [(0,)], [6])
            inplace.scale_units_([have], chosen.to(there), [(0,)], [6])
            assert torch.equal(have, want), "units"
    one, two = rows.clone(), rows.clone()
    inplace.clamp_([one], [0.5])
    inplace.clamp_([two], [torch.tensor(0.5).to(there)])
    assert torch.equal(one, two), "clamp"
    one, two = rows.clone(), rows.clone()
    inplace.scale_([one], torch.tensor([0.5], dtype=torch.float64))
    inplace.scale_([two], torch.tensor([0.5], dtype=torch.float64).to(there))
    assert torch.equal(one, two), "scale"
    inplace.zero_([one], torch.tensor([True]).to(there))
    assert not bool(one.any()), "zero"


def check(label: str, policy: Any, mode: str, generator: torch.Generator) -> None:
    """A whole walk with everything on the device, and the same on the CPU."""
    from distclip.engine.walk import Terms, walk

    shapes = [(6, 9), (64,), (2, 3, 4), (), (0, 5), (700,)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    steps = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
    steps[1][0][2, 3] = math.nan
    found = []
    for device in (torch.device("cpu"), torch.device(NAME)):
        gradients: list[Tensor] = []
        program, states = compiled(policy, [w.to(device) for w in weights], gradients, device)
        results: list[Any] = []
        for step in steps:
            gradients[:] = [gradient.clone().to(device) for gradient in step]
            reads.clear()
            walked = walk(program, states, Terms(on_nonfinite=mode))
            assert not reads, (label, mode, reads[0])
            states = walked.states
            for tensor in (
                *gradients,
                walked.raw,
                walked.after,
                walked.coefficients,
                walked.smallest,
                walked.clipped,
                walked.threshold,
                walked.skipped,
            ):
                results.append(read(tensor).clone())
        found.append(results)
    for number, (want, have) in enumerate(zip(*found, strict=True)):
        assert torch.allclose(want.double(), have.double(), rtol=1e-6, atol=0, equal_nan=True), (
            label, mode, number, want, have,
        )  # fmt: skip


class Event:
    """Of a device that has done everything at once."""

    waited = 0

    def synchronize(self) -> None:
        Event.waited += 1


def check_late(fused: bool) -> None:
    """Attached steps under ``"error_late"`` read nothing, bad steps and good ones alike."""
    from distclip import GradClipper, NonFiniteGradientError, policies
    from distclip.kernels import transfer

    transfer.has_events = lambda device: True
    transfer.record_event = lambda device: Event()  # type: ignore[assignment, return-value]
    parameters = [torch.ones(shape).to(torch.device(NAME)) for shape in ((6, 9), (64,))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0, fused=fused)
    named = [(f"p{number}", parameter) for number, parameter in enumerate(parameters)]
    clipper = GradClipper(named, policies.global_norm(1.0), on_nonfinite="error_late")
    clipper.attach(optimizer)

    def step(bad: bool) -> list[Tensor]:
        for number, parameter in enumerate(parameters):
            raw = torch.full(parameter.shape, math.nan if bad and number else 1.0)
            parameter.grad = raw.to(torch.device(NAME))
        reads.clear()
        optimizer.step()
        assert not reads, (fused, bad, reads[0])
        return [read(parameter).clone() for parameter in parameters]

    step(False)
    before = step(False)
    after = step(True)
    assert all(torch.isfinite(each).all() for each in after)
    assert all(map(torch.equal, before, after)) == fused
    waited = Event.waited
    with pytest.raises(NonFiniteGradientError, match=r"step 2 .* of 'p1', or"):
        step(False)
    assert all(torch.equal(read(p), one) for p, one in zip(parameters, after, strict=True))
    assert Event.waited == waited + 1  # for the step before
    after = step(False)
    assert not all(torch.equal(read(p), one) for p, one in zip(parameters, before, strict=True))
    reading = GradClipper(named, policies.global_norm(1.0), on_nonfinite="error")
    reads.clear()
    reading.clip_()
    assert reads  # the mode that this one is for: it is noticed


def compiled(
    policy: Any, weights: list[Tensor], gradients: list[Tensor], device: torch.device
) -> tuple[Any, Any]:
    """A program over ``weights``, whose gradients are asked for at each step."""
    from distclip.engine.passes import compile_passes, report_order
    from distclip.engine.program import Program
    from distclip.layouts.piece import Box, Entry, Piece
    from distclip.layouts.plan import local_plan
    from distclip.policies import ParameterInfo
    from distclip.policies.compose import stages

    names = [f"layer.{n}.{'weight' if w.dim() == 2 else 'other'}" for n, w in enumerate(weights)]
    described = [
        (
            Entry(name, tuple(weight.shape), "float32"),
            [
                Piece(
                    0,
                    Box((0,) * weight.dim(), tuple(weight.shape)),
                    1.0,
                    functools.partial(gradients.__getitem__, number),
                    functools.partial(weights.__getitem__, number),
                )
            ],
        )
        for number, (name, weight) in enumerate(zip(names, weights, strict=True))
    ]
    plan = local_plan(described, device)
    infos = [ParameterInfo(e.name, e.shape, n % 2) for n, e in enumerate(plan.entries)]
    passes = compile_passes(policy, infos, plan, norms=True, watch_nonfinite=True)
    states = {
        stage.path: {
            key: value.to(device)
            for key, value in stage.policy.init([infos[m] for m in stage.members]).items()
        }
        for stage in stages(policy, infos)
        if stage.members
    }
    return Program(plan, tuple(infos), passes, report_order(policy, infos)), states


def read(tensor: Tensor) -> Tensor:
    return tensor.raw if isinstance(tensor, Pretended) else tensor


if __name__ == "__main__":
    with torch.inference_mode():  # autograd would make tensors anew, and they would lose `raw`
        main()
