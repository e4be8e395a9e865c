"""Gradient clipping that means the same thing on one process and on a thousand ranks.

::

    import distclip
    from distclip import policies

    clipper = distclip.GradClipper(model, policies.agc(0.01))
    clipper.attach(optimizer)  # or clipper.clip_() between backward and step

This file is the whole public surface.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distclip import errors as errors
from distclip import policies as policies
from distclip._version import __version__ as __version__
from distclip.clipper import GradClipper as GradClipper
from distclip.config.build import from_config as from_config
from distclip.errors import CollectiveError as CollectiveError
from distclip.errors import ConfigurationError as ConfigurationError
from distclip.errors import DistclipError as DistclipError
from distclip.errors import NonFiniteGradientError as NonFiniteGradientError
from distclip.errors import ProcessGroupError as ProcessGroupError
from distclip.errors import RankMismatchError as RankMismatchError
from distclip.errors import ReplicaDriftError as ReplicaDriftError
from distclip.errors import StateError as StateError
from distclip.errors import UnsupportedGradientError as UnsupportedGradientError
from distclip.functional import clip_grad_agc_ as clip_grad_agc_
from distclip.functional import clip_grad_norm_ as clip_grad_norm_
from distclip.functional import clip_grad_value_ as clip_grad_value_
from distclip.functional import get_total_norm as get_total_norm
from distclip.functional import grad_norms as grad_norms
from distclip.layouts.declared import declare_sharded as declare_sharded
from distclip.report import ClipReport as ClipReport

if TYPE_CHECKING:
    from distclip import optim as optim
    from distclip.integrations import accelerate as accelerate
    from distclip.integrations import deepspeed as deepspeed
    from distclip.integrations import transformers as transformers

_LAZY = {
    "accelerate": "distclip.integrations.accelerate",
    "deepspeed": "distclip.integrations.deepspeed",
    "optim": "distclip.optim",
    "transformers": "distclip.integrations.transformers",
}
"""Namespaces that are imported when they are used; some import a framework."""

__all__ = [
    "ClipReport",
    "ConfigurationError",
    "DistclipError",
    "GradClipper",
    "NonFiniteGradientError",
    "CollectiveError",
    "ProcessGroupError",
    "RankMismatchError",
    "ReplicaDriftError",
    "StateError",
    "UnsupportedGradientError",
    "__version__",
    "clip_grad_agc_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "declare_sharded",
    "errors",
    "from_config",
    "get_total_norm",
    "grad_norms",
    "policies",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            return importlib.import_module(_LAZY[name])
        except ModuleNotFoundError as error:
            raise ImportError(
                f"distclip.{name} needs a package that is not installed ({error.name}); "
                f"pip install 'distclip[{name}]'"
            ) from error
    raise AttributeError(f"module 'distclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY])
