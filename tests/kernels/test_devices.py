"""Gradients that lie on another device than the statistics."""

import pytest
import torch.utils.backend_registration as backends

from tests.helpers.processes import python, well


@pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device in Python",
)
def test_cpu_gradients_beside_an_accelerator() -> None:
    """In a process of its own, with a device that is strict about others, computed on the CPU."""
    assert well(python("-m", "tests.helpers.pretend")).strip() == "all equal"
