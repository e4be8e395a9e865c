"""A report of a clip to give to a sink."""

from typing import Any


class Report:
    """Counts how often it is read: reading waits for the device."""

    def __init__(self, norm: float = 1.5) -> None:
        self.norm = norm
        self.reads = 0

    def to_dict(self, *, per_parameter: bool = True) -> dict[str, Any]:
        self.reads += 1
        shown: dict[str, Any] = {"total_norm": self.norm, "skipped": False, "nonfinite": []}
        return {**shown, "parameters": {"w": {"norm": self.norm}}} if per_parameter else shown
