"""What every integration's handle is: a policy on one object of a framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from distclip.clipper import GradClipper
from distclip.config import Config
from distclip.engine.checkpoint import StateSource
from distclip.errors import ConfigurationError
from distclip.integrations import hooks, patches
from distclip.integrations.checkpoints import Shelf
from distclip.report import ClipReport


class Attachment(ABC):
    """Lets a policy do all the clipping for one object of a framework.

    Args:
        owner: the object. One attachment at a time; it is ``owner._distclip``.
        kind: what to call the object in messages.
        config: a checked configuration.

    Attributes:
        config: the configuration.
        last_report: the newest report; None before the first step.
        loss_factor: what a loss that the framework's ``backward`` gets has to be multiplied by, so
            that the losses of one update average to that of the update.
        announced: whose calls to clip have been told of, as ``charge.replaced_caller`` names them.

    Raises:
        ConfigurationError: the object has a policy already.
    """

    def __init__(self, owner: Any, kind: str, config: Config) -> None:
        if getattr(owner, "_distclip", None) is not None:
            raise ConfigurationError(
                f"this {kind} has a distclip policy already, from an earlier attach() or from "
                f"`distclip run`; call remove() on the first handle, or start without "
                f"`distclip run`"
            )
        self.config = config
        self.last_report: ClipReport | None = None
        self.loss_factor: Callable[[], float] = lambda: 1
        self.announced: set[str] = set()
        self._owner = owner
        self._undo: list[Callable[[], object]] = []

    def _begin(self, integration: str | None = None) -> None:
        """Become the attachment of the owner; ``integration`` clips from now on."""
        self._owner._distclip = self
        if integration is not None:
            hooks.mark_active(integration)

    def _replace(
        self,
        owner: Any,
        name: str,
        function: Callable[..., Any],
        when: Callable[[], bool] | None = None,
    ) -> None:
        """As :func:`distclip.integrations.patches.replace`, until :meth:`remove`."""
        self._undo.append(patches.replace(owner, name, function, when))

    def remove(self) -> None:
        """Restore the framework's own clipping; a second call does nothing.

        Raises:
            NonFiniteGradientError: under ``on_nonfinite="error_late"``, after everything is
                restored: the last step had a gradient that is not finite.
        """
        if getattr(self._owner, "_distclip", None) is not self:
            return
        _, known = self.memory()
        clippers = list(known)
        self._owner._distclip = None
        while self._undo:
            self._undo.pop()()
        for clipper in clippers:
            clipper.raise_late()

    @abstractmethod
    def observe(self, loss: Tensor | float) -> None:
        """Pass on a loss of the coming update, as :meth:`distclip.GradClipper.observe` does.

        Only needed where the loss does not go through the framework's own ``backward``.
        """

    def _observe_backward(self, loss: Tensor) -> None:
        """Pass on a loss that the framework's ``backward`` was called with."""
        factor = self.loss_factor()
        self.observe(loss if factor == 1 else loss.detach() * factor)

    @abstractmethod
    def memory(self) -> tuple[Shelf, Iterable[GradClipper]]:
        """The states that have no clipper yet, and the clippers, for a framework's checkpoints."""

    def keep_rewinds(self) -> int:
        """Let no clipper that comes into being from now on have less rewinds than there were.

        Returns:
            How many.
        """
        shelf, clippers = self.memory()
        shelf.rewinds = max([shelf.rewinds, *(clipper.rewinds for clipper in clippers)])
        return shelf.rewinds

    def have_made(self, rewinds: int) -> None:
        """Let no clipper have less rewinds than these, which an earlier attachment has kept."""
        shelf, clippers = self.memory()
        shelf.rewinds = max(shelf.rewinds, rewinds)
        for clipper in clippers:
            clipper.rewinds = rewinds

    def state_dict(self) -> dict[str, Any]:
        """The state of the policy, for checkpoints that the framework does not make.

        Tensors and plain values, the same on every rank.
        """
        shelf, clippers = self.memory()
        return shelf.state_dict(clippers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, on every rank, before the first step or later.

        An empty state (a checkpoint from before distclip was in use) gives a warning in the log.

        Raises:
            StateError: no such state, that of another policy or model (of another model perhaps at
                the next step, when the clipper is built), or a damaged one.
        """
        shelf, clippers = self.memory()
        shelf.load_state_dict(state, clippers, StateSource("what load_state_dict was given"))
