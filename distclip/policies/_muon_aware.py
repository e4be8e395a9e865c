"""Clipping what AdamW steps, and leaving alone what Muon orthogonalises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from distclip.policies._global_norm import GlobalNorm
from distclip.policies.checks import NormOrder, Threshold
from distclip.policies.compose import ByPart
from distclip.policies.registry import register

BY_MUON = (
    "group.use_muon=True or group.algorithm=*muon*|dion or "
    "optimizer=*Muon*, not group.use_muon=False, not group.algorithm=*adam*|lion"
)
"""What Muon steps: as an optimizer of its own (torch.optim.Muon), or as groups of one that steps
the rest by AdamW, marked by ``use_muon`` (Keller Jordan, DeepSpeed) or ``algorithm`` (Dion)."""


@register
class MuonAware(ByPart):
    """``global_norm`` over what other optimizers step; what Muon steps is left alone.

    Muon makes the update of a matrix orthogonal, so that its length does not depend on the length
    of the gradient. A coefficient that changes from step to step still gets into its momentum: a
    gradient that was divided by a norm which others dominate is lost beside the earlier ones. And
    the gradients of Muon's matrices, which are often much the larger ones, shrink what AdamW steps
    beside them. So the norm is that of AdamW's parameters alone, and only these are scaled.

    Muon is known by the class of the optimizer, or of a base class (``*Muon*``), and by the keys
    ``use_muon`` and ``algorithm`` of its parameter groups. The optimizers have to be known:
    ``clipper.attach(muon, adamw)``, or ``GradClipper(..., optimizer=[muon, adamw])``.

    For another choice write it out: ``by_part({"optimizer=Muon": ...}, default=...)``.

    Args:
        max_norm: threshold >= 0 of what is not Muon's; ``math.inf`` measures only.
        norm_type: order p > 0 or inf.

    Raises:
        ConfigurationError: a negative or NaN threshold, p <= 0; at the first clip, no optimizer.
    """

    name: ClassVar[str] = "muon_aware"
    labels: ClassVar[Mapping[str, str]] = {BY_MUON: "muon"}

    def __init__(self, max_norm: Threshold, norm_type: NormOrder = 2.0) -> None:
        super().__init__({BY_MUON: None}, default=GlobalNorm(max_norm, norm_type))


muon_aware = MuonAware
