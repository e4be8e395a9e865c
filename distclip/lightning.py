"""Clipping in Lightning and Fabric: the public name of ``distclip.integrations.lightning``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from distclip.common.namespaces import namespace

if TYPE_CHECKING:
    from distclip.integrations.lightning import *  # noqa: F403
else:
    sys.modules[__name__] = namespace("lightning")
