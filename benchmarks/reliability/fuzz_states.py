"""Damaged and foreign state dicts, for :mod:`benchmarks.reliability.fuzz`."""

from __future__ import annotations

import copy
import math
import warnings
from random import Random
from typing import Any

import torch

from benchmarks.reliability import hostile
from benchmarks.reliability.fuzz_guards import (
    BrokenPromiseError,
    Folder,
    Fuzzer,
    Outcome,
    refused,
)
from distclip import GradClipper, policies
from distclip.engine.checkpoint_form import checksum
from distclip.errors import DistclipError

MEMORIES = (
    policies.adagc(), policies.zclip(), policies.autoclip(window=4), policies.autoclip(),
    policies.skip_spikes(window=4, min_history=2), policies.agc(),
    policies.by_name({"*.bias": policies.zclip()}, default=policies.chain(policies.adagc(),
    policies.agc())),
)  # fmt: skip


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        same = isinstance(other, dict) and one.keys() == other.keys()
        return same and all(_same(part, other[key]) for key, part in one.items())
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


TENSORS: tuple[Any, ...] = (
    torch.tensor(float("nan")), torch.tensor(-1.0), torch.zeros(3), torch.ones((),
    dtype=torch.int64),
    torch.tensor(1j), torch.tensor(True), torch.empty(0), torch.empty((), device="meta"),
    torch.tensor(1.0).to_sparse(),
)  # fmt: skip


def states(here: Folder) -> Fuzzer:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    clippers = [GradClipper(model, policy) for policy in MEMORIES]
    for _ in range(3):
        for clipper in clippers:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            clipper.clip_()
    saved = [clipper.state_dict() for clipper in clippers]

    def one(rng: Random) -> Outcome:
        number = rng.randrange(len(clippers))
        state = rng.choice(saved) if rng.random() < 0.1 else saved[number]
        if rng.random() < 0.6:
            state = hostile.bent(rng, state, strange=True)
        else:
            state = _disturbed(rng, state)
        clipper = clippers[number]
        if isinstance(state, dict) and rng.random() < 0.6:
            state = _signed(rng, state, clipper)
        try:
            return _loaded(clipper, state, saved[number])
        finally:
            clipper.load_state_dict(saved[number])

    return one


def _signed(rng: Random, state: Any, clipper: GradClipper) -> Any:
    """Past the checksum: with one that is right, or in the form from before there were any."""
    if rng.random() < 0.5:
        return {**state, "version": 1, "policy": repr(clipper.policy)}
    try:
        return {**state, "version": [1, checksum(state)]}
    except Exception:  # nobody can sign this
        return state


def _loaded(clipper: GradClipper, state: Any, before: dict[str, object]) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clipper.load_state_dict(state)
    except DistclipError as error:
        if not _same(clipper.state_dict(), before):
            raise BrokenPromiseError("a refused state has changed the clipper") from None
        return refused(error)
    present = clipper.state_dict()
    if present.keys() != before.keys() or not _finite(present):
        raise BrokenPromiseError("took a state with NaN, or of another form")
    return "accepted"


def _finite(tree: Any) -> bool:
    if isinstance(tree, dict):
        return all(map(_finite, tree.values()))
    return not isinstance(tree, torch.Tensor) or not bool(tree.isnan().any())


def _disturbed(rng: Random, state: Any) -> Any:
    """With another tensor in the place of one."""
    state = copy.deepcopy(state)
    places = [
        (holder, key)
        for holder in hostile.holders_of(state)
        if isinstance(holder, dict)
        for key, value in holder.items()
        if isinstance(value, torch.Tensor)
    ]
    if places:
        holder, key = rng.choice(places)
        there = holder[key]
        odd = [there * 2, there + 1, -there, there.expand(2, *there.shape)]
        if there.is_floating_point():
            odd += [torch.full_like(there, value) for value in (math.nan, math.inf, -math.inf)]
        holder[key] = rng.choice((*TENSORS, *odd))
    return state
