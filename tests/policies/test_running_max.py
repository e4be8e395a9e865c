"""``running_max``: the published bound."""

import math

import numpy as np
import torch

from distclip import policies
from distclip.policies import ParameterInfo, Statistics


def test_stable_spams_bound(frontier: dict[str, np.ndarray]) -> None:
    want, table = frontier["running_max|0.9"], frontier["in|norms"]
    infos = [ParameterInfo(str(i), (2,)) for i in range(table.shape[1])]
    policy = policies.running_max(0.9)
    state = policy.init(infos)
    for row, expected in zip(table, want, strict=True):
        bound, state = policy.update_bound(
            Statistics(infos, {math.inf: torch.from_numpy(row.copy())}), state
        )
        np.testing.assert_allclose(bound.numpy(), expected, rtol=1e-12)
    assert (want < table).any(1).sum() > 50
