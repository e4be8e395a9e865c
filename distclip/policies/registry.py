"""The names that a configuration file may use."""

from __future__ import annotations

from typing import TypeVar

from distclip.errors import ConfigurationError
from distclip.policies.checks import name_of
from distclip.policies.protocol import Policy

PolicyType = TypeVar("PolicyType", bound=type[Policy])

_registered: dict[str, type[Policy]] = {}


def register(policy: PolicyType) -> PolicyType:
    """Class decorator: make a policy known to configurations by its ``name``, as the built-in ones.

    The same class defined anew (a notebook cell run again, a reloaded module) takes its own place.

    Raises:
        ConfigurationError: it has no name, or that of another class.
    """
    name = name_of(policy)
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
