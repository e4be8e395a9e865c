"""Gradient clipping that means the same thing on one process and on a thousand ranks.

::

    import distclip
    from distclip import policies

    clipper = distclip.GradClipper(model, policies.agc(0.01))
    clipper.attach(optimizer)  # or clipper.clip_() between backward and step

This file is the whole public surface. What needs torch is imported when it is first used, so that
the command line can show a help text or check a configuration without it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from distclip import errors as errors
from distclip import policies as policies
from distclip._version import __version__ as __version__
from distclip.common import namespaces as _namespaces
from distclip.common import tested as _tested
from distclip.errors import CollectiveError as CollectiveError
from distclip.errors import ConfigurationError as ConfigurationError
from distclip.errors import DistclipError as DistclipError
from distclip.errors import LadderExhaustedError as LadderExhaustedError
from distclip.errors import NonFiniteGradientError as NonFiniteGradientError
from distclip.errors import ProcessGroupError as ProcessGroupError
from distclip.errors import RankMismatchError as RankMismatchError
from distclip.errors import ReplicaDriftError as ReplicaDriftError
from distclip.errors import RewindRequested as RewindRequested
from distclip.errors import StateError as StateError
from distclip.errors import UnsupportedGradientError as UnsupportedGradientError

if TYPE_CHECKING:
    from distclip import accelerate as accelerate
    from distclip import deepspeed as deepspeed
    from distclip import lightning as lightning
    from distclip import optim as optim
    from distclip import transformers as transformers
    from distclip.clipper import GradClipper as GradClipper
    from distclip.config.build import from_config as from_config
    from distclip.functional import clip_grad_agc_ as clip_grad_agc_
    from distclip.functional import clip_grad_norm_ as clip_grad_norm_
    from distclip.functional import clip_grad_value_ as clip_grad_value_
    from distclip.functional import clip_grads_with_norm_ as clip_grads_with_norm_
    from distclip.functional import get_total_norm as get_total_norm
    from distclip.functional import grad_norms as grad_norms
    from distclip.integrations.clipped_step import ClippedStep as ClippedStep
    from distclip.integrations.micro_batches import MicroBatchClipper as MicroBatchClipper
    from distclip.layouts.declared import declare_sharded as declare_sharded
    from distclip.report import ClipReport as ClipReport

_NAMES = {
    "ClipReport": "distclip.report",
    "ClippedStep": "distclip.integrations.clipped_step",
    "GradClipper": "distclip.clipper",
    "MicroBatchClipper": "distclip.integrations.micro_batches",
    "clip_grad_agc_": "distclip.functional",
    "clip_grad_norm_": "distclip.functional",
    "clip_grad_value_": "distclip.functional",
    "clip_grads_with_norm_": "distclip.functional",
    "declare_sharded": "distclip.layouts.declared",
    "from_config": "distclip.config.build",
    "get_total_norm": "distclip.functional",
    "grad_norms": "distclip.functional",
}
"""Public name -> the module that is imported when the name is first used."""

__all__ = [
    "ClipReport",
    "ClippedStep",
    "ConfigurationError",
    "DistclipError",
    "GradClipper",
    "MicroBatchClipper",
    "LadderExhaustedError",
    "NonFiniteGradientError",
    "CollectiveError",
    "ProcessGroupError",
    "RankMismatchError",
    "ReplicaDriftError",
    "RewindRequested",
    "StateError",
    "UnsupportedGradientError",
    "__version__",
    "clip_grad_agc_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "declare_sharded",
    "errors",
    "from_config",
    "get_total_norm",
    "grad_norms",
    "policies",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        _tested.check_version("torch")
        found = getattr(importlib.import_module(_NAMES[name]), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
        found = importlib.import_module(f"{__name__}.{name}")  # such as distclip.optim
    else:
        raise AttributeError(f"module 'distclip' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    # help() and completion get every name, which must not fail for want of a framework.
    usable = [
        name
        for name in _namespaces.FRAMEWORKS
        if all(map(importlib.util.find_spec, (name, *_namespaces.BESIDES.get(name, ()))))
    ]
    return sorted([*__all__, "optim", *usable])
