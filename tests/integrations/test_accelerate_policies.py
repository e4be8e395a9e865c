"""Accelerate: policies, by name and by part of a model, against the oracle."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
import distclip
from tests.integrations.accelerated import (
    LAYOUTS,
    Halve,
    Reference,
    batch,
    by_abandoning,
    by_both,
    by_hand,
    by_hook,
    by_norm,
    by_presence,
    by_value,
    clip_all,
    loss_of,
    make,
    mine,
    prepared,
    same,
    sgd,
    start,
    whole,
)

LR = 0.5


ORACLE: dict[str, Any] = {
    "global_norm": {"policy": {"name": "global_norm", "max_norm": 0.3}},
    "agc": {"policy": {"name": "agc", "clip_factor": 0.02}},
    "value": {"policy": {"name": "value", "clip_value": 0.05}},
    "by_name": {
        "policy": {"name": "agc", "clip_factor": 0.02},
        "by_name": {"*.bias": None, "head.*": {"name": "global_norm", "max_norm": 0.1}},
    },
    "group_norm": {"policy": {"name": "group_norm", "max_norm": 0.2}},
}


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    """Weights and biases in groups of their own; the frozen one in none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1]}]
    groups.append({"params": [p for p in trained if p.dim() == 1], "lr": LR / 2})
    return torch.optim.SGD(groups, lr=LR, momentum=0.9)


@pytest.mark.ranks(1, 2)
@LAYOUTS
@pytest.mark.parametrize("name", ORACLE)
def test_policies_against_the_oracle(layout: str, name: str) -> None:
    document = ORACLE[name]
    policy = document["policy"]
    if "by_name" in document:
        policy = {"by_name": document["by_name"], "default": policy}
    for path in (by_hook, by_norm, by_value):
        accelerator, _, model, optimizer = prepared(layout, document, grouped)
        reference = Reference(plain := make(), grouped(plain))
        for number in range(4):
            path(accelerator, model, optimizer, mine(batch(number)))
            reference.update(policy, loss_of(plain, batch(number)))
        same(whole(model), whole(plain))


@pytest.mark.ranks(2)
@LAYOUTS
def test_group_norm_knows_the_groups_of_several_optimizers(layout: str) -> None:
    """One for the weights, one for the biases; and a frozen parameter is in neither."""
    accelerator = start(layout)
    distclip.accelerate.attach(accelerator, ORACLE["group_norm"])
    model, plain = make(), make()
    for each in (model, plain):
        each.head.bias.requires_grad_(False)
    reference = Reference(plain, grouped(plain))
    separate = [torch.optim.SGD([group], momentum=0.9) for group in grouped(model).param_groups]
    model, *optimizers = accelerator.prepare(model, *separate)
    for number in range(3):
        accelerator.backward(loss_of(model, mine(batch(number))))
        clip_all(accelerator, model)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        reference.update(ORACLE["group_norm"]["policy"], loss_of(plain, batch(number)))

    same(whole(model), whole(plain))


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("name", ["agc", "by_name"])
def test_flat_parameters_of_fsdp1(name: str) -> None:
    """``use_orig_params: false``: the script sees one parameter, the policy those it stands for."""
    document = ORACLE[name]
    policy = document["policy"]
    if "by_name" in document:
        policy = {"by_name": document["by_name"], "default": policy}
    for path in (by_hook, by_norm, by_value, by_both, by_presence, by_hand, by_abandoning):
        accelerator = start("fsdp1 flat")
        handle = distclip.accelerate.attach(accelerator, document)
        model = accelerator.prepare(make())
        optimizer = accelerator.prepare(sgd(model))  # the flat parameter is there only now
        reference = Reference(plain := make(), sgd(plain))
        assert len(list(model.parameters())) == 1
        for number in range(3):
            x = batch(number, 12)
            path(accelerator, model, optimizer, mine(x))
            reference.update(policy, loss_of(plain, x))
        assert handle.last_report.names == ("body.weight", "body.bias", "head.weight", "head.bias")
        try:
            same(whole(model), whole(plain))
        except AssertionError as error:
            raise AssertionError(f"{path.__name__}: {error}") from None


@pytest.mark.ranks(2, 3)
def test_parts_of_a_model_under_fsdp1_by_name_and_by_presence() -> None:
    """Each rank may hold elements of another part: the ranks agree on which part is meant."""
    accelerator, _, model, optimizer = prepared("fsdp1", Halve())
    reference = Reference(plain := make(), sgd(plain))
    for number, part in enumerate(["head", "body", "body", "head", ""]):
        for present in (True, False):
            x = batch(2 * number + present, 6)
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, mine(x)))
            chosen = [p for n, p in model.named_parameters() if part in n]
            if present:
                chosen = [p for p in chosen if p.grad is not None]
            norm = accelerator.clip_grad_norm_(chosen, 1e-9)
            optimizer.step()
            factors = {n: 0.5 if part in n else 1.0 for n, _ in plain.named_parameters()}
            plain.zero_grad()
            loss_of(plain, x).backward()
            wanted = [p.grad for n, p in plain.named_parameters() if part in n]
            norms = torch.stack([gradient.norm() for gradient in wanted])
            assert norm.item() == pytest.approx(norms.norm().item(), rel=1e-5), part
            plain.zero_grad()
            reference.update(factors, loss_of(plain, x))
    same(whole(model), whole(plain), 1e-5)
