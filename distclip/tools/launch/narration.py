"""What ``distclip run`` says of a run: a line at the first step of each clipper, one at the end."""

from __future__ import annotations

import sys
import weakref

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.clipper import GradClipper
from distclip.common.foreign import in_one_line
from distclip.config import Config, logs
from distclip.layouts import detect
from distclip.monitor.sinks import JsonlSink
from distclip.policies.compose import summary
from distclip.report import ClipReport
from distclip.statistics import collectives

SUMMED_AT_ONCE = 64
"""Steps that are summed up at once."""


class Narration:
    """Follows every clipper that a configuration is applied with, from now on.

    Only the main rank says something, on stderr.
    """

    def __init__(self) -> None:
        self.followed: list[Followed] = []
        logs.opened.append(self._follow)

    def _follow(self, clipper: GradClipper, config: Config) -> None:
        followed = Followed(clipper, len(self.followed) + 1)
        clipper.sinks = (*clipper.sinks, followed)
        self.followed.append(followed)

    def conclude(self) -> None:
        """Say of each clipper what it has done, and follow no more."""
        logs.opened.remove(self._follow)
        several = len([each for each in self.followed if each.steps]) > 1
        for number, followed in enumerate(self.followed, 1):
            if followed.steps and followed.speaks:
                _say(f"{number}. {followed.result()}" if several else followed.result())


class Followed:
    """Counts what a clipper does; a sink. Never waits for the device before the end.

    It outlives the clipper, and keeps neither that nor its model alive.
    """

    def __init__(self, clipper: GradClipper, number: int) -> None:
        self.steps = 0
        self.speaks = False
        self._about = describe(clipper, names=number > 1)
        if number > 1:
            self._about = f"{number}. {self._about}"
        self._clipper = weakref.ref(clipper)
        self._logs: list[str] = []
        self._waiting: list[Tensor] = []
        self._sums: Tensor | None = None
        """float64: steps that were clipped, and that were skipped; the largest norm."""

    def __call__(self, step: int, report: ClipReport) -> None:
        """Count a step."""
        if self.steps == 0:
            self.speaks = collectives.is_first()
            if self.speaks:
                _say(self._about)
        self.steps += 1
        if (clipper := self._clipper()) is not None:
            self._logs = [in_one_line(s.path) for s in clipper.sinks if isinstance(s, JsonlSink)]
        norm = report.total_norm.double()
        norm = torch.where(torch.isfinite(norm), norm, 0.0)
        clipped = (report.clipped_fraction > 0).double()
        self._waiting.append(torch.stack([clipped, report.skipped.double(), norm]))
        if len(self._waiting) == SUMMED_AT_ONCE:
            self._add()

    def _add(self) -> None:
        rows = torch.stack(self._waiting + ([] if self._sums is None else [self._sums]))
        self._sums = torch.cat([rows[:, :2].sum(0), rows[:, 2:].amax(0)])
        self._waiting.clear()

    def result(self) -> str:
        """The line at the end. Waits for the device."""
        if self._waiting:
            self._add()
        assert self._sums is not None  # there has been a step
        clipped, skipped, largest = self._sums.tolist()
        share = 100.0 * clipped / self.steps
        line = f"{self.steps} steps, {share:.3g} % clipped, {skipped:.0f} skipped, largest norm "
        line += f"{largest:.4g}"
        if self._logs:
            line += f"; log: {', '.join(self._logs)}"
        return line


def describe(clipper: GradClipper, *, names: bool = False) -> str:
    """A clipper in one line: ``agc(0.01) on 29 parameters, FSDP2 over 2 ranks, float32``."""
    dtypes = sorted(entry.dtype for entry in clipper.plan.entries)
    kinds = "/".join(dict.fromkeys(dtypes))
    count = len(clipper.names)
    which = f" ({_some(clipper.names)})" if names else ""
    return (
        f"{summary(clipper.policy)} on {count} parameter{'s' if count != 1 else ''}{which}, "
        f"{_layout(clipper)}, {kinds}"
    )


def _layout(clipper: GradClipper) -> str:
    """How the parameters lie on ranks, in words."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    group = clipper.plan.group
    if group is not None:
        ranks = dist.get_world_size(group)
    found = detect.sharding_kinds(clipper.plan.entries, clipper.here)
    if not found and ranks == 1:
        return "one process"
    found = found or ["DDP"]
    return f"{' and '.join(found)} over {ranks} rank{'s' if ranks != 1 else ''}"


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(in_one_line(name) for name in names[:2])
    return f"{shown}, ..." if len(names) > 2 else shown


def _say(line: str) -> None:
    print(f"distclip: {line}", file=sys.stderr, flush=True)
