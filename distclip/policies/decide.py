"""Asking a policy for its decision, and looking at what it returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from distclip.errors import ConfigurationError
from distclip.policies.protocol import (
    Action,
    Clamp,
    ClampingPolicy,
    ParameterInfo,
    Policy,
    Scale,
    ScalingPolicy,
    Skip,
    State,
    Statistics,
    UnitPolicy,
)


def actions_of(
    policy: ScalingPolicy, statistics: Statistics, state: State
) -> tuple[Sequence[Action], State]:
    """What a scaling policy decides.

    Raises:
        ConfigurationError: it returns something that is no action of a scaling policy.
    """
    returned: Any = policy.update(statistics, state)
    pair = isinstance(returned, (tuple, list)) and len(returned) == 2
    if not pair or not isinstance(returned[0], Sequence):
        raise ConfigurationError(
            f"{policy!r}: update must return (actions, state), such as "
            f"([policies.Scale(coefficients)], state), got {returned!r}; no gradient was changed"
        )
    actions, state = returned
    for action in actions:
        if not isinstance(action, (Scale, Skip)):
            mend = (
                "derive a policy that clamps from policies.ClampingPolicy, with `bound` or "
                "`update_bound`, and put the two together by policies.chain(...)"
                if isinstance(action, Clamp)
                else "return policies.Scale and policies.Skip"
            )
            raise ConfigurationError(
                f"{policy!r}: update returned {action!r}, which a scaling policy cannot do, and no "
                f"gradient was changed; {mend}"
            )
        if isinstance(action, Scale) and not isinstance(action.coefficients, Tensor):
            raise ConfigurationError(
                f"{policy!r}: update returned Scale({action.coefficients!r}); coefficients must be "
                f"a float64 tensor, 0-dim or one for each parameter; no gradient was changed"
            )
    return actions, state


def bound_of(policy: ClampingPolicy, statistics: Statistics, state: State) -> tuple[Tensor, State]:
    """The bound that a clamping policy decides on, inf where it is NaN or negative.

    Raises:
        ConfigurationError: it is no tensor of one number, or of one for each parameter.
    """
    bound, state = policy.update_bound(statistics, state)
    count = len(statistics.parameters)
    if not isinstance(bound, Tensor) or bound.shape not in ((), (count,)):
        got = f"shape {list(bound.shape)}" if isinstance(bound, Tensor) else repr(bound)
        raise ConfigurationError(
            f"{policy!r}: update_bound must return a 0-dim tensor, or one of shape [{count}] with "
            f"a bound for each parameter, got {got}; no gradient was changed"
        )
    return torch.where(bound >= 0, bound.double(), math.inf), state


def rehearse(
    policy: Policy,
    parameters: Sequence[ParameterInfo],
    state: State,
    device: torch.device,
    norm: float = 1.0,
) -> tuple[Sequence[Action], State]:
    """Look at what a policy returns before anything depends on it.

    Policies are pure, so a decision about made-up statistics has no effect. It is for a policy that
    decides after other gradients have been changed already, or within another policy.

    Returns:
        The actions of a scaling policy, none of another; and the new state.

    Raises:
        ConfigurationError: as :func:`actions_of` and :func:`bound_of`.
    """
    if isinstance(policy, UnitPolicy) or (isinstance(policy, ClampingPolicy) and not policy.moving):
        return (), state
    ones = torch.ones(len(parameters), dtype=torch.float64, device=device)
    statistics = Statistics(
        parameters,
        dict.fromkeys(policy.needs.gradient_norms, ones * norm),
        dict.fromkeys(policy.needs.weight_norms, ones),
        loss=ones.new_ones(()) if policy.needs.loss else None,
    )
    if isinstance(policy, ClampingPolicy):
        return (), bound_of(policy, statistics, state)[1]
    return actions_of(cast(ScalingPolicy, policy), statistics, state)
