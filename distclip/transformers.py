"""Clipping in transformers' Trainer: the public name of ``distclip.integrations.transformers``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from distclip.common.namespaces import namespace

if TYPE_CHECKING:
    from distclip.integrations.transformers import *  # noqa: F403
else:
    sys.modules[__name__] = namespace("transformers")
