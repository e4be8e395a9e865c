"""What a piece of code really does: every op and every collective, seen at torch's dispatcher."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from distclip.kernels.host import kernels

COLLECTIVE_NAMESPACES = {"c10d", "_c10d_functional", "_dtensor", "symm_mem"}

REDUCTION = "allgather_"
"""How distclip's all-reduce of a short message looks on a few gloo ranks."""


@dataclass
class Seen:
    """Ops by name, ops on DTensors by name, and each collective with its size in bytes.

    Of what is gathered, only what this rank gives counts.
    """

    ops: Counter[str] = field(default_factory=Counter)
    dtensor_ops: Counter[str] = field(default_factory=Counter)
    collectives: list[tuple[str, int]] = field(default_factory=list)

    @property
    def collective_names(self) -> list[str]:
        return [name for name, _ in self.collectives]


class loops:  # noqa: N801 - used as `with loops() as counted`
    """Count the calls of the compiled loops over host memory, which torch does not see."""

    def __enter__(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        run = kernels._run

        def counting(name: str, *args: Any) -> None:
            counted[f"loop {name}"] += 1
            run(name, *args)

        self._patch = mock.patch.object(kernels, "_run", counting)
        self._patch.start()
        return counted

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


class watch(TorchDispatchMode):  # noqa: N801 - used as `with watch() as seen`
    """Count what is dispatched in the block. Sees ``torch.distributed`` of any spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()

    def __enter__(self) -> Seen:
        super().__enter__()
        return self.seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        self.seen.ops[name] += 1
        if any(issubclass(kind, DTensor) for kind in types):
            self.seen.dtensor_ops[name] += 1
            # A tensor that knows how to handle the op itself must get the chance to.
        if func.namespace in COLLECTIVE_NAMESPACES:
            name = name.split(".")[1]
            given = args[1] if name == "allgather_" else args
            size = sum(t.numel() * t.element_size() for t in _tensors(given))
            self.seen.collectives.append((name, size))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def bits(tensor: Tensor | None) -> Tensor | None:
    """A copy for comparing bit by bit, NaN payloads included."""
    if tensor is None:
        return None
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().clone().contiguous().view(-1).view(torch.uint8)


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    return (one is None) == (other is None) and (
        one is None or other is None or torch.equal(one, other)
    )
