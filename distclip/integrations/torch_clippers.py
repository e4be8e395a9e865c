"""The clippers of a plain torch script: one for each set of parameters that is clipped alone."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distclip import policies
from distclip.application.eager import eagerly
from distclip.clipper import GradClipper
from distclip.config import Config
from distclip.config.logs import open_log, release_log
from distclip.engine.attaching import stepped_by
from distclip.integrations.patches import replace
from distclip.integrations.torch_checkpoints import Memory
from distclip.integrations.torch_objects import TorchObjects
from distclip.layouts.gradients import is_reduced

_logger = logging.getLogger("distclip.torch")


class Clippers:
    """Made when first asked for, since parameters are known late: FSDP2 replaces them.

    Args:
        objects: the optimizers of the script.
        config: a checked configuration.

    Attributes:
        known: those that apply the policy, by the ids of their parameters.
    """

    def __init__(self, objects: TorchObjects, config: Config) -> None:
        self.known: dict[frozenset[int], GradClipper] = {}
        self._measurers: dict[tuple[frozenset[int], float], GradClipper] = {}
        self._objects = objects
        self._config = config
        self._unreduced: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        """Those whose last forward with gradients was under ``no_sync()``."""
        self._restore = replace(DistributedDataParallel, "_post_forward", self._note)
        self._memory = Memory(self.known, config.policy)

    def forget(self) -> list[GradClipper]:
        """Forget all clippers; returns those that applied the policy."""
        clippers = list(self.known.values())
        for clipper in clippers:
            clipper.close()
            release_log(clipper)
        self.known.clear()
        self._measurers.clear()
        self._restore()
        self._memory.restore()
        return clippers

    def of(self, parameters: Sequence[Tensor], *, measuring: float | None = None) -> GradClipper:
        """The one of exactly these parameters.

        Args:
            parameters: as an optimizer steps them.
            measuring: order of a norm: the one that only measures it.
        """
        key = frozenset(map(id, parameters))
        found = self.known.get(key) if measuring is None else self._measurers.get((key, measuring))
        if found is not None:
            return found
        self._let_go()
        owners = self._objects.owners(parameters)
        changes = {} if measuring is None else _measuring(measuring)
        clipper = GradClipper(
            self._objects.target(parameters, owners),
            optimizer=owners,
            **self._config.arguments(**changes),
        )
        if measuring is None:
            self.known[key] = clipper
            open_log(clipper, self._config)
            self._memory.hand_over(clipper, key)
        else:
            clipper.expects_gradients = False
            self._measurers[key, measuring] = clipper
        return clipper

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

    def _let_go(self) -> None:
        """Forget the clippers of models that no optimizer steps any more."""
        stepped = {id(p) for each in self._objects.optimizers for p in stepped_by(each)}
        for key in [key for key in self.known if stepped.isdisjoint(key)]:
            release_log(clipper := self.known.pop(key))
            clipper.close()
        for each in [each for each in self._measurers if stepped.isdisjoint(each[0])]:
            del self._measurers[each]


def _measuring(norm_type: float) -> dict[str, object]:
    return {
        "policy": policies.measure(norm_type),
        "on_nonfinite": "pass",
        "norms": True,
        "verify_replicas": "never",
        "overlap": False,
    }
