"""The goldens of ``tests/golden/make_frontier.py``."""

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent.parent / "golden"
GOLDEN = FOLDER / "golden_frontier.npz"


def script() -> ModuleType:
    """The script that makes them."""
    spec = importlib.util.spec_from_file_location("make_frontier", FOLDER / "make_frontier.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
