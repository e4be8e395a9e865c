"""What a rank writes down while the user's script runs, without a change to the script.

One JSON object a line, written through at once, so that a rank that hangs or dies leaves all that
came before. Nothing here talks to other ranks: the journals are compared by who launched them.

=============  ====================================================================================
``forward``    a model was called for training: fingerprints of the samples, modules that were run
``backward``   a scalar was differentiated: its value, and how often each operation is in its graph
``clip``       a GradClipper's report
``step``       an optimizer is about to step: of each local piece of each parameter where it lies,
               fingerprint and sum of squares of gradient and weights
``stepped``    it has
=============  ====================================================================================
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.data import DataLoader

from distclip import clipper
from distclip.clipper import GradClipper, Watcher
from distclip.errors import DistclipError
from distclip.integrations.patches import replace
from distclip.layouts.detect import detect
from distclip.layouts.names import named_parameters, without_wrappers
from distclip.layouts.piece import Entry, MisplacedError, Piece
from distclip.report import ClipReport
from distclip.statistics.fingerprint import box_fingerprint

MOST_SAMPLES = 4096
"""Of one batch that are told apart."""

MOST_GRAPH_NODES = 50_000
"""Of a graph that are counted."""


class Journal:
    """Lines of JSON, each written through at once."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - until exit
        self._lock = threading.Lock()

    def write(self, event: str, **fields: Any) -> None:
        """One line: what happened, when, and its particulars."""
        line = json.dumps({"event": event, "time": time.time(), **fields})
        with self._lock:
            self._file.write(line + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Recorder(Watcher):
    """Watches forward, backward, clipping and steps of this process. A context manager.

    Args:
        journal: where to write.
        steps: end the script, by ``SystemExit``, after so many optimizer steps; None: never.
    """

    def __init__(self, journal: Journal, steps: int | None = None) -> None:
        self.journal = journal
        self.step = 0
        self.enough = False
        self._steps = steps
        self._epoch = 0
        self._called: list[str] = []
        self._within = threading.local()
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._module_names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._pieces: weakref.WeakKeyDictionary[Optimizer, _Known] = weakref.WeakKeyDictionary()
        self._told: set[str] = set()
        self._stepping: FrameType | None = None
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Recorder:
        self._replace(nn.Module, "__call__", self._call)
        self._replace(torch.autograd, "backward", self._backward)
        self._replace(DataLoader, "__iter__", self._iterate)
        before = register_optimizer_step_pre_hook(self._before_step)
        after = register_optimizer_step_post_hook(self._after_step)
        clipper.watchers.append(self)
        self._undo += [before.remove, after.remove, lambda: clipper.watchers.remove(self)]
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def watch_engine(self, module: Any) -> None:
        """Take losses and steps from DeepSpeed's engine, which splits a step into several."""
        self._replace(module.DeepSpeedEngine, "backward", self._engine_backward)
        self._replace(module.DeepSpeedEngine, "step", self._engine_step)

    def _replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._undo.append(replace(owner, name, function))

    def _depth(self, name: str) -> int:
        depth: int = getattr(self._within, name, 0)
        return depth

    @contextlib.contextmanager
    def _inside(self, name: str) -> Iterator[bool]:
        """Counts what this thread is within; gives whether it is the outermost."""
        depth = self._depth(name)
        setattr(self._within, name, depth + 1)
        try:
            yield depth == 0
        finally:
            setattr(self._within, name, depth)

    # ---- forward and backward ------------------------------------------------------------

    def _call(self, original: Any, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not module.training or not torch.is_grad_enabled():
            return original(module, *args, **kwargs)
        if self._depth("backward"):  # activation checkpointing runs it again
            return original(module, *args, **kwargs)
        with self._inside("call") as outermost:
            trained = outermost and any(p.requires_grad for p in module.parameters())
            if trained:
                self._learn_names(module)
                self._called = []
            if name := self._module_names.get(module):
                self._called.append(name)
            output = original(module, *args, **kwargs)
        if trained:
            self._tell_forward(args, kwargs)
        return output

    def _learn_names(self, module: nn.Module) -> None:
        if module in self._models:
            return
        self._models.add(module)
        for name, part in module.named_modules():
            if name := without_wrappers(name):
                self._module_names[part] = name

    def _tell_forward(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        called = [n for i, n in enumerate(self._called) if i == 0 or self._called[i - 1] != n]
        self.journal.write(
            "forward",
            step=self.step,
            epoch=self._epoch,
            samples=samples([args, kwargs]),
            **self._once("modules", called),
        )

    def _once(self, what: str, value: Any) -> dict[str, Any]:
        """A digest, and the value itself where it is new."""
        digest = hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
        new = digest not in self._told
        self._told.add(digest)
        return {what: digest, **({f"{what}_are": value} if new else {})}

    def _backward(self, original: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        loss = listed[0] if len(listed) == 1 and listed[0].numel() == 1 else None
        with self._inside("backward") as outermost:
            if outermost and loss is not None:
                self._tell_loss(float(loss.detach()), loss)
            return original(tensors, *args, **kwargs)

    def _tell_loss(self, value: float, loss: Tensor) -> None:
        counts = sorted(operations(loss).items())
        self.journal.write(
            "backward", step=self.step, loss=value, **self._once("operations", counts)
        )

    def _iterate(self, original: Any, loader: Any) -> Any:
        self._epoch += 1
        return original(loader)

    # ---- clipping and steps --------------------------------------------------------------

    def after(self, clipper: GradClipper, report: ClipReport, loss_scale: Tensor | None) -> None:
        numbers = report.to_dict(per_parameter=False)
        numbers.pop("nonfinite")
        self.journal.write("clip", step=self.step, parameters=len(clipper.names), **numbers)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        caller = sys._getframe(1)
        if self._depth("engine") or _is_within(caller, self._stepping):
            return  # a part of a step: DeepSpeed's, or of a class whose step calls super().step()
        self._stepping = caller
        with torch.no_grad():
            self._tell_step(*self._told_of(optimizer))

    def _tell_step(self, pieces: Sequence[Any], unseen: Sequence[str]) -> None:
        alone = not (dist.is_available() and dist.is_initialized())
        world = 1 if alone else dist.get_world_size()
        self.journal.write("step", step=self.step, world=world, pieces=pieces, unseen=unseen)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if sys._getframe(1) is self._stepping:
            self._stepping = None
            self._count()

    def _count(self) -> None:
        self.journal.write("stepped", step=self.step)
        self.step += 1
        if self.step == self._steps:
            self.enough = True
            raise SystemExit(0)

    def _told_of(self, optimizer: Optimizer) -> tuple[list[Any], list[str]]:
        """Of every local piece what it holds, and what cannot be read."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known = self._pieces.get(optimizer)
        if known is None or known.parameters != tuple(map(id, parameters)):
            known = self._pieces[optimizer] = self._described(parameters)
        told, unseen = [], list(known.unseen)
        for entry, piece in known.pieces:
            try:
                told.append(_piece_record(entry, piece))
            except (DistclipError, MisplacedError) as error:
                unseen.append(str(error))
        return told, unseen

    def _described(self, parameters: Sequence[Tensor]) -> _Known:
        names = {id(p): name for model in self._models for name, p in named_parameters(model)}
        known = _Known(tuple(map(id, parameters)), [], [])
        for number, parameter in enumerate(parameters):
            name = names.get(id(parameter), str(number))
            try:
                described = detect(name, parameter)
            except DistclipError as error:
                known.unseen.append(str(error))
            else:
                known.pieces.extend(
                    (entry, piece) for entry, pieces in described for piece in pieces
                )
        return known

    # ---- DeepSpeed -----------------------------------------------------------------------

    def _engine_backward(self, original: Any, engine: Any, loss: Any, *args: Any, **kw: Any) -> Any:
        self._tell_loss(float(loss.detach()) / engine.gradient_accumulation_steps(), loss)
        with self._inside("backward"):
            return original(engine, loss, *args, **kw)

    def _engine_step(self, original: Any, engine: Any, *args: Any, **kwargs: Any) -> Any:
        if not engine.is_gradient_accumulation_boundary():
            return original(engine, *args, **kwargs)
        self._tell_step([], [])
        with self._inside("engine"):
            result = original(engine, *args, **kwargs)
        norm = engine.get_global_grad_norm()
        if norm is not None:
            self.journal.write("norm", step=self.step, norm=float(norm))
        self._count()
        return result


class _Known(NamedTuple):
    """What an optimizer's parameters, told apart by their ids, consist of."""

    parameters: tuple[int, ...]
    pieces: list[tuple[Entry, Piece]]
    unseen: list[str]


def _piece_record(entry: Entry, piece: Piece) -> list[Any]:
    """Name, offsets, extents; fingerprint and sum of squares of gradient (None: none), weights."""
    box = piece.box
    values: list[Any] = []
    for tensor in (piece.gradient(), piece.weight()):
        if tensor is None:
            values += [None, None]
        else:
            tensor = tensor.to_dense() if tensor.is_sparse else tensor
            norm = torch.linalg.vector_norm(tensor, dtype=torch.float64)
            values += [int(box_fingerprint(tensor, entry.shape, box.offsets)), float(norm) ** 2]
    return [entry.name, list(box.offsets), list(box.extents), *values]


def samples(batch: Any) -> list[str]:
    """A fingerprint of each sample: of row i of every tensor that has as many rows as the first.

    Args:
        batch: nested lists, tuples and mappings; tensors that require a gradient are no data.
    """
    found = [t for t in _tensors(batch) if t.dim() and not t.requires_grad]
    rows = len(found[0]) if found else 0
    hashes = [hashlib.blake2b(digest_size=6) for _ in range(min(rows, MOST_SAMPLES))]
    for tensor in found:
        if len(tensor) == rows and tensor.numel():
            words = tensor.detach().cpu().contiguous().reshape(rows, -1).view(torch.uint8).numpy()
            for hash_, row in zip(hashes, words, strict=False):
                hash_.update(row.tobytes())
    return [hash_.hexdigest() for hash_ in hashes]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def operations(loss: Tensor) -> Counter[str]:
    """How often each operation occurs in the graph of a loss."""
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    counts: Counter[str] = Counter()
    while waiting and len(seen) < MOST_GRAPH_NODES:
        node = waiting.pop()
        if node is None:
            continue
        counts[node.name()] += 1
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return counts


def _is_within(frame: FrameType | None, outer: FrameType | None) -> bool:
    while outer is not None and frame is not None and frame is not outer:
        frame = frame.f_back
    return outer is not None and frame is not None
