"""Clipping in Accelerate: the public name of ``distclip.integrations.accelerate``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from distclip.common.namespaces import namespace

if TYPE_CHECKING:
    from distclip.integrations.accelerate import *  # noqa: F403
else:
    sys.modules[__name__] = namespace("accelerate")
