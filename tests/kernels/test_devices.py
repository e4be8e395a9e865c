"""Gradients that lie on another device than the statistics."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch.utils.backend_registration as backends


@pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device in Python",
)
def test_cpu_gradients_beside_an_accelerator() -> None:
    """In a process of its own, with a device that is strict about others, computed on the CPU."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.pretend"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "all equal"
