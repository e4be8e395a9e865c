"""Entry points of Lightning: a callback for every ``Trainer`` and ``Fabric``, if one is asked for.

Lightning calls them in every process where distclip is installed, and imports nothing of it unless
``DISTCLIP_CONFIG`` names a configuration.
"""

from __future__ import annotations

import os
from typing import Any

ENVIRONMENT = "DISTCLIP_CONFIG"


def callbacks() -> list[Any]:
    """For ``lightning.pytorch.callbacks_factory``, ``lightning.fabric.callbacks_factory``."""
    if not os.environ.get(ENVIRONMENT):
        return []
    from distclip.integrations import lightning

    return lightning.automatic()
