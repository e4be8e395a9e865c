"""Outputs of the reference codes, loaded once."""

import numpy as np
import pytest

from tests.policies import driving
from tests.policies import frontier as newer
from tests.policies import golden as clipped


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """Of policies without a memory."""
    with np.load(clipped.GOLDEN, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    """Of policies with a memory, run by run."""
    with np.load(driving.GOLDEN, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def frontier() -> dict[str, np.ndarray]:
    """Of policies of 2025 and 2026, by ``tests/golden/make_frontier.py``."""
    with np.load(newer.GOLDEN, allow_pickle=False) as file:
        return dict(file)
