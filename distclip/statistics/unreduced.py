"""Gradients of this rank before they are reduced over the data-parallel ranks: their norms.

A hook on a leaf of autograd (``Tensor.register_hook``) is given the gradient of one backward before
it is added to ``.grad``. DDP, and a script that averages gradients by hand, reduce ``.grad`` after
that; FSDP2 the gradient of the gathered parameter. So no communication hook is needed, and
``no_sync()`` changes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from distclip.errors import ConfigurationError
from distclip.kernels import measuring
from distclip.layouts import detect, fsdp2
from distclip.layouts.tensors import own


class Unreduced:
    """Squared norms of the gradients of the backwards that run while it is armed.

    It is held weakly by its hooks, which are on the parameters only while it is armed.

    Args:
        named: the parameters of this rank, as the optimizer steps them, by name.
        rows: name -> row of the table.
        device: of the results.

    Raises:
        ConfigurationError: a parameter whose gradient cannot be seen before its reduction.
    """

    def __init__(
        self, named: Sequence[tuple[str, Tensor]], rows: Mapping[str, int], device: torch.device
    ) -> None:
        trained = [(name, each) for name, each in named if each.requires_grad]
        known = fsdp2.known_to_fsdp2(each for _, each in trained)
        for name, parameter in trained:
            if id(parameter) not in known and not detect.is_whole(parameter):
                raise ConfigurationError(
                    f"{name!r} is neither a plain tensor nor a parameter of fully_shard (FSDP2), "
                    f"so its gradient is seen only when it has been reduced over the ranks; use "
                    f"monitor.NoiseScale, which compares micro-batches"
                )
        self._rows = [rows[name] for name, _ in trained]
        self._parameters = [each for _, each in trained]
        self._sharded = [id(each) in known for each in self._parameters]
        self._number, self._device = len(rows), device
        self._handles: list[Any] = []
        self._whole = False
        """Whether all of the leaves are there."""
        self._found: list[tuple[int, Tensor]] = []
        self._calls: dict[int, int] = {}
        self._copies: dict[int, float] = {}
        self.unmeasured: set[int] = set()
        """Rows whose gradient is sparse, or terms of a sum over the ranks of tensor parallelism."""
        self.error: Exception | None = None
        """What kept a gradient from being measured."""

    @property
    def backwards(self) -> int | None:
        """How many there have been since it was armed; None where it cannot see them."""
        return max(self._calls.values(), default=0) if self._whole and self._handles else None

    def arm(self) -> None:
        """Watch the backwards that come, from a clean start."""
        self.disarm()
        gathered = fsdp2.unsharded_leaves(self._parameters)
        leaves = [
            other if sharded else parameter
            for parameter, other, sharded in zip(
                self._parameters, gathered, self._sharded, strict=True
            )
        ]
        self._whole = all(leaf is not None for leaf in leaves)
        if not self._whole:
            return  # before the first forward
        for row, leaf in zip(self._rows, cast(list[Tensor], leaves), strict=True):
            mesh = leaf.device_mesh.size() if isinstance(leaf, DTensor) else 1
            self._copies[row] = 1.0 / mesh  # the ranks of tensor parallelism have one in common
            register: Any = leaf.register_hook
            self._handles.append(register(_unreduced_hook(weakref.ref(self), row)))

    def disarm(self) -> None:
        """Take the hooks off, and forget."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._found, self._calls, self._copies = [], [], {}, {}

    def table(self) -> Tensor:
        """What this rank adds to the sum over ranks; NaN where it could not see the gradients.

        Returns:
            float64 ``(2, rows)``: by row of the table, the squared norms of the gradients of all
            backwards together, and how many data-parallel ranks this one stands for: 0 where the
            gradient cannot be measured.
        """
        result = torch.zeros(2, self._number, dtype=torch.float64, device=self._device)
        if not self._whole or not self._handles:
            return result.fill_(torch.nan)
        found = [(row, square) for row, square in self._found if row not in self.unmeasured]
        if found:
            rows = torch.tensor([row for row, _ in found], dtype=torch.long, device=self._device)
            result[0].index_add_(0, rows, torch.stack([square for _, square in found]))
        measured = {row: n for row, n in self._copies.items() if row not in self.unmeasured}
        result[1] = torch.tensor(
            [measured.get(row, 0.0) for row in range(self._number)], device="cpu"
        )
        return result

    def note(self, row: int, gradient: Tensor) -> None:
        """The gradient of one backward."""
        self._calls[row] = self._calls.get(row, 0) + 1
        share = _share(gradient)
        if share:
            (norm,) = measuring.norms([own(gradient)], 2.0, device=self._device)
            self._found.append((row, norm.square() * share))
        else:
            self.unmeasured.add(row)

    def fail(self, error: Exception) -> None:
        """Keep the error: a hook that raised on one rank would leave the others waiting."""
        self.error, self._whole = error, False


def _share(gradient: Tensor) -> float:
    """How much the square of this rank's part counts in the sum; 0 where it cannot be measured."""
    if own(gradient).layout is not torch.strided:
        return 0.0
    share = 1.0
    if isinstance(gradient, DTensor):  # tensor parallelism, whose ranks see the same samples
        for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
            if isinstance(placement, Replicate):
                share /= size
            elif not isinstance(placement, Shard):
                return 0.0  # terms of a sum over ranks
    return share


def _unreduced_hook(owner: weakref.ref[Unreduced], row: int) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        if (unreduced := owner()) is None:
            return
        try:
            with torch.no_grad():
                unreduced.note(row, gradient)
        except Exception as error:
            unreduced.fail(error)

    return hook
