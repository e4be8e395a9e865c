"""What the integrations take as a policy: the policy itself, or a configuration in any form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from distclip.config import Config, load
from distclip.policies import Policy

PolicyOrConfig = Policy | str | os.PathLike[str] | Mapping[str, Any] | Config
"""A policy, a configuration file or mapping, or a checked configuration."""


def config_of(policy_or_config: PolicyOrConfig) -> Config:
    """The checked configuration.

    Raises:
        ConfigurationError: a bad one.
    """
    if isinstance(policy_or_config, Config):
        return policy_or_config
    if isinstance(policy_or_config, Policy):
        return Config(policy=policy_or_config)
    return load(policy_or_config)
