"""Kinds of parameters are known by their modules under every front end, as to a GradClipper."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import policies
from distclip.layouts.names import Excerpt, without_wrappers
from tests.helpers.shards import full
from tests.integrations.scripted import running

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {"kind=embedding": policies.value(0.0), "kind=norm": policies.value(0.0)}
ZEROED = {"table.weight", "wte.weight", "body.1.weight", "body.1.bias"}
"""Of these only ``wte`` has a name that says what it is."""


class Model(nn.Module):
    """Modules with telling and with other names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 4)
        self.wte = nn.Embedding(10, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.out = nn.Linear(4, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.out(self.body(self.table(tokens) + self.wte(tokens)))
        return result


def policy() -> Any:
    return policies.by_part(dict(KINDS), default=policies.measure())


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = model(torch.arange(10)).square().sum()
    return loss


def zeroed(model: nn.Module) -> set[str]:
    """Names of the parameters whose gradient is 0."""
    named = [
        (without_wrappers(name), parameter.grad) for name, parameter in model.named_parameters()
    ]
    return {name for name, gradient in named if gradient is None or not full(gradient).any()}


def test_given_the_model() -> None:
    model = Model()
    loss_of(model).backward()
    distclip.GradClipper(model, policy()).clip_()
    assert zeroed(model) == ZEROED


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_accelerate(layout: str) -> None:
    pytest.importorskip("accelerate")
    from tests.integrations.accelerated import start

    accelerator = start(layout)
    distclip.accelerate.attach(accelerator, policy())
    model = Model()
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    accelerator.backward(loss_of(wrapped))
    optimizer.step()
    assert zeroed(model) == ZEROED


def test_fabric() -> None:
    pytest.importorskip("lightning")
    from lightning.fabric import Fabric

    callback = distclip.lightning.ClipCallback(policy())
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    model = Model()
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    fabric.backward(loss_of(wrapped))
    optimizer.step()
    assert zeroed(model) == ZEROED


def split(model: Model, name: str) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    first = named.pop(name)
    return [torch.optim.SGD([first], 0.1), torch.optim.SGD(list(named.values()), 0.1)]


@pytest.mark.parametrize("first", ["out.weight", "table.weight"])
def test_optimizers_that_step_parts_of_a_model(first: str) -> None:
    with running(policy()):
        model = Model()
        optimizers = split(model, first)
        loss_of(model).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert zeroed(model) == ZEROED


def test_a_script_with_muon_and_adamw_is_known_by_their_classes() -> None:
    torch.manual_seed(0)
    with running(policies.muon_aware(1.0)):
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-3)
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], lr=1e-3)
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(32, 8)).square().sum().mul(100.0).backward()
            before = [p.grad.norm() for p in model.parameters()]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            after = [p.grad.norm() for p in model.parameters()]
            assert after[::2] == before[::2]  # the matrices
            assert torch.stack(after[1::2]).norm() == pytest.approx(1.0, rel=1e-5)  # the biases
            muon.step()
            adamw.step()


def test_models_with_modules_of_one_path() -> None:
    """One clipper of parts of two models; ``0`` is an embedding in one, a linear in the other."""
    with running(policy()):
        one = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
        two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        optimizer = torch.optim.SGD([one[0].weight, two[1].bias], 0.1)
        two(one(torch.arange(10))).square().sum().backward()
        optimizer.step()
        assert not one[0].weight.grad.any()
        assert two[1].bias.grad.any()


def test_an_excerpt_does_not_keep_its_modules() -> None:
    model = Model()
    excerpt = Excerpt(model.table.named_parameters("table"), [model])
    clipper = distclip.GradClipper(excerpt, policy())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert clipper.names == ("table.weight",)
