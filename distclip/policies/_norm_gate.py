"""Skipping the whole update by the norm of a part of the model."""

from __future__ import annotations

from typing import ClassVar

from distclip.policies._skip_norm import SkipNorm
from distclip.policies.checks import NormOrder, Threshold
from distclip.policies.compose import ByPart
from distclip.policies.registry import register


@register
class NormGate(ByPart):
    """Skip the whole update where the joint norm of one part's gradients is above ``max_norm``.

    ::

        chain(norm_gate("lm_head.*", 0.5), global_norm(1.0))

    Dynamic Gradient Gating (arXiv 2605.19425) drops updates by the norm of the output layer's
    gradient, which rises where a policy has moved too far from the rollouts that it is trained on.
    The rule by which it moves its threshold is not published; here it is fixed. It is
    ``by_part({part: skip_norm(max_norm)})``, so that ``report.part_norms`` has the norm that it
    decides by; for a threshold that follows the norm put ``skip_spikes`` in place of ``skip_norm``.

    It changes no gradient: what is not skipped is left to the policies behind it in a chain. A step
    with a NaN or inf norm of the part is skipped. A part without parameters never skips, and is
    mentioned in the log.

    Args:
        part: a name pattern such as ``"lm_head.*"``, or a part of the model as in ``by_part``
            (``"kind=embedding"``).
        max_norm: threshold >= 0; ``math.inf`` skips non-finite norms only.
        norm_type: order p > 0 or inf.

    Raises:
        ConfigurationError: a part that cannot be read, a negative or NaN threshold, p <= 0.
    """

    name: ClassVar[str] = "norm_gate"

    def __init__(self, part: str, max_norm: Threshold, norm_type: NormOrder = 2.0) -> None:
        key = f"name={part}" if isinstance(part, str) and "=" not in part else part
        super().__init__({key: SkipNorm(max_norm, norm_type)})


norm_gate = NormGate
