"""Plain torch scripts under ``distclip run``: DDP, FSDP1, FSDP2 or one process, and no change.

torch's hook for all optimizers finds an optimizer at its first step; from then on the policy clips
before its steps. The clipping functions of ``torch.nn.utils``, and FSDP1's method, apply the policy
in place of their own rule to what they are given, and the step that follows does not clip again.
Optimizers that another integration clips for are left alone.
"""

from __future__ import annotations

import logging
from types import ModuleType

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distclip.application.eager import eagerly
from distclip.application.stepping import Decision
from distclip.config import Config
from distclip.engine.attaching import stepped_by
from distclip.errors import UnsupportedGradientError
from distclip.integrations import charge, hooks
from distclip.integrations.marks import JointDecision, Marks
from distclip.integrations.torch_clippers import ScriptClippers
from distclip.integrations.torch_functions import Functions
from distclip.integrations.torch_objects import TorchObjects
from distclip.layouts import fsdp2
from distclip.layouts.detect import is_whole
from distclip.layouts.gradients import is_uneven, owner_of
from distclip.report import ClipReport
from distclip.statistics import collectives

_logger = logging.getLogger("distclip.torch")

UNSTEPPED = 20
"""Calls of a clipping function in a row, with no step of an optimizer, that are mentioned."""


def enable(module: ModuleType, config: Config | None) -> TorchScripts | None:
    """Apply ``config`` to every torch optimizer that no other integration clips for.

    Returns:
        What :meth:`TorchScripts.remove` undoes.
    """
    return None if config is None else TorchScripts(config)


class TorchScripts:
    """A policy on all optimizers of this process; :meth:`remove` undoes it.

    Attributes:
        last_report: the newest report; None before the first clip.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.last_report: ClipReport | None = None
        self._objects = TorchObjects()
        self._clippers = ScriptClippers(self._objects, config)
        self._adopted = charge.Adopted(charge.Charge("torch"), self._before_step, self._after_step)
        self._marks = Marks()
        """Parameters (by id) that have been clipped since their last step, by a call or a step."""
        self._calls: dict[frozenset[int], int] = {}
        """How often a call of the script has clipped a set of parameters since the last step."""
        self._late: dict[frozenset[int], list[Tensor]] = {}
        """Sets that the script clips several times for one step: they are clipped at the step."""
        self._scaled: dict[frozenset[int], list[Tensor]] = {}
        """Sets that a call was to clip while they were scaled: they wait for this one step."""
        self._said: set[str] = set()
        self._undo = [self._objects.forget]
        self._undo += [register_optimizer_step_pre_hook(self._meet).remove]
        self._undo += [Functions(self._by_hand).restore]

    def remove(self) -> None:
        """Restore torch's own functions, and let optimizers step as they did before.

        Raises:
            NonFiniteGradientError: under ``on_nonfinite="error_late"``, of the last step.
        """
        while self._undo:
            self._undo.pop()()
        self._adopted.release()
        clippers = list(self._clippers.known.values())
        self._clippers.forget()
        for clipper in clippers:
            clipper.raise_late()

    # ---- the step --------------------------------------------------------------------------------

    @eagerly
    def _meet(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Before every step of every optimizer: adopt it, unless something else clips for it."""
        if optimizer in self._adopted or charge.charge_of(optimizer) is not None:
            return
        stepped = stepped_by(optimizer)
        ids = set(map(id, stepped))
        for other in self._adopted:
            if self._adopted.is_stepping(other) and ids <= set(map(id, stepped_by(other))):
                return  # a part of a container of optimizers, whose step has clipped
        _refuse_in_backward(optimizer)
        self._adopted.add(optimizer)
        self._objects.optimizers.add(optimizer)
        hooks.mark_active("torch_scripts")
        self._mention_dead(optimizer, stepped)

    def _before_step(self, optimizer: Optimizer, due: charge.Due) -> Decision:
        scaled = self._objects.note_step(optimizer) or due.found_inf is not None
        parameters = stepped_by(optimizer)
        ids = set(map(id, parameters))
        waiting = {k: v for k, v in {**self._late, **self._scaled}.items() if not ids.isdisjoint(k)}
        sound = self._marks.sound(parameters)
        if not sound and waiting.keys() <= {frozenset(ids)}:
            self.last_report = report = self._clippers.of(parameters).clip_before_step(*due)
            return report
        # What the script has left out is left alone. Where several optimizers share what it clips
        # as one, the first of them clips for all.
        reports = {id(report): report for report in sound.values()}
        for listed in waiting.values():
            clipped = self._marks.sound(listed)
            if all(id(p) in clipped for p in listed if id(p) in ids):
                continue
            if due.loss_scale is None:
                self._objects.unscale_like(optimizer, listed)
            fresh = [p for p in listed if id(p) not in clipped or owner_of(p).grad is None]
            report = self._clip(fresh, due.loss_scale, scaled)
            reports[id(report)] = report
        return JointDecision(reports.values())

    def _after_step(self, optimizer: Optimizer, skipped: bool | Tensor) -> None:
        ids = set(map(id, stepped_by(optimizer)))
        for key in ids:
            self._marks.pop(key, None)
        for called in [called for called in self._calls if not ids.isdisjoint(called)]:
            del self._calls[called]
        for waited in [waited for waited in self._scaled if not ids.isdisjoint(waited)]:
            del self._scaled[waited]

    # ---- calls of the script -----------------------------------------------------------------

    def _chosen(self, listed: list[Tensor]) -> list[Tensor] | charge.Charge:
        """The parameters that a call means, by their part in the model and not in this step.

        Where only parameters without a gradient are missing (``if p.grad is not None``), all that
        their optimizers step are meant: so the list, and with it the policy's state, does not
        depend on what happens to be there. Of FSDP1's flattened parameters all are meant: which
        of them have a gradient differs between ranks.

        Returns:
            An empty list: no optimizer steps them. A charge: another integration clips for them.
        """
        listed = fsdp2.sharded(listed)
        given = {id(parameter): parameter for parameter in listed}
        owners = self._objects.owners(listed)
        for owner in owners:
            other = charge.charge_of(owner)
            if other is not None and other.name != "torch":
                return other
        if not owners:
            return []
        whole = {id(p): p for owner in owners for p in stepped_by(owner)}
        if any(map(is_uneven, listed)):
            return list(whole.values())
        chosen = {key: p for key, p in given.items() if p.requires_grad or key in whole}
        if frozenset(chosen) in self._clippers.known:
            return list(chosen.values())
        missing = [p for key, p in whole.items() if key not in chosen]
        if chosen.keys() < whole.keys() and all(p.grad is None for p in missing):
            return list(whole.values())
        return list(chosen.values())

    def _by_hand(
        self, parameters: list[Tensor], call: str, norm_type: float | None, *, only_measures: bool
    ) -> Tensor | None:
        """See :class:`ByHand`. Of gradients that an earlier call has clipped, the norm it found."""
        chosen = self._chosen(parameters)
        if isinstance(chosen, charge.Charge):
            return None if chosen.clip is None or only_measures else chosen.clip(parameters)
        if not chosen:
            return None
        scaling, scale = self._objects.scale(self._objects.owners(chosen))
        # Gradients of one rank, of which more is to come; or of all ranks, and one may ask alone.
        alone = only_measures and all(map(is_whole, chosen))
        order = norm_type or 2.0
        if alone or not self._clippers.synchronised(chosen):
            return self._clippers.measured(chosen, scale, order, local=True).float()
        if only_measures:
            return self._clippers.measured(chosen, scale, order, local=False)
        self._mention(
            call, "%s calls %s; the configured policy is applied in its place: %r",
            charge.replaced_caller(), call, self.config.policy,
        )  # fmt: skip
        if self._has_no_gradient(chosen, call):
            return torch.zeros((), device="cpu")
        return self._clip_by_hand(chosen, call, norm_type, scaling, scale)

    def _clip_by_hand(
        self,
        chosen: list[Tensor],
        call: str,
        norm_type: float | None,
        scaling: bool,
        scale: Tensor | None,
    ) -> Tensor:
        key = frozenset(map(id, chosen))
        self._count(key, call)
        self._scaled.pop(key, None)
        if scale is not None:  # the step knows for sure what is in the gradients
            self._scaled[key] = chosen
            return self._clippers.measured(chosen, scale, norm_type or 2.0, local=False)
        marks = [(mark, p) for p in chosen if (mark := self._marks.get(id(p)))]
        if not scaling and any(mark.outdated(p) and mark.is_of(p) for mark, p in marks):
            self._clip_at_step(key, chosen, call)
        if key in self._late:
            return self._clippers.measured(chosen, scale, norm_type or 2.0, local=False)
        fresh = self._marks.fresh(chosen)
        if not fresh:
            return self._marks[id(chosen[0])].report.total_norm
        norm = None
        if norm_type is not None and norm_type != self._clippers.of(fresh).norm_type:
            norm = self._clippers.measured(fresh, scale, norm_type, local=False)
        report = self._clip(fresh, scale, scaling)
        return report.total_norm if norm is None else norm

    def _clip(self, chosen: list[Tensor], scale: Tensor | None, scaling: bool) -> ClipReport:
        """Clip, and mark what has been clipped."""
        # While a gradient scaler looks for its scale, an overflow is its business and no error.
        watched = torch.zeros(1, device="cpu") if scaling else None
        clipper = self._clippers.of(chosen)
        stepped = [p for each in self._objects.optimizers for p in stepped_by(each)]
        self.last_report = report = self._marks.clip(
            chosen, lambda: clipper.clip_before_step(scale, watched), stepped
        )
        return report

    def _clip_at_step(self, key: frozenset[int], chosen: list[Tensor], call: str) -> None:
        """From now on calls on these parameters measure, and the step clips."""
        if key not in self._late:
            self._mention(
                "late",
                "%s calls %s again on gradients that have grown since, with no step in "
                "between: from now on these calls only return the norm, and the policy is applied "
                "once, when the optimizer steps",
                charge.replaced_caller(),
                call,
            )
            self._late[key] = chosen

    # ---- what is mentioned, once ---------------------------------------------------------------

    def _mention(self, what: str, message: str, *values: object) -> None:
        if what not in self._said and collectives.is_first():
            _logger.warning(message, *values)
        self._said.add(what)

    def _count(self, key: frozenset[int], call: str) -> None:
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] == UNSTEPPED:
            self._mention(
                "unstepped",
                "%s has called %s %d times, and no torch optimizer that has these %d "
                "parameters has stepped since: the calls clip, but a step that is not made by "
                "torch.optim.Optimizer.step is not seen, and cannot be skipped",
                charge.replaced_caller(), call, UNSTEPPED, len(key),
            )  # fmt: skip

    def _has_no_gradient(self, chosen: list[Tensor], call: str) -> bool:
        """Whether none is there, and no other rank may have one."""
        if any(owner_of(parameter).grad is not None for parameter in chosen):
            return False
        self._mention(
            "no gradient",
            "%s: none of the %d parameters has a gradient, so nothing is clipped: call it after "
            "backward (with synchronisation), and before zero_grad()",
            call, len(chosen),
        )  # fmt: skip
        return collectives.default_group(None) is None

    def _mention_dead(self, optimizer: Optimizer, stepped: list[Tensor]) -> None:
        if stepped and all(owner_of(p).grad is None for p in stepped):
            self._mention(
                f"dead {id(optimizer)}",
                "%s steps %d parameters, and none of them has a gradient at its first step: this "
                "step changes nothing. If the optimizer was built before fully_shard(model) or "
                "FullyShardedDataParallel(model), which replace parameters, build it after that",
                type(optimizer).__name__, len(stepped),
            )  # fmt: skip


def _refuse_in_backward(optimizer: Optimizer) -> None:
    """Refuse a step within backward.

    Raises:
        UnsupportedGradientError: the gradients of other parameters are not there yet.
    """
    running = getattr(torch._C, "_current_graph_task_id", lambda: -1)()
    if running != -1:
        raise UnsupportedGradientError(
            f"{type(optimizer).__name__} steps during backward (a hook of "
            f"register_post_accumulate_grad_hook, or an optimizer that DDP runs in its "
            f"communication hook): the gradients of other parameters are not there yet, so no norm "
            f"over the model can clip these; step after backward, or run without distclip"
        )
