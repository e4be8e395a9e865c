"""The form of a saved state, and its checksum: whether it is what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distclip.errors import StateError

VERSION = 1


def checksum(saved: Mapping[str, object]) -> str:
    """SHA-256 over everything in a state but ``version``: names, shapes, dtypes and values."""
    found = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            add(f"{plain.dtype} {list(plain.shape)}")
            found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            add(len(value))
            for key in sorted(value):
                add(key)
                add(value[key])
        elif isinstance(value, (list, tuple)):
            add(len(value))
            for each in value:
                add(each)
        else:
            text = f"{type(value).__name__} {value!r}".encode()
            found.update(len(text).to_bytes(8, "little") + text)

    for key in ("policy", "step", "parameters", "shapes", "states"):
        add(key)
        add(saved[key])
    return found.hexdigest()


def check_form(saved: object) -> None:
    """Refuse what :func:`dump` cannot have given, and what has changed since."""
    if not isinstance(saved, Mapping):
        raise StateError(f"expected a dict from GradClipper.state_dict(), got a {kind_of(saved)}")
    version = saved.get("version")
    number, summed = version, None
    if isinstance(version, list) and len(version) == 2:
        number, summed = version
    if type(number) is not int or number != VERSION:
        shown = number if type(number) is int else f"of type {kind_of(number)}"
        raise StateError(
            f"expected a state of version {VERSION} from GradClipper.state_dict(), and its version "
            f"is {shown}"
        )
    step = saved.get("step")
    if type(step) is not int or step < 0:
        shown = step if type(step) is int else f"a {kind_of(step)}"
        raise StateError(f"the state's 'step' must be an integer >= 0, got {shown}")
    names, shapes = saved.get("parameters"), saved.get("shapes")
    sound = isinstance(names, list) and isinstance(shapes, list) and len(names) == len(shapes)
    if not sound or not all(type(name) is str for name in names or ()):
        raise StateError("the state's 'parameters' and 'shapes' must be lists of one length")
    if not all(map(_is_shape, shapes or ())):
        raise StateError("the state's 'shapes' must be lists of sizes")
    _check_states(saved.get("states"))
    if type(saved.get("policy")) is not str:
        raise StateError(
            "the state has no description of its policy: its 'policy' must be a string"
        )
    if isinstance(version, list) and (type(summed) is not str or summed != checksum(saved)):
        raise StateError(
            "the state is damaged: its values are not those that were saved (the checksum "
            "differs); take another checkpoint"
        )


def _is_shape(shape: object) -> bool:
    return isinstance(shape, (list, tuple)) and all(
        type(size) is int and 0 <= size < 2**63 for size in shape
    )


def _check_states(found: object) -> None:
    if not isinstance(found, Mapping):
        raise StateError(f"the state's 'states' must be a dict, got a {kind_of(found)}")
    for path, parts in found.items():
        keys = {"shared", "by_parameter"}
        if type(path) is not str or not isinstance(parts, Mapping) or set(parts) != keys:
            raise StateError(f"the state's 'states' are damaged at {_short(path)}")
        groups = [parts["shared"], parts["by_parameter"]]
        if isinstance(parts["by_parameter"], Mapping):
            groups += parts["by_parameter"].values()
        for number, group in enumerate(groups):
            if not isinstance(group, Mapping) or not all(type(key) is str for key in group):
                raise StateError(f"the state's 'states' are damaged at {path!r}")
            for key, value in group.items() if number != 1 else ():
                if not _is_plain(value):
                    raise StateError(f"the state's {_short(key)} at {path!r} must be a tensor")


def _is_plain(value: object) -> bool:
    """Whether it is a tensor with values in memory, one for each element."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_meta
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def policy_of(saved: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """The ``repr`` of a checked state's policy, and whose memory it is; None from an old one."""
    if isinstance(saved["version"], int):
        return saved["policy"], None
    policy = json.loads(saved["policy"])  # as it was written: the checksum has been compared
    return policy["repr"], policy["memory"]


def kind_of(value: object) -> str:
    """The name of its type: an odd value itself may be endless."""
    return type(value).__name__


def _short(value: object) -> str:
    return repr(value[:60]) if isinstance(value, str) else f"a key of type {kind_of(value)}"
