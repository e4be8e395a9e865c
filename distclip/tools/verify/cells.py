"""Cells of the matrix of ``distclip verify``: one policy on one sharded model, against the oracle.

All of this runs on the ranks. A cell looks at everything and then says all that is wrong, on every
rank alike, so that no rank waits for one that has stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distclip import policies
from distclip.clipper import GradClipper
from distclip.config import load
from distclip.layouts.declared import declare_sharded
from distclip.policies import Chain, ClampingPolicy, Policy, SideBySide, UnitPolicy
from distclip.report import ClipReport
from distclip.testing import Expected, assert_rounded, expected
from distclip.testing.cases import POLICIES, ROUNDINGS
from distclip.testing.models.sharded import whole
from distclip.testing.models.sharding import shard


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix: layout, policy, dtype and number of ranks."""

    layout: str
    policy: str
    dtype: str
    ranks: int


class Found(NamedTuple):
    """The result of one cell.

    Attributes:
        status: ``"passed"``, ``"failed"`` or ``"not run"``.
        detail: what was wrong, or why it was not run.
        seconds: of the slowest rank.
    """

    status: str
    detail: str = ""
    seconds: float = 0.0


ClippedPart = tuple[str, "Tensor | None", "np.ndarray[Any, Any] | None"]
"""Name, local gradient after clipping, and what the oracle says of those elements."""


def build(configuration: Any) -> Policy:
    """The library's policy from the same words as the oracle's."""
    if isinstance(configuration, (list, tuple)):
        return policies.chain(*map(build, configuration))
    for make in (policies.by_name, policies.by_part):
        if make.name not in configuration:
            continue
        mapping, default = configuration[make.name], configuration["default"]
        return make(
            {key: None if value is None else build(value) for key, value in mapping.items()},
            default=None if default is None else build(default),
        )
    return load({"policy": configuration}).policy


def run_group(layout: str, dtype: str, labels: Sequence[str], seed: int = 0) -> list[Found]:
    """Every listed policy on the built-in model; to be called on every rank."""
    results = []
    for label in labels:
        start = time.perf_counter()
        faults = faults_of(POLICIES[label], layout, dtype, ROUNDINGS.get(label, 1), seed)
        seconds = time.perf_counter() - start
        results.append(Found("failed" if faults else "passed", "\n".join(faults), seconds))
    return results


def faults_of(
    configuration: Any,
    layout: str,
    dtype: str,
    roundings: int = 1,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """What is wrong with one policy on one sharding of the built-in model; empty if nothing is.

    Args:
        configuration: the policy, in words.
        layout: one of ``LAYOUTS``.
        dtype: one of ``DTYPES``.
        roundings: how often an element is rounded on its way.
        seed: of weights and gradients.
        **options: for the GradClipper.
    """
    values = whole(dtype, seed=seed)
    model = shard(layout, values)
    values = model.values or values
    for name, group in model.apart.items():
        declare_sharded(model.parameters[name], group)
    model.set_gradients(values.gradients)
    want = expected(configuration, values.gradients, values.weights)
    policy = build(configuration)
    report = GradClipper(model.named(), policy, **options).clip_()

    parts = model.beside(want.gradients)
    return judge(policy, report, want, parts, exact=dtype == "float32", roundings=roundings)


def plain_policies(policy: Policy | None) -> Iterator[Policy]:
    """The policies that a composition is made of; the policy itself where it is none."""
    if isinstance(policy, Chain):
        for part in policy.policies:
            yield from plain_policies(part)
    elif isinstance(policy, SideBySide):
        for _, choice in policy.mapping:
            yield from plain_policies(choice)
        yield from plain_policies(policy.default)
    elif policy is not None:
        yield policy


def judge(
    policy: Policy,
    report: ClipReport,
    want: Expected,
    parts: Iterator[ClippedPart],
    *,
    exact: bool,
    roundings: int,
) -> list[str]:
    """Hold norms, coefficients and every local element against the oracle; on every rank alike.

    Args:
        policy: what decided.
        report: of the clipping.
        want: the oracle's word.
        parts: the local gradients and what they should be.
        exact: whether everything is float32, so that norms after clipping are not rounded.
        roundings: how often an element is rounded.
    """
    faults: list[str] = []

    def near(what: str, have: float, should: float, rel: float) -> None:
        if not (abs(have - should) <= max(rel * abs(should), 1e-12) or have == should):
            faults.append(f"{what} is {have!r}, should be {should!r}")

    near("total_norm", report.total_norm.item(), want.total_norm, 1e-6)
    for name, norm in report.parameter_norms.items():
        near(f"norm of {name!r}", norm, want.parameter_norms[name], 1e-6)
    if bool(report.skipped) != want.skipped:
        faults.append(f"skipped is {bool(report.skipped)}, should be {want.skipped}")
    clipped = report.clipped_norm.item()
    if not math.isnan(clipped):
        near("clipped_norm", clipped, want.clipped_norm, 1e-6 if exact else 4e-3)
    # The norms of a second pass are those of elements that the first has rounded.
    error = 2.0**-8 if roundings == 3 and not exact else 3e-7
    for name, gradient, part in parts:
        if gradient is None or part is None:
            if (gradient is None) != (part is None):
                there = "a gradient" if part is None else "no gradient"
                faults.append(f"{name!r} has {there}, unlike the whole model")
            continue
        try:
            assert_rounded(gradient, part, ulps=roundings, coefficient_error=error, name=name)
        except AssertionError as fault:
            faults.append(str(fault))
    coefficient = report.coefficient.item()
    parts_of_policy = list(plain_policies(policy))
    if sum(isinstance(part, UnitPolicy) for part in parts_of_policy) > 1:
        # The report's coefficient is a lower bound then; see ClipReport.
        if coefficient > want.coefficient * (1 + 2e-6):
            faults.append(f"coefficient is {coefficient!r}, should be at most {want.coefficient!r}")
    elif not any(isinstance(part, ClampingPolicy) for part in parts_of_policy):
        near("coefficient", coefficient, want.coefficient, 2e-6)
    return together(faults, _bits(report))


def _bits(report: ClipReport) -> bytes:
    numbers = [
        report.coefficient.item(),
        report.total_norm.item(),
        *report.parameter_coefficients.values(),
    ]
    return torch.tensor(numbers, dtype=torch.float64).numpy().tobytes()


def together(faults: Sequence[str], bits: bytes = b"") -> list[str]:
    """All ranks' faults with their ranks, on every rank; and whether all have the same ``bits``."""
    told = everyones((list(faults), bits))
    if len(told) == 1:
        return list(faults)
    lines = [f"rank {rank}: {fault}" for rank, (some, _) in enumerate(told) for fault in some]
    if any(other != told[0][1] for _, other in told):
        lines.append("coefficients differ between ranks")
    return lines


def everyones(value: Any) -> list[Any]:
    """The value of each rank, by rank; that of this process where there is one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def merged_results(by_rank: Sequence[Sequence[Found]]) -> list[Found]:
    """One result a cell from those of all ranks, which say the same but for the time."""
    results = []
    for founds in zip(*by_rank, strict=True):
        worst = next((found for found in founds if found.status != "passed"), founds[0])
        results.append(worst._replace(seconds=max(found.seconds for found in founds)))
    return results
