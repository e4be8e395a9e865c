"""Gradients on a GPU: the same as on the CPU, without waiting for the device.

The CPU's results are held to the float64 oracle by the other tests.
"""

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distclip import ClipReport, GradClipper, NonFiniteGradientError, policies
from distclip.kernels import changing as inplace
from distclip.kernels.device import multi_tensor
from tests.engine.test_matrix import POLICIES, build

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(params=["triton", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the kernels and without them."""
    monkeypatch.setenv(multi_tensor.TRITON_SWITCH, "1" if request.param == "triton" else "0")
    multi_tensor.is_usable.cache_clear()
    if request.param == "triton":
        assert multi_tensor.is_usable(torch.device("cuda", 0)), "the kernels do not run here"
    yield request.param
    multi_tensor.is_usable.cache_clear()


class Net(nn.Module):
    """Matrices, vectors, a convolution, a scalar, an empty one, an odd one, and a long one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {
            "matrix": (33, 65), "even": (64, 256), "bias": (65,), "kernel": (8, 4, 3, 3),
            "scalar": (), "empty": (0, 5), "long": (70_001,), "rows": (300, 1),
        }  # fmt: skip
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
        )
        self.weights["other"] = nn.Parameter(torch.randn(17, 9))


def pair(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    here = Net(dtype)
    return here, copy.deepcopy(here).cuda()


def give(model: nn.Module, seed: int, size: float = 1.0, bad: float | None = None) -> None:
    """Gradients that depend on names and seed only."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        gradient = torch.randn(parameter.shape, generator=generator) * size
        if bad is not None and name.endswith("matrix"):
            gradient.view(-1)[7] = bad
        parameter.grad = None if name.endswith("rows") and seed % 2 else _like(gradient, parameter)


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    return gradient.to(parameter.device, parameter.dtype)


def clipper_of(model: nn.Module, configuration: Any, **options: Any) -> GradClipper:
    listed = list(model.parameters())
    optimizer = torch.optim.SGD([{"params": listed[:3]}, {"params": listed[3:]}], lr=0.1)
    return GradClipper(model, build(configuration), optimizer=optimizer, **options)


def assert_alike(here: nn.Module, there: nn.Module) -> None:
    for (name, one), (_, other) in zip(
        here.named_parameters(), there.named_parameters(), strict=True
    ):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            # Norms may differ in their last bit, and so may a rounding.
            room = 2.0 * torch.finfo(one.dtype).eps
            torch.testing.assert_close(
                other.grad.cpu(), one.grad, rtol=room, atol=0.0, equal_nan=True, msg=name
            )


def assert_reports_alike(one: ClipReport, other: ClipReport) -> None:
    have, want = other.to_dict(per_parameter=False), one.to_dict(per_parameter=False)
    assert have.pop("nonfinite") == want.pop("nonfinite")
    assert have == pytest.approx(want, rel=1e-6, nan_ok=True)
    for which in ("parameter_norms", "parameter_coefficients"):
        found, wanted = dict(getattr(other, which)), dict(getattr(one, which))
        assert found == pytest.approx(wanted, rel=1e-6, nan_ok=True), which


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("label", POLICIES)
def test_every_policy_does_what_it_does_on_the_cpu(label: str, kind: str) -> None:
    here, there = pair(DTYPES[kind])
    clippers = [clipper_of(model, POLICIES[label]) for model in (here, there)]
    for step in range(3):
        for model in (here, there):
            give(model, step, 10.0**-step)
        reports = [each.clip_() for each in clippers]
        assert_reports_alike(*reports)
        assert_alike(here, there)


@pytest.mark.parametrize("mode", ["pass", "zero", "skip"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_modes(mode: str, bad: float) -> None:
    configurations = ["global", "agc", "value"]
    for label in (each for each in POLICIES if each.split()[0] in configurations):
        here, there = pair()
        clippers = [
            clipper_of(model, POLICIES[label], on_nonfinite=mode) for model in (here, there)
        ]
        for model in (here, there):
            give(model, 0, bad=bad)
        one, other = (each.clip_() for each in clippers)
        assert bool(one.skipped) == bool(other.skipped)
        assert_alike(here, there)


def silently(run: Any) -> None:
    """Raise where anything waits for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a beta feature
        torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["pass", "zero", "skip", "error_late"])
@pytest.mark.parametrize("label", POLICIES)
def test_nothing_waits(label: str, mode: str) -> None:
    _, model = pair()
    clipper = clipper_of(model, POLICIES[label], on_nonfinite=mode)
    for step in (0, 2):
        give(model, step)
        clipper.clip_()
    give(model, 4)
    silently(clipper.clip_)


@pytest.mark.parametrize("label", ["global", "agc", "value"])
@pytest.mark.parametrize("kind", DTYPES)
def test_exponents_are_counted_as_on_the_cpu_without_waiting(label: str, kind: str) -> None:
    here, there = pair(DTYPES[kind])
    clippers = [
        clipper_of(each, POLICIES[label], on_nonfinite="pass", exponents=1)
        for each in (here, there)
    ]
    for step in range(3):
        for each in (here, there):
            give(each, 2 * step, 10.0**-step, bad=math.nan)
        one = clippers[0].clip_().exponents
        silently(clippers[1].clip_) if step == 2 else clippers[1].clip_()
        assert clippers[1].last_report is not None
        other = clippers[1].last_report.exponents
        assert {n: e.to_dict() for n, e in other.items()} == {
            n: e.to_dict() for n, e in one.items()
        }


def test_waiting_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"):
        silently(lambda: torch.ones(1, device="cuda").item())


@pytest.mark.parametrize("kind", ["adamw", "adam"])
@pytest.mark.parametrize("mode", ["pass", "skip", "error_late"])
def test_a_fused_step_waits_for_nothing(kind: str, mode: str) -> None:
    here, there = pair()
    optimizers = []
    for model in (here, there):
        made = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
        optimizer = made(model.parameters(), lr=0.1, eps=1.0, fused=True)
        GradClipper(model, policies.global_norm(0.5), on_nonfinite=mode).attach(optimizer)
        optimizers.append(optimizer)
    for step in range(3):
        for model, optimizer in zip((here, there), optimizers, strict=True):
            give(model, step)
            if step == 2 and model is there:
                silently(optimizer.step)
            else:
                optimizer.step()
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-5, atol=1e-6)


def test_grad_scaler() -> None:
    here, there = pair()
    scalers = [torch.amp.GradScaler(device, init_scale=1024.0) for device in ("cpu", "cuda")]
    optimizers = []
    for model in (here, there):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1.0, fused=True)
        GradClipper(model, policies.global_norm(0.5)).attach(optimizer)
        optimizers.append(optimizer)
    for step in range(3):
        for model, optimizer, scaler in zip((here, there), optimizers, scalers, strict=True):
            total = scaler.scale(torch.ones((), device=next(model.parameters()).device))
            assert total > 0  # makes the scale
            give(model, step, 1024.0, bad=math.inf if step == 1 else None)
            scaler.step(optimizer)
            scaler.update(1024.0)
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label", ["global", "value", "agc row"])
def test_captured_in_a_graph(label: str) -> None:
    made = {
        "global": policies.global_norm(0.5),
        "value": policies.value(0.3),
        "agc row": policies.agc(0.01),
    }[label]
    here, there = pair()
    give(here, 0)
    give(there, 0)
    clippers = [GradClipper(model, made, on_nonfinite="pass") for model in (here, there)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        clippers[1].clip_()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = clippers[1].clip_()
    for step in (2, 4):
        give(here, step)
        for (_, one), (_, other) in zip(
            here.named_parameters(), there.named_parameters(), strict=True
        ):
            if one.grad is not None and other.grad is not None:
                other.grad.copy_(one.grad)
        want = clippers[0].clip_()
        graph.replay()
        assert report.total_norm.item() == pytest.approx(want.total_norm.item(), rel=1e-6)
        assert_alike(here, there)


def test_a_late_error_in_a_graph() -> None:
    """Captured with the step: a replay with a NaN changes nothing, and is raised when asked for."""
    _, model = pair()
    give(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True, capturable=True)
    clipper = GradClipper(model, policies.global_norm(0.5), on_nonfinite="error_late")
    clipper.attach(optimizer)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    clipper.raise_late()
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gradients[0].view(-1)[0] = math.nan
    graph.replay()
    gradients[0].view(-1)[0] = 0.0
    with pytest.raises(NonFiniteGradientError):
        clipper.raise_late()
    assert all(map(torch.equal, model.parameters(), kept))
    graph.replay()
    assert not all(map(torch.equal, model.parameters(), kept))
    clipper.raise_late()


def test_the_same_bits_every_time() -> None:
    _, model = pair()
    clipper = GradClipper(model, policies.global_norm(1.0))
    found = set()
    for _ in range(5):
        give(model, 0)
        clipper.clip_()
        total = sum(p.grad.double().sum().item() for p in model.parameters() if p.grad is not None)
        found.add(total)
    assert len(found) == 1


def test_clamping_many_keeps_nan() -> None:
    tensors = [torch.tensor([math.nan, 3.0, -math.inf, 0.1], device="cuda") for _ in range(3)]
    inplace.clamp_(tensors, [0.5, 1.0, 2.0])
    for tensor, bound in zip(tensors, (0.5, 1.0, 2.0), strict=True):
        want = torch.tensor([math.nan, bound, -bound, min(0.1, bound)])
        torch.testing.assert_close(tensor.cpu(), want, rtol=0, atol=0, equal_nan=True)


def test_sharded_over_one_gpu() -> None:
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        here, there = pair()
        for model in (here, there):
            del model.weights["scalar"]
        fully_shard(there, mesh=init_device_mesh("cuda", (1,)))
        clippers = [GradClipper(each, policies.agc(0.01)) for each in (here, there)]
        give(here, 0)
        for one, other in zip(here.parameters(), there.parameters(), strict=True):
            other.grad = torch.distributed.tensor.distribute_tensor(
                one.grad.cuda(), other.device_mesh, other.placements
            )
        assert_reports_alike(*(each.clip_() for each in clippers))
        for one, other in zip(here.parameters(), there.parameters(), strict=True):
            torch.testing.assert_close(other.grad.full_tensor().cpu(), one.grad, rtol=1e-6, atol=0)
    finally:
        torch.distributed.destroy_process_group()
