"""Gradients of ``DistributedDataParallel``, measured as its buckets are reduced.

DDP fills buckets during backward and reduces each as soon as it is full. A
``register_post_accumulate_grad_hook`` comes too early: it is called before the gradient is even
sent. A communication hook returns the future of the reduction, and what is chained to that future
runs when the bucket holds the average of all ranks: there the bucket is measured. At the end of
backward DDP writes the buckets to the gradients; a callback that comes after that notes which
gradients it wrote, as they are then.

torch takes one communication hook per module, and none can be taken off. So it is registered once,
does what DDP does without one, and calls the user's own where one is registered later.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distclip.errors import ConfigurationError
from distclip.statistics import collectives
from distclip.statistics.early import batch_of

if TYPE_CHECKING:
    from distclip.statistics.early import Batch, Pattern
    from distclip.statistics.request import Request

CommHook = Callable[[Any, Any], Any]

_measuring = threading.Lock()
"""gloo ends reductions on threads of its own, several at a time."""
_relays: weakref.WeakKeyDictionary[nn.Module, Relay] = weakref.WeakKeyDictionary()


class Measurer(Protocol):
    """Whoever measures buckets; an ``Overlap``.

    Attributes:
        calls: how many gradients or buckets came.
        error: why it measures no more.
        device: where norms go.
        wanted: positions of the pieces that are measured early.
        expects_buckets: whether buckets are to be measured in this backward.
    """

    calls: int
    error: Exception | None

    @property
    def device(self) -> torch.device: ...

    @property
    def wanted(self) -> frozenset[int]: ...

    @property
    def expects_buckets(self) -> bool: ...

    def asked_of(self, positions: tuple[int, ...]) -> tuple[Pattern, Request]:
        """What is to be measured of the pieces at these positions."""

    def keep(self, batch: Batch) -> None:
        """Remember what was measured."""

    def fail(self, error: Exception) -> None:
        """Measure no more."""


def refusal(module: DistributedDataParallel) -> str | None:
    """Why the buckets of this module cannot be followed, with the mend; None: they can."""
    if module in _relays:
        return None
    if getattr(module, "mixed_precision", None) is not None:
        return "DDP(mixed_precision=...) reduces by a communication hook of its own: use autocast"
    if module.__dict__.get("register_comm_hook") is _registered_on_copy:
        return "this DDP module is a copy of one whose buckets are followed: wrap its .module anew"
    if module._comm_hooks:
        return (
            "DDP has a communication hook already and takes only one: build the GradClipper before "
            "register_comm_hook, and the hook that is registered then is called by distclip's"
        )
    if getattr(module, "_use_python_reducer", False):
        return "DDP under compiled autograd has no buckets: use another optimize_ddp"
    if any(getattr(each, "sparse", False) is True for each in module.modules()):
        return "DDP reduces sparse gradients outside of its buckets: use sparse=False"
    return None


def follow(module: DistributedDataParallel, owner: Measurer, positions: Mapping[int, int]) -> None:
    """Measure the buckets of a module for ``owner``, which is held weakly, from now on.

    Args:
        module: one without :func:`refusal`.
        owner: has the request, and is given what is measured.
        positions: ``id`` of a parameter -> position of its piece in the plan.
    """
    relay = _relays.get(module)
    if relay is None:
        relay = _relays[module] = Relay(module)
    relay.owners.append((weakref.ref(owner), positions))


class Relay:
    """The communication hook of one module: the reduction, and who follows it."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self.owners: list[tuple[weakref.ref[Measurer], Mapping[int, int]]] = []
        self.reduce: Callable[[Any], Any] = functools.partial(_average, weakref.ref(module))

        def hook(state: object, bucket: Any) -> Any:
            return self._reduce(bucket)

        hook.__annotations__.clear()  # torch compares them with types, and these are strings
        module.register_comm_hook(None, hook)
        module._comm_hooks.clear()  # where a user's own is to be found
        module.register_comm_hook = _Kept(self, module)  # type: ignore[method-assign]

    def _reduce(self, bucket: Any) -> Any:
        future = self.reduce(bucket)
        # In `join`, a rank without inputs calls the hook outside of any backward.
        if torch._C._current_graph_task_id() < 0 or bucket.buffer().layout is not torch.strided:
            return future
        self.owners = [(owner, positions) for owner, positions in self.owners if owner()]
        for owner, positions in self.owners:
            overlap = owner()
            if overlap is not None and overlap.expects_buckets:
                future = Bucket(overlap, positions, bucket).measured_after(future)
        return future


class _Kept:
    """In place of ``register_comm_hook``: the hook is called by the one that is there."""

    def __init__(self, relay: Relay, module: DistributedDataParallel) -> None:
        self._relay, self._module = relay, weakref.ref(module)

    def __call__(self, state: object, hook: CommHook) -> None:
        module: Any = self._module()
        module._check_comm_hook(hook)
        if module._comm_hooks:
            raise RuntimeError("register_comm_hook can only be called once")
        module._comm_hooks.append((hook, state))
        self._relay.reduce = functools.partial(hook, state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _registered_on_copy

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _for_copies, ()


def _for_copies() -> Callable[..., None]:
    """What a pickled module gets in place of it."""
    return _registered_on_copy


def _registered_on_copy(state: object, hook: CommHook) -> None:
    """``register_comm_hook`` of a copied module, whose reducer is another one."""
    raise ConfigurationError(
        "register_comm_hook of a copy of a DistributedDataParallel module whose gradients are "
        "measured during backward: wrap the copied .module in DistributedDataParallel anew"
    )


def _average(reference: weakref.ref[DistributedDataParallel], bucket: Any) -> Any:
    """Average a bucket over the ranks, as DDP does without a hook.

    To the bit, but for gradients that are views of the bucket and stay from step to step: DDP
    divides those where it multiplies others, which differ in the last bit on three ranks, say.
    """
    module = reference()
    assert module is not None  # its backward is running
    if not getattr(module, "_divide_by_initial_world_size", True):
        raise ConfigurationError(
            "DDP's join(divide_by_initial_world_size=False) changes the divisor from step to step, "
            "which a communication hook does not get: leave overlap=True out of the GradClipper, "
            "or use divide_by_initial_world_size=True"
        )
    return collectives.average_later(bucket.buffer(), module.process_group)


class Bucket:
    """One gradient bucket of DDP in one backward."""

    def __init__(self, overlap: Measurer, positions: Mapping[int, int], bucket: Any) -> None:
        self._owner = weakref.ref(overlap)
        self._buffer: Tensor = bucket.buffer()
        chosen = [
            (positions[id(parameter)], parameter, view)
            for parameter, view in zip(bucket.parameters(), bucket.gradients(), strict=True)
            if positions.get(id(parameter), -1) in overlap.wanted
        ]
        self._positions = tuple(position for position, _, _ in chosen)
        self._parameters: list[Tensor] = [parameter for _, parameter, _ in chosen]
        self._views: list[Tensor] = [view for _, _, view in chosen]
        gradients = [parameter.grad for parameter in self._parameters]
        self._before = [(g, None if g is None else g._version) for g in gradients]
        self._found: Any = None

    def measured_after(self, future: Any) -> Any:
        """The future of the same tensor, when it has been measured."""
        if not self._positions:
            return future
        _at_end(functools.partial(_at_end, self._note))  # after DDP's own, queued in between
        return future.then(self._reduced)

    def _reduced(self, future: Any) -> Tensor:
        value = future.value()
        tensor: Tensor = value[0] if isinstance(value, (list, tuple)) else value
        overlap = self._owner()
        if overlap is not None:
            try:
                with torch.no_grad(), _measuring:
                    self._found = self._measured(overlap, tensor)
            except Exception as error:  # DDP would raise it on this rank, and the others would hang
                overlap.fail(error)
        return tensor

    def _measured(self, overlap: Measurer, tensor: Tensor) -> Any:
        buffer = self._buffer
        fits = tensor.dtype is buffer.dtype and tensor.numel() == buffer.numel()
        if not fits or not tensor.is_contiguous() or tensor.device != overlap.device:
            return None
        shift = tensor.storage_offset() - buffer.storage_offset()
        shards = [
            tensor.as_strided(view.shape, view.stride(), view.storage_offset() + shift)
            for view in self._views
        ]
        pattern, request = overlap.asked_of(self._positions)
        return pattern, *pattern.measured(shards, request, overlap.device)

    def _note(self) -> None:
        overlap = self._owner()
        if overlap is None:
            return
        overlap.calls += 1
        if self._found is None or overlap.error is not None:
            return
        gradients: list[Any] = [parameter.grad for parameter in self._parameters]
        if all(map(self._is_written, gradients, self._before, self._views)):
            pattern, norms, units = self._found
            with torch.no_grad():
                overlap.keep(batch_of(pattern, gradients, norms, units))

    def _is_written(
        self, gradient: Tensor | None, before: tuple[Tensor | None, int | None], view: Tensor
    ) -> bool:
        """Whether DDP gave this gradient the value of its bucket: not where no rank used it."""
        if gradient is None or gradient.dtype is not self._buffer.dtype:
            return False
        if gradient.data_ptr() == view.data_ptr():
            return True
        return gradient is not before[0] or gradient._version != before[1]


def _at_end(callback: Callable[[], None]) -> None:
    """Call it at the end of the backward that is running."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def ddp_modules(modules: Sequence[nn.Module]) -> list[DistributedDataParallel]:
    """The DDP modules among these and within them."""
    found = (each for module in modules for each in module.modules())
    return list(dict.fromkeys(e for e in found if isinstance(e, DistributedDataParallel)))
