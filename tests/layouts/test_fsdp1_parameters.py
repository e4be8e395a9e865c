"""FSDP1: frozen, ignored, tied, offloaded and unwrapped parameters."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distclip
from distclip import GradClipper, policies
from distclip.errors import UnsupportedGradientError
from distclip.testing import expected
from distclip.testing.models.flattened import wrap
from tests.helpers.field import still_a_defect
from tests.layouts.flattened import (
    ORIG,
    batch,
    held,
    loss_of,
    make,
    mine,
    total,
    trained,
    truth,
    wrapped,
)


@pytest.mark.ranks(2)
def test_frozen_ignored_tied_and_permuted_parameters() -> None:
    model, plain = make(), make()
    for each in (model, plain):
        each.middle.bias.requires_grad_(False)
        each.head.weight = nn.Parameter(each.head.weight.detach())
        each.middle.weight = each.body.extra = nn.Parameter(torch.arange(36.0).view(6, 6).t() / 99)
        assert not each.middle.weight.is_contiguous()
    model = wrap(model, use_orig_params=True, ignored_states=[model.head.weight])
    loss_of(model, mine(batch())).backward()
    loss_of(plain, batch()).backward()
    head = dict(model.named_parameters())["_fsdp_wrapped_module.head.weight"]
    dist.all_reduce(head.grad)  # what FSDP1 ignores is the user's to reduce
    head.grad /= dist.get_world_size()
    named = dict(plain.named_parameters())
    gradients = {name: p.grad for name, p in named.items()}
    want = expected({"name": "agc", "clip_factor": 0.02}, gradients, named)
    clipper = GradClipper(model, policies.agc(0.02))
    assert set(clipper.names) == set(named)
    report = clipper.clip_()
    assert report.parameter_norms == pytest.approx(want.parameter_norms, rel=1e-5)
    assert report.clipped_norm.item() == pytest.approx(want.clipped_norm, rel=1e-5)


def offloaded(orig: bool, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """On a CPU, where there is nothing to pin memory for, and no stream to wait for."""
    from torch.distributed.fsdp import CPUOffload

    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda self: None, raising=False)
    return wrapped(orig, cpu_offload=CPUOffload(offload_params=True))


@pytest.mark.ranks(2)
@ORIG
def test_parameters_offloaded_to_the_cpu(orig: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = offloaded(orig, monkeypatch)
    clipper = GradClipper(model, policies.global_norm(0.1))
    for number in range(3):
        model.zero_grad(set_to_none=False)  # see the next test
        loss_of(model, mine(batch(number))).backward()
        assert held(model) == pytest.approx(total(truth(number)), rel=1e-6)
        assert clipper.clip_().total_norm.item() == pytest.approx(total(truth(number)), rel=1e-6)
        assert clipper.clip_().total_norm.item() == pytest.approx(0.1, rel=1e-4)
        assert held(model) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.ranks(2)
def test_torch_keeps_offloaded_gradients_that_were_set_to_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without distclip: with original parameters, the last step's gradient is added to the next.

    Seen where it offloads from CPU to CPU. What the optimizer is given is what is clipped.
    """
    model = offloaded(True, monkeypatch)
    for number in range(2):
        model.zero_grad()
        loss_of(model, mine(batch(number))).backward()
    still_a_defect(held(model) > 1.1 * total(truth(1)), "adds an old gradient to the new one")
    norm = distclip.clip_grad_norm_(model.parameters(), 1e9)
    assert norm.item() == pytest.approx(held(model), rel=1e-6)


class Tied(nn.Module):
    """The output layer is the embedding; so is its gradient, the sum of both."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.middle = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embed(tokens))))


@pytest.mark.ranks(2, 3)
@ORIG
def test_tied_parameters_train_as_in_one_process(orig: bool) -> None:
    """Counted once and scaled once, also where the tie reaches around a wrapped module."""
    torch.manual_seed(0)
    plain = Tied()
    torch.manual_seed(0)
    model: nn.Module = Tied()
    model.middle = wrap(model.middle, use_orig_params=orig)  # type: ignore[arg-type]
    model = wrap(model, use_orig_params=orig)
    policy = policies.chain(policies.agc(0.02), policies.global_norm(0.05))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m in (plain, model)]
    alone: Any = [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]
    clippers = [
        GradClipper(plain, policy, process_group=alone, verify_replicas="never"),
        GradClipper(model, policy),
    ]
    assert sorted(clippers[1].names) == sorted(clippers[0].names)
    for step in range(5):
        tokens = torch.randint(7, (12,), generator=torch.Generator().manual_seed(step))
        for module, data in ((plain, tokens), (model, mine(tokens))):
            module.zero_grad()
            nn.functional.cross_entropy(module(data), (data + 1) % 7).backward()
        reports = [clipper.clip_() for clipper in clippers]
        assert reports[1].parameter_norms == pytest.approx(reports[0].parameter_norms, rel=1e-5)
        for optimizer in optimizers:
            optimizer.step()
    for name, value in trained(model).items():
        torch.testing.assert_close(value, plain.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.ranks(2)
def test_a_parameter_without_a_handle_is_refused() -> None:
    model = wrapped(True)
    copied = nn.Parameter(torch.ones(3))
    copied._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedGradientError, match=r"'mine' was flattened by FSDP1"):
        GradClipper([("mine", copied)], policies.global_norm(1.0))
    del model
