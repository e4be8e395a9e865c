"""What clipping sends on thousands of ranks, seen from one of them without the others.

torch's fake process group lets one process be rank r of n: collectives return at once and change
nothing but their shapes. So numbers are meaningless here, but which collectives are issued, over
how many ranks and with how many bytes, is what a real run issues: distclip's plan is made from
parameters alone, never from values.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from distclip import GradClipper
from distclip.layouts.placements import local_spans
from distclip.policies import Policy

TALKS = {"c10d", "_c10d_functional", "_dtensor", "symm_mem"}
"""Namespaces of torch's collectives."""

INPUT = {"allgather_": 1, "_allgather_base_": 1, "_reduce_scatter_base_": 1}
"""Which argument of a collective is what this rank gives; else the first."""

SILENT = {"wait_tensor", "_wrap_tensor_autograd"}

TP = 8
"""Ranks of a tensor-parallel group: those of one node."""

EP = 64
"""Ranks that share out the experts of a layer."""


@contextmanager
def world(ranks: int, rank: int = 0) -> Iterator[None]:
    """This process as one of many ranks that are not there."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Collective:
    """One collective: over how many ranks, and how many bytes this rank gives."""

    op: str
    ranks: int
    bytes: int


class trace(TorchDispatchMode):  # noqa: N801 - used as `with trace() as seen`
    """Records the collectives of the block, those inside of DTensor ops too, and counts ops."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.ops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it takes itself apart, and comes back with what it is made of
        self.ops += 1
        name = func._schema.name.split("::")[1]
        if func.namespace in TALKS and name not in SILENT:
            given = args[INPUT.get(name, 0)]
            size = sum(t.numel() * t.element_size() for t in _tensors(given))
            self.collectives.append(Collective(name.strip("_"), _members(func, args), size))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _members(func: Any, args: Sequence[Any]) -> int:
    for formal, value in zip(func._schema.arguments, args, strict=False):
        if formal.name == "process_group":
            return dist.ProcessGroup.unbox(value).size()
        if formal.name == "group_name":
            return dist.distributed_c10d._resolve_process_group(value).size()
    raise AssertionError(f"{func}: over which group?")


# ---- models: names, shapes and shardings, no data but this rank's own ---------------------------


@dataclass(frozen=True)
class Weight:
    """A parameter, and the dim along which tensor parallelism cuts it; None: it is replicated."""

    name: str
    shape: tuple[int, ...]
    cut: int | None


def llama(layers: int, width: int, hidden: int, keys: int, vocabulary: int) -> list[Weight]:
    """The parameters of a Llama 3, as torchtitan shards them."""
    weights = [Weight("embedding", (vocabulary, width), 0)]
    for layer in range(layers):
        weights += [
            Weight(f"{layer}.{name}", shape, cut)
            for name, shape, cut in (
                ("wq", (width, width), 0),
                ("wk", (keys, width), 0),
                ("wv", (keys, width), 0),
                ("wo", (width, width), 1),
                ("w1", (hidden, width), 0),
                ("w2", (width, hidden), 1),
                ("w3", (hidden, width), 0),
                ("attention_norm", (width,), None),
                ("ffn_norm", (width,), None),
            )
        ]
    return [*weights, Weight("norm", (width,), None), Weight("output", (vocabulary, width), 0)]


def deepseek() -> list[Weight]:
    """The parameters of DeepSeek-V3 (671 B): multi-head latent attention, 58 layers of 256 experts.

    Experts are stacked, ``(256, out, in)``, as torchtitan has them; nothing is cut by tensor
    parallelism.
    """
    width, hidden, expert, vocabulary = 7168, 18432, 2048, 129280
    weights = [Weight("embedding", (vocabulary, width), None)]
    for layer in range(61):
        shapes: dict[str, tuple[int, ...]] = {
            "wq_a": (1536, width), "q_norm": (1536,), "wq_b": (24576, 1536),
            "wkv_a": (576, width), "kv_norm": (512,), "wkv_b": (32768, 512),
            "wo": (width, 16384), "attention_norm": (width,), "ffn_norm": (width,),
        }  # fmt: skip
        inner = expert if layer >= 3 else hidden
        shapes |= {"w1": (inner, width), "w2": (width, inner), "w3": (inner, width)}
        if layer >= 3:
            shapes |= {"router": (256, width), "experts.w1": (256, expert, width)}
            shapes |= {"experts.w2": (256, width, expert), "experts.w3": (256, expert, width)}
        weights += [Weight(f"{layer}.{name}", shape, None) for name, shape in shapes.items()]
    return [*weights, Weight("norm", (width,), None), Weight("output", (vocabulary, width), None)]


LLAMA_8B = llama(32, 4096, 14336, 1024, 128256)
LLAMA_405B = llama(126, 16384, 53248, 1024, 128256)
DEEPSEEK_671B = deepseek()


def mesh_of(layout: str, ranks: int) -> DeviceMesh:
    """The mesh of a layout on so many ranks.

    ``fsdp2``, ``hsdp`` (512 shards or fewer), ``fsdp2_tp``, and ``experts``: those of expert
    parallelism, beside ``fsdp2`` for the rest of the model.
    """
    # DTensor's caches hand out an equal mesh of before, which believes to be on another rank: so
    # no two ranks have equal ones here.
    here = f"_of_rank_{dist.get_rank()}"
    if layout in ("fsdp2", "fsdp2_ep"):
        return init_device_mesh("cpu", (ranks,), mesh_dim_names=(f"fsdp{here}",))
    if layout == "hsdp":
        shards = min(512, ranks // 4)
        names = f"replicate{here}", f"fsdp{here}"
        return init_device_mesh("cpu", (ranks // shards, shards), mesh_dim_names=names)
    if layout == "experts":
        names = f"efsdp{here}", f"ep{here}"
        return init_device_mesh("cpu", (ranks // EP, EP), mesh_dim_names=names)
    if layout == "fsdp2_tp":
        names = f"fsdp{here}", f"tp{here}"
        return init_device_mesh("cpu", (ranks // TP, TP), mesh_dim_names=names)
    raise ValueError(layout)


def placements_of(layout: str, weight: Weight) -> tuple[Placement, ...]:
    """As FSDP2 places the parameter on that mesh."""
    if layout == "fsdp2":
        return (Shard(0),)
    if layout == "hsdp":
        return (Replicate(), Shard(0))
    if layout == "experts":  # FSDP2 cuts dim 1 where a rank has fewer experts than there are ranks
        return (Shard(1), Shard(0))
    if weight.cut is None:
        return (Shard(0), Replicate())
    if weight.cut == 0:  # FSDP2 cuts what tensor parallelism has left
        return (_StridedShard(0, split_factor=TP), Shard(0))
    return (Shard(0), Shard(weight.cut))


Named = list[tuple[str, nn.Parameter]]


def sharded(
    weights: Sequence[Weight], layout: str, mesh: DeviceMesh, dtype: torch.dtype = torch.float32
) -> Named:
    """This rank's shards of weights and gradients; no rank ever has more.

    ``fsdp2_ep`` is ``fsdp2`` on ``mesh``, and expert parallelism for what is stacked.
    """
    dense = mesh
    expert = mesh_of("experts", mesh.size()) if layout == "fsdp2_ep" else mesh
    named = []
    for weight in weights:
        kind = layout
        if layout == "fsdp2_ep":
            kind = "experts" if len(weight.shape) == 3 else "fsdp2"
        mesh = expert if kind == "experts" else dense
        placements = placements_of(kind, weight)
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        # torch's own function takes minutes for strided shards of this size.
        spans = local_spans(weight.shape, tuple(mesh.shape), coordinate, placements)
        local = [sum(stop - start for start, stop in dim) for dim in spans]
        whole = torch.empty(weight.shape, device="meta")
        made = [
            DTensor.from_local(
                torch.full(local, 1e-3, dtype=dtype),
                mesh,
                placements,
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
            for _ in range(2)
        ]
        parameter = nn.Parameter(made[0])
        parameter.grad = made[1]
        named.append((weight.name, parameter))
    return named


# ---- what is done -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taken:
    """What a clipper sent when it was built, in its first step and in a later one."""

    parameters: int
    construction: tuple[Collective, ...]
    first: tuple[Collective, ...]
    later: tuple[Collective, ...]
    seconds: float
    """To construct it, here."""


def clipper(named: Named, policy: Policy, **options: Any) -> Taken:
    """Trace distclip."""
    with trace() as seen:
        built = GradClipper(named, policy, **options)
    start = time.perf_counter()
    GradClipper(named, policy, **options)
    seconds = time.perf_counter() - start
    steps = []
    for _ in range(2):
        with trace() as step:
            built.clip_()
        steps.append(tuple(step.collectives))
    return Taken(len(named), tuple(seen.collectives), steps[0], steps[1], seconds)
