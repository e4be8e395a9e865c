import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from distclip import clipper
from distclip.config import logs

pytest_plugins = ["distclip.testing.plugin", "pytester"]

# Triton reads this when it defines a function: its own, at its import, which may come from any test
# that meets torch.compile, Accelerate or DeepSpeed first, and ours.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish() -> None:
    """What the imports made stays: no collection of garbage has to look through it again."""
    gc.collect()
    gc.freeze()


def of_this_process() -> dict[str, Any]:
    """What ``distclip run`` and the integrations change in the process that they run in."""
    return {
        "environment": {k: v for k, v in os.environ.items() if k.startswith("DISTCLIP_")},
        "followers of configurations": [*logs.opened],
        "watchers of clippers": [*clipper.watchers],
    }


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """A test that leaves one of these behind changes those that come after it."""
    before = of_this_process()
    yield
    assert of_this_process() == before


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a script does to this process stays."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
