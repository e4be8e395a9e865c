"""The names that a configuration file may use."""

from __future__ import annotations

from typing import TypeVar

from distclip.errors import ConfigurationError
from distclip.policies._adagc import AdaGC
from distclip.policies._agc import AGC
from distclip.policies._autoclip import AutoClip
from distclip.policies._block_rms import BlockRMS
from distclip.policies._dreamer_agc import DreamerAGC
from distclip.policies._global_norm import GlobalNorm
from distclip.policies._group_norm import GroupNorm
from distclip.policies._measure import Measure
from distclip.policies._parameter_norm import ParameterNorm
from distclip.policies._protocol import Policy
from distclip.policies._skip_spikes import SkipSpikes
from distclip.policies._value import Value
from distclip.policies._zclip import ZClip

PolicyType = TypeVar("PolicyType", bound=type[Policy])

_registered: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Measure,
        GlobalNorm,
        Value,
        ParameterNorm,
        GroupNorm,
        BlockRMS,
        AGC,
        DreamerAGC,
        AutoClip,
        ZClip,
        AdaGC,
        SkipSpikes,
    )
}


def register(policy: PolicyType) -> PolicyType:
    """Class decorator: make a policy of your own known to configurations by its ``name``.

    The same class defined anew (a notebook cell run again, a reloaded module) takes its own place.

    Raises:
        ConfigurationError: the name is taken by another class.
    """
    name = policy.name
    known = _registered.get(name, policy)
    if (known.__module__, known.__qualname__) != (policy.__module__, policy.__qualname__):
        raise ConfigurationError(
            f"policy name {name!r} is taken by {_registered[name].__name__}; choose another name"
        )
    _registered[name] = policy
    return policy


def registered() -> dict[str, type[Policy]]:
    """Name -> policy class, in order of registration."""
    return dict(_registered)
