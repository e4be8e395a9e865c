"""Goldens of policies of 2025 and 2026, from the published algorithms, in plain Python and numpy.

    python tests/golden/make_frontier.py

writes ``golden_frontier.npz`` beside this file. Each function follows a publication step by step
and shares nothing with distclip or with its oracle. ``tests/policies/test_frontier.py`` holds the
file, this script and the policies together.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

STEPS, PARAMETERS = 240, 5
SEED = 26


def norms() -> np.ndarray:
    """Norms of gradients, ``(STEPS, PARAMETERS)``: a drift, noise, spikes of one and of all."""
    random = np.random.default_rng(SEED)
    scale = np.array([0.3, 1.0, 2.0, 0.05, 4.0])
    table = scale * np.exp(0.5 * np.sin(np.arange(STEPS) / 40))[:, None]
    table = table * random.lognormal(0.0, 0.15, (STEPS, PARAMETERS))
    table[90] *= 30.0
    table[91] *= 8.0
    table[150, 1] *= 200.0
    table[200:206] *= 12.0
    return table


def skip_norm(table: np.ndarray, threshold: float, clip: float) -> np.ndarray:
    """By step, the coefficient of the gradients; 0 where the step is not made.

    Megatron-LM, ``ChainedOptimizer.step``: the joint norm is compared with
    ``grad_norm_skip_threshold``; gradients are scaled by ``clip_grad / (norm + 1e-6)`` below 1.
    """
    result = []
    for row in table:
        norm = float(np.sqrt(sum(float(value) ** 2 for value in row)))
        result.append(0.0 if norm > threshold else min(1.0, clip / (norm + 1e-6)))
    return np.array(result)


def make() -> dict[str, np.ndarray]:
    """All goldens by key."""
    table = norms()
    return {
        "in|norms": table,
        "skip_norm|20,5": skip_norm(table, 20.0, 5.0),
    }


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden_frontier.npz", **make())
