"""The clippers of a training run: one for each set of parameters that is clipped by itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip import policies
from distclip.clipper import GradClipper
from distclip.config import Config
from distclip.config.logs import open_log, release_log
from distclip.errors import ConfigurationError
from distclip.functional import get_total_norm
from distclip.integrations.checkpoints import Shelf
from distclip.layouts import fsdp2
from distclip.layouts.gradients import is_reduced
from distclip.layouts.names import Excerpt, Named, Target, named_parameters
from distclip.policies.compose import reads_loss
from distclip.statistics import collectives

_logger = logging.getLogger("distclip")


class Trained(Protocol):
    """What a framework trains at the moment."""

    def meant(self, parameters: list[Tensor]) -> tuple[Target, list[Optimizer]]:
        """What a clipper of these is built of, and the torch optimizers that step any of them."""


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
        self._measurers: dict[tuple[frozenset[int], float], GradClipper] = {}
        self.shelf = Shelf(config.policy)
        self.reads_loss = reads_loss(config.policy)
        self._losses: list[Tensor] = []
        """Losses of the first update, which come before there is a clipper."""
        self._notes: list[tuple[Any, Callable[[], object] | None]] = []
        """Notes of the first update, for the same reason: batch and ``recompute`` of each."""
        self._trained = trained
        self._config = config

    def forget(self) -> None:
        """Forget all clippers."""
        for clipper in self.known.values():
            clipper.close()
            release_log(clipper)
        self.known.clear()
        self._measurers.clear()
        self._losses.clear()
        self._notes.clear()

    def observe(self, loss: Tensor | float) -> None:
        """A loss of the update to come, for a policy that reads it."""
        if not self.reads_loss:
            return
        for clipper in self.known.values():
            clipper.observe(loss)
        if not self.known:
            value = loss if isinstance(loss, Tensor) else torch.tensor(loss, device="cpu")
            self._losses.append(value.detach())

    def note(self, batch: Any, recompute: Callable[[], object] | None) -> None:
        """See :meth:`distclip.GradClipper.note`."""
        for clipper in self.known.values():
            clipper.note(batch, recompute)
        if not self.known:
            self._notes.append((batch, recompute))

    def of(self, parameters: list[Tensor], *, measuring: float | None = None) -> GradClipper:
        """The one of exactly these parameters.

        Args:
            parameters: as an optimizer steps them.
            measuring: order of a norm: the one that only measures it.
        """
        key = frozenset(map(id, parameters))
        found = self.known.get(key) if measuring is None else self._measurers.get((key, measuring))
        if found is not None:
            return found
        self._make_way(measuring)
        target, optimizers = self._trained.meant(parameters)
        options = self._config.arguments(**({} if measuring is None else _measuring(measuring)))
        clipper = GradClipper(target, optimizer=optimizers, **options)
        if measuring is None:
            self.known[key] = clipper
            open_log(clipper, self._config, getattr(self._trained, "accelerator", None))
            self._begin(clipper, key)
        else:
            clipper.expects_gradients = False
            self._measurers[key, measuring] = clipper
        return clipper

    def measured(
        self,
        parameters: list[Tensor],
        scale: Tensor | None,
        norm_type: float = 2.0,
        *,
        local: bool | None = None,
    ) -> Tensor:
        """The norm of gradients, which are left as they are.

        Args:
            parameters: those that have the gradients.
            scale: how many times too large the gradients are; None: they are not.
            norm_type: order of the norm.
            local: whether to take those of this rank alone; None: where one is not reduced yet.
        """
        if local if local is not None else not all(map(is_reduced, parameters)):
            norm = get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)
            return norm if scale is None else norm / scale
        return self.of(parameters, measuring=norm_type).clip_before_step(scale).total_norm

    def _make_way(self, measuring: float | None) -> None:
        """Called before a new one is built."""
        if measuring is None and self.known and self.reads_loss:
            raise ConfigurationError(
                f"{self._config.policy!r} reads the loss, and this script clips several sets of "
                f"parameters by themselves (several optimizers, or clip_grad_norm_ on parts of a "
                f"model): backward(loss) does not say to which of them a loss belongs. "
                f"Leave `loss` off, or build a GradClipper for each set and give it its own "
                f"by clipper.observe(loss)"
            )

    def _begin(self, clipper: GradClipper, key: frozenset[int]) -> None:
        """Give a new clipper what came before it."""
        self.shelf.hand_over(clipper)
        for loss in self._losses:
            clipper.observe(loss)
        self._losses.clear()
        for batch, recompute in self._notes:
            clipper.note(batch, recompute)
        self._notes.clear()
        if collectives.is_first():
            _logger.info("clipping %d parameters by %r", len(key), clipper.policy)


def _measuring(norm_type: float) -> dict[str, object]:
    """Options of a clipper that only measures."""
    return {
        "policy": policies.measure(norm_type),
        "on_nonfinite": "pass",
        "norms": True,
        "verify_replicas": "never",
        "overlap": False,
        "ratios": None,
        "exponents": None,
    }
