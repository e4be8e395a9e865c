"""``torch``, imported when something of it is first used.

The arguments of a policy, their limits and their description can be read without torch, which takes
seconds to import: the command line checks configurations so. Only the mathematics needs it.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch(ModuleType):
        def __getattr__(self, name: str) -> Any:
            found = getattr(importlib.import_module("torch"), name)
            setattr(self, name, found)  # so that the next use is an ordinary look-up
            return found

    torch = _Torch("torch")
