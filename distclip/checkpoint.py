"""A clipper's memory as a state dict of tensors and plain values, and back.

::

    {
        "version": 1,
        "policy": "AdaGC(lambda_rel=1.05, ...)",
        "step": 1200,
        "parameters": ["embed.weight", ...], "shapes": [[256, 64], ...],
        "states": {"": {"shared": {"steps": tensor}, "by_parameter": {"gamma": {name: tensor}}}},
    }

The outer key of ``states`` is the place of a policy in a composition (``""``, ``"1"``,
``"[*.bias]"``). Nothing in it depends on the number of ranks or on the sharding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distclip.errors import StateError
from distclip.policies import ParameterInfo, Policy, State
from distclip.policies._compose import Stage

VERSION = 1


@dataclass(frozen=True)
class Owner:
    """What a state belongs to: a policy, taken apart into stages, and parameters in table order."""

    policy: Policy
    stages: Sequence[Stage]
    parameters: Sequence[ParameterInfo]

    def names_of(self, stage: Stage) -> list[str]:
        """Names of the parameters that a stage is responsible for, in the order of its state."""
        return [self.parameters[member].name for member in stage.members]


def dump(owner: Owner, step: int, states: Mapping[str, State]) -> dict[str, object]:
    """The state dict; its tensors are copies."""
    saved: dict[str, object] = {}
    for stage in owner.stages:
        state = states.get(stage.path)
        if state:
            shared = {k: v.clone() for k, v in state.items() if k not in stage.policy.per_parameter}
            by_parameter = {
                key: dict(zip(owner.names_of(stage), value.clone().unbind(), strict=True))
                for key, value in state.items()
                if key in stage.policy.per_parameter
            }
            saved[stage.path] = {"shared": shared, "by_parameter": by_parameter}
    return {
        "version": VERSION,
        "policy": repr(owner.policy),
        "step": step,
        "parameters": [parameter.name for parameter in owner.parameters],
        "shapes": [list(parameter.shape) for parameter in owner.parameters],
        "states": saved,
    }


def restore(
    owner: Owner, saved: Mapping[str, Any], states: Mapping[str, State]
) -> tuple[int, dict[str, State]] | None:
    """Step and states from what :func:`dump` gave; None, with a warning, from an empty state.

    Args:
        owner: whose state it has to be.
        saved: a state dict; empty for a checkpoint from before distclip was in use.
        states: the present states, which say what there has to be. Left as they are.

    Raises:
        StateError: a state of another policy or other parameters, or a damaged one; says what
            differs.
    """
    if saved is None or (isinstance(saved, Mapping) and not saved):
        warnings.warn(
            f"the checkpoint has no state of distclip (it is from before distclip was in use?): "
            f"{owner.policy!r} begins with an empty memory",
            stacklevel=3,
        )
        return None
    if not isinstance(saved, Mapping):
        raise StateError(f"expected a dict from GradClipper.state_dict(), got {type(saved)}")
    _check_owner(owner, saved)
    step = saved.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise StateError(f"the state's 'step' must be an integer, got {step!r}")
    found = saved.get("states")
    if not isinstance(found, Mapping):
        raise StateError(f"the state's 'states' must be a dict, got {type(found)}")
    wanted = {stage.path: stage for stage in owner.stages if states.get(stage.path)}
    _refuse_difference("states: policies of the composition", wanted, found)
    return step, {
        path: _restored(owner, stage, found[path], states[path]) for path, stage in wanted.items()
    }


def _check_owner(owner: Owner, saved: Mapping[str, Any]) -> None:
    if saved.get("version") != VERSION:
        raise StateError(
            f"the state has version {saved.get('version')!r}, and this distclip reads version "
            f"{VERSION}; is it from GradClipper.state_dict() of another distclip?"
        )
    if saved.get("policy") != repr(owner.policy):
        raise StateError(
            f"this state belongs to {saved.get('policy')}, but the clipper's policy is "
            f"{owner.policy!r}; build the clipper with the policy that was saved, or do not load "
            f"the state"
        )
    names, shapes = saved.get("parameters"), saved.get("shapes")
    if not isinstance(names, list) or not isinstance(shapes, list) or len(names) != len(shapes):
        raise StateError("the state's 'parameters' and 'shapes' must be lists of one length")
    have = dict(zip(names, shapes, strict=True))
    _refuse_difference("parameters", [p.name for p in owner.parameters], have)
    for parameter in owner.parameters:
        if list(parameter.shape) != have[parameter.name]:
            raise StateError(
                f"parameter {parameter.name!r} has shape {list(parameter.shape)}, but the state is "
                f"of a model where it has {have[parameter.name]}"
            )


def _restored(owner: Owner, stage: Stage, saved: Any, state: State) -> State:
    parts = saved if isinstance(saved, Mapping) else {}
    shared, by_parameter = parts.get("shared"), parts.get("by_parameter")
    if not isinstance(shared, Mapping) or not isinstance(by_parameter, Mapping):
        raise StateError(f"the state of {stage.policy.name} ({stage.path!r}) is damaged")
    _refuse_difference(f"entries of {stage.policy.name}", state, [*shared, *by_parameter])
    result = {}
    for key, present in state.items():
        where = f"{stage.policy.name}: {key!r}"
        if key in stage.policy.per_parameter:
            values, names = by_parameter.get(key, {}), owner.names_of(stage)
            _refuse_difference(f"parameters of {where}", names, values)
            rows = [_fitting(values[n], one, where) for n, one in zip(names, present, strict=True)]
            result[key] = torch.stack(rows) if rows else present
        else:
            result[key] = _fitting(shared.get(key), present, where)
    return result


def _fitting(value: object, present: Tensor, where: str) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != present.shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise StateError(
            f"{where} must be a tensor of shape {list(present.shape)}, but the state has {got}"
        )
    return value.detach().to(present.device, present.dtype, copy=True)


def _refuse_difference(what: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    missing = _shown(set(wanted) - set(found))
    unexpected = _shown(set(found) - set(wanted))
    if missing or unexpected:
        parts = [f"missing: {missing}"] if missing else []
        parts += [f"unexpected: {unexpected}"] if unexpected else []
        raise StateError(f"this state belongs to another model; {what} {', '.join(parts)}")


def _shown(names: set[str]) -> str:
    some = sorted(names)
    return ", ".join(map(repr, some[:8])) + (f" and {len(some) - 8} more" if len(some) > 8 else "")
