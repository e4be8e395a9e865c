"""The clippers of a plain torch script, and which gradients of it are those of all ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distclip.application.eager import eagerly
from distclip.clipper import GradClipper
from distclip.config import Config
from distclip.config.logs import release_log
from distclip.engine.attaching import stepped_by
from distclip.integrations.clippers import Clippers
from distclip.integrations.patches import replace
from distclip.integrations.torch_checkpoints import OptimizerMemory
from distclip.integrations.torch_objects import TorchObjects
from distclip.layouts.gradients import is_reduced


class ScriptClippers(Clippers):
    """The clippers of a plain script, which saves their states itself and gives no loss."""

    def __init__(self, objects: TorchObjects, config: Config) -> None:
        super().__init__(objects, config)
        self._objects = objects
        self._unreduced: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        """DDP modules whose last forward with gradients was under ``no_sync()``."""
        self._restore = replace(DistributedDataParallel, "_post_forward", self._note)
        self._memory = OptimizerMemory(self.known, config.policy)
        objects.optimizers.met.append(self._memory.meet)

    def forget(self) -> None:
        super().forget()
        self._restore()
        self._memory.restore()

    def _begin(self, clipper: GradClipper, key: frozenset[int]) -> None:
        self._memory.hand_over(clipper, key)

    def synchronised(self, parameters: Sequence[Tensor]) -> bool:
        """Whether gradients are those of all ranks, not of this one, as under ``no_sync()``."""
        if not all(map(is_reduced, parameters)):
            return False
        wanted = set(map(id, parameters))
        return not any(
            id(parameter) in wanted for model in self._unreduced for parameter in model.parameters()
        )

    @eagerly
    def _note(
        self, original: Callable[..., Any], model: DistributedDataParallel, *args: Any, **kw: Any
    ) -> Any:
        """DDP decides here whether the next backward synchronises; not without gradients.

        Its own note (``require_forward_param_sync``) is also changed by a forward under
        ``no_grad``, which begins no backward.
        """
        if torch.is_grad_enabled():
            held = not model.require_backward_grad_sync
            (self._unreduced.add if held else self._unreduced.discard)(model)
        return original(model, *args, **kw)

    def _make_way(self, measuring: float | None) -> None:
        """Forget the clippers of models that no optimizer steps any more."""
        stepped = {id(p) for each in self._objects.optimizers for p in stepped_by(each)}
        for key in [key for key in self.known if stepped.isdisjoint(key)]:
            release_log(clipper := self.known.pop(key))
            clipper.close()
        for each in [each for each in self._measurers if stepped.isdisjoint(each[0])]:
            del self._measurers[each]
