"""A policy's memory in the checkpoints of a plain torch script.

``optimizer.state_dict()`` gets a third key, ``"distclip"``, beside ``"state"`` and
``"param_groups"``, and ``load_state_dict`` reads it. torch itself reads no other keys than its two,
so a checkpoint with the key loads without distclip, and one without it loads with distclip. FSDP1's
functions, which transform such a dict, keep the key.

``torch.distributed.checkpoint`` takes the dict apart, and loads only what a present dict has, so
there the memory is a file of its own in the folder of the checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from distclip.application.eager import eagerly
from distclip.clipper import GradClipper
from distclip.engine.attaching import stepped_by
from distclip.engine.checkpoint import StateSource
from distclip.errors import NonFiniteGradientError
from distclip.integrations import hooks
from distclip.integrations.charge import is_running
from distclip.integrations.checkpoints import FILE, Shelf
from distclip.integrations.patches import replace, replace_everywhere
from distclip.integrations.torch_functions import FSDP1_MODULE
from distclip.policies import Policy
from distclip.statistics import collectives

OPTIMIZER_KEY = "distclip"
"""Key in an optimizer's state dict; its value is what :class:`Shelf` gives."""

DCP = "torch.distributed.checkpoint"

_SOURCE = StateSource(
    f"{OPTIMIZER_KEY!r} in the optimizer's state dict",
    f"delete the key {OPTIMIZER_KEY!r} from it before it is loaded",
)

_logger = logging.getLogger("distclip.torch")


class OptimizerMemory:
    """Saves and loads clippers with the optimizers that step their parameters."""

    def __init__(self, known: Mapping[frozenset[int], GradClipper], policy: Policy) -> None:
        self._known = known
        self._policy = policy
        self._shelves: weakref.WeakKeyDictionary[Optimizer, Shelf] = weakref.WeakKeyDictionary()
        """What each optimizer has loaded, and no clipper has taken yet."""
        self._without: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Optimizers that have loaded a state dict without a memory."""
        self._apart: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Optimizers whose state ``torch.distributed.checkpoint`` has, and has not saved yet."""
        self._folder: Shelf | None = None
        """What was in the folder that ``torch.distributed.checkpoint`` loaded last."""
        self._said: set[str] = set()
        self._busy: set[int] = set()
        """Optimizers (by id) of which a method is being called."""
        self._kinds: set[type] = set()
        """Classes of optimizers whose own methods are replaced."""
        self._undo: list[Callable[[], object]] = []
        self._replace_in(Optimizer)
        self._undo.append(hooks.on_import(FSDP1_MODULE, self._replace_methods).remove)
        self._undo.append(hooks.on_import(DCP, self._replace_functions).remove)

    def meet(self, optimizer: Optimizer) -> None:
        """Of a new optimizer: its class may have methods that do not call those of torch."""
        for kind in type(optimizer).__mro__:
            if issubclass(kind, Optimizer):
                self._replace_in(kind)

    def _replace_in(self, kind: type) -> None:
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        for name, ours in (("state_dict", self._save), ("load_state_dict", self._load)):
            if name in vars(kind):
                self._undo.append(replace(kind, name, functools.partial(self._outermost, ours)))

    def _outermost(
        self, ours: Callable[..., Any], original: Callable[..., Any], optimizer: Optimizer,
        *args: Any, **kw: Any,
    ) -> Any:  # fmt: skip
        """A method may call that of its base class, and the memory is to be treated once."""
        if id(optimizer) in self._busy:
            return original(optimizer, *args, **kw)
        self._busy.add(id(optimizer))
        try:
            return ours(original, optimizer, *args, **kw)
        finally:
            self._busy.discard(id(optimizer))

    def restore(self) -> None:
        """Put torch's own methods back."""
        while self._undo:
            self._undo.pop()()

    def hand_over(self, clipper: GradClipper, parameters: Collection[int]) -> None:
        """Give a new clipper what an optimizer of its parameters (by id) has loaded.

        Raises:
            StateError: a state with some of its parameters: what differs.
        """
        for optimizer, shelf in list(self._shelves.items()):
            if _steps_any(optimizer, parameters):
                shelf.hand_over(clipper)
        if any(_steps_any(optimizer, parameters) for optimizer in self._without):
            self._mention_none([clipper])

    def _of(self, optimizer: Optimizer) -> list[GradClipper]:
        return [clipper for key, clipper in self._known.items() if _steps_any(optimizer, key)]

    def _memory(self, optimizers: Iterable[Optimizer]) -> dict[str, Any]:
        """States of the optimizers' clippers, and those that wait for one; a :class:`Shelf`."""
        optimizers = list(optimizers)
        # In the order in which they came into being, by which equal models are told apart.
        clippers = [
            clipper
            for key, clipper in self._known.items()
            if any(_steps_any(each, key) for each in optimizers)
        ]
        waiting = {id(s): s for each in optimizers if (s := self._shelves.get(each)) is not None}
        saved = Shelf(self._policy).state_dict(clippers)
        for shelf in waiting.values():
            saved["clippers"] += shelf.state_dict([])["clippers"]
        return saved

    # ---- torch's own -------------------------------------------------------------------------

    @eagerly
    def _save(
        self, original: Callable[..., dict[str, Any]], optimizer: Optimizer, *args: Any, **kw: Any
    ) -> dict[str, Any]:
        state = original(optimizer, *args, **kw)
        if is_running(DCP):
            self._apart.add(optimizer)
            return state
        memory = self._memory([optimizer])
        return {**state, OPTIMIZER_KEY: memory} if memory["clippers"] else state

    @eagerly
    def _load(
        self,
        original: Callable[..., None],
        optimizer: Optimizer,
        state_dict: Any,
        *args: Any,
        **kw: Any,
    ) -> None:
        found = state_dict.get(OPTIMIZER_KEY) if isinstance(state_dict, Mapping) else None
        shelf = self._folder if is_running(DCP) else None
        if shelf is not None and shelf.empty and self._shelves.get(optimizer) is shelf:
            shelf = None  # it has taken what is there, and loads something else now
        if found:
            shelf = Shelf(self._policy)
            shelf.load_state_dict(found, self._of(optimizer), _SOURCE)
        elif shelf is not None:
            for clipper in self._of(optimizer):
                shelf.hand_over(clipper)
        if shelf is not None:
            self._shelves[optimizer] = shelf
            self._without.discard(optimizer)
        else:
            self._shelves.pop(optimizer, None)
            self._without.add(optimizer)
            self._mention_none(self._of(optimizer))
        original(optimizer, state_dict, *args, **kw)

    # ---- FSDP1's -----------------------------------------------------------------------------

    def _replace_methods(self, module: ModuleType) -> None:
        kind = module.FullyShardedDataParallel
        self._undo.append(replace(kind, "optim_state_dict", _gather))
        self._undo.append(replace(kind, "optim_state_dict_to_load", _scatter))

    # ---- torch.distributed.checkpoint's ------------------------------------------------------

    def _replace_functions(self, module: ModuleType) -> None:
        ours = {
            module.save: self._save_folder,
            module.async_save: self._save_folder,
            module.load: self._load_folder,
        }
        self._undo += replace_everywhere(ours)

    @eagerly
    def _save_folder(self, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if is_running(DCP):  # the thread of async_save
            return original(*args, **kw)
        result = original(*args, **kw)
        memory = self._memory(self._apart)
        self._apart.clear()
        if memory["clippers"] and (kw.get("no_dist") or collectives.is_first(_group(kw))):
            folder = _folder(kw, "storage_writer")
            if folder is None and any(each["states"] for each in memory["clippers"]):
                self._mention(
                    "this checkpoint of torch.distributed.checkpoint is no folder, so it does not "
                    "hold the memory of %r"
                )
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                if original.__name__ == "save":  # async_save has written nothing yet
                    memory["checkpoint"] = _id_of(folder)
                torch.save(memory, folder / FILE)
        return result

    @eagerly
    def _load_folder(self, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if not is_running(DCP):
            folder = _folder(kw, "storage_reader")
            self._folder = None
            if folder is not None and (folder / FILE).exists():
                shelf = Shelf(self._policy)
                shelf.load([], folder, _id_of(folder))
                self._folder = None if shelf.empty else shelf
        return original(*args, **kw)

    # ---- what is mentioned, once -------------------------------------------------------------

    def _mention_none(self, clippers: list[GradClipper]) -> None:
        """Of a policy without memory there is nothing to say."""
        if any(map(_remembers, clippers)):
            self._mention(
                "the optimizer's state that was loaded has no state of distclip (it was saved "
                "without distclip, before the first step, or through a function that drops it): %r "
                "goes on with the memory it has, at the start with none"
            )

    def _mention(self, message: str) -> None:
        if message not in self._said and collectives.is_first():
            _logger.warning(message, self._policy)
        self._said.add(message)


def _remembers(clipper: GradClipper) -> bool:
    """Whether there is a memory to lose, when an optimizer is about to load another state."""
    try:
        return bool(clipper.state_dict()["states"])
    except NonFiniteGradientError:  # once; the step to come raises it too
        return bool(clipper.state_dict()["states"])


def _id_of(folder: Path) -> str | None:
    """Tells a checkpoint from another one in the same folder: torch writes a new id into each."""
    try:
        return hashlib.sha256((folder / ".metadata").read_bytes()).hexdigest()
    except OSError:
        return None


def _folder(options: Mapping[str, Any], storage: str) -> Path | None:
    """The folder that a function of ``torch.distributed.checkpoint`` writes to or reads."""
    where = options.get("checkpoint_id") or getattr(options.get(storage), "path", None)
    if not isinstance(where, (str, os.PathLike)) or "://" in os.fspath(where):
        return None
    return Path(where)


def _group(options: Mapping[str, Any]) -> ProcessGroup | None:
    return collectives.default_group(options.get("process_group"))


def _steps_any(optimizer: Optimizer, parameters: Collection[int]) -> bool:
    return any(id(parameter) in parameters for parameter in stepped_by(optimizer))


def _gather(
    original: Callable[..., dict[str, Any]],
    model: Any,
    optim: Optimizer,
    optim_state_dict: dict[str, Any] | None = None,
    group: ProcessGroup | None = None,
) -> dict[str, Any]:
    state = optim.state_dict() if optim_state_dict is None else optim_state_dict
    result = original(model, optim, state, group)
    # Nothing is on the ranks that are to save nothing.
    return (
        {**result, OPTIMIZER_KEY: state[OPTIMIZER_KEY]}
        if result and OPTIMIZER_KEY in state
        else result
    )


def _scatter(
    original: Callable[..., dict[str, Any]],
    model: Any,
    optim: Optimizer,
    optim_state_dict: dict[str, Any],
    is_named_optimizer: bool = False,
    load_directly: bool = False,
    group: ProcessGroup | None = None,
) -> dict[str, Any]:
    result = original(model, optim, optim_state_dict, is_named_optimizer, False, group)
    found = (optim_state_dict or {}).get(OPTIMIZER_KEY)
    fsdp: Any = sys.modules[FSDP1_MODULE]
    settings = fsdp.FullyShardedDataParallel.get_state_dict_type(model).optim_state_dict_config
    joint = collectives.default_group(group)
    if getattr(settings, "rank0_only", False) and joint is not None:
        found = collectives.gather(found, joint)[0]
    if found:
        result = {**result, OPTIMIZER_KEY: found}
    if load_directly:
        optim.load_state_dict(result)
    return result
