"""Clipping inside an optimizer: a GradClipper that follows the optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributed import ProcessGroup

from distclip import policies
from distclip.clipper import GradClipper
from distclip.options import OnNonfinite
from distclip.report import ClipReport


class Clipping:
    """``dreamer_agc`` with each group's own ``agc`` and ``pmin``, and what NaN and inf do.

    Args:
        on_nonfinite, process_group: as in :class:`distclip.GradClipper`.
    """

    def __init__(self, on_nonfinite: OnNonfinite, process_group: ProcessGroup | None) -> None:
        self.on_nonfinite = on_nonfinite
        self.process_group = process_group
        self.report: ClipReport | None = None
        self._clipper: GradClipper | None = None
        self._built_for: object = None

    def __getstate__(self) -> dict[str, Any]:
        # The clipper is built anew, for the parameters of the copy.
        return {
            **self.__dict__,
            "report": None,
            "_clipper": None,
            "_built_for": None,
        }

    def clip_(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Clip the gradients in place.

        The clipper is built before the first update and not with the optimizer: until then FSDP2
        may replace the parameters. It is built anew whenever the groups have changed.

        Returns:
            Whether the update is to be dropped. Read on the host under ``"skip"`` only.
        """
        settings = [(group["agc"], group["pmin"]) for group in groups]
        if self.on_nonfinite == "pass" and not any(agc for agc, _ in settings):
            self.report = None
            return False
        wanted = (settings, [tuple(map(id, group["params"])) for group in groups])
        if self._clipper is None or self._built_for != wanted:
            self._clipper = self._build(groups, settings)
            self._built_for = wanted
        self.report = self._clipper.clip_()
        # dreamer_agc itself never drops an update.
        return self.on_nonfinite == "skip" and bool(self.report.skipped)

    def _build(
        self, groups: Sequence[dict[str, Any]], settings: Sequence[tuple[float, float]]
    ) -> GradClipper:
        chosen = [policies.dreamer_agc(agc, pmin) if agc else None for agc, pmin in settings]
        alike = all(policy == chosen[0] for policy in chosen)
        pairs = [
            (name if alike else f"group{number}.{name}", parameter)
            for number, group in enumerate(groups)
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ]
        policy: policies.Policy = chosen[0] or policies.measure()
        if not alike:
            policy = policies.by_name({f"group{n}.*": each for n, each in enumerate(chosen)})
        return GradClipper(
            pairs, policy, on_nonfinite=self.on_nonfinite, process_group=self.process_group
        )
