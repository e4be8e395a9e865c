"""A part of the policies for each case, so that together the cases meet all of them."""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import pytest

K = TypeVar("K")

WHOLE = "DISTCLIP_TEST_WHOLE"
"""Set in the environment: every case meets every policy, which takes minutes more (nightly)."""


def share(policies: Mapping[K, Any], *numbers: int, of: int) -> dict[K, Any]:
    """Every ``of``-th policy, beginning elsewhere in cases that differ in one number by one.

    ``of`` cases whose numbers follow each other, such as three dtypes of one layout, meet each
    policy once.

    Args:
        policies: by label.
        *numbers: of the case: its layout, dtype or number of ranks, as a place in a list.
        of: 1 or more.
    """
    step = 1 if os.environ.get(WHOLE) else of
    first = sum(numbers) % step
    return {k: v for i, (k, v) in enumerate(policies.items()) if i % step == first}


at_night = pytest.mark.skipif(
    not os.environ.get(WHOLE), reason=f"takes long, and its parts are tested: {WHOLE}=1"
)
"""For a case whose every part another one has."""
