"""The mend that an error names has to exist in the function that raised it."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import distclip
from distclip import DistclipError, GradClipper, policies

FOREIGN = {"sparse", "placements"}
"""Arguments of nn.Embedding and of DTensor.redistribute, which messages name as such."""

DROP_INS: dict[str, Callable[[Any], object]] = {
    "clip_grad_norm_": lambda given: distclip.clip_grad_norm_(given, 1.0, error_if_nonfinite=True),
    "clip_grad_value_": lambda given: distclip.clip_grad_value_(given, 1.0),
    "clip_grad_agc_": lambda given: distclip.clip_grad_agc_(given),
    "get_total_norm": lambda given: distclip.get_total_norm(
        [p if p.grad is None else p.grad for p in given], error_if_nonfinite=True
    ),
    "grad_norms": lambda given: distclip.grad_norms(given),
}


def parameter(value: float = 1.0, **kwargs: Any) -> nn.Parameter:
    made = nn.Parameter(torch.ones(2, **kwargs))
    made.grad = torch.full_like(made, value)
    return made


def stepped_in_backward() -> nn.Parameter:
    made = parameter()
    made._in_backward_optimizers = [object()]  # type: ignore[attr-defined]
    return made


def sparse() -> nn.Parameter:
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    return table.weight


def partitioned() -> nn.Parameter:
    made = parameter()
    made.ds_tensor = torch.zeros(1)  # type: ignore[attr-defined]
    return made


BAD: dict[str, Callable[[], Any]] = {
    "nan": lambda: [parameter(math.nan)],
    "module": lambda: nn.Linear(2, 2),
    "groups": lambda: torch.optim.SGD([parameter()], lr=0.1).param_groups,
    "words": lambda: ["weight"],
    "numbers": lambda: [3.0],
    "meta": lambda: [nn.Parameter(torch.ones(2, device="meta"))],
    "sparse": lambda: [sparse()],
    "complex": lambda: [parameter(dtype=torch.complex64)],
    "in backward": lambda: [stepped_in_backward()],
    "ZeRO-3": lambda: [partitioned()],
}


def named_arguments(text: str) -> set[str]:
    """Words that a message uses as keyword arguments, without what it shows as a value's repr."""
    return set(re.findall(r"\b([a-z_]+)=(?=[\w\"'(\[]|\.\.\.)", text))


def said(call: Callable[[], object]) -> str:
    """The message of the error, or nothing."""
    try:
        call()
    except DistclipError as error:
        return str(error)
    return ""


def unknown(function: Callable[..., object], text: str) -> set[str]:
    return named_arguments(text) - set(inspect.signature(function).parameters) - FOREIGN


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", DROP_INS)
def test_the_advice_of_a_drop_in_is_its_own(name: str, kind: str) -> None:
    given = BAD[kind]()
    if name == "grad_norms" and isinstance(given, list):
        given = [(str(n), p) for n, p in enumerate(given)]
    elif name == "get_total_norm" and kind in ("module", "groups", "words", "numbers"):
        pytest.skip("tensors, not parameters")
    text = said(lambda: DROP_INS[name](given))
    assert not unknown(getattr(distclip, name), text), text
    assert "GradClipper(..." not in text
    assert "on_nonfinite" not in text


@pytest.mark.parametrize("kind", BAD)
def test_the_advice_of_a_clipper_is_its_own(kind: str) -> None:
    text = said(lambda: GradClipper(BAD[kind](), policies.global_norm(1.0)).clip_())
    assert bool(text) == (kind not in ("module", "complex", "sparse"))
    assert not unknown(GradClipper, text), text
    assert ('on_nonfinite="skip"' in text) == (kind == "nan")


def test_the_check_can_fail() -> None:
    text = 'use on_nonfinite="skip", norms=True or max_norm=1'
    assert unknown(distclip.clip_grad_norm_, text) == {"on_nonfinite", "norms"}
    assert unknown(GradClipper, text) == {"max_norm"}


def test_what_goes_on_without_an_error_does() -> None:
    p = parameter(math.nan)
    with pytest.raises(distclip.NonFiniteGradientError, match="error_if_nonfinite=False") as caught:
        distclip.clip_grad_norm_([p], 1.0, error_if_nonfinite=True)
    assert caught.value.parameters == ("0",)
    assert math.isnan(distclip.clip_grad_norm_([p], 1.0, error_if_nonfinite=False))


def test_a_parameter_replaced_in_an_attached_optimizer_is_refused() -> None:
    """As after fully_shard or a merged adapter, where the clipper has a list and no module."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = GradClipper(list(model.parameters()), policies.global_norm(1.0))
    clipper.attach(optimizer)
    model.weight = nn.Parameter(model.weight.detach().clone())
    optimizer.param_groups[0]["params"][0] = model.weight
    model(torch.ones(1, 3)).sum().backward()
    before = model.bias.detach().clone()
    with pytest.raises(
        distclip.ConfigurationError, match=r"one of shape \[2, 3\] in the optimizer"
    ):
        optimizer.step()
    assert torch.equal(before, model.bias)
