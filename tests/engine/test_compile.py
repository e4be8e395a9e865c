"""Under torch.compile: a graph break at each entry point, and the results of the eager run."""

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import distclip
from distclip import GradClipper, policies

BACKENDS = ["eager", "aot_eager"]
if os.environ.get("DISTCLIP_TEST_INDUCTOR"):  # takes minutes, and a C++ compiler
    BACKENDS.append("inductor")

pytestmark = pytest.mark.filterwarnings("default")  # dynamo's own, about what it cannot trace


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def parameter() -> nn.Parameter:
    made = nn.Parameter(torch.tensor([1.0, 1.0]))
    made.grad = torch.tensor([3.0, 4.0])
    return made


def of_clipper(p: nn.Parameter) -> Callable[[], Any]:
    clipper = GradClipper([("p", p)], policies.global_norm(1.0))
    return lambda: clipper.clip_().total_norm


ENTRIES: dict[str, Callable[[nn.Parameter], Callable[[], Any]]] = {
    "clip_grad_norm_": lambda p: lambda: distclip.clip_grad_norm_([p], 1.0),
    "clip_grad_value_": lambda p: lambda: distclip.clip_grad_value_([p], 3.5),
    "clip_grad_agc_": lambda p: lambda: distclip.clip_grad_agc_([p], 0.1),
    "get_total_norm": lambda p: lambda: distclip.get_total_norm([p.grad]),  # type: ignore[list-item]
    "grad_norms": lambda p: lambda: distclip.grad_norms([("p", p)])["p"],
    "GradClipper.clip_": of_clipper,
    "GradClipper": lambda p: lambda: of_clipper(p)(),
}


def test_a_full_graph_is_refused_with_the_mend() -> None:
    run = torch.compile(ENTRIES["clip_grad_norm_"](parameter()), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        run()


@pytest.mark.parametrize("name", ENTRIES)
def test_entry_points(name: str) -> None:
    plain, compiled = parameter(), parameter()
    want = ENTRIES[name](plain)()
    run = torch.compile(ENTRIES[name](compiled), backend="eager")
    for _ in range(2):
        compiled.grad = torch.tensor([3.0, 4.0])
        got = run()
        assert torch.equal(compiled.grad, plain.grad)  # type: ignore[arg-type]
        assert got is want is None or torch.equal(got, want)


MADE: dict[str, Callable[[], policies.Policy]] = {
    "agc": lambda: policies.agc(0.01),
    "group_norm": lambda: policies.group_norm(1.0),
    "zclip": lambda: policies.zclip(alpha=0.9),
    "chain": lambda: policies.chain(policies.value(0.5), policies.global_norm(1.0)),
    "by_name": lambda: policies.by_name({"*.bias": None}, default=policies.autoclip(10)),
}


@pytest.mark.parametrize("name", MADE)
def test_a_policy_that_is_made_in_a_compiled_region(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo warns of each cache that it passes over; none is on the way."""
    monkeypatch.setattr(torch._dynamo.utils, "warn_once_cache", set(), raising=False)
    made: list[policies.Policy] = []

    def region(x: Tensor) -> Tensor:
        made.append(MADE[name]())
        return x + 1

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.compile(region, backend="eager")(torch.ones(1))
    assert made == [MADE[name]()]
    assert not [each for each in told if "cache" in str(each.message)]


class Nested(SGD):
    """Torch runs the step hooks of a class and of its base."""

    def step(self, closure: object = None) -> object:  # type: ignore[override]
        return super().step(closure)


def optimizers_of(kind: str, model: nn.Module) -> list[Optimizer]:
    listed = list(model.parameters())
    if kind == "two":
        matrices = [p for p in listed if p.ndim == 2]
        rest = [p for p in listed if p.ndim < 2]
        return [torch.optim.Muon(matrices, lr=0.01), AdamW(rest, lr=0.01, eps=1.0)]
    if kind == "nested":
        SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        return [Nested(listed, lr=0.01, momentum=0.9)]
    return [
        SGD(listed, lr=0.01, momentum=0.9)
        if kind == "sgd"
        else AdamW(listed, lr=0.01, eps=1.0, fused=kind == "fused")
    ]


def train(kind: str, what: str, backend: str, scaled: bool = False) -> tuple[list[float], Any]:
    """Four steps, the third with NaN: the norms that were clipped, and the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    optimizers = optimizers_of(kind, model)
    norms: list[float] = []
    clipper = GradClipper(
        model,
        policies.global_norm(0.1),
        on_nonfinite="skip",
        sinks=[lambda step, report: norms.append(report.total_norm.item())],
    )
    clipper.attach(optimizers)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=scaled)

    def compiled(function: Any, here: str) -> Any:
        return torch.compile(function, backend=backend) if what == here else function

    steps = [compiled(optimizer.step, "step") for optimizer in optimizers]

    def update(data: Tensor) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(model(data).square().sum()).backward()
        for optimizer, step in zip(optimizers, steps, strict=True):
            scaler.step(optimizer) if scaled else step()
        if scaled:
            scaler.update()

    run = compiled(update, "everything")
    data = torch.randn(16, 8)
    for factor in (1.0, 3.0, float("nan"), 2.0):
        run(data * factor)
    return norms, [p.detach().clone() for p in model.parameters()]


def compare(kind: str, what: str, backend: str, scaled: bool = False) -> None:
    norms, weights = train(kind, "nothing", backend, scaled)
    got, moved = train(kind, what, backend, scaled)
    # Muon computes in bfloat16, which inductor rounds less often.
    rtol, atol = (1e-2, 1e-3) if backend == "inductor" else (1e-5, 1e-7)
    assert got == pytest.approx(norms, rel=rtol, nan_ok=True)
    for one, other in zip(weights, moved, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["adamw", "two"])
def test_a_compiled_training_step(kind: str, backend: str) -> None:
    compare(kind, "everything", backend)


@pytest.mark.parametrize("kind", ["sgd", "fused", "nested"])
def test_a_compiled_training_step_with_other_optimizers(kind: str) -> None:
    compare(kind, "everything", "eager")


@pytest.mark.parametrize("kind", ["sgd", "fused", "two", "nested"])
def test_a_compiled_optimizer_step(kind: str) -> None:
    compare(kind, "step", "eager")


@pytest.mark.parametrize("kind", ["fused", "two"])
def test_a_compiled_training_step_under_a_scaler(kind: str) -> None:
    compare(kind, "everything", "eager", scaled=True)


def test_a_compiled_step_with_a_closure() -> None:
    p = parameter()
    optimizer = SGD([p], lr=0.1)
    GradClipper([("p", p)], policies.global_norm(1.0)).attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * torch.tensor([3.0, 4.0])).sum()
        loss.backward()
        return loss

    torch.compile(lambda: optimizer.step(closure), backend="eager")()
    torch.testing.assert_close(p.detach(), torch.tensor([0.94, 0.92]))
