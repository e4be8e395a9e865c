"""Saved states that are damaged are refused, or load as they were."""

import copy
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distclip import GradClipper, StateError, policies
from distclip.integrations.checkpoints import FILE, Shelf
from tests.engine.saved import AUTO, clipper_of
from tests.engine.test_trajectory import alike


def test_a_file_with_a_flipped_bit_is_refused_or_loads_the_same(tmp_path: Path) -> None:
    policy = policies.chain(AUTO(10, window=40), policies.adagc())
    clipper = clipper_of(policy, 5)
    want: Any = clipper.state_dict()
    shelf = Shelf(policy)
    shelf.save([clipper], tmp_path)
    raw, source = (tmp_path / FILE).read_bytes(), random.Random(1)
    refused = 0
    for _ in range(200):
        damaged = bytearray(raw)
        damaged[source.randrange(len(raw))] ^= 1 << source.randrange(8)
        (tmp_path / FILE).write_bytes(damaged)
        try:
            Shelf(policy).load([clipper], tmp_path)
        except StateError:
            refused += 1
        assert alike(clipper.state_dict(), want)
    assert refused > 100
    for short in (b"", raw[:1000], raw[: len(raw) // 2], b"\0" * len(raw)):
        (tmp_path / FILE).write_bytes(short)
        with pytest.raises(StateError, match=rf"{FILE} is damaged.*remove {tmp_path}"):
            Shelf(policy).load([clipper], tmp_path)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a state that is no container, and to every container."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value) if _is_list(value) else 0):
        yield from leaves(value[key], (*path, key))


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def changed(value: Any) -> list[Any]:
    """Other values of a kind."""
    if isinstance(value, torch.Tensor):
        flipped = value.clone().reshape(-1)
        flipped.view(torch.uint8)[0] ^= 1
        other = torch.int32 if value.is_floating_point() else torch.float64
        return [flipped.view(value.shape), value.to(other), value.unsqueeze(0), value[None][:0]]
    if isinstance(value, dict):
        keys = list(value)
        renamed = {("x" + key if key == keys[0] else key): each for key, each in value.items()}
        return [renamed, {key: value[key] for key in keys[1:]}] if keys else []
    if isinstance(value, list):
        return [value[:-1], value[::-1], [*value, *value[:1]]]
    return [value + 1] if isinstance(value, int) else [value + "x", value[:-1]]


def put(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copied = dict(state) if isinstance(state, dict) else list(state)
    copied[path[0]] = put(copied[path[0]], path[1:], value)
    return copied


def get(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def test_every_change_of_a_state_is_noticed() -> None:
    clipper = clipper_of(policies.chain(AUTO(10, window=4), policies.adagc()), 3)
    state: Any = clipper.state_dict()
    tried = 0
    for path in leaves(state):
        for other in changed(get(state, path)):
            if repr(other) == repr(get(state, path)):
                continue  # a palindrome
            with pytest.raises(StateError):
                clipper.load_state_dict(put(state, path, other))
            assert alike(clipper.state_dict(), state), path
            tried += 1
    assert tried > 80


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


class Wild(dict[str, Any]):
    """A mapping that has everything, and fails."""

    def get(self, *args: Any) -> Any:
        raise ZeroDivisionError("wild")


ODD: list[Any] = [
    1, "state", b"x", [1], {1, 2}, object(), math.nan, torch.ones(3), torch.ones(()), int,
    {"version": 1}, {None: 1}, {1: {2: 3}}, nested(100_000), {"version": nested(100_000)},
    Wild(version=1), {"clippers": []},
]  # fmt: skip


PARTS: list[Any] = [
    None, True, -1, 2**80, 1.5, math.nan, "text", b"bytes", [], {}, [None], {"": None}, {None: 1},
    {"": {"shared": None, "by_parameter": 3}}, torch.ones(2), torch.ones(()), nested(100_000),
    torch.empty(2**40, device="meta"), torch.ones(1).expand(2**40), torch.ones(2).to_sparse(),
    torch.ones(2, dtype=torch.complex64), object(), int, ["a"] * 3, [[-1]], [["x"]], {"repr": "x"},
    [1, "x"], [1], "{}",
]  # fmt: skip


@pytest.mark.parametrize("old", [False, True])
def test_odd_states_are_refused_and_change_nothing(old: bool) -> None:
    clipper = clipper_of(policies.chain(AUTO(10, window=4), policies.adagc()), 3)
    state: Any = clipper.state_dict()
    before = copy.deepcopy(state)
    given = {**state, "version": 1, "policy": repr(clipper.policy)} if old else state
    for each in ODD:
        with pytest.raises(StateError):
            clipper.load_state_dict(each)
    for path in leaves(given):
        for part in PARTS if path else ():
            if alike_or_not(part, get(given, path)):
                continue
            assert refuses(clipper, put(given, path, part)), (path, part)
        if path:
            where = get(given, path[:-1])
            missing = (
                {key: each for key, each in where.items() if key != path[-1]}
                if isinstance(where, dict)
                else where[: path[-1]] + where[path[-1] + 1 :]
            )
            assert refuses(clipper, put(given, path[:-1], missing)), path
    assert alike(clipper.state_dict(), before)


def refuses(clipper: GradClipper, state: Any) -> bool:
    try:
        clipper.load_state_dict(state)
    except StateError:
        return True
    return False


def alike_or_not(one: Any, other: Any) -> bool:
    """Whether a part is as good as what is there: a step may be any number >= 0, for instance."""
    if isinstance(other, int) and isinstance(one, int) and not isinstance(one, bool):
        return one >= 0
    return type(one) is type(other) and not isinstance(one, torch.Tensor) and one == other
