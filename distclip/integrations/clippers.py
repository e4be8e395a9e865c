"""The clippers of a training run: one for each set of parameters that is clipped by itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip import policies
from distclip.clipper import GradClipper
from distclip.config import Config
from distclip.config.logs import open_log, release_log
from distclip.errors import ConfigurationError
from distclip.integrations.checkpoints import Shelf
from distclip.layouts import fsdp2
from distclip.layouts.names import Excerpt, Named, named_parameters
from distclip.policies.compose import reads_loss
from distclip.statistics import collectives

_logger = logging.getLogger("distclip")


MEASURING = {
    "policy": policies.measure(),
    "on_nonfinite": "pass",
    "norms": True,
    "verify_replicas": "never",
    "overlap": False,
}
"""Options of a clipper that only measures."""


class Trained(Protocol):
    """What a framework trains at the moment."""

    def named(self, parameters: list[Tensor]) -> Named:
        """The parameters with their names in the models."""

    def optimizers(self, parameters: list[Tensor]) -> list[Optimizer]:
        """All torch optimizers that step any of these."""


def named_in(models: Sequence[nn.Module], parameters: list[Tensor]) -> Named:
    """Parameters with their names in the models concerned; a number for one that is in none."""
    wanted = set(map(id, parameters))
    concerned = [
        model
        for model in models
        if not wanted.isdisjoint(map(id, fsdp2.sharded(model.parameters())))
    ]
    names = {id(p): name for name, p in named_parameters(concerned)} if concerned else {}
    unknown = sum(id(parameter) not in names for parameter in parameters)
    if unknown and collectives.is_first():
        _logger.warning(
            "%d of %d parameters are in no model that was prepared for training; they are called "
            "unnamed.0, unnamed.1, ..., which name patterns will not match",
            unknown,
            len(parameters),
        )
    pairs = [
        (names.get(id(parameter), f"unnamed.{position}"), parameter)
        for position, parameter in enumerate(parameters)
    ]
    return Excerpt(pairs, concerned)


class Clippers:
    """Made when first asked for, since parameters are known late: FSDP2 replaces them.

    Attributes:
        known: those that apply the policy, by the ids of their parameters.
        shelf: the states that come from and go to checkpoints.
        reads_loss: whether the policy does.
    """

    def __init__(self, trained: Trained, config: Config) -> None:
        self.known: dict[frozenset[int], GradClipper] = {}
        self._measurers: dict[frozenset[int], GradClipper] = {}
        self.shelf = Shelf(config.policy)
        self.reads_loss = reads_loss(config.policy)
        self._losses: list[Tensor] = []
        """Those of the first update, which come before there is a clipper."""
        self._trained = trained
        self._config = config

    def forget(self) -> None:
        """Forget the clippers of models that no longer exist."""
        for clipper in self.known.values():
            clipper.close()
            release_log(clipper)
        self.known.clear()
        self._measurers.clear()
        self._losses.clear()

    def observe(self, loss: Tensor | float) -> None:
        """A loss of the update to come, for a policy that reads it."""
        if not self.reads_loss:
            return
        for clipper in self.known.values():
            clipper.observe(loss)
        if not self.known:
            self._losses.append(torch.as_tensor(loss).detach())

    def of(self, parameters: list[Tensor], *, measuring: bool = False) -> GradClipper:
        """The one of exactly these parameters, or the one that only measures them."""
        known = self._measurers if measuring else self.known
        key = frozenset(map(id, parameters))
        if key not in known:
            policy = self._config.policy
            if not measuring and self.known and self.reads_loss:
                raise ConfigurationError(
                    f"{policy!r} reads the loss, and this script clips several sets of parameters "
                    f"by themselves (several optimizers, or clip_grad_norm_ on parts of a model): "
                    f"backward(loss) does not say to which of them a loss belongs. "
                    f"Leave `loss` off, or build a GradClipper for each set and give it its own "
                    f"by clipper.observe(loss)"
                )
            asked = self._config.arguments(**(MEASURING if measuring else {}))
            known[key] = GradClipper(
                self._trained.named(parameters),
                optimizer=self._trained.optimizers(parameters),
                **asked,
            )
            known[key].expects_gradients = not measuring
            if not measuring:
                self._open_log(known[key])
                self._begin(known[key])
            if not measuring and collectives.is_first():
                _logger.info("clipping %d parameters by %r", len(key), policy)
        return known[key]

    def _begin(self, clipper: GradClipper) -> None:
        """Give a new clipper what came before it."""
        self.shelf.hand_over(clipper)
        for loss in self._losses:
            clipper.observe(loss)
        self._losses.clear()

    def _open_log(self, clipper: GradClipper) -> None:
        open_log(clipper, self._config, getattr(self._trained, "accelerator", None))
