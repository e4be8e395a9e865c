"""Drawn cases against the float64 oracle: policies x dtypes x magnitudes x shapes x shardings.

A case is drawn from its number alone, so every rank draws the same one, and ``--seed`` and a number
bring it back: ``check(seed, number)``. Cases run in batches on warm ranks.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from benchmarks.reliability.drawing import KINDS, Case, draw, values
from benchmarks.reliability.rows import Row
from distclip import GradClipper, NonFiniteGradientError
from distclip.testing import assert_rounded, expected, run_on_ranks
from distclip.testing.models.sharded import like, mesh_of, numbers
from distclip.tools.verify.cells import build

COUNT = 20_000
BATCH = 250
WORLDS = (1, 2)


class Model:
    """The parameters of a case as tensors of this rank, and the elements that they hold."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.named: list[tuple[str, Tensor]] = []
        self.elements: dict[str, Tensor] = {}
        self._where: dict[str, Tensor] = {}
        mesh = mesh_of((dist.get_world_size(),), ("x",)) if dist.is_initialized() else None
        for number, (parameter, (weights, _)) in enumerate(
            zip(case.parameters, values(case, 0), strict=True)
        ):
            name, where = f"p{number}", numbers(parameter.shape)
            if parameter.placement is not None and mesh is not None:
                placement: Placement = (
                    Replicate() if parameter.placement < 0 else Shard(parameter.placement)
                )
                where = distribute_tensor(where, mesh, [placement], src_data_rank=None)
            self._where[name] = where
            self.elements[name] = where.to_local() if isinstance(where, DTensor) else where
            local = weights.flatten()[self.elements[name]]
            self.named.append((name, nn.Parameter(like(where, local))))

    def optimizer(self) -> torch.optim.Optimizer:
        """Two groups: parameters of even and of odd numbers."""
        tensors = [tensor for _, tensor in self.named]
        return torch.optim.SGD([{"params": p} for p in (tensors[::2], tensors[1::2]) if p], lr=0.1)

    def put(self, step: int) -> dict[str, Tensor | None]:
        """Give every parameter its gradient of this step; the whole ones."""
        whole: dict[str, Tensor | None] = {}
        for (name, tensor), parameter, (_, gradient) in zip(
            self.named, self.case.parameters, values(self.case, step), strict=True
        ):
            whole[name] = None if parameter.missing else gradient
            tensor.grad = None
            if not parameter.missing:
                local = gradient.flatten()[self.elements[name]]
                tensor.grad = like(self._where[name], local)
        return whole

    def local(self) -> dict[str, Tensor]:
        """This rank's gradients."""
        return {
            name: tensor.grad.to_local() if isinstance(tensor.grad, DTensor) else tensor.grad
            for name, tensor in self.named
            if tensor.grad is not None
        }


def check(seed: int, number: int) -> str | None:
    """Run one case on this rank; what is wrong on any rank, or None."""
    case = draw(seed, number)
    model = Model(case)
    memory: dict[str, Any] = {}
    clipper = GradClipper(
        model.named,
        build(case.policy),
        on_nonfinite=case.mode,
        optimizer=model.optimizer() if "group_norm" in str(case.policy) else None,
    )
    for step in range(case.steps):
        whole = model.put(step)
        outcome: tuple[str | None, bytes]
        try:
            outcome = None, _step(case, model, clipper, whole, memory)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}", b""
        # Here and nowhere else the ranks tell each other, so that none goes on alone.
        everyones = [outcome]
        if dist.is_initialized() and dist.get_world_size() > 1:
            everyones = [outcome] * dist.get_world_size()
            dist.all_gather_object(everyones, outcome)
        for rank, (trouble, _) in enumerate(everyones):
            if trouble is not None:
                return f"rank {rank}, step {step}: {trouble}"
        if len({packed for _, packed in everyones}) > 1:
            return f"step {step}: the ranks' reports differ"
        if not outcome[1]:
            break
    return None


def _step(
    case: Case,
    model: Model,
    clipper: GradClipper,
    whole: dict[str, Tensor | None],
    memory: dict[str, Any],
) -> bytes:
    """Clip once and compare; every number of the report, empty after an error that had to come."""
    before = {name: local.clone() for name, local in model.local().items()}
    wants = _expected(case, whole, memory)
    blamed: tuple[str, ...] = ()
    report = None
    try:
        report = clipper.clip_()
    except NonFiniteGradientError as error:
        blamed = error.parameters
    if wants is None or report is None:
        bad = [n for n, g in whole.items() if g is not None and not torch.isfinite(g).all()]
        assert case.mode == "error", f"an error under {case.mode}"
        assert blamed == tuple(bad), f"an error for {blamed} instead of {bad}"
        _same_bits(before, model.local())
        return b""
    want, rounded = wants
    assert tuple(sorted(report.nonfinite)) == want.nonfinite, f"non-finite {report.nonfinite}"
    assert bool(report.skipped) == want.skipped, f"skipped {report.skipped}"
    for name, norm in report.parameter_norms.items():
        assert is_near(norm, want.parameter_norms[name]), (
            f"norm of {name}: {norm}, expected {want.parameter_norms[name]}"
        )
    total = torch.tensor(want.total_norm, dtype=torch.float64).to(report.total_norm.dtype).item()
    assert is_near(report.total_norm.item(), total, 2e-45), (
        f"total norm {report.total_norm.item()}, expected {total}"
    )
    if want.skipped:
        _same_bits(before, model.local())
    else:
        _compare(case, model, want, rounded)
    return _packed(report)


def _expected(case: Case, whole: dict[str, Tensor | None], memory: dict[str, Any]) -> Any:
    """What the oracle says without and with rounding after each policy; None for an error."""
    weights = {f"p{n}": _array(w) for n, (w, _) in enumerate(values(case, 0))}
    gradients = {name: None if g is None else _array(g) for name, g in whole.items()}
    groups = {name: number % 2 for number, name in enumerate(weights)}
    known = {"groups": groups, "on_nonfinite": case.mode}
    try:
        rounded = expected(
            case.policy, gradients, weights, memory=dict(memory), stored=_stored(case), **known
        )
        return expected(case.policy, gradients, weights, memory=memory, **known), rounded
    except FloatingPointError:
        return None


def _array(tensor: Tensor) -> Any:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).numpy()


def _stored(case: Case) -> Callable[[str, Any], Any]:
    dtypes = {f"p{n}": getattr(torch, p.dtype) for n, p in enumerate(case.parameters)}

    def rounded(name: str, array: Any) -> Any:
        return _array(torch.from_numpy(np.asarray(array)).to(dtypes[name]))

    return rounded


def is_near(have: float, want: float, least: float = 1e-322) -> bool:
    """Within 1e-6, or ``least``; NaN and inf alike."""
    if math.isnan(want):
        return math.isnan(have)
    return have == want or abs(have - want) <= 1e-6 * abs(want) + least


def _same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for name, local in after.items():
        same = before[name].reshape(-1).view(torch.uint8).equal(local.reshape(-1).view(torch.uint8))
        assert same, f"{name} was changed"


def _stages(policy: Any) -> int:
    """Policies that may act on one parameter one after another."""
    if policy is None:
        return 0
    if isinstance(policy, list):
        return sum(map(_stages, policy))
    if "by_name" in policy:
        return max(map(_stages, [*policy["by_name"].values(), policy.get("default")]))
    return 1


def _compare(case: Case, model: Model, want: Any, rounded: Any) -> None:
    """Each element within rounding of the oracle.

    A second pass over the gradients measures what the first has rounded. How far that may move a
    result is seen from the oracle itself, with and without rounding after each policy.
    """
    stages = _stages(case.policy)
    for name, local in model.local().items():
        exact, other = (each.gradients[name] for each in (want, rounded))
        where = model.elements[name].numpy()
        parts = [np.asarray(each).reshape(-1)[where] for each in (exact, other)]
        reals = [p.view(np.float64) if np.iscomplexobj(p) else p for p in map(np.atleast_1d, parts)]
        have = torch.atleast_1d(local.detach())
        if have.is_complex():  # inf + 1j times 0: which of the two parts is NaN is nobody's promise
            bad = np.isnan(have.numpy())
            have = torch.where(torch.from_numpy(bad), complex(math.nan, math.nan), have)
            for real in reals:
                pairs = real.reshape(-1, 2)
                pairs[np.isnan(pairs).any(1)] = math.nan
        have = torch.view_as_real(have).flatten(-2) if have.is_complex() else have
        with np.errstate(all="ignore"):
            loose = np.nan_to_num(2 * np.abs(reals[0] - reals[1]), posinf=0.0)
            near = np.abs(have.double().numpy() - reals[0]) <= loose
        close = torch.from_numpy(np.where(near, reals[0], have.double().numpy())).to(have.dtype)
        # A product of coefficients below 2.2e-308 has fewer bits than others, or none.
        applied = np.nan_to_num(np.abs(want.coefficients[name]), nan=1.0)
        smallest = max(float(np.min(applied, initial=1.0)), 5e-324)
        error = stages * (2e-6 + 5e-324 / smallest)
        assert_rounded(close, reals[0], ulps=float(stages), coefficient_error=error, name=name)


def _packed(report: Any) -> bytes:
    """Every number of a report, bit by bit."""
    numbers = [
        *report.parameter_norms.values(),
        *report.parameter_coefficients.values(),
        float(report.total_norm),
        float(report.clipped_norm),
        float(report.coefficient),
        float(report.threshold),
    ]
    return struct.pack(f"{len(numbers)}d", *numbers)


def _batch(seed: int, cases: range) -> list[tuple[int, str]]:
    """Numbers of the cases that fail, and why."""
    outcomes = ((number, check(seed, number)) for number in cases)
    return [(number, why) for number, why in outcomes if why is not None]


def failures(seed: int, count: int) -> dict[int, str]:
    """The cases below ``count`` that fail, and why; every second one on two ranks."""
    found: dict[int, str] = {}
    for start in range(0, count, BATCH):
        for offset, world in enumerate(WORLDS):
            cases = range(start + offset, min(start + BATCH, count), len(WORLDS))
            found.update(run_on_ranks(_batch, world, seed, cases, timeout=600)[0])
    return found


def run(count: int, seed: int) -> list[Row]:
    """One row for each group of policies and dtypes."""
    times = Counter(draw(seed, number).group for number in range(count))
    failed: dict[str, list[str]] = defaultdict(list)
    for number, why in sorted(failures(seed, count).items()):
        group = draw(seed, number).group
        failed[group].append(why)
        print(f"{number} ({group}): {why}\n    {draw(seed, number)}")
    return [
        Row(
            fault=f"{NAMES[group.partition('|')[0]]}, {group.partition('|')[2]}",
            how="drawn cases, half of them on 2 ranks",
            times=times[group],
            outcome="as the oracle says" if not failed[group] else failed[group][0][:80],
            failures=len(failed[group]),
        )
        for group in (
            f"{kind}|{dtype}"
            for kind, dtype in itertools.product(NAMES, (*KINDS, "several dtypes"))
        )
        if times[group]
    ]


NAMES = {
    "scaling": "one scaling policy",
    "value": "`value`",
    "agc": "`agc`",
    "memory": "one policy with a memory, 3 steps",
    "chain": "a chain",
    "by_name": "`by_name`",
}
