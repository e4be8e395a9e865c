"""The models of ``distclip bench``: on each rank, parameters with gradients under one sharding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

Size = tuple[int, int]
SMALL: Size = (24, 64)
"""Layers and width of an encoder of 288 parameters and 1.2 M elements."""
LARGE: Size = (12, 512)
"""Layers and width of an encoder of 144 parameters and 38 M elements."""


@dataclass(frozen=True)
class Model:
    """A model with gradients, which the ways of a case clip.

    Attributes:
        target: what a ``GradClipper`` is built for.
        parameters: all of them, with gradients.
        fsdp1: the FSDP1 module, which has a method of its own to clip.
    """

    target: Any
    parameters: list[Tensor]
    fsdp1: Any = None


def fsdp2(size: Size, dtype: torch.dtype = torch.float32) -> Model:
    """An encoder sharded by FSDP2, each layer by itself."""
    blocks = encoder_layers(size, dtype)
    for block in blocks:
        fully_shard(block)
        _backward(block, size[1], dtype)
    parameters: list[Tensor] = list(blocks.parameters())
    return Model(parameters, parameters)


def ddp(size: Size, dtype: torch.dtype = torch.float32) -> Model:
    """The encoder of :func:`fsdp2` under DistributedDataParallel."""
    model = DistributedDataParallel(encoder_layers(size, dtype))
    _backward(model, size[1], dtype)
    return Model(model, list(model.parameters()))


def fsdp1(size: Size, dtype: torch.dtype = torch.float32, *, original: bool = False) -> Model:
    """The encoder of :func:`fsdp2` under FSDP1, one flat parameter a layer.

    Args:
        size: of the encoder.
        dtype: of its parameters.
        original: ``use_orig_params``: the module shows views into the flat parameters.
    """
    model = FullyShardedDataParallel(
        encoder_layers(size, dtype),
        auto_wrap_policy=ModuleWrapPolicy({nn.TransformerEncoderLayer}),
        device_id=torch.device("cpu"),
        use_orig_params=original,
    )
    _backward(model, size[1], dtype)
    return Model(model, list(model.parameters()), fsdp1=model)


def encoder(size: Size) -> Model:
    """The encoder of :func:`fsdp2`, whole on each rank, with gradients that are drawn."""
    return with_gradients(encoder_layers(size, torch.float32).parameters())


def plain_tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Model:
    """Whole tensors of one shape, each in memory of its own, as in one process."""
    return with_gradients(nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(count))


def with_gradients(parameters: Any) -> Model:
    """Parameters with gradients drawn from the normal distribution."""
    listed: list[Tensor] = list(parameters)
    for parameter in listed:
        parameter.grad = torch.randn_like(parameter)
    return Model(listed, listed)


def embedding() -> Model:
    """A bf16 table of a vocabulary under FSDP2, with the gradient of a real backward."""
    torch.manual_seed(0)
    table = nn.Embedding(32_000, 1024, dtype=torch.bfloat16)
    fully_shard(table)
    table(torch.arange(32_000)).float().square().sum().backward()
    parameters: list[Tensor] = list(table.parameters())
    return Model(parameters, parameters)


def dtensors(count: int, shape: tuple[int, ...]) -> Model:
    """DTensors of one logical shape, sharded over dim 0, with drawn gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    local = (shape[0] // dist.get_world_size(), *shape[1:])

    def drawn() -> DTensor:
        return DTensor.from_local(torch.randn(local), mesh, [Shard(0)], run_check=False)

    parameters: list[Tensor] = [nn.Parameter(drawn()) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = drawn()
    return Model(parameters, parameters)


def encoder_layers(size: Size, dtype: torch.dtype) -> nn.Sequential:
    """The layers of an encoder, with the same weights on every rank."""
    layers, width = size
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
    ).to(dtype)


def _backward(model: Callable[..., Any], width: int, dtype: torch.dtype) -> None:
    """Backward of a random projection of the output, on 64 tokens.

    The square of what a LayerNorm gives is a constant: its gradients would be rounding errors. And
    with few tokens some units are never active, so that their rows are zero. In fp16, whose matrix
    products take a CPU many times as long, there are 4 tokens all the same.
    """
    tokens = (1, 4) if dtype == torch.float16 else (4, 16)
    output = model(torch.randn(*tokens, width, dtype=dtype)).float()
    output.backward(torch.randn_like(output))


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank, without what makes a DTensor of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients' parts on this rank; fetched once, not in a round."""
    return [local(p.grad) for p in parameters if p.grad is not None]


def local_weights(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters' parts on this rank; see :func:`local_gradients`."""
    return [local(parameter.detach()) for parameter in parameters]


def exact_norm(parameters: Sequence[Tensor]) -> float:
    """Norm of all gradients: each rank's squares in float64, added without rounding."""
    sharded: list[float] = []
    whole: list[float] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        squares = float(local(parameter.grad).double().square_().sum())
        (sharded if isinstance(parameter.grad, DTensor) else whole).append(squares)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sharded)
    return math.sqrt(math.fsum([*whole, *(squares for each in gathered for squares in each)]))
