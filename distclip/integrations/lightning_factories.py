"""Entry points of Lightning: a callback for every ``Trainer`` and ``Fabric``, if one is asked for.

Lightning calls them in every process where distclip is installed, and imports nothing of it unless
``DISTCLIP_CONFIG`` names a configuration.
"""

from __future__ import annotations

import os
from typing import Any

from distclip.common.environment import CONFIG_VARIABLE


def callbacks() -> list[Any]:
    """Callbacks of every Trainer and Fabric; for Lightning's ``callbacks_factory``."""
    if not os.environ.get(CONFIG_VARIABLE):
        return []
    from distclip.integrations import lightning

    return lightning.automatic()
