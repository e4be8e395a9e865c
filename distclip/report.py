"""What one clipping step found and did."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distclip.common.exponents import Exponents, by_dtype, of_row, row_dtypes
from distclip.common.notebook import report_html
from distclip.common.rollups import Floats, check_depth, grouped, joint
from distclip.engine.walked import Walked
from distclip.kernels.transfer import HostCopy
from distclip.policies.protocol import combine_norms


@dataclass(frozen=True, eq=False, repr=False)
class ClipReport:
    """The result of :meth:`GradClipper.clip_`.

    Reading it never starts a collective, and what is not read is not computed.

    The scalars are 0-dim tensors on the statistics' device: float32, or float64 where a gradient
    is float64. Norms are of the policy's order (2 where it has none) over whole tensors, each
    element counted once.

    Attributes:
        total_norm: norm of all gradients before clipping.
        clipped_norm: the same after it. NaN where an elementwise clamp came after a scaling, since
            that would have to be measured again.
        coefficient: the smallest coefficient that was applied, 1 where nothing was clipped. A
            lower bound where a chain scales the same parameter by units of two kinds.
        threshold: the policy's threshold in its own measure (``max_norm``, ``clip_factor``, ...);
            of a composed policy the first one's; NaN where there is none.
        skipped: bool; this update is to be skipped (``attach`` does it).
        leave_out: for what makes the step: ``skipped``, or None where the step is to be made in any
            case, so that nobody has to read a flag of the device.
        clipped_fraction: mean over parameters of the share of their units that were clipped; a
            parameter clipped as a whole counts 1.
        weight_norm: norm of all weights, in a step that measures ``ratios``; else NaN. Weights that
            take no gradient do not count.
        noise_scale: gradient noise scale so far, in samples, where a
            :class:`monitor.RankNoiseScale <distclip.monitor.RankNoiseScale>` follows; else NaN.
    """

    names: Sequence[str]
    skipped: Tensor
    _norm_type: float
    _dtype: torch.dtype
    _walked: Walked
    leave_out: Tensor | None = None
    noise_scale: float = math.nan

    @cached_property
    def total_norm(self) -> Tensor:
        """Norm of all gradients before clipping."""
        return self._walked.total_norm.to(self._dtype)

    @cached_property
    def clipped_norm(self) -> Tensor:
        """Norm of all gradients after clipping."""
        # Up to this order, what float32 shows (1e-45 to 3e38) has powers in float64's range; what
        # would leave that range is 0 or inf in float32 anyway.
        in_range = self._dtype is torch.float32 and self._norm_type <= 6.0
        norm = combine_norms(self._walked.after, self._norm_type, in_range=in_range)
        norm = norm.to(self._dtype)
        return self._unless_skipped(norm, self.total_norm)

    @cached_property
    def coefficient(self) -> Tensor:
        """The smallest coefficient that was applied.

        Where a policy decides per unit and others scale the same parameters, or other parameters
        in one ``by_name``, it may lie below that: the product of what was smallest in each.
        """
        least = (
            self._walked.smallest.min() if len(self.names) else self._walked.smallest.new_ones(())
        )
        return self._unless_skipped(least, 1.0).to(self._dtype)

    @cached_property
    def threshold(self) -> Tensor:
        """The policy's threshold in its own measure."""
        return self._walked.threshold.to(self._dtype)

    @cached_property
    def clipped_fraction(self) -> Tensor:
        """Mean over parameters of the share of their units that were clipped."""
        fraction = (
            self._walked.clipped.mean() if len(self.names) else self._walked.clipped.new_zeros(())
        )
        return self._unless_skipped(fraction, 0.0).to(self._dtype)

    @cached_property
    def weight_norm(self) -> Tensor:
        """Norm of all weights that were measured."""
        weights = self._walked.weights
        if weights is None:
            return self.total_norm.new_full((), math.nan)
        return combine_norms(weights, self._norm_type).to(self._dtype)

    @cached_property
    def parameter_norms(self) -> Mapping[str, float]:
        """Name -> norm of its whole gradient before clipping. Reads the host."""
        return dict(zip(self.names, self._walked.raw.tolist(), strict=True))

    @cached_property
    def parameter_ratios(self) -> Mapping[str, float]:
        """Name -> norm of its gradient before clipping by that of its weight. Reads the host.

        Empty but in a step that measures ``ratios``. inf for a weight of 0, NaN where the gradient
        is 0 too.
        """
        if self._walked.weights is None:
            return {}
        ratios = self._walked.raw / self._walked.weights
        return dict(zip(self.names, ratios.tolist(), strict=True))

    @cached_property
    def exponents(self) -> Mapping[str, Exponents]:
        """Name -> counts of its gradient's elements by binary exponent. Reads the host.

        Empty but in a step that counts ``exponents``; without the parameters that have no gradient.
        Whole tensors, each element counted once, as they were before clipping; under a gradient
        scaler that has not unscaled them, as they lie in memory.
        """
        if self._walked.exponents is None:
            return {}
        table = self._of_exponents.read().numpy()
        rows = zip(self.names, row_dtypes(table), table, strict=True)
        return {name: of_row(dtype, row) for name, dtype, row in rows if dtype is not None}

    @cached_property
    def exponents_by_dtype(self) -> Mapping[str, Exponents]:
        """Dtype -> the same of all gradients of it together. Reads the host."""
        if self._walked.exponents is None:
            return {}
        found = by_dtype(self.names, self._of_exponents.read().numpy())
        return {dtype: whole for dtype, (whole, _) in found.items()}

    def module_norms(self, depth: int) -> Mapping[str, float]:
        """Module path -> joint norm of its parameters' gradients before clipping. Reads the host.

        Args:
            depth: parameters whose names have the first ``depth`` parts in common are one module;
                of ``layers.0.attn.weight``, 1 is ``layers`` and 2 is ``layers.0``. A parameter
                whose name has fewer parts stands for itself.

        Raises:
            ConfigurationError: ``depth < 1``.
        """
        return {path: each["norm"] for path, each in self._modules(depth).items()}

    def module_ratios(self, depth: int) -> Mapping[str, float]:
        """Module path -> joint norm of its gradients by that of its weights. Reads the host.

        As :meth:`module_norms`; empty where :attr:`parameter_ratios` is.
        """
        found = self._modules(depth)
        return {path: each["ratio"] for path, each in found.items() if "ratio" in each}

    def _modules(self, depth: int) -> dict[str, dict[str, float]]:
        return self.fetch(per_parameter=False, modules=depth)()["modules"]  # type: ignore[no-any-return]

    @cached_property
    def part_norms(self) -> Mapping[str, float]:
        """Part of the model -> norm of all its gradients before clipping. Reads the host.

        The parts are the keys of the policy's first ``by_part`` or ``by_name``, and ``"default"``;
        also those that the policy leaves alone. Empty for a policy without parts.
        """
        return {part: norm.item() for part, norm in self._walked.part_norms.items()}

    @cached_property
    def parameter_coefficients(self) -> Mapping[str, float]:
        """Name -> what its gradient was multiplied by. Reads the host.

        Where the units of a parameter have different coefficients: its norm after clipping by its
        norm before.
        """
        coefficients = torch.where(self.skipped, 1.0, self._walked.coefficients)
        return dict(zip(self.names, coefficients.tolist(), strict=True))

    @cached_property
    def nonfinite(self) -> tuple[str, ...]:
        """Names of the parameters whose gradient's norm is NaN or inf. Reads the host.

        By a NaN or inf in it; or by a norm beyond float64, of a gradient that is finite.
        """
        flags = self._walked.nonfinite.tolist()
        return tuple(name for name, bad in zip(self.names, flags, strict=True) if bad)

    def tensors(self) -> dict[str, Tensor]:
        """The scalars of this step by field, for a log that takes tensors. Reads no host.

        Returns:
            0-dim tensors. ``nonfinite`` is the number of the parameters that have NaN or inf;
            ``threshold`` is left out where the policy has none.
        """
        found = {
            "total_norm": self.total_norm,
            "clipped_norm": self.clipped_norm,
            "coefficient": self.coefficient,
            "threshold": self.threshold,
            "clipped_fraction": self.clipped_fraction,
            "skipped": self.skipped,
            "nonfinite": self._walked.nonfinite.sum(),
        }
        if not self._walked.has_threshold:
            del found["threshold"]
        if not math.isnan(self.noise_scale):
            found["noise_scale"] = self.total_norm.new_full((), self.noise_scale)
        return found

    def to_dict(self, *, per_parameter: bool = True, modules: int | None = None) -> dict[str, Any]:
        """Plain numbers, for a log. Reads the host.

        Where the norms are no 2-norms, ``"norm_type"`` is their order, ``"inf"`` for inf.

        Args:
            per_parameter: with ``"parameters": {name: {"norm": ..., "coefficient": ...}}``, and a
                ``"ratio"`` in a step that measures ``ratios``.
            modules: with ``"modules"``, the same of the modules of this depth; see
                :meth:`module_norms`.

        Raises:
            ConfigurationError: ``modules < 1``.
        """
        return self.fetch(per_parameter=per_parameter, modules=modules)()

    def fetch(self, *, per_parameter: bool = True, modules: int | None = None) -> ReportFetch:
        """Start copying what :meth:`to_dict` gives, and wait for nothing.

        Args:
            per_parameter: as for :meth:`to_dict`.
            modules: as for :meth:`to_dict`.

        Returns:
            Called, it waits for the copy and gives the numbers; ``ready`` says whether a call waits
            for nothing.
        """
        if modules is not None:
            check_depth(modules)
        parameters = self._of_parameters if per_parameter or modules is not None else None
        return ReportFetch(
            self.names,
            tuple(self._walked.part_norms),
            self._summary,
            parameters,
            None if self._walked.exponents is None else self._of_exponents,
            per_parameter=per_parameter,
            modules=modules,
            order=self._norm_type,
            noise_scale=self.noise_scale,
        )

    def _unless_skipped(self, value: Tensor, instead: Tensor | float) -> Tensor:
        """``instead`` in a step that is to be skipped, where there may be such steps."""
        if self._walked.skips_nothing:
            return value
        return torch.where(self.skipped, instead, value)

    @cached_property
    def _summary(self) -> HostCopy:
        scalars = [
            self.total_norm, self.clipped_norm, self.coefficient, self.threshold,
            self.clipped_fraction, self.skipped, self.weight_norm,
        ]  # fmt: skip
        whole = torch.stack([scalar.to(self._dtype) for scalar in scalars]).double()
        parts = [norm.reshape(1) for norm in self._walked.part_norms.values()]
        return HostCopy(torch.cat((whole, self._walked.nonfinite.double(), *parts)))

    @cached_property
    def _of_parameters(self) -> HostCopy:
        coefficients = torch.where(self.skipped, 1.0, self._walked.coefficients)
        weights = () if self._walked.weights is None else (self._walked.weights,)
        return HostCopy(torch.stack((self._walked.raw, coefficients, *weights)))

    @cached_property
    def _of_exponents(self) -> HostCopy:
        assert self._walked.exponents is not None
        return HostCopy(self._walked.exponents)

    def __repr__(self) -> str:
        return f"<ClipReport: {self}>"

    def _repr_html_(self) -> str:
        """What a notebook shows. Reads the host, once."""
        return report_html(self.to_dict())

    def __str__(self) -> str:
        if bool(self.skipped.item()):
            return f"norm {self.total_norm.item():.4g}, skipped"
        threshold = self.threshold.item()
        limit = "" if math.isnan(threshold) else f", threshold {threshold:.4g}"
        return (
            f"norm {self.total_norm.item():.4g} -> {self.clipped_norm.item():.4g} "
            f"(coefficient {self.coefficient.item():.4g}{limit})"
        )


class ReportFetch:
    """Numbers of a :class:`ClipReport` on their way to the host; made by ``ClipReport.fetch``."""

    def __init__(
        self,
        names: Sequence[str],
        parts: Sequence[str],
        summary: HostCopy,
        parameters: HostCopy | None,
        exponents: HostCopy | None,
        *,
        per_parameter: bool,
        modules: int | None,
        order: float,
        noise_scale: float,
    ) -> None:
        self._names = names
        self._noise_scale = noise_scale
        self._per_parameter, self._depth, self._order = per_parameter, modules, order
        self._parts = parts
        self._summary = summary
        self._parameters, self._exponents = parameters, exponents

    @property
    def ready(self) -> bool:
        """Whether a call waits for nothing."""
        copies = self._summary, self._parameters, self._exponents
        return all(copy is None or copy.ready for copy in copies)

    def __call__(self) -> dict[str, Any]:
        """What ``ClipReport.to_dict`` gives; waits for the copy."""
        values = self._summary.read().numpy()
        before, after, coefficient, threshold, fraction, skipped, weights = values[:7].tolist()
        flags = values[7 : 7 + len(self._names)]
        shown: dict[str, Any] = {
            "total_norm": before,
            "clipped_norm": after,
            "coefficient": coefficient,
            "threshold": threshold,
            "skipped": bool(skipped),
            "clipped_fraction": fraction,
            "nonfinite": [self._names[i] for i in flags.nonzero()[0].tolist()],
        }
        if self._parts:
            norms = values[7 + len(self._names) :].tolist()
            shown["parts"] = dict(zip(self._parts, norms, strict=True))
        if self._order != 2.0:
            shown["norm_type"] = "inf" if math.isinf(self._order) else self._order
        if not math.isnan(weights):
            shown["weight_norm"] = weights
        if not math.isnan(self._noise_scale):
            shown["noise_scale"] = self._noise_scale
        if self._exponents is not None:
            counted = by_dtype(self._names, self._exponents.read().numpy())
            shown["exponents"] = {
                dtype: {**whole.to_dict(), "nearest": nearest}
                for dtype, (whole, nearest) in counted.items()
            }
        if self._parameters is not None:
            found = self._parameters.read().numpy()
            if self._depth is not None:
                groups = grouped(self._names, self._depth)
                shown["modules"] = _named(groups, _rolled_up(found, groups.values(), self._order))
            if self._per_parameter:  # the last: readers may leave it out
                shown["parameters"] = _named(self._names, found)
        return shown


def _rolled_up(found: Floats, groups: Collection[list[int]], order: float) -> Floats:
    """Norms, coefficients and norms of weights: of groups of parameters from those of each."""
    norms, coefficients, *weights = found
    parts = np.stack((norms, norms * coefficients, *weights))
    joined = np.empty((len(parts), len(groups)))
    for number, places in enumerate(groups):
        joined[:, number] = joint(parts[:, places], order)
    with np.errstate(all="ignore"):
        joined[1] = np.where(joined[0] == 0.0, 1.0, joined[1] / joined[0])
    return joined


def _named(names: Iterable[str], found: Floats) -> dict[str, dict[str, float]]:
    """By name: norm, coefficient, and ratio of gradient to weight where that was measured."""
    norms, coefficients, *weights = found
    with np.errstate(all="ignore"):
        columns = np.stack((norms, coefficients, *(norms / each for each in weights)), axis=1)
    fields = ("norm", "coefficient", "ratio")[: columns.shape[1]]
    rows = [dict(zip(fields, row, strict=True)) for row in columns.tolist()]
    return dict(zip(names, rows, strict=True))
