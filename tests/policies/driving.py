"""Policies with a memory, driven by scripted norms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distclip.policies import ParameterInfo, Policy, Scale, Statistics

GOLDEN = Path(__file__).parent.parent / "golden" / "golden_stateful.npz"


def drive(
    policy: Policy, norms: Any, losses: Any = None
) -> tuple[list[Any], list[dict[str, Tensor]]]:
    """The first action and the state of every step; ``norms`` is ``(steps, parameters)``."""
    table = torch.as_tensor(np.asarray(norms, np.float64))
    table = table.reshape(len(table), -1)
    infos = [ParameterInfo(f"p{i}", (3,)) for i in range(table.shape[1])]
    state, actions, states = policy.init(infos), [], []
    for step, row in enumerate(table):
        loss = None if losses is None else torch.tensor(float(losses[step]), dtype=torch.float64)
        (action, *_), state = policy.update(Statistics(infos, {2.0: row}, loss=loss), state)
        actions.append(action)
        states.append(state)
    return actions, states


def thresholds(actions: Sequence[Scale]) -> np.ndarray:
    return np.array([float(action.threshold) for action in actions])  # type: ignore[arg-type]


def coefficients(actions: Sequence[Scale], size: int = 1) -> np.ndarray:
    rows = np.array([action.coefficients.expand(size).numpy() for action in actions])
    return rows[:, 0] if size == 1 else rows


GOOD = 1.0 + 0.1 * np.sin(np.arange(400))
