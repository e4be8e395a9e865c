"""That each gradient is clipped once: by hand or before a step, and by one clipper."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from distclip.application.joint import AttachHandle, Clip, GradientsSeen
from distclip.application.notices import earlier_clip, note_clip, sample, warn
from distclip.engine import attaching
from distclip.engine.session import Session
from distclip.errors import ConfigurationError
from distclip.layouts.detect import refuse_stepped_in_backward
from distclip.policies import Measure

_attached_now: weakref.WeakSet[ClipOnce] = weakref.WeakSet()
"""Of clippers that are attached, or were."""


class ClipOnce:
    """What one clipper has clipped by hand, and the optimizers that it is attached to.

    Attributes:
        handle: of the newest attachment; None before the first.
    """

    def __init__(self, session: Session, shown: str) -> None:
        self._session, self._shown = session, shown
        self._sample = sample([parameter for _, parameter in session.named])
        self._changes_gradients = not isinstance(session.options.policy, Measure)
        self._seen: GradientsSeen | None = None
        """Gradients as a clip by hand has left them, where the clipper is attached too."""
        self._report: Any = None
        self._warned: set[str] = set()
        self.handle: AttachHandle | None = None

    @property
    def attached(self) -> bool:
        """Whether the clipper is attached now."""
        return self.handle is not None and self.handle.active

    def attach(
        self,
        optimizers: Sequence[Optimizer],
        clip: Clip,
        follow: Callable[[dict[int, Any]], None],
        finish: Callable[[], None],
    ) -> AttachHandle:
        """Put hooks on the optimizers; arguments as of :class:`AttachHandle`.

        Raises:
            ConfigurationError: attached already, or optimizers that cannot be meant.
        """
        if self.attached:
            raise ConfigurationError(
                "this GradClipper is attached already; where several optimizers step one model, "
                "give all of them in one call, clipper.attach(first, second), for one norm and one "
                "decision over all, or else handle.remove() the first attachment"
            )
        session = self._session
        attaching.check_optimizers(optimizers, session.named)
        for name, parameter in session.named:
            refuse_stepped_in_backward(name, parameter)
        self._mention_others()
        handle = AttachHandle(optimizers, clip, session.anywhere, follow, finish)
        try:
            session.follow(optimizers)
        except Exception:
            handle.remove()
            raise
        if session.speaks:
            attaching.mention_unstepped(optimizers, session.named)
        self.handle = handle
        _attached_now.add(self)
        return handle

    def by_hand_again(self) -> Any:
        """Before a clip by hand: the report of the last one if no gradient has changed since."""
        if not self.attached:
            return None
        self.warn_once(
            "by hand",
            f"{self._shown} is attached to an optimizer, and clip_() is called too: one of the two "
            f"is enough. Gradients that have not changed in between are clipped, and counted "
            f"in the policy's memory, once",
        )
        return self._clipped_by_hand()

    def note_by_hand(self, report: Any) -> None:
        """After a clip by hand, with its report."""
        self._report = report
        if self.attached:
            self._seen = GradientsSeen(self._gradients())
        if self._changes_gradients:
            note_clip(self._sample, self._shown, id(self))

    def before_step(self) -> Any:
        """The report of the clip by hand that this step needs no other after; None: clip now."""
        report = self._clipped_by_hand()
        self._seen = None
        if report is not None or not self._changes_gradients:
            return report
        by = earlier_clip(self._sample, id(self))
        if by is not None:
            self.warn_once(
                "earlier",
                f"these gradients have been clipped already since their backward, by {by}, and are "
                f"now clipped by {self._shown}, which is attached to the optimizer: leave one of "
                f"them out, or give policies.chain(...) to one GradClipper if both are meant",
            )
        return None

    def warn_once(self, what: str, message: str) -> None:
        """Warn, the first time for ``what``."""
        if what not in self._warned:
            self._warned.add(what)
            warn(message)

    def _clipped_by_hand(self) -> Any:
        """The report of the last clip by hand, if no gradient on any rank has changed since."""
        if self._seen is None:
            return None
        gradients = self._gradients()
        unseen = all(gradient is None for gradient in gradients)  # they are somewhere else
        changed = unseen or self._seen.differ(gradients)
        if self._session.plan.group is not None:
            changed = self._session.on_any_rank(changed)
        if changed:
            self._seen = None
            return None
        return self._report

    def _gradients(self) -> list[Tensor | None]:
        return [
            getattr(parameter, "main_grad", None) if parameter.grad is None else parameter.grad
            for _, parameter in self._session.named
        ]

    def _mention_others(self) -> None:
        """Warn of another clipper that is attached and has some of the same parameters."""
        for other in list(_attached_now):
            if other is self or not other.attached:
                continue
            if not (self._changes_gradients and other._changes_gradients):
                continue
            known = other._session.known
            shared = [name for name, p in self._session.named if id(p) in known]
            if shared:
                more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
                warn(
                    f"{self._shown} is attached while {other._shown} is, and both clip "
                    f"{shared[0]!r}{more}, in every update one after the other. If both are meant, "
                    f"give policies.chain(...) to one GradClipper; else remove() the handle of the "
                    f"other first"
                )
