"""Adaptive gradient clipping (AGC) as in NFNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from distclip.errors import ConfigurationError
from distclip.policies._torch import torch
from distclip.policies.checks import NormOrder, Positive
from distclip.policies.protocol import ParameterInfo, UnitPolicy, matches
from distclip.policies.registry import register

if TYPE_CHECKING:
    from torch import Tensor

GRADIENT_FLOOR = 1e-6
"""Floor of the gradient norm in the division, as timm and the NFNet code have it."""


@register
@dataclass(frozen=True, repr=False)
class AGC(UnitPolicy):
    """Adaptive gradient clipping: each unit's gradient against the same unit's weight.

    With ``m_u = clip_factor * max(||w_u||, eps)``: where ``||g_u|| > m_u``,
    ``g_u *= m_u / max(||g_u||, 1e-6)``. Brock et al. 2021 (arXiv 2102.06171, equation 3).

    Norms are p-norms of the order ``norm_type``, of gradients and weights alike, as in timm.

    A unit is an output row: index over dim 0, reduced over all other dims (as timm; torch's layout
    is output first). A vector or scalar is one unit. The authors exclude only the final linear
    layer: ``by_name({"head.weight": None}, default=agc(0.01))``.

    Args:
        clip_factor: lambda, > 0 and finite.
        eps: floor of the weight norm, > 0: without it zero-initialised weights never train.
        unit: ``"row"``, or ``"tensor"`` for one unit per parameter.
        unit_dims: name pattern -> dims that index the units of the parameters that match, first
            match wins; stacked experts ``[E, out, in]``: ``{"*.experts.*": (0, 1)}``.
        norm_type: order p > 0 or inf of the norms that are compared.

    Raises:
        ConfigurationError: ``clip_factor <= 0``, ``eps <= 0``, an unknown unit, ``norm_type <= 0``,
            dims that a matching parameter does not have.
    """

    clip_factor: Positive = 0.01
    eps: Positive = 1e-3
    unit: Literal["row", "tensor"] = "row"
    unit_dims_by_name: tuple[tuple[str, tuple[int, ...]], ...] = ()
    norm_type: NormOrder = 2.0
    name: ClassVar[str] = "agc"

    def __init__(
        self,
        clip_factor: Positive = 0.01,
        eps: Positive = 1e-3,
        unit: Literal["row", "tensor"] = "row",
        unit_dims: Mapping[str, Sequence[int]] | None = None,
        norm_type: NormOrder = 2.0,
    ) -> None:
        if unit not in ("row", "tensor"):
            raise ConfigurationError(f'agc: unit must be "row" or "tensor", got {unit!r}')
        set_ = object.__setattr__
        set_(self, "clip_factor", clip_factor)
        set_(self, "eps", eps)
        set_(self, "unit", unit)
        items = tuple((name, _dims(name, dims)) for name, dims in (unit_dims or {}).items())
        set_(self, "unit_dims_by_name", items)
        set_(self, "norm_type", norm_type)
        self.__post_init__()

    def __repr__(self) -> str:
        dims = dict(self.unit_dims_by_name) or None
        # Left out where it is 2: ranks, logs and digests compare this text with older ones.
        order = "" if self.norm_type == 2.0 else f", norm_type={self.norm_type!r}"
        return (
            f"AGC(clip_factor={self.clip_factor!r}, eps={self.eps!r}, unit={self.unit!r}, "
            f"unit_dims={dims!r}{order})"
        )

    @property
    def threshold(self) -> float | None:
        return self.clip_factor

    def unit_dims(self, parameter: ParameterInfo) -> tuple[int, ...]:
        ndim = len(parameter.shape)
        for pattern, dims in self.unit_dims_by_name:
            if matches(parameter.name, pattern):
                if any(not -ndim <= dim < ndim for dim in dims):
                    raise ConfigurationError(
                        f"agc: unit_dims[{pattern!r}] = {list(dims)} does not fit parameter "
                        f"{parameter.name!r} of shape {list(parameter.shape)}"
                    )
                return tuple(sorted({dim % ndim for dim in dims}))
        return (0,) if self.unit == "row" and ndim > 1 else ()

    def unit_coefficients(self, gradient_norms: Tensor, weight_norms: Tensor) -> Tensor:
        # In place where it can be: rows are many, and each of these vectors is a number for each.
        limit = torch.clamp(weight_norms, min=self.eps).mul_(self.clip_factor)
        floored = torch.clamp(gradient_norms, min=GRADIENT_FLOOR)
        shrunk = torch.div(limit, floored, out=floored)
        # A NaN gradient is not ">" anything, but it must not pass as "within the limit" either.
        return shrunk.masked_fill_(gradient_norms <= limit, 1.0)


def _dims(pattern: str, dims: Sequence[int]) -> tuple[int, ...]:
    if isinstance(dims, (str, bytes)) or not all(
        isinstance(dim, int) and not isinstance(dim, bool) for dim in dims
    ):
        raise ConfigurationError(
            f"agc: unit_dims[{pattern!r}] must be a list of dims such as [0, 1], got {dims!r}"
        )
    return tuple(dims)


agc = AGC
