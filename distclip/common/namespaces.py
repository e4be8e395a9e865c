"""Modules that work with a framework, which has to be installed."""

from __future__ import annotations

import importlib
from types import ModuleType

from distclip.common import tested

FRAMEWORKS = ("accelerate", "deepspeed", "lightning", "transformers")

BESIDES = {"transformers": ("accelerate",)}
"""Framework -> packages that its module needs besides."""


def namespace(name: str) -> ModuleType:
    """The module of ``distclip.integrations`` that works with a framework.

    Raises:
        ImportError: a package that it needs is not installed; says how to install it.
    """
    for package in ("torch", name, *BESIDES.get(name, ())):
        tested.check_version(package)
    try:
        return importlib.import_module(f"distclip.integrations.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"distclip.{name} needs a package that is not installed ({error.name}); "
            f"pip install 'distclip[{name}]'"
        ) from error
