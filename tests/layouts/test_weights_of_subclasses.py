"""Weights that are tensor subclasses: all-gathered in float8 by FSDP2, or quantised.

Their gradients are plain. Policies that read weights read the values behind them, or refuse.
"""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

import distclip
from distclip import GradClipper, policies
from distclip.testing import expected
from tests.sharded import mesh_of

aten = torch.ops.aten
KEPT = {
    aten.detach.default,
    aten.clone.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.view.default,
    aten.as_strided.default,
    aten.new_zeros.default,
    aten.empty_like.default,
    aten.copy_.default,
}


class Wrapper(Tensor):
    """As torchao's: dispatches by itself, and stays what it is in views and copies only."""

    @staticmethod
    def __new__(cls, inner: Tensor, *rest: Any) -> Any:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=torch.float32,
            device=inner.device,
        )

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op not in KEPT:
            raise NotImplementedError(f"{cls.__name__} has no {op}")
        if op is aten.copy_.default:
            args[0]._tensor.copy_(getattr(args[1], "_tensor", args[1]))
            return args[0]
        args, kwargs = tree_map_only(cls, lambda t: t._tensor, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, op(*args, **kwargs))


class CastForGather(Wrapper):
    """As ``WeightWithDynamicFloat8CastTensor``: high precision within, less on the wire."""

    def __init__(self, inner: Tensor) -> None:
        self._tensor = inner

    def __tensor_flatten__(self) -> Any:
        return ["_tensor"], None

    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        return (self._tensor.to(torch.bfloat16),), None

    def fsdp_post_all_gather(
        self, outputs: Any, metadata: Any, dtype: Any, *, out: Tensor | None = None
    ) -> Any:
        if out is not None:
            with torch.no_grad():
                out.copy_(outputs[0])
            return None
        gathered = outputs[0].float()
        return gathered, (gathered,)


class Quantised(Wrapper):
    """Integers and a scale, as weight-only quantisation leaves them."""

    def __init__(self, inner: Tensor) -> None:
        self.data_int8 = inner if inner.dtype is torch.int8 else (inner * 16).round().to(torch.int8)
        self._tensor = self.data_int8

    def dequantize(self) -> Tensor:
        return self.data_int8.float() / 16


class Opaque(Wrapper):
    def __init__(self, inner: Tensor) -> None:
        self._tensor = inner.double()


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


AGC = {"name": "agc", "clip_factor": 0.01}


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("policy", ["agc", "global_norm"])
def test_float8_all_gather_of_fsdp2(policy: str) -> None:
    weight = randn(12, 4)
    model = nn.Linear(4, 12)
    with torch.no_grad():
        model.bias.copy_(randn(12, seed=2))
    model.weight = nn.Parameter(CastForGather(weight.clone()))
    fully_shard(model, mesh=mesh_of((dist.get_world_size(),), ("dp",)))
    model(torch.ones(2, 4)).square().sum().backward()
    assert isinstance(model.weight, DTensor)
    assert isinstance(model.weight._local_tensor, CastForGather)
    full = {n: p.grad.full_tensor() for n, p in model.named_parameters()}  # type: ignore[union-attr]
    weights = {"weight": weight, "bias": randn(12, seed=2)}
    document = AGC if policy == "agc" else {"name": "global_norm", "max_norm": 0.1}
    want = expected(document, full, weights)
    built = policies.agc(0.01) if policy == "agc" else policies.global_norm(0.1)
    report = GradClipper(model, built).clip_()
    assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6)
    for name, parameter in model.named_parameters():
        found = parameter.grad.full_tensor().double().numpy()  # type: ignore[union-attr]
        np.testing.assert_allclose(found, want.gradients[name], rtol=1e-5, err_msg=name)


def having(kind: Any) -> Any:
    made = nn.Parameter(kind(randn(4, 4)))
    assert isinstance(made, kind)
    made.grad = randn(4, 4, seed=2) * 3
    return made


@pytest.mark.parametrize("kind", [CastForGather, Quantised])
def test_plain_parameters(kind: Any) -> None:
    values = randn(4, 4) if kind is CastForGather else (randn(4, 4) * 16).round() / 16
    want = expected(AGC, {"w": randn(4, 4, seed=2) * 3}, {"w": values})
    for act in (
        lambda p: GradClipper([("w", p)], policies.agc(0.01)).clip_(),
        lambda p: distclip.clip_grad_agc_([p], 0.01),
    ):
        parameter = having(kind)
        act(parameter)
        np.testing.assert_allclose(parameter.grad.numpy(), want.gradients["w"], rtol=1e-5)


@pytest.mark.ranks(1, 2)
def test_what_offers_no_values_is_refused_when_weights_are_read() -> None:
    opaque = having(Opaque)
    with pytest.raises(distclip.UnsupportedGradientError, match=r"'w' .*Opaque.* reads weights"):
        GradClipper([("w", opaque)], policies.agc(0.01))
    with pytest.raises(distclip.UnsupportedGradientError, match=r"'0' .*Opaque.* reads weights"):
        distclip.clip_grad_agc_([opaque], 0.01)
    integers = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn))
    with pytest.raises(distclip.UnsupportedGradientError, match=r"'w' .*float8_e4m3fn"):
        GradClipper([("w", integers)], policies.agc(0.01))
    for policy in (
        policies.global_norm(0.1),
        policies.by_name({"w": policies.global_norm(0.1)}, default=policies.agc(0.01)),
    ):
        opaque = having(Opaque)
        clipper = GradClipper([("w", opaque), ("v", having(Tensor))], policy)
        clipper.clip_()
        assert opaque.grad.norm().item() <= 0.1001


@pytest.mark.ranks(1, 2)
def test_frozen_weights_are_not_read() -> None:
    """As quantised ones under adapters (QLoRA)."""
    frozen = nn.Parameter(Opaque(randn(4, 4)), requires_grad=False)
    adapter = having(Tensor)
    clipper = GradClipper([("base", frozen), ("adapter", adapter)], policies.agc(0.01))
    for _ in range(2):
        clipper.clip_()
    assert adapter.grad.norm().item() < 1.0
