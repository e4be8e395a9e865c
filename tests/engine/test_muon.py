"""Muon beside AdamW: ``muon_aware`` on one and two ranks, and what a shared norm does."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Muon, Optimizer

from distclip import GradClipper, RankMismatchError, policies
from tests.helpers.shards import full

MAX_NORM, RATE = 0.5, 0.02
STEPS = 200


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(20, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 6)
    )


def pair_of(model: nn.Module) -> tuple[Optimizer, Optimizer]:
    named = dict(model.named_parameters())
    matrices = [named["1.weight"], named["4.weight"]]
    rest = [p for n, p in named.items() if n not in ("1.weight", "4.weight")]
    return Muon(matrices, lr=RATE), AdamW(rest, lr=0.01)


def loss_of(model: nn.Module, step: int, half: int) -> Tensor:
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(20, (2, 8), generator=random)[half]
    wanted = torch.randn(2, 8, 6, generator=random)[half]
    loss: Tensor = (model(tokens) - wanted).square().sum() * 5
    return loss


def train(kind: str) -> tuple[list[float], list[Tensor]]:
    """Norms of every step, and the weights after the last; each coefficient is checked."""
    bare = model_of()
    model: nn.Module = bare
    halves = [0, 1] if kind == "one" else [dist.get_rank()]
    if kind == "ddp":
        model = DistributedDataParallel(bare)
    elif kind == "fsdp2":
        fully_shard(bare)
    pair, norms = pair_of(bare), []
    clipper = GradClipper(bare, policies.muon_aware(MAX_NORM))
    clipper.attach(*pair)
    for step in range(STEPS):
        for half in halves:
            (loss_of(model, step, half) / len(halves)).backward()
        gradients = {n: full(p.grad).double().clone() for n, p in bare.named_parameters()}
        for optimizer in pair:
            optimizer.step()
        report: Any = clipper.last_report
        muons = [gradients.pop(name) for name in ("1.weight", "4.weight")]
        rest = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
        assert report.part_norms["default"] == pytest.approx(rest, rel=1e-6)
        assert report.part_norms["muon"] == pytest.approx(
            torch.cat([gradient.flatten() for gradient in muons]).norm().item(), rel=1e-6
        )
        coefficients = report.parameter_coefficients
        assert coefficients.pop("1.weight") == coefficients.pop("4.weight") == 1.0
        want = min(1.0, MAX_NORM / (rest + 1e-6))
        assert list(coefficients.values()) == pytest.approx([want] * 5, rel=1e-6)
        norms.append(report.total_norm.item())
        for optimizer in pair:
            optimizer.zero_grad()
    return norms, [full(parameter).detach().clone() for parameter in bare.parameters()]


@functools.cache
def alone() -> tuple[list[float], list[Tensor]]:
    return train("one")


@pytest.mark.ranks(2)
def test_two_ranks_under_ddp_train_as_one_process() -> None:
    norms, weights = train("ddp")
    assert norms == alone()[0]  # halves are exact
    assert all(map(torch.equal, weights, alone()[1]))


@pytest.mark.ranks(2)
def test_two_ranks_under_fsdp2_train_as_one_process() -> None:
    """As far as torch's Muon does: it multiplies shards of bfloat16, and rounds otherwise."""
    norms, weights = train("fsdp2")
    assert norms[0] == pytest.approx(alone()[0][0], rel=1e-6)
    assert norms == pytest.approx(alone()[0], rel=0.05)
    for mine, theirs in zip(weights, alone()[1], strict=True):
        assert (mine - theirs).abs().max() < STEPS * RATE * 2**-6


def moved(policy: policies.Policy, embedding: float, matrices: float) -> tuple[float, float]:
    """How far one step moves Muon's matrices, and AdamW's norm layer (eps 1e-3)."""
    model = model_of()
    loss_of(model, 0, 0).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        size = {"0.weight": embedding, "1.weight": matrices, "4.weight": matrices}.get(name, 1.0)
        parameter.grad *= size / parameter.grad.norm()
    muon, adamw = pair_of(model)
    for group in (*muon.param_groups, *adamw.param_groups):
        group["weight_decay"] = 0.0
    adamw.param_groups[0]["eps"] = 1e-3
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    GradClipper(model, policy).attach(muon, adamw)
    muon.step()
    adamw.step()
    after = dict(model.named_parameters())
    first, second = (
        (after[name].detach() - before[name]).norm().item() for name in ("1.weight", "2.weight")
    )
    return first, second


def test_a_shared_norm_shrinks_the_step_and_muon_aware_does_not() -> None:
    shared, aware = policies.global_norm(1.0), policies.muon_aware(1.0)
    free = policies.measure()
    # A huge gradient of the embedding divides those of the matrices by as much, below the floor
    # of Muon's own normalisation (eps 1e-7): NVIDIA/Megatron-LM#5394.
    far = moved(free, 1e11, 1.0)[0]
    assert moved(shared, 1e11, 1.0)[0] < far / 85
    assert moved(aware, 1e11, 1.0)[0] == pytest.approx(far, rel=1e-3)
    # And gradients of the matrices of 1e6, which Muon does not mind, hold up what AdamW steps.
    far = moved(free, 1.0, 1e6)[1]
    assert moved(shared, 1.0, 1e6)[1] < far / 85
    assert moved(aware, 1.0, 1e6)[1] > far / 2


def test_muon_as_groups_of_one_optimizer() -> None:
    class WithAuxiliary(AdamW):
        """Muon for the groups that say so, as DeepSpeed's and Keller Jordan's."""

    for key, on, off in (("use_muon", True, False), ("algorithm", "muon", "adamw")):
        model = model_of()
        loss_of(model, 0, 0).backward()
        muon, rest = (each.param_groups[0]["params"] for each in pair_of(model))
        WithAuxiliary.__name__ = "MuonWithAuxAdam"
        both = WithAuxiliary([{"params": muon, key: on}, {"params": rest, key: off}])
        report = GradClipper(model, policies.muon_aware(MAX_NORM), optimizer=both).clip_()
        left = {n for n, c in report.parameter_coefficients.items() if c == 1.0}
        assert left == {"1.weight", "4.weight"}


def one_group(model: nn.Module, *, marked: bool) -> Optimizer:
    """As Moonlight's Muon: one group, and the state of a parameter says what steps it."""
    muon, rest = (each.param_groups[0]["params"] for each in pair_of(model))
    optimizer = type("Muon", (torch.optim.SGD,), {})([*muon, *rest], lr=0.1)
    for parameters, on in ((muon, True), (rest, False)) if marked else ():
        for parameter in parameters:
            optimizer.state[parameter]["use_muon"] = on
    return optimizer


def test_muon_as_one_group_whose_states_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of()
    loss_of(model, 0, 0).backward()
    clipper = GradClipper(model, policies.muon_aware(MAX_NORM))
    clipper.attach(one_group(model, marked=True))
    coefficients = clipper.clip_().parameter_coefficients
    assert {n for n, c in coefficients.items() if c == 1.0} == {"1.weight", "4.weight"}
    assert not caplog.records


def test_that_nothing_is_clipped_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of()
    clipper = GradClipper(model, policies.muon_aware(MAX_NORM))
    assert not caplog.records
    clipper.attach(one_group(model, marked=False))
    assert [each.getMessage().split(",")[1] for each in caplog.records] == [
        " Muon steps all 7 parameters here"
    ]


@pytest.mark.ranks(2)
def test_stages_tell_each_other_what_steps_their_parameters() -> None:
    rank = dist.get_rank()
    stage = nn.ModuleDict({str(rank): nn.Linear(4, 4)})
    layer = stage[str(rank)]
    for parameter in stage.parameters():
        parameter.grad = torch.full_like(parameter, 3.0 + rank)
    clipper = GradClipper([stage], policies.muon_aware(1.0))
    clipper.attach(Muon([layer.weight]), AdamW([layer.bias]))
    report = clipper.clip_()
    assert report.part_norms["muon"] == pytest.approx((16 * (9 + 16)) ** 0.5)
    assert report.part_norms["default"] == pytest.approx((4 * (9 + 16)) ** 0.5)
    assert layer.weight.grad is not None
    assert (layer.weight.grad == 3.0 + rank).all()
    assert layer.bias.grad is not None
    assert layer.bias.grad[0].item() == pytest.approx((3.0 + rank) / 10.0, rel=1e-5)


@pytest.mark.ranks(2)
def test_ranks_that_give_a_parameter_to_other_optimizers_are_told() -> None:
    model = nn.Linear(4, 4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    clipper = GradClipper(model, policies.muon_aware(1.0))
    first = [model.weight] if dist.get_rank() == 0 else []
    pair = [AdamW([p for p in model.parameters() if all(p is not q for q in first)])]
    pair += [Muon(first)] if first else []
    clipper.attach(*pair)
    with pytest.raises(RankMismatchError, match="parts by optimizer"):
        clipper.clip_()
    assert model.bias.grad is not None
    assert (model.bias.grad == 1.0).all()
