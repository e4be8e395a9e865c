"""``distclip run --check``: the first steps of the user's own run against gathered tensors.

Before and after clipping every gradient is gathered whole (``DTensor.full_tensor``, FSDP1's
``summon_full_params``, plain tensors as they are), and what distclip did is held against the
float64 reference of :mod:`distclip.testing`, which shares no code with it. Where a fused optimizer
multiplies as it steps, the gradients are looked at after the step, as in a run without the check.
Costs memory for whole gradients and weights on every rank, in those steps only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distclip import clipper as clippers
from distclip.clipper import GradClipper, Watcher
from distclip.common.foreign import clean_lines
from distclip.engine.passes import report_order
from distclip.errors import DistclipError
from distclip.integrations import hooks
from distclip.layouts.gathering import WholeTensors, can_gather, gather_whole
from distclip.layouts.gradients import is_uneven
from distclip.policies import ByName, Chain, Policy, SideBySide
from distclip.report import ClipReport
from distclip.testing import expected
from distclip.testing.oracle import WITHOUT_MEMORY
from distclip.tools.verify.cells import everyones, judge, together


class StepCheck(Watcher):
    """Checks the first steps of every GradClipper of this process."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.checked = 0
        self._done: weakref.WeakKeyDictionary[GradClipper, int] = weakref.WeakKeyDictionary()
        self._before: WholeTensors | None = None

    def install(self) -> StepCheck:
        """Start watching every GradClipper of this process."""
        clippers.watchers.append(self)
        return self

    def before(self, clipper: GradClipper, loss_scale: Tensor | None) -> None:
        self._before = None
        if self._done.get(clipper, 0) < self.steps:
            self._before = gathered(clipper, loss_scale)

    def after(self, clipper: GradClipper, report: ClipReport, loss_scale: Tensor | None) -> None:
        if self._before is None:
            return
        before, self._before = self._before, None
        step = self._done.get(clipper, 0)
        self._done[clipper] = step + 1
        after = gathered(clipper, loss_scale)
        faults, exact = clipping_faults(clipper, report, before, after)
        if faults:
            shown = "\n".join(f"  {line}" for line in faults[:12])
            raise DistclipError(
                f"check: in step {step} of {clipper.policy!r} distclip did not do what it does to "
                f"the gathered gradients:\n{shown}\nPlease report it, with these lines and the "
                f"output of `distclip doctor`"
            )
        self.checked += 1
        words = "the float64 reference" if exact else "their norms and coefficients"
        say(
            f"step {step}: {len(before)} parameters, norm {report.total_norm.item():.7g}, "
            f"coefficient {report.coefficient.item():.7g}: as {words} of the gathered gradients"
        )

    def conclude(self) -> None:
        """At the end of the script: say so if there was nothing to check."""
        if not self.checked:
            say("warning: nothing was clipped, so nothing was checked")


def say(text: str) -> None:
    """A line on stderr, from the main rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"distclip check: {clean_lines(text)}", file=sys.stderr, flush=True)


# ---- gathering ---------------------------------------------------------------------------------


def gathered(clipper: GradClipper, loss_scale: Tensor | None = None) -> WholeTensors:
    """Whole gradients, unscaled, and weights of all parameters of all ranks; on every rank.

    Raises:
        DistclipError: parameters that cannot be gathered independently of distclip; on all ranks.
    """
    problem = ""
    try:
        _refuse(clipper)
    except DistclipError as error:
        problem = str(error)
    here = clipper.here
    _agree(problem, {n: p.grad is not None for n, p in here.items() if not is_uneven(p)})
    mine = gather_whole(here)
    whole = _exchanged(mine, clipper)
    scale = 1.0 if loss_scale is None else float(loss_scale)
    return {
        name: (None if gradient is None else gradient / scale, weights)
        for name, (gradient, weights) in whole.items()
    }


def _refuse(clipper: GradClipper) -> None:
    if "deepspeed" in hooks.activated:
        raise DistclipError(
            "check: DeepSpeed keeps its gradients to itself until it steps, so they cannot be "
            "gathered; leave --check away, and compare layouts with `distclip simulate` instead"
        )
    shapes = {info.name: info.shape for info in clipper.parameters}
    for name, parameter in clipper.here.items():
        if not can_gather(parameter, shapes[name]):
            raise DistclipError(
                f"check: {name!r} is a declared slice of a tensor, which only distclip could put "
                f"together again; leave --check away"
            )


def _agree(problem: str, present: Mapping[str, bool]) -> None:
    """All ranks refuse together, and none gathers what another does not.

    Args:
        problem: of this rank.
        present: whether there is a gradient, of each parameter that has one on all ranks or none.
    """
    told = everyones((problem, dict(present)))
    for text, _ in told:
        if text:
            raise DistclipError(text)
    seen: dict[str, bool] = {}
    for rank, (_, theirs) in enumerate(told):
        for name, there in theirs.items():
            if seen.setdefault(name, there) != there:
                raise DistclipError(
                    f"check: rank {rank} has {'a' if there else 'no'} gradient of {name!r}, unlike "
                    f"a rank before it: were gradients synchronised?"
                )


def _exchanged(mine: WholeTensors, clipper: GradClipper) -> WholeTensors:
    """With those that only other ranks have (pipeline stages, experts)."""
    lacking = any(info.name not in mine for info in clipper.parameters)
    if not any(everyones(lacking)):
        return mine
    whole: WholeTensors = {}
    for theirs in everyones(mine):
        whole = theirs | whole
    return whole


# ---- comparing ---------------------------------------------------------------------------------


def clipping_faults(
    clipper: GradClipper, report: ClipReport, before: WholeTensors, after: WholeTensors
) -> tuple[list[str], bool]:
    """What is wrong, on every rank alike, and whether the policy is one that the reference knows.

    Of another policy (one of your own, one with a memory) norms before and after and the
    coefficients between them are compared, not the decision itself.
    """
    words = in_words(clipper.policy)
    if words is None or bool(report.skipped) or not _measured(report):
        order = report_order(clipper.policy, clipper.parameters)
        return together(_consistency(report, order, before, after)), False
    groups = {info.name: info.group for info in clipper.parameters if info.group is not None}
    mode = clipper.on_nonfinite
    want = expected(
        words,
        {name: gradient for name, (gradient, _) in before.items()},
        {name: weights for name, (_, weights) in before.items()},
        groups=groups or None,
        on_nonfinite="pass" if mode == "error" or mode == "error_late" else mode,
    )
    kinds = {g.dtype for g, _ in before.values() if g is not None}
    roundings = 3 if isinstance(clipper.policy, (Chain, SideBySide)) else 1
    exact = kinds <= {torch.float32, torch.float64}
    parts = ((name, gradient, want.gradients[name]) for name, (gradient, _) in after.items())
    return judge(clipper.policy, report, want, parts, exact=exact, roundings=roundings), True


def _measured(report: ClipReport) -> bool:
    return not math.isnan(report.total_norm.item()) or bool(report.nonfinite)


def _consistency(
    report: ClipReport, order: float, before: WholeTensors, after: WholeTensors
) -> list[str]:
    faults = []
    for name, (gradient, _) in before.items():
        clipped = after[name][0]
        if gradient is None or clipped is None or name in report.nonfinite:
            continue
        if bool(report.skipped):
            if not torch.equal(gradient, clipped):
                faults.append(f"{name!r} was changed though the step is to be skipped")
            continue
        norm, now = (
            float(torch.linalg.vector_norm(g.double(), ord=order)) for g in (gradient, clipped)
        )
        known = report.parameter_norms[name]
        if not math.isnan(known) and not math.isclose(known, norm, rel_tol=1e-6, abs_tol=1e-30):
            faults.append(f"norm of {name!r} is {known!r}, should be {norm!r}")
        coefficient = report.parameter_coefficients[name]
        within = 1e-6 if gradient.dtype in (torch.float32, torch.float64) else 4e-3
        if not math.isnan(coefficient) and not math.isclose(
            now, coefficient * norm, rel_tol=within, abs_tol=1e-30
        ):
            faults.append(
                f"{name!r} has norm {now!r} after clipping; its coefficient {coefficient!r} makes "
                f"that {coefficient * norm!r}"
            )
    return faults


def in_words(policy: Policy) -> Any:
    """The policy in the words of a configuration; None if the reference does not know it."""
    with contextlib.suppress(KeyError):
        return _words(policy)
    return None


def _words(policy: Policy) -> Any:
    if isinstance(policy, Chain):
        return [_words(each) for each in policy.policies]
    if isinstance(policy, ByName):
        mapping = {key: None if p is None else _words(p) for key, p in policy.mapping}
        return {
            "by_name": mapping,
            "default": None if policy.default is None else _words(policy.default),
        }
    if policy.name not in WITHOUT_MEMORY:
        raise KeyError(policy.name)
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}  # type: ignore[arg-type]
    dims = fields.pop("unit_dims_by_name", ())
    return {"name": policy.name, **fields, **({"unit_dims": dict(dims)} if dims else {})}
