"""A clipper's memory as a state dict of tensors and plain values, and back.

::

    {
        "version": [1, "5f3c..."],
        "policy": '{"repr": "AdaGC(lambda_rel=1.05, ...)", "memory": {"": {...}}}',
        "step": 1200,
        "parameters": ["embed.weight", ...], "shapes": [[256, 64], ...],
        "states": {"": {"shared": {"steps": tensor}, "by_parameter": {"gamma": {name: tensor}}}},
    }

``version`` is the form's number and a checksum of the rest. The outer key of ``states``, and of
``memory``, is the place of a policy in a composition (``""``, ``"1"``, ``"[*.bias]"``); ``memory``
says whose it is: class, fields, parameters. Nothing depends on the number of ranks or the sharding.

``torch.distributed.checkpoint`` loads into the keys of a present state, and takes a mapping apart
into keys. So that it loads states from before there were checksums, whose version is 1 and whose
policy is its ``repr``, there are no keys but theirs, and what has been added is no mapping.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distclip.engine.checkpoint_form import VERSION, check_form, checksum, kind_of, policy_of
from distclip.errors import StateError
from distclip.layouts.differences import quoted_names
from distclip.policies import ParameterInfo, Policy, State
from distclip.policies.compose import Stage, stages
from distclip.policies.protocol import memory_depends_on

_logger = logging.getLogger("distclip")


@dataclass(frozen=True)
class Owner:
    """What a state belongs to: a policy, taken apart into stages, and parameters in table order."""

    policy: Policy
    stages: Sequence[Stage]
    parameters: Sequence[ParameterInfo]

    def names_of(self, stage: Stage) -> list[str]:
        """Names of the parameters that a stage is responsible for, in the order of its state."""
        return [self.parameters[member].name for member in stage.members]


@dataclass(frozen=True)
class StateSource:
    """Where a state is from, for the messages.

    Attributes:
        what: the file, or another name of the state.
        anew: what the user of this front end does to begin with an empty memory.
    """

    what: str = "the state"
    anew: str = "do not call load_state_dict"


@dataclass(frozen=True)
class Restored:
    """A state that fits, not in use yet.

    Attributes:
        step: steps so far.
        states: state of each stage that has one.
        changes: what is different from when it was saved, and does not matter; "" for nothing.
    """

    step: int
    states: dict[str, State]
    changes: str = ""

    def announce(self) -> None:
        """One line in the log about what is different."""
        if self.changes:
            _logger.warning("%s", self.changes)


def dump(owner: Owner, step: int, states: Mapping[str, State]) -> dict[str, object]:
    """The state dict; its tensors are copies."""
    saved: dict[str, Any] = {}
    memory: dict[str, object] = {}
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
            memory[stage.path] = _described(owner, stage)
    result: dict[str, Any] = {
        "policy": json.dumps({"repr": repr(owner.policy), "memory": memory}),
        "step": step,
        "parameters": [parameter.name for parameter in owner.parameters],
        "shapes": [list(parameter.shape) for parameter in owner.parameters],
        "states": saved,
    }
    return {"version": [VERSION, checksum(result)], **result}


def restore(
    owner: Owner,
    saved: object,
    states: Mapping[str, State],
    source: StateSource | None = None,
) -> Restored | None:
    """A state from what :func:`dump` gave; None, with a warning, from an empty one.

    Args:
        owner: whose state it has to be.
        saved: a state dict; empty for a checkpoint from before distclip was in use.
        states: the present states, which say what there has to be. Left as they are.
        source: named in messages.

    Raises:
        StateError: a memory that means something else, other parameters, or a damaged state; says
            what differs.
    """
    source = source or StateSource()
    if saved is None or (isinstance(saved, Mapping) and not saved):
        warnings.warn(
            f"the checkpoint has no state of distclip (it is from before distclip was in use?): "
            f"{owner.policy!r} begins with an empty memory",
            stacklevel=4,
        )
        return None
    try:
        return _restore(owner, saved, states, source)
    except StateError as error:
        raise StateError(f"{source.what}: {error}; nothing was loaded") from None
    except Exception as error:  # nested too deep, tensors without memory, ...
        raise StateError(
            f"{source.what} cannot be read ({type(error).__name__}), it is damaged or no state of "
            f"distclip; nothing was loaded. To begin with an empty memory, {source.anew}"
        ) from error


def check_state(policy: Policy | None, saved: object, source: StateSource) -> None:
    """Raise a StateError if a state does not fit a policy on the parameters that it was saved for.

    For a state whose clipper comes into being later. Without a policy only its form is looked at.
    """
    try:
        check_form(saved)
    except StateError as error:
        raise StateError(f"{source.what}: {error}; nothing was loaded") from None
    except Exception as error:
        raise StateError(f"{source.what} is damaged ({type(error).__name__})") from error
    if policy is None:
        return
    assert isinstance(saved, Mapping)  # or it had no such form
    pairs = zip(saved["parameters"], saved["shapes"], strict=True)
    parameters = [ParameterInfo(name, tuple(shape)) for name, shape in pairs]
    owner = Owner(policy, stages(policy, parameters), parameters)
    initial = {
        stage.path: stage.policy.init([parameters[member] for member in stage.members])
        for stage in owner.stages
        if stage.members
    }
    restore(owner, saved, initial, source)


def _restore(
    owner: Owner, saved: object, states: Mapping[str, State], source: StateSource
) -> Restored | None:
    check_form(saved)
    assert isinstance(saved, Mapping)  # or it had no such form
    wanted = {stage.path: stage for stage in owner.stages if states.get(stage.path)}
    changes = _compared(owner, wanted, saved, source)
    if not wanted:
        return Restored(saved["step"], {}, changes)
    have = dict(zip(saved["parameters"], saved["shapes"], strict=True))
    _refuse_difference("parameters", [p.name for p in owner.parameters], have)
    for parameter in owner.parameters:
        if list(parameter.shape) != list(have[parameter.name]):
            raise StateError(
                f"parameter {parameter.name!r} has shape {list(parameter.shape)}, but the state is "
                f"of a model where it has {list(have[parameter.name])}"
            )
    found = saved["states"]
    _refuse_difference("states: policies of the composition", wanted, found)
    restored = {
        path: _restored(owner, stage, found[path], states[path]) for path, stage in wanted.items()
    }
    return Restored(saved["step"], restored, changes)


# ---- what the memory means ---------------------------------------------------------------------


def _described(owner: Owner, stage: Stage) -> dict[str, Any]:
    """Whose memory it is: class, fields, parameters."""
    policy: Any = stage.policy
    fields: dict[str, str] = {"": repr(policy)}  # of a class whose fields are not known
    if dataclasses.is_dataclass(policy):
        names = [each.name for each in dataclasses.fields(policy)]
        fields = {name: repr(getattr(policy, name)) for name in names}
    return {
        "class": type(policy).__qualname__,
        "fields": fields,
        "parameters": owner.names_of(stage),
    }


def _compared(
    owner: Owner, wanted: Mapping[str, Stage], saved: Mapping[str, Any], source: StateSource
) -> str:
    """What has changed since the state was saved; refuses what makes its memory another one."""
    before, described = policy_of(saved)
    now = repr(owner.policy)
    if not wanted:
        left = f"; the memory of {', '.join(map(repr, saved['states']))} is left out"
        changed = f"saved under {before}, and goes on under {now}, which has no memory"
        lost = left if saved["states"] else ""
        return "" if before == now else f"{source.what}: {changed}{lost}"
    if before == now:
        return ""
    reasons: list[str] = []
    notes: list[str] = []
    if described is None:
        reasons.append("it does not say what its memory depends on (an older distclip wrote it)")
    else:
        for path in sorted(set(wanted) ^ set(described)):
            verb = "remembers only here" if path in wanted else "remembers only in the state"
            name = wanted[path].policy if path in wanted else described[path]["class"]
            reasons.append(f"{_place(path)}{name!r} {verb}")
        for path in sorted(set(wanted) & set(described)):
            for text, matters in _differences(owner, wanted[path], described[path]):
                (reasons if matters else notes).append(_place(path) + text)
    if reasons:
        raise StateError(
            f"this state belongs to {before}, but the clipper's policy is {now}, whose memory "
            f"means something else: {', '.join(reasons)}. Configure the policy as it was saved, "
            f"or, to begin with an empty memory, {source.anew}"
        )
    what = ", ".join(notes) if notes else "only policies without memory differ"
    return f"{source.what}: saved under {before}, and goes on under {now} with its memory: {what}"


def _differences(
    owner: Owner, stage: Stage, described: Mapping[str, Any]
) -> Iterator[tuple[str, bool]]:
    """What is different, and whether the memory depends on it."""
    here = _described(owner, stage)
    if described["class"] != here["class"]:
        yield f"{described['class']} was saved, and this is {here['class']}", True
        return
    before, now = described["fields"], here["fields"]
    for field in sorted({*before, *now}):
        one, other = before.get(field, "nothing"), now.get(field, "nothing")
        if one != other:
            text = f"{field or 'it'} was {one} and is {other}"
            yield text, memory_depends_on(stage.policy, field)
    if sorted(described["parameters"]) != sorted(owner.names_of(stage)):
        yield "it is responsible for other parameters", True


def _place(path: str) -> str:
    return f"at {path!r} " if path else ""


# ---- its tensors -------------------------------------------------------------------------------


def _restored(owner: Owner, stage: Stage, saved: Mapping[str, Any], state: State) -> State:
    shared, by_parameter = saved["shared"], saved["by_parameter"]
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
        got = list(value.shape) if isinstance(value, Tensor) else f"a {kind_of(value)}"
        raise StateError(
            f"{where} must be a tensor of shape {list(present.shape)}, but the state has {got}"
        )
    if value.dtype != present.dtype:
        raise StateError(f"{where} must be {present.dtype}, but the state has {value.dtype}")
    if not bool(torch.isfinite(value).all()):
        raise StateError(f"{where} has NaN or inf, which enter no memory: the state is damaged")
    return value.detach().to(present.device, copy=True)


def _refuse_difference(what: str, wanted: Iterable[str], found: Iterable[str]) -> None:
    missing = quoted_names(sorted({*wanted} - {*found}), 8)
    unexpected = quoted_names(sorted({*found} - {*wanted}), 8)
    if missing or unexpected:
        parts = [f"missing: {missing}"] if missing else []
        parts += [f"unexpected: {unexpected}"] if unexpected else []
        raise StateError(f"this state belongs to another model; {what} {', '.join(parts)}")
