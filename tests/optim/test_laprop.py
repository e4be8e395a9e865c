"""LaProp in one process: as well behaved as torch's own optimizers."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import distclip
from distclip import ConfigurationError
from distclip.optim import LaProp, dreamer_v3, update
from distclip.testing.norms import wide
from tests.optim.chain import Chain
from tests.optim.laprop import follows, give, gradients, make, same, train

OPTIONS = st.fixed_dictionaries(
    {
        "lr": st.floats(0.0, 0.1),
        "eps": st.sampled_from([1e-30, 1e-20, 1e-8, 1e-3]),
        "nesterov": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.01, 1.0]),
        "agc": st.sampled_from([0.0, 0.01, 0.3]),
        "warmup": st.integers(0, 4),
        "b1": st.sampled_from([0.0, 0.5, 0.9, 0.99]),
        "b2": st.sampled_from([0.0, 0.9, 0.999, 0.99999]),
        "curve": st.sampled_from([("const", 0), ("linear", 6), ("cosine", 6)]),
        "maximize": st.booleans(),
    }
)


@settings(max_examples=40, deadline=None)
@given(OPTIONS, st.integers(0, 3))
def test_any_options_follow_the_chain_and_foreach_is_the_loop(
    options: dict[str, Any], seed: int
) -> None:
    options = dict(options)
    betas = (options.pop("b1"), options.pop("b2"))
    options["schedule"], options["anneal"] = options.pop("curve")
    first, second = make(seed), make(seed)
    chain_options = {k: v for k, v in options.items() if k != "maximize"}
    sign = -1.0 if options["maximize"] else 1.0
    chain = Chain(first, b1=betas[0], b2=betas[1], sign=sign, **chain_options)
    many = LaProp(first.items(), betas=betas, foreach=True, **options)
    one = LaProp(second.items(), betas=betas, foreach=False, **options)
    for step in range(3):
        values = gradients(10 * seed + step, scale=[1.0, 100.0, 0.01][step])
        for model, optimizer in ((first, many), (second, one)):
            give(model, values)
            optimizer.step()
        chain.step(values)
    assert same(first, second)
    scale = max(1.0, options["lr"] * 1e2)
    follows(first, chain, rtol=5e-5, atol=5e-6 * scale)
    for a, b in zip(many.state.values(), one.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_large_tensors_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "ON_HOST", 1000)
    first, second = make(), make()
    first["big.weight"].data = first["big.weight"].data.t().contiguous().t()  # has strides
    train(first, LaProp(first.items(), lr=1e-2, weight_decay=0.1), range(3))
    train(second, LaProp(second.items(), lr=1e-2, weight_decay=0.1, foreach=False), range(3))
    assert same(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moments_are_float32_or_better(dtype: torch.dtype) -> None:
    model = make(dtype=dtype)
    chain = Chain(model, lr=1e-2, agc=0.3, weight_decay=0.1)
    optimizer = dreamer_v3(model.items(), lr=1e-2, warmup=0, weight_decay=0.1)
    for step in range(3):
        give(model, gradients(step))
        # Each update from where the rounded weights are.
        chain.p = {name: wide(p).copy() for name, p in model.items()}
        chain.step({n: p.grad for n, p in model.items() if p.grad is not None})
        optimizer.step()
        # AGC rounds the gradients to their dtype, the parameter is rounded once.
        eps = torch.finfo(dtype).eps
        follows(model, chain, rtol=max(eps, 1e-12), atol=max(1e-2 * eps, 1e-12))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == wanted


def test_complex_parameters_are_pairs() -> None:
    pairs = torch.randn(4, 3, 2)
    whole, halves = nn.Parameter(torch.view_as_complex(pairs.clone())), nn.Parameter(pairs.clone())
    grad = torch.randn(4, 3, 2)
    optimizers = [dreamer_v3([p], lr=0.1, warmup=0, weight_decay=0.1) for p in (whole, halves)]
    for _ in range(3):
        whole.grad, halves.grad = torch.view_as_complex(grad.clone()), grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(whole.detach()), halves.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_bitwise(dtype: torch.dtype) -> None:
    arguments: dict[str, Any] = {"lr": 1e-2, "warmup": 2, "weight_decay": 0.1, "nesterov": True}
    model = make(dtype=dtype)
    optimizer = dreamer_v3(model.items(), **arguments)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), {n: p.detach() for n, p in model.items()}], file)
    train(model, optimizer, range(3, 6))

    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    again = {name: nn.Parameter(value) for name, value in weights.items()}
    resumed = dreamer_v3(again.items())  # the options are in the state
    resumed.load_state_dict(state)
    train(again, resumed, range(3, 6))
    assert same(model, again)
    for a, b in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def test_copies_and_pickles_are_optimizers() -> None:
    model = make()
    optimizer = dreamer_v3(list(model.values()), lr=1e-2, warmup=0)
    train(model, optimizer, range(2))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        parameters = dict(zip(model, copied.param_groups[0]["params"], strict=True))
        twin = copy.deepcopy(optimizer)
        twins = dict(zip(model, twin.param_groups[0]["params"], strict=True))
        train(parameters, copied, range(2, 4))
        train(twins, twin, range(2, 4))
        assert same(parameters, twins)
        assert not same(parameters, model)
        assert copied.report is not None


def test_the_state_of_adam_is_refused() -> None:
    model = make()
    adam = torch.optim.AdamW(model.values())
    train(model, adam, range(1))
    optimizer = dreamer_v3(model.values())
    with pytest.raises(distclip.StateError, match=r"not the state of a LaProp.*'agc'"):
        optimizer.load_state_dict(adam.state_dict())


def test_what_is_not_there_is_left_alone() -> None:
    model = make()
    chain = Chain(model, lr=1e-2, agc=0.3)
    model["conv.weight"].requires_grad_(False)
    optimizer = dreamer_v3(model.items(), lr=1e-2, warmup=0)
    optimizer.step()  # no gradient at all
    assert not optimizer.state
    assert optimizer.param_groups[0]["updates"] == 0
    for step in range(3):
        values: dict[str, Any] = gradients(step)
        values["conv.weight"] = None
        if step == 1:
            values["fc.bias"] = None
        for name, parameter in model.items():
            parameter.grad = None if values[name] is None else values[name].clone()
        optimizer.step()
        chain.step(values)
    follows(model, chain)
    assert optimizer.state[model["fc.bias"]]["step"] == 2
    assert model["conv.weight"] not in optimizer.state


def test_a_sparse_gradient_is_refused_before_anything_changes() -> None:
    for agc in (0.3, 0.0):
        table = nn.Embedding(5, 3, sparse=True)
        fc = nn.Linear(3, 2)
        model = nn.ModuleDict({"fc": fc, "table": table})
        optimizer = dreamer_v3(model, lr=0.1, warmup=0, agc=agc, on_nonfinite="pass")
        fc(table(torch.tensor([1, 2]))).sum().backward()
        before = copy.deepcopy(model.state_dict())
        gradient = fc.weight.grad.clone()
        with pytest.raises(distclip.UnsupportedGradientError, match=r"'table.weight' is sparse"):
            optimizer.step()
        assert same(model.state_dict(), before)
        assert torch.equal(fc.weight.grad, gradient)
        assert not optimizer.state


def test_capturable_is_the_same() -> None:
    first, second = make(), make()
    options: dict[str, Any] = {
        "warmup": 2,
        "schedule": "cosine",
        "anneal": 6,
        "weight_decay": 0.1,
        "nesterov": True,
    }
    lr = torch.tensor(1e-2, dtype=torch.float64)
    captured = LaProp(first.items(), lr=lr, capturable=True, **options)
    plain = LaProp(second.items(), lr=1e-2, **options)
    train(first, captured, range(5))
    train(second, plain, range(5))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-7)
    assert captured.param_groups[0]["updates"] == 5
    assert captured.learning_rates() == pytest.approx(plain.learning_rates())
    again = LaProp(make().items(), capturable=True)
    again.load_state_dict(captured.state_dict())
    assert isinstance(again.param_groups[0]["updates"], Tensor)


def test_what_decays() -> None:
    def decays(**options: Any) -> list[bool]:
        return LaProp(make().items(), weight_decay=0.1, **options).param_groups[0]["decayed"]

    assert decays() == [True, False, True, False, True, True]
    assert decays(decay_mask=["fc.*"]) == [True, True, False, False, False, False]
    assert decays(decay_mask=lambda name, p: p.ndim == 4) == [False, False, True, *[False] * 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and >= 0, got -1.0"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": torch.ones(2)}, "lr must be a number or a tensor of one"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be >= 0 and < 1, got 1.0"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"eps": 0.0}, "eps must be finite and > 0"),
        ({"eps": 1e-40}, "eps must be at least 1.2e-38"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite and >= 0"),
        ({"agc": -0.3}, "agc must be finite and >= 0"),
        ({"pmin": 0.0}, "pmin must be finite and > 0"),
        ({"warmup": 1.5}, "warmup must be a whole number of updates >= 0, got 1.5"),
        ({"anneal": -1}, "anneal must be a whole number"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"schedule": "linear"}, "anneal=0, which must come after the warm-up"),
        ({"anneal": 10}, "anneal=10 has no meaning with schedule='const'"),
        ({"nesterov": 1}, "nesterov must be True or False"),
        ({"foreach": "yes"}, "foreach must be True, False or None"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of"),
        ({"decay_mask": "*.weight"}, "decay_mask must be a function"),
        ({"capturable": True, "agc": 0.3}, "clipping cannot be captured"),
        ({"capturable": True, "on_nonfinite": "skip"}, "cannot be captured"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LaProp(make().items(), **options)
    if "on_nonfinite" not in options:
        optimizer = LaProp([nn.Parameter(torch.ones(2))])
        with pytest.raises(ConfigurationError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
        assert len(optimizer.param_groups) == 1


def test_what_are_no_parameters() -> None:
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for params, message in (
        ([], "no parameters"),
        ({one}, "set, whose order changes"),
        ([("a", one), ("a", two)], "called 'a'"),
        ([{"params": [("a", one)]}, {"params": [("a", two)]}], "called 'a'"),
        ([{"params": {one}}], "set, whose order"),
        ("model", "expected a module"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            LaProp(params)  # type: ignore[arg-type]
    tied = nn.Linear(2, 2)
    assert len(LaProp([tied.weight, tied.weight, tied.bias]).param_groups[0]["params"]) == 2
    assert LaProp([{"params": one}, {"params": [two]}]).param_groups[1]["param_names"] == ["1"]
    assert LaProp(tied).param_groups[0]["param_names"] == ["weight", "bias"]
