"""The clippers of an ``Accelerator``: one for each set of parameters that is clipped by itself."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from distclip import policies
from distclip.clipper import GradClipper
from distclip.config import Config
from distclip.config.logs import open_log, release_log
from distclip.errors import ConfigurationError
from distclip.integrations.accelerate_prepared import Prepared
from distclip.integrations.checkpoints import Shelf
from distclip.policies.compose import reads_loss

_logger = logging.getLogger("distclip.accelerate")


MEASURING = {
    "policy": policies.measure(),
    "on_nonfinite": "pass",
    "norms": True,
    "verify_replicas": "never",
    "overlap": False,
}
"""Options of a clipper that only measures."""


class Clippers:
    """Made when first asked for, since parameters are known late: FSDP2 replaces them.

    Attributes:
        known: those that apply the policy, by the ids of their parameters.
        shelf: the states that come from and go to checkpoints.
        reads_loss: whether the policy does.
    """

    def __init__(self, prepared: Prepared, config: Config) -> None:
        self.known: dict[frozenset[int], GradClipper] = {}
        self._measurers: dict[frozenset[int], GradClipper] = {}
        self.shelf = Shelf(config.policy)
        self.reads_loss = reads_loss(config.policy)
        self._losses: list[Tensor] = []
        """Those of the first update, which come before there is a clipper."""
        self._prepared = prepared
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
                    f"accelerator.backward(loss) does not say to which of them a loss belongs. "
                    f"Leave `loss` off, or build a GradClipper for each set and give it its own "
                    f"by clipper.observe(loss)"
                )
            asked = self._config.arguments(**(MEASURING if measuring else {}))
            known[key] = GradClipper(
                self._prepared.named(parameters),
                optimizer=self._prepared.optimizers(parameters),
                **asked,
            )
            known[key].expects_gradients = not measuring
            if not measuring:
                self._open_log(known[key])
                self._begin(known[key])
            if not measuring and self._prepared.accelerator.is_main_process:
                _logger.info("clipping %d parameters by %r", len(key), policy)
        return known[key]

    def _begin(self, clipper: GradClipper) -> None:
        """Give a new clipper what came before it."""
        self.shelf.hand_over(clipper)
        for loss in self._losses:
            clipper.observe(loss)
        self._losses.clear()

    def _open_log(self, clipper: GradClipper) -> None:
        open_log(clipper, self._config, self._prepared.accelerator)
