"""Gradients that torch cannot change in place, or that would be changed twice, and other odd ones.

Each is clipped rightly, or refused by name with no gradient changed, its own and the others'.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import distclip
from distclip import GradClipper, policies
from distclip.optim import LaProp
from distclip.testing import expected

Parameters = list[nn.Parameter]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def complexes(*shape: int) -> Tensor:
    return torch.complex(numbers(*shape), numbers(*shape, seed=2))


def having(gradient: Any, weight: Tensor | None = None, *, free: bool = False) -> Parameters:
    trained = weight is None or weight.is_floating_point() or weight.is_complex()
    made = nn.Parameter(numbers(4, 4, seed=3) if weight is None else weight, requires_grad=trained)
    if free:
        made.grad_dtype = None  # type: ignore[attr-defined]
    made.grad = gradient
    return [made]


def pair(first: Tensor, second: Tensor) -> Parameters:
    return [*having(first), *having(second)]


def autograd_conjugate() -> Parameters:
    (made,) = having(None, complexes(4, 4))
    (made.conj() * complexes(4, 4)).sum().real.backward()
    assert made.grad is not None
    assert made.grad.is_conj()
    return [made]


def autograd_graph() -> Parameters:
    (made,) = having(None)
    (made**3).sum().backward(create_graph=True)
    assert made.grad is not None
    assert made.grad.requires_grad
    return [made]


def inference() -> Parameters:
    with torch.inference_mode():
        gradient = numbers(4, 4)
    return having(gradient)


def replaced_data() -> Parameters:
    (made,) = having(numbers(4, 4))
    made.data = numbers(3, 4)
    return [made]


def freed() -> Parameters:
    (made,) = having(numbers(4, 4))
    assert made.grad is not None
    made.grad.untyped_storage().resize_(0)
    return [made]


def fake() -> Parameters:
    with FakeTensorMode():
        return having(torch.ones(4, 4), numbers(4, 4))


def weight_itself() -> Parameters:
    (made,) = having(None)
    made.grad = made.detach()
    return [made]


def overlapping_views() -> Parameters:
    flat = numbers(24)
    return pair(flat[:16].view(4, 4), flat[8:].view(4, 4))


def integers(dtype: torch.dtype) -> Parameters:
    return having(torch.full((4, 4), 3, dtype=dtype), torch.ones(4, 4, dtype=dtype))


def quantised() -> Parameters:
    weight, gradient = (
        torch.quantize_per_tensor(numbers(4, 4), 0.1, 0, torch.qint8) for _ in range(2)
    )
    return having(gradient, weight)


def negative() -> Parameters:
    gradient = complexes(4, 4).conj().imag
    assert gradient.is_neg()
    return having(gradient)


def interleaved() -> Parameters:
    both = numbers(4, 8)
    return pair(both[:, :4], both[:, 4:])


def same(gradient: Tensor) -> Parameters:
    return pair(gradient, gradient)


RIGHT = ""
ODD: dict[str, tuple[Callable[[], Parameters], str]] = {
    "conjugate bit": (autograd_conjugate, RIGHT),
    "negative bit": (negative, RIGHT),
    "with a graph": (autograd_graph, RIGHT),
    "transposed": (lambda: having(numbers(4, 4).t()), RIGHT),
    "every other column": (lambda: having(numbers(4, 8)[:, ::2]), RIGHT),
    "interleaved": (interleaved, RIGHT),
    "no elements": (lambda: having(numbers(0, 4), numbers(0, 4)), RIGHT),
    "a parameter": (lambda: having(nn.Parameter(numbers(4, 4))), RIGHT),
    "higher precision than the weight": (
        lambda: having(numbers(4, 4), numbers(4, 4, dtype=torch.bfloat16), free=True),
        RIGHT,
    ),
    "lower precision than the weight": (
        lambda: having(numbers(4, 4, dtype=torch.bfloat16), free=True),
        RIGHT,
    ),
    "expanded": (lambda: having(numbers(4, 1).expand(4, 4)), "elements that share memory"),
    "overlapping itself": (
        lambda: having(numbers(7).as_strided((4, 4), (1, 1))),
        "elements that share memory",
    ),
    "one tensor for two": (lambda: same(numbers(4, 4)), "'odd0' and the gradient of 'odd1' share"),
    "one transposed tensor for two": (
        lambda: same(numbers(4, 4).t()),
        "'odd0' and the gradient of 'odd1' share",
    ),
    "overlapping another": (overlapping_views, "'odd0' and the gradient of 'odd1' share"),
    "the weight itself": (weight_itself, "the weights of 'odd0' share memory"),
    "inference": (inference, "torch.inference_mode"),
    "replaced data": (replaced_data, r"has the shape \[4, 4\], and its parameter \[3, 4\]"),
    "freed": (freed, "has no memory"),
    "fake": (fake, "FakeTensor"),
    "int32": (lambda: integers(torch.int32), "torch.int32"),
    "bool": (lambda: integers(torch.bool), "torch.bool"),
    "float8": (
        lambda: having(*[numbers(4, 4).to(torch.float8_e4m3fn) for _ in range(2)]),
        "float8_e4m3fn",
    ),
    "complex32": (
        lambda: having(*[complexes(4, 4).to(torch.complex32) for _ in range(2)]),
        "complex32",
    ),
    "quantised": (quantised, "torch.qint8"),
    "mkldnn": (
        lambda: having(*[numbers(4, 4).to_mkldnn() for _ in range(2)]),
        "_mkldnn",
    ),
}

WAYS: dict[str, tuple[Any, Any, str]] = {
    "global_norm": (
        policies.global_norm(0.1),
        {"name": "global_norm", "max_norm": 0.1},
        "pass",
    ),
    "value": (policies.value(0.01), {"name": "value", "clip_value": 0.01}, "pass"),
    "agc": (policies.agc(0.01), {"name": "agc", "clip_factor": 0.01}, "pass"),
    "zero": (policies.global_norm(0.1), {"name": "global_norm", "max_norm": 0.1}, "zero"),
}


def with_neighbours(odd: Parameters, *, bad: bool) -> list[tuple[str, nn.Parameter]]:
    """Something that would be changed before and after the odd ones."""
    (first,), (last,) = (
        having(torch.full((3,), 5.0), torch.ones(3)),
        having(numbers(2, 2), torch.ones(2, 2)),
    )
    if bad:
        assert first.grad is not None
        first.grad[0] = math.nan
    return [("first", first), *((f"odd{n}", each) for n, each in enumerate(odd)), ("last", last)]


def values(tensor: Tensor | None) -> Any:
    """For the oracle, in float64; complex numbers as pairs, whose norms are the same."""
    assert tensor is not None
    plain = tensor.detach().resolve_conj().resolve_neg()
    return (torch.view_as_real(plain) if plain.is_complex() else plain).double().numpy().copy()


def bits(gradient: Tensor | None) -> Any:
    """Something that shows any change, of tensors that have bits; None of others."""
    if gradient is None or type(gradient) not in (Tensor, nn.Parameter):
        return None
    if gradient.layout is not torch.strided or gradient.is_quantized:
        return None
    if gradient.numel() and not gradient.untyped_storage().nbytes():
        return None
    plain = gradient.detach().resolve_conj().resolve_neg().contiguous()
    return plain.clone().flatten().view(torch.uint8).tolist()


SAID_BY_TORCH = pytest.mark.filterwarnings(
    "ignore:Using backward.. with create_graph", "ignore:ComplexHalf", "ignore:torch.quantize_per"
)


@SAID_BY_TORCH
@pytest.mark.parametrize("odd", ODD)
def test_odd_gradients_are_clipped_rightly_or_refused_untouched(odd: str) -> None:
    make, message = ODD[odd]
    for way, (policy, document, mode) in WAYS.items():
        named = with_neighbours(make(), bad=mode == "zero")
        if way == "value" and any(p.is_complex() for _, p in named):
            continue  # complex numbers cannot be clamped, and that is another error
        before = [bits(p.grad) for _, p in named]
        if message:
            made: list[GradClipper] = []

            def clip(
                made: Any = made, named: Any = named, policy: Any = policy, mode: Any = mode
            ) -> None:
                if not made:
                    made.append(GradClipper(named, policy, on_nonfinite=mode))
                made[0].clip_()

            for _ in range(2):
                with pytest.raises(distclip.UnsupportedGradientError, match=message):
                    clip()
                assert [bits(p.grad) for _, p in named] == before
            continue
        gradients = {name: values(p.grad) for name, p in named}  # type: ignore[arg-type]
        weights = {name: values(p) for name, p in named}
        want = expected(document, gradients, weights, on_nonfinite=mode)  # type: ignore[arg-type]
        clipper = GradClipper(named, policy, on_nonfinite=mode)  # type: ignore[arg-type]
        assert clipper.clip_().total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
        for name, parameter in named:
            assert parameter.grad is not None
            rough = parameter.grad.dtype is torch.bfloat16
            np.testing.assert_allclose(
                values(parameter.grad),
                want.gradients[name],
                rtol=1e-2 if rough else 1e-5,
                err_msg=f"{way}, {name}",
            )


@SAID_BY_TORCH
@pytest.mark.parametrize("odd", ODD)
def test_the_functions_and_laprop_do_the_same(odd: str) -> None:
    make, message = ODD[odd]
    acts: list[Callable[[Any], Any]] = [
        lambda ps: distclip.clip_grad_norm_(ps, 0.1),
        lambda ps: distclip.clip_grad_value_(ps, 0.01),
        lambda ps: distclip.clip_grad_agc_(ps, 0.01),
        lambda ps: LaProp(ps, lr=0.1, agc=0.3).step(),
    ]
    for number, act in enumerate(acts):
        named = with_neighbours(make(), bad=False)
        if number == 1 and any(p.is_complex() for _, p in named):
            continue
        before = [bits(p.grad) for _, p in named]
        if message:
            match = message.replace("odd1", "2").replace("odd0", "1")
            with pytest.raises(distclip.DistclipError, match=match):
                act([p for _, p in named])
            assert [bits(p.grad) for _, p in named] == before
        else:
            act([p for _, p in named])
            assert bits(named[0][1].grad) != before[0]


def test_gradients_that_become_odd_later_are_found_later() -> None:
    """Not only in the first step; but whose memory a gradient overlaps is looked at once."""
    for odd, message in (
        (lambda: numbers(4, 1).expand(4, 4), "share memory"),
        (inference()[0].grad, "inference_mode"),
        (lambda: numbers(4, 4).to(torch.int32), "torch.int32"),
    ):
        (parameter,) = having(numbers(4, 4), free=True)
        clipper = GradClipper([("w", parameter)], policies.global_norm(0.1))
        clipper.clip_()
        parameter.grad = odd() if callable(odd) else odd
        with pytest.raises(distclip.UnsupportedGradientError, match=message):
            clipper.clip_()
    (parameter,) = having(numbers(4, 4))
    clipper = GradClipper([("w", parameter)], policies.global_norm(0.1))
    clipper.clip_()
    parameter.grad = numbers(4, 4)._neg_view()  # type: ignore[attr-defined]
    assert parameter.grad.is_contiguous()
    want = values(parameter.grad)
    want *= 0.1 / np.linalg.norm(want)
    clipper.clip_()
    np.testing.assert_allclose(values(parameter.grad), want, rtol=1e-4)
    both = pair(numbers(4, 4), numbers(4, 4))
    clipper = GradClipper(both, policies.global_norm(0.1))
    clipper.clip_()
    both[0].grad = both[1].grad
    with pytest.raises(distclip.UnsupportedGradientError, match="share memory"):
        clipper.clip_()


@pytest.mark.ranks(2)
def test_an_odd_gradient_of_one_rank_is_an_error_on_all() -> None:
    from torch.distributed.fsdp import fully_shard

    for make in (
        lambda shape: numbers(1).expand(shape),
        lambda shape: torch.ones(shape, dtype=torch.int32),
    ):
        model = nn.Linear(4, 4)
        fully_shard(model)
        clipper = GradClipper(model, policies.global_norm(0.1))
        model(torch.ones(2, 4)).sum().backward()
        weight: Any = model.weight
        if dist.get_rank() == 1:
            weight.grad._local_tensor = make(weight.grad._local_tensor.shape)
        before = bits(model.bias.grad._local_tensor)  # type: ignore[union-attr]
        with pytest.raises(distclip.UnsupportedGradientError, match=r"'weight'|another rank"):
            clipper.clip_()
        assert bits(model.bias.grad._local_tensor) == before  # type: ignore[union-attr]


def test_everything_in_inference_mode_is_clipped() -> None:
    with torch.inference_mode():
        made = torch.ones(4)
        made.grad = numbers(4)
        distclip.clip_grad_norm_([made], 0.1)
        assert made.grad.norm().item() == pytest.approx(0.1, rel=1e-4)
        clipper = distclip.GradClipper([made], policies.global_norm(0.05))
        for bound in (0.05, 0.05):  # a second time: nobody can tell whether anything has changed
            clipper.clip_()
            assert made.grad.norm().item() == pytest.approx(bound, rel=1e-4)


def test_memory_that_comes_to_be_shared_later_is_refused() -> None:
    one, other = (nn.Parameter(torch.ones(4)) for _ in range(2))
    clipper = GradClipper([one, other], policies.global_norm(1.0))
    one.grad = torch.full((4,), 9.0)
    clipper.clip_()
    one.grad, other.grad = torch.full((4,), 9.0), other.data  # its first gradient: the weights
    with pytest.raises(distclip.UnsupportedGradientError, match="share memory"):
        clipper.clip_()
    assert other.tolist() == [1.0] * 4
    other.grad = torch.ones(4)
    clipper.clip_()
    both = torch.full((6,), 9.0)
    one.grad, other.grad = both[:4], both[2:]
    with pytest.raises(distclip.UnsupportedGradientError, match="share memory"):
        clipper.clip_()
    assert both.tolist() == [9.0] * 6


@pytest.mark.parametrize(
    "ways", [policies.agc(0.01), policies.chain(policies.value(0.5), policies.agc(0.01))]
)
def test_rows_of_another_shape_are_refused_at_any_step(ways: policies.Policy) -> None:
    parameter = nn.Parameter(torch.ones(6, 4))
    clipper = GradClipper([parameter], ways)
    parameter.grad = torch.full((6, 4), 9.0)
    clipper.clip_()
    parameter.data, parameter.grad = torch.ones(4, 6), None
    parameter.grad = torch.full((4, 6), 9.0)
    with pytest.raises(distclip.UnsupportedGradientError, match=r"shape \[4, 6\]"):
        clipper.clip_()
    assert bool((parameter.grad == 9.0).all())


def test_gradients_that_become_the_weights_are_refused() -> None:
    one, other = (nn.Parameter(torch.full((4,), 9.0)) for _ in range(2))
    clipper = GradClipper([one, other], policies.global_norm(1.0))
    clips = (clipper.clip_, lambda: distclip.clip_grad_norm_([one, other], 1.0))
    for clip in clips:
        one.grad, other.grad = torch.full((4,), 9.0), torch.ones(4)
        clip()
        one.grad = one.data
        with pytest.raises(distclip.UnsupportedGradientError, match="share memory"):
            clip()
        assert one.tolist() == [9.0] * 4
    one.data, one.grad = torch.full((4,), 5.0), one.data  # what were the weights is free to use
    clipper.clip_()
    one.grad = one.data
    with pytest.raises(distclip.UnsupportedGradientError, match="share memory"):
        clipper.clip_()
    assert one.tolist() == [5.0] * 4
