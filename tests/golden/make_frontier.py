"""Goldens of policies of 2025 and 2026, from the published algorithms, in plain Python and numpy.

    python tests/golden/make_frontier.py

writes ``golden_frontier.npz`` beside this file. Each function follows a publication step by step
and shares nothing with distclip or with its oracle. ``tests/policies/test_frontier.py`` holds the
file, this script and the policies together.
"""

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


def norm_gate(table: np.ndarray, columns: list[int], threshold: float) -> np.ndarray:
    """By step, 1 where no step is made: the norm of one part is above a threshold."""
    norms = [float(np.sqrt(sum(float(row[column]) ** 2 for column in columns))) for row in table]
    return np.array([norm > threshold for norm in norms], dtype=np.float64)


def running_max(table: np.ndarray, theta: float) -> np.ndarray:
    """By step, the bound of each parameter: ``m_max_hat`` of StableSPAM.step."""
    mean, bounds = np.zeros(table.shape[1]), []
    for step, row in enumerate(table, 1):
        mean = theta * mean + (1 - theta) * row
        bounds.append(mean / (1 - theta**step))
    return np.array(bounds)


def stabilized(table: np.ndarray, gamma1: float, gamma2: float, eps: float) -> np.ndarray:
    """By step, the norm that each gradient gets: ``c_norm_t`` of StableSPAM.step, scale 1."""
    result = np.zeros_like(table)
    for column, norms in enumerate(table.T):
        m = v = 0.0
        for step, norm in enumerate(norms, 1):
            m = gamma1 * m + (1 - gamma1) * norm
            v = gamma2 * v + (1 - gamma2) * norm**2
            m_hat, v_hat = m / (1 - gamma1**step), v / (1 - gamma2**step)
            result[step - 1, column] = m_hat / (v_hat**0.5 + eps)
    return result


def aggc(
    table: np.ndarray,
    options: tuple[float, float, float, float, float],
    start: bool,
    late: tuple[float, float, int, int] | None = None,
) -> np.ndarray:
    """By step, the scale of each group (a column is a group), as PerModuleGradClipper has it.

    Args:
        table: the norm of each group.
        options: high_mult, low_mult, ema_beta, max_down_scale, max_up_scale; small norms are
            raised (``raise_small``) where low_mult is not 0.
        start: whether the average begins with the first norm; with 0 in the authors' code.
        late: high_mult and low_mult to which those of ``options`` move linearly, and the steps
            between which they do.
    """
    high, low, beta, down, up = options
    ema = table[0].copy() if start else np.zeros(table.shape[1])
    result = np.ones_like(table)
    for step, row in enumerate(table):
        if late is not None:
            points = [late[2], late[3]]
            high = float(np.interp(step, points, [options[0], late[0]]))
            low = float(np.interp(step, points, [options[1], late[1]]))
        for group, norm in enumerate(row):
            lower, upper, scale = ema[group] * low, ema[group] * high, 1.0
            if upper > 0.0 and norm > upper + 1e-12:
                scale = max(upper / (norm + 1e-12), down)
            elif lower > 0.0 and norm < lower - 1e-12:
                scale = min(lower / (norm + 1e-12), up)
            result[step, group] = scale
            ema[group] = beta * ema[group] + (1 - beta) * norm * scale
    return result


AGGC = (1.2, 0.9, 0.95, 0.1, 1.5)


def make() -> dict[str, np.ndarray]:
    """All goldens by key."""
    table = norms()
    return {
        "in|norms": table,
        "skip_norm|20,5": skip_norm(table, 20.0, 5.0),
        "norm_gate|columns 1 and 3,2": norm_gate(table, [1, 3], 2.0),
        "running_max|0.9": running_max(table, 0.9),
        "norm_stabilizer|default": stabilized(table, 0.7, 0.9, 1e-8),
        "norm_stabilizer|0.85,0.99999": stabilized(table, 0.85, 0.99999, 1e-8),
        "group_ema|from the first norm": aggc(table, AGGC, start=True),
        "group_ema|schedule": aggc(table, AGGC, start=True, late=(1.02, 0.5, 50, 150)),
        "group_ema|from 0": aggc(table, AGGC, start=False),
    }


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).parent / "golden_frontier.npz", **make())
