"""ClippedStep: the GRPO loop of docs/example on two ranks, engines with a step of their own."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import ClippedStep, ConfigurationError, GradClipper, policies
from tests.helpers.main_grad import accumulate

GRPO = Path(__file__).parents[2] / "docs" / "example" / "grpo.py"
UPDATES, BAD, SKIP, MAX, RATE = 7, 4, 2.0, 0.1, 0.02
POLICY = policies.skip_norm(SKIP, clip_norm=MAX)


@functools.cache
def grpo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo", GRPO)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["grpo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spoil(update: int, advantages: Tensor) -> Tensor:
    """A reward service that returns garbage, once."""
    return -1000.0 * advantages if update == BAD else advantages


def policy_of() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = grpo().Policy()
    return model


@functools.cache
def reference() -> tuple[list[float], list[float], list[bool]]:
    """One process with the rollouts of both ranks, float64, clipping written out."""
    loop, model = grpo(), policy_of().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    rewards, norms, skipped = [], [], []
    for update in range(UPDATES):
        ranks = []
        for rank in range(2):
            (*batch, advantages), reward = loop.rollouts(model, update, rank)
            ranks.append([*batch, spoil(update, advantages)])
            rewards.append(reward)
        for _ in range(loop.EPOCHS):
            for index in range(loop.MINIBATCHES):
                optimizer.zero_grad()
                for batch in ranks:
                    part = [each.chunk(loop.MINIBATCHES)[index] for each in batch]
                    (sum(loop.losses(model, *part)) / 2).backward()
                gradients: list[Any] = [parameter.grad for parameter in model.parameters()]
                norms.append(sum(g.square().sum().item() for g in gradients) ** 0.5)
                skipped.append(norms[-1] > SKIP)
                if not skipped[-1]:
                    for gradient in gradients:
                        gradient *= min(1.0, MAX / (norms[-1] + 1e-6))
                    optimizer.step()
            if skipped[-1]:
                break
    return rewards, norms, skipped


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_two_ranks_update_and_skip_as_one_process(kind: str) -> None:
    model = bare = policy_of()
    if kind == "ddp":
        model = DistributedDataParallel(bare)
    elif kind == "fsdp1":
        model = FullyShardedDataParallel(bare, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        fully_shard(bare)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    step = ClippedStep(GradClipper(model, POLICY, on_nonfinite="skip"), optimizer)
    rewards, norms, skipped = grpo().train(model, step, UPDATES, dist.get_rank(), spoil)
    want = reference()
    assert rewards == pytest.approx(want[0][dist.get_rank() :: 2])
    assert norms == pytest.approx(want[1], rel=1e-3)
    assert skipped == want[2]
    bad = 4 * BAD  # the first optimizer step of the bad update: its rollouts are used no further
    assert [n for n, each in enumerate(skipped) if each] == [bad, bad + 1]
    assert rewards[-1] > rewards[0] + 0.2


class Engine:
    """As Megatron-LM's Float16OptimizerWithFloat16Params: main_grad, float32 copies, a tuple."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.main = [p.detach().float().clone().requires_grad_() for p in self.parameters]
        self.inner = torch.optim.Adam(self.main, lr=RATE)
        self.zeroed, self.works = 0, True
        self.config = type("Config", (), {"clip_grad": 0.0, "use_distributed_optimizer": False})()
        for parameter in self.parameters:
            parameter.main_grad = torch.zeros(parameter.shape)
            parameter.register_post_accumulate_grad_hook(accumulate)

    def zero_grad(self) -> None:
        self.zeroed += 1
        for parameter in self.parameters:
            parameter.main_grad.zero_()

    def get_loss_scale(self) -> Tensor:
        return torch.ones(1)

    def step(self) -> tuple[bool, None, None]:
        for main, parameter in zip(self.main, self.parameters, strict=True):
            main.grad = parameter.main_grad.clone()
        self.inner.step()
        with torch.no_grad():
            for main, parameter in zip(self.main, self.parameters, strict=True):
                parameter.copy_(main)
        return self.works, None, None


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def backward(model: nn.Module, times: float = 1.0) -> float:
    """Gradients in main_grad or grad; their norm in float64."""
    (model(torch.arange(8)).square().mean() * times).backward()
    found = [getattr(p, "main_grad", p.grad).double().flatten() for p in model.parameters()]
    return torch.cat(found).norm().item()


def test_an_engine_with_a_step_of_its_own_is_clipped_and_skipped() -> None:
    model = policy_of()
    engine = Engine(model)
    step = ClippedStep(GradClipper(model, POLICY), engine)
    before = weights(model)
    norm = backward(model)
    assert step.optimizer_step().item() == pytest.approx(norm, rel=1e-6)
    assert not step.skipped
    clipped: list[Any] = [main.grad.double().flatten() for main in engine.main]  # type: ignore[union-attr]
    assert torch.cat(clipped).norm().item() == pytest.approx(min(norm, MAX), rel=1e-5)
    assert not all(map(torch.equal, before, weights(model)))

    engine.zero_grad()
    before, norm = weights(model), backward(model, 1e4)
    assert norm > SKIP
    assert step.optimizer_step().item() == pytest.approx(norm, rel=1e-6)
    assert step.skipped
    assert engine.zeroed == 2
    assert all(map(torch.equal, before, weights(model)))

    backward(model)
    engine.works = False
    step.optimizer_step()
    assert step.skipped
    assert engine.zeroed == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clip_grad": 1.0}, r"Engine clips by itself \(clip_grad=1.0\).*set clip_grad=0"),
        ({"use_distributed_optimizer": True}, "only a part of main_grad"),
    ],
)
def test_an_engine_that_cannot_be_clipped_so_is_refused(change: dict[str, Any], said: str) -> None:
    model = policy_of()
    engine = Engine(model)
    vars(engine.config).update(change)
    with pytest.raises(ConfigurationError, match=said):
        ClippedStep(GradClipper(model, POLICY), engine)


def test_what_is_no_engine_is_refused() -> None:
    model = policy_of()
    clipper, engine = GradClipper(model, POLICY), Engine(model)
    with pytest.raises(ConfigurationError, match="got Linear"):
        ClippedStep(clipper, nn.Linear(1, 1))
    with pytest.raises(ConfigurationError, match="got Engine, Engine"):
        ClippedStep(clipper, [engine, engine])
    with pytest.raises(ConfigurationError, match="carry a loss scale"):
        ClippedStep(clipper, engine, scaler=torch.amp.GradScaler("cpu"))
    engine.get_loss_scale = lambda: torch.tensor([1024.0])  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="carry a loss scale"):
        ClippedStep(clipper, engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    clipper.attach(optimizer)
    with pytest.raises(ConfigurationError, match="attached already"):
        ClippedStep(clipper, optimizer)


def test_under_a_scaler_norms_are_unscaled_and_an_overflow_is_skipped() -> None:
    model = policy_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step = ClippedStep(GradClipper(model, POLICY), optimizer, scaler=scaler)
    norm = backward(model)
    model.zero_grad()
    backward(model, 256.0)
    scaler.scale(torch.ones(()))  # makes its scale, as the loss does
    assert step.optimizer_step().item() == pytest.approx(norm, rel=1e-5)
    assert not step.skipped

    before = weights(model)
    model.zero_grad()
    backward(model, float("inf"))
    assert step.optimizer_step().item() == float("inf")
    assert step.skipped
    assert step.report is None
    assert scaler.get_scale() == 128.0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, before, weights(model)))


def test_a_loss_is_handed_on_to_the_policy() -> None:
    model = policy_of()
    policy = policies.skip_spikes(8, 3.0, 2, loss=True)
    step = ClippedStep(GradClipper(model, policy), torch.optim.SGD(model.parameters(), lr=RATE))
    for loss in (1.0, 1.1, 0.9, 1.0, 1000.0):
        model.zero_grad()
        backward(model)
        step.optimizer_step(loss)
    assert step.skipped


def test_without_a_skip_to_come_nothing_is_zeroed() -> None:
    model = policy_of()
    step = distclip.ClippedStep(
        GradClipper(model, policies.global_norm(MAX)), torch.optim.SGD(model.parameters(), lr=RATE)
    )
    backward(model)
    step.optimizer_step()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["error", "pass", "zero"])
def test_a_fused_step_that_the_scaler_drops(mode: Any) -> None:
    """The optimizer's kernel leaves it out: the policy does not know of it."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    clipper = GradClipper(model, policies.global_norm(1.0), on_nonfinite=mode)
    step = ClippedStep(clipper, optimizer, scaler=scaler)
    for times, dropped in ((1.0, False), (float("nan"), True), (1.0, False)):
        before = model.weight.detach().clone()
        scaler.scale(model(torch.ones(4, 3)).sum() * times).backward()
        norm = step.optimizer_step()
        assert step.skipped == dropped
        assert bool(norm.isinf()) == dropped
        assert (step.report is None) == dropped
        assert torch.equal(before, model.weight) == dropped
        assert (model.weight.grad is None) == dropped
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:.*is attached to an optimizer")
def test_a_clip_by_hand_before_the_step() -> None:
    model = nn.Linear(3, 2)
    clipper = GradClipper(model, policies.global_norm(1.0), on_nonfinite="skip")
    step = ClippedStep(clipper, torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.ones(4, 3)).sum().backward()
    by_hand = clipper.clip_().total_norm
    assert torch.equal(step.optimizer_step(), by_hand)
    assert not step.skipped
    assert model.weight.grad is not None


@pytest.mark.ranks(2)
def test_scalers_under_fsdp1() -> None:
    """One that each rank decides by alone is refused; with the other, all drop a step together."""
    cpu, rank = torch.device("cpu"), dist.get_rank()
    model = FullyShardedDataParallel(nn.Linear(3, 2), device_id=cpu, use_orig_params=True)
    clipper = GradClipper(model, policies.global_norm(1.0), on_nonfinite="skip")
    sharded = ShardedGradScaler("cpu", init_scale=1024.0)
    for fused, scaler, message in (
        (False, torch.amp.GradScaler("cpu"), "give a .*ShardedGradScaler"),
        (True, sharded, "fused=False"),
    ):
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        with pytest.raises(ConfigurationError, match=message):
            ClippedStep(clipper, optimizer, scaler=scaler)
    optimizer = torch.optim.AdamW(model.parameters())
    step = ClippedStep(clipper, optimizer, scaler=sharded)
    skipped = []
    for number in range(3):
        sharded.scale(model(torch.ones(4, 3)).sum()).backward()
        if number == 1 and rank == 1:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
        step.optimizer_step()
        optimizer.zero_grad()
        skipped.append(step.skipped)
    assert skipped == [False, True, False]
    assert sharded.get_scale() == 512.0
