"""ZeRO++: weights and gradients that travel in 8 and 4 bits; what arrives is what is clipped.

DeepSpeed's quantizer is a CUDA op; on CPU ranks its place is taken by the same sums in torch, of
the shapes that DeepSpeed asks for, and all around it is DeepSpeed's own.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed")

import torch
from torch import Tensor, nn

from tests.integrations.engines import VERSION, close, engine_of, json_of
from tests.integrations.test_deepspeed import POLICIES
from tests.integrations.test_deepspeed_precision import replay

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(VERSION < (0, 19), reason="the quantizer is asked otherwise"),
]


class Quantizer:
    """Symmetric quantisation by groups of consecutive elements, for one device a node."""

    Symmetric = 0

    def __init__(self) -> None:
        self.calls: set[str] = set()

    def load(self) -> Quantizer:
        return self

    def quantize(self, values: Tensor, groups: int, bits: int, kind: int) -> tuple[Tensor, Tensor]:
        self.calls.add(f"quantize {bits}")
        rows = values.reshape(groups, -1).float()
        scales = rows.abs().amax(1).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
        quantized = (rows / scales[:, None]).round().to(torch.int8)
        return quantized.view(values.shape), scales

    def dequantize(
        self, quantized: Tensor, scales: Tensor, groups: int, bits: int, kind: int
    ) -> Tensor:
        rows = quantized.reshape(groups, -1).float() * scales[:, None]
        return rows.half().view(quantized.shape)

    def swizzle_quant(
        self,
        values: Tensor,
        groups: int,
        bits: int,
        kind: int,
        pipeline: int,
        nodes: int,
        each: int,
    ) -> tuple[Tensor, Tensor]:
        assert (pipeline, each) == (1, 1)  # then nothing is to be reordered
        return self.quantize(values.reshape(-1), groups, bits, kind)

    def quantized_reduction(
        self,
        quantized: Tensor,
        scales: Tensor,
        given: int,
        groups: int,
        bits: int,
        kind: int,
        each: int,
    ) -> tuple[Tensor, Tensor]:
        assert each == 1  # of one device, which is its own mean
        return self.quantize(
            self.dequantize(quantized, scales, given, bits, kind), groups, bits, kind
        )


class Wide(nn.Module):
    """Parts of eights, as the 8-bit form asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.fc = nn.Linear(32, 64)
        self.norm = nn.LayerNorm(64)
        self.out = nn.Linear(64, 32)
        self.frozen = nn.Linear(64, 64, bias=False)
        self.frozen.weight.requires_grad_(False)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.fc(self.embed(ids))))
        return nn.functional.mse_loss(self.out(x + self.frozen(x))[:, :3].float(), target)


CELLS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "weights": ({"zero_quantized_weights": True}, {"quantize 8"}),
    "gradients": ({"zero_quantized_gradients": True}, {"quantize 4"}),
    "all": (
        {
            "zero_quantized_weights": True,
            "zero_quantized_gradients": True,
            "zero_hpz_partition_size": 2,
        },
        {"quantize 8", "quantize 4"},
    ),
}


@pytest.mark.ranks(2, 4, timeout=240)
def test_what_has_arrived_is_clipped(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    from deepspeed.ops import op_builder
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer

    for label, (keys, calls) in CELLS.items():
        if world_size == 4 and label != "all":
            continue
        quantizer = Quantizer()
        monkeypatch.setattr(op_builder, "QuantizerBuilder", lambda q=quantizer: q)
        monkeypatch.setattr(coalesced_collectives, "quantizer_module", quantizer)
        monkeypatch.setattr(CUDAQuantizer, "quantizer_cuda_module", quantizer)
        torch.manual_seed(0)
        zero = {"stage3_param_persistence_threshold": 0, **keys}
        engine = engine_of(json_of(3, "bf16", zero=zero), made=Wide())
        try:
            replay(POLICIES["agc"], engine, 4)
            assert quantizer.calls == calls
        except Exception as error:
            raise AssertionError(f"{label}: {error}") from error
        finally:
            close(engine)
