"""pytest's assertion rewriting on a rank, so that a failed assert there shows its values too.

pytest offers no public call for this. Everything here falls back to plain asserts when its
inside has moved.
"""

from __future__ import annotations

import builtins
import functools
from importlib.abc import Loader
from types import ModuleType


@functools.cache
def loader() -> Loader | None:
    """The loader that rewrites asserts, installed on first use; None where pytest has none."""
    try:
        from _pytest.assertion import install_importhook
        from _pytest.config import get_config

        return install_importhook(get_config([]))
    except Exception:  # private names: whatever is wrong with them, plain asserts do
        return None


def provide_names(module: ModuleType) -> None:
    """Give a module the names that rewritten code refers to.

    A local function is sent as the code pytest made of it, also where the module around it had
    to be loaded with plain asserts.
    """
    try:
        from _pytest.assertion import rewrite
    except ImportError:
        return
    vars(module).setdefault("@pytest_ar", rewrite)
    vars(module).setdefault("@py_builtins", builtins)
