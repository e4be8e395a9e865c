"""Clipping in DeepSpeed engines: the public name of ``distclip.integrations.deepspeed``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from distclip.common.namespaces import namespace

if TYPE_CHECKING:
    from distclip.integrations.deepspeed import *  # noqa: F403
else:
    sys.modules[__name__] = namespace("deepspeed")
