"""Configurations in files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distclip import config
from distclip.errors import ConfigurationError

Write = Callable[..., Path]


def fault(source: Any) -> str:
    """The message with which a source is refused."""
    with pytest.raises(ConfigurationError) as caught:
        config.load(source)
    return str(caught.value)
