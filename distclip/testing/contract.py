"""What every clipping policy has to keep to, as a check of one's own policy.

The policy is driven through a scripted run: ordinary norms, spikes, zeros, NaN, infinities, the
smallest and largest numbers. It is known by what it does only; nothing of the library is imported.
"""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from distclip.testing import contract_units
from distclip.testing.contract_units import Parameter

CONTRACT_SHAPES = {"embed.weight": (11, 4), "fc.weight": (5, 4), "fc.bias": (5,), "scale": ()}
COLLECTIVES = (
    "all_reduce", "all_gather", "broadcast", "barrier", "all_gather_object", "send", "recv",
)  # fmt: skip


@dataclass(frozen=True)
class _Statistics:
    """Statistics that know what was asked for in advance."""

    parameters: Sequence[Parameter]
    gradients: Mapping[float, Tensor]
    weights: Mapping[float, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    in_range: bool = False

    def gradient_norms(self, norm_type: float = 2.0) -> Tensor:
        return _declared_norms(self.gradients, norm_type, "gradient_norms")

    def weight_norms(self, norm_type: float = 2.0) -> Tensor:
        return _declared_norms(self.weights, norm_type, "weight_norms")

    def total_norm(self, norm_type: float = 2.0) -> Tensor:
        norms = self.gradient_norms(norm_type)
        if math.isinf(norm_type):
            return norms.max()
        largest = norms.max()
        unit = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
        total: Tensor = torch.linalg.vector_norm(norms / unit, norm_type) * unit
        return total


def _declared_norms(table: Mapping[float, Tensor], order: float, what: str) -> Tensor:
    if order not in table:
        raise AssertionError(f"it reads {what}({order}), which its `needs` do not declare")
    return table[order]


def check_policy(factory: Callable[[], Any], *, steps: int = 300) -> None:
    """Check that a policy keeps to the contract of its kind.

    ::

        def test_my_policy():
            check_policy(lambda: MyPolicy(ratio=4.0))

    Of every policy:

    * its ``repr`` is the same on every rank, and says what it is;
    * it is pure: the same input gives the same output bit by bit, and no input is changed;
    * it is independent of rank, random numbers and environment, and talks to no rank;
    * it reads no value on the host (seen with fake tensors, so no device is needed).

    Of one that scales (``update``), or decides on a bound at every step (``update_bound``):

    * its state is a dict of tensors whose keys, shapes and dtypes never change, and it is all the
      memory there is: saved, loaded with ``weights_only=True`` into a new policy, it goes on alike;
    * NaN and inf never enter its state, and finite norms give finite coefficients >= 0, or bounds
      that are neither NaN nor negative;
    * what it returns has the types, shapes and dtypes that it must have, and ``needs`` declares
      what it reads.

    Of one that clamps to a ``bound``: that it is a number >= 0, the same whenever it is asked for.

    Of one that decides per unit: that its ``unit_dims`` are dims of the parameter, that finite
    norms give finite coefficients >= 0, one a unit, and that each depends on that unit alone.

    Args:
        factory: makes the policy; called several times. For a chain or ``by_name`` check its parts.
        steps: length of the scripted run: longer than the policy's warm-up.

    Raises:
        AssertionError: names the policy, the rule and the step.
    """
    policy = factory()
    label = repr(policy)
    try:
        _check_description(policy, factory())
        kind = _kind(policy)
        if kind == "unit_coefficients":
            contract_units.check_unit_contract(factory, _as_rank)
        elif kind == "bound":
            _check_bound(factory)
        else:
            first = _run(factory(), steps)
            _check_rank(factory, steps, first)
            _check_round_trip(factory, steps, first)
            _check_no_sync(factory())
    except AssertionError as error:
        raise AssertionError(f"{label}: {error}") from error


def _kind(policy: Any) -> str:
    """The member by which it decides; of two kinds, one would have no effect."""
    moving = getattr(policy, "moving", hasattr(policy, "update_bound"))
    found = {
        "update": hasattr(policy, "update"),
        "update_bound": moving,
        "bound": getattr(policy, "bound", None) is not None,
        "unit_coefficients": hasattr(policy, "unit_coefficients"),
    }
    kinds = [kind for kind, there in found.items() if there]
    assert kinds, (
        "it decides nothing: it has none of update, update_bound, bound, unit_coefficients"
    )
    assert len(kinds) == 1, (
        f"it is of several kinds ({', '.join(kinds)}), of which one would have no effect; put "
        f"several policies together by policies.chain(...)"
    )
    return kinds[0]


def _check_bound(factory: Callable[[], Any]) -> None:
    found = []
    for rank in (0, 5):
        with _as_rank(rank):
            policy = factory()
            found += [policy.bound, policy.bound]
    for bound in found:
        number = isinstance(bound, (int, float)) and not isinstance(bound, bool) and bound >= 0
        assert number, (
            f"`bound` must be a number >= 0, got {bound!r}; one that changes is what update_bound "
            f"returns"
        )
    assert len(set(found)) == 1, f"`bound` is not the same whenever it is asked for: {found}"
    state = factory().init(_parameters()) if hasattr(factory(), "init") else {}
    assert not state, "it has a state, which nothing would ever change; use update_bound"


def _check_description(policy: Any, again: Any) -> None:
    assert isinstance(getattr(policy, "name", None), str), "`name` must be a string"
    assert repr(policy) == repr(again), (
        "two policies of the same arguments have a different repr, by which ranks compare them; "
        "make it a frozen dataclass"
    )
    depends, fields = getattr(policy, "memory_fields", None), set(vars(policy))
    assert depends is None or set(depends) <= fields, (
        f"memory_fields names {sorted(set(depends) - fields)}, which is none of its fields "
        f"{sorted(fields)}"
    )
    assert " at 0x" not in repr(policy), "its repr holds an address, which differs between ranks"


def _parameters() -> list[Parameter]:
    return [Parameter(name, shape) for name, shape in CONTRACT_SHAPES.items()]


def _norms(step: int) -> list[float]:
    """One norm per parameter; every kind of trouble comes up in the first 60 steps and later."""
    source = random.Random(step)
    norms = [10.0**i * source.lognormvariate(-1.0, 0.2) for i in range(-2, 2)]
    troubles: dict[int, tuple[int, float]] = {
        7: (0, math.nan), 11: (1, math.inf), 13: (2, 0.0), 17: (3, 1e4), 23: (1, 1e300),
        29: (2, 5e-324), 31: (0, 0.0), 37: (3, math.nan),
    }  # fmt: skip
    where = troubles.get(step % 61)
    if where is not None:
        norms[where[0]] = where[1]
    return [0.0] * 4 if step % 61 == 41 else norms


def _statistics(policy: Any, step: int) -> _Statistics:
    needs = policy.needs
    row = torch.tensor(_norms(step), dtype=torch.float64)
    loss = torch.tensor(math.nan if step % 19 == 5 else 2.0 + 0.1 * math.sin(step)).double()
    return _Statistics(
        _parameters(),
        {order: row * (1.0 + 1.0 / order) for order in needs.gradient_norms},
        {order: torch.tensor([1.0, 2.0, 0.0, 0.5]).double() for order in needs.weight_norms},
        loss if getattr(needs, "loss", False) else None,
    )


StepResult = tuple[list[Tensor], dict[str, Tensor]]


def _run(
    policy: Any, steps: int, start: int = 0, state: dict[str, Tensor] | None = None
) -> list[StepResult]:
    """Drive a policy, checking each step by itself."""
    state = _initial(policy) if state is None else state
    sizes = _sizes(state)
    taken: list[StepResult] = []
    for step in range(start, start + steps):
        statistics = _statistics(policy, step)
        given = [*statistics.gradients.values(), *statistics.weights.values(), *state.values()]
        before = [tensor.clone() for tensor in given]
        actions, new = _ask(policy, statistics, state)
        again, newer = _ask(policy, statistics, state)
        where = f"step {step}"
        assert _same(before, given), f"{where}: it changed its state or statistics in place"
        flat = _decided(policy, actions, statistics, where)
        assert _same(flat, _decided(policy, again, statistics, where)), (
            f"{where}: not pure: the same statistics and state gave another action"
        )
        assert new.keys() == newer.keys(), f"{where}: not pure: the states have other keys"
        assert _same(list(new.values()), list(newer.values())), (
            f"{where}: not pure: the same statistics and state gave another new state"
        )
        assert _sizes(new) == sizes, (
            f"{where}: its state changed keys, shapes or dtypes: {_sizes(new)} after {sizes}"
        )
        for key, value in new.items():
            finite = not value.is_floating_point() or bool(torch.isfinite(value).all())
            assert finite, f"{where}: NaN or inf entered its state[{key!r}]: {value}"
        state = new
        taken.append((flat, new))
    return taken


def _ask(policy: Any, statistics: _Statistics, state: Mapping[str, Tensor]) -> Any:
    """What it decides, and its new state."""
    kind = _kind(policy)
    decide = policy.update if kind == "update" else policy.update_bound
    returned = decide(statistics, state)
    is_pair = isinstance(returned, (tuple, list)) and len(returned) == 2
    assert is_pair, (
        f"{kind} must return two things, what it decides and the state, got {returned!r}"
    )
    return returned


def _initial(policy: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = policy.init(_parameters())
    for key, value in state.items():
        assert isinstance(key, str), f"init: keys must be strings, got {key!r}"
        assert isinstance(value, Tensor), f"init: state[{key!r}] must be a tensor, got {value!r}"
    for key in getattr(policy, "per_parameter", ()):
        assert key in state, f"per_parameter names {key!r}, which init does not give"
        assert state[key].shape[:1] == (len(CONTRACT_SHAPES),), (
            f"state[{key!r}] must have one entry per parameter along its first dim"
        )
    return state


def _sizes(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (value.shape, value.dtype) for key, value in state.items()}


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(contract_units.same, one, other))


def _decided(policy: Any, actions: Any, statistics: _Statistics, where: str) -> list[Tensor]:
    """The tensors of some actions, or of a bound, each checked."""
    found = []
    sound = all(bool(torch.isfinite(row).all()) for row in statistics.gradients.values())
    if _kind(policy) == "update_bound":
        assert isinstance(actions, Tensor), f"{where}: a bound must be a tensor, got {actions!r}"
        assert actions.dtype == torch.float64, f"{where}: the bound is {actions.dtype}"
        assert actions.shape in ((), (len(CONTRACT_SHAPES),)), (
            f"{where}: bound of {list(actions.shape)}"
        )
        good = bool((actions >= 0).all())
        assert good or not sound, f"{where}: finite norms gave a bound of {actions}"
        return [actions]
    for action in actions:
        if hasattr(action, "coefficients"):
            factors = action.coefficients
            assert isinstance(factors, Tensor), f"{where}: coefficients must be a tensor"
            assert factors.dtype == torch.float64, f"{where}: coefficients are {factors.dtype}"
            assert factors.shape in ((), (len(CONTRACT_SHAPES),)), (
                f"{where}: shape {list(factors.shape)}"
            )
            good = bool(torch.isfinite(factors).all()) and bool((factors >= 0).all())
            assert good or not sound, f"{where}: finite norms gave coefficients {factors}"
            found.append(factors)
        elif hasattr(action, "flag"):
            assert action.flag.dtype == torch.bool, f"{where}: a Skip's flag must be bool"
            assert action.flag.shape == (), f"{where}: a Skip's flag must be 0-dim"
            found.append(action.flag.double())
        else:
            raise AssertionError(
                f"{where}: {action!r} is no action of a scaling policy, which returns Scale and "
                f"Skip; a policy that clamps is a ClampingPolicy"
            )
    return found


@contextmanager
def _as_rank(rank: int) -> Iterator[None]:
    """As a process of another rank would be: environment, seeds, and nobody to talk to."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("it talks to other ranks, and a policy must not know of any")

    distributed = torch.distributed
    patches: list[Any] = [
        mock.patch.dict(os.environ, {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
        mock.patch.object(distributed, "get_rank", return_value=rank),
        mock.patch.object(distributed, "get_world_size", return_value=rank + 1),
        mock.patch.object(distributed, "is_initialized", return_value=True),
        *(mock.patch.object(distributed, name, refuse) for name in COLLECTIVES),
    ]
    generator, state = torch.get_rng_state(), random.getstate()
    torch.manual_seed(rank)
    random.seed(rank)
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
        torch.set_rng_state(generator)
        random.setstate(state)


def _check_rank(factory: Callable[[], Any], steps: int, want: Sequence[StepResult]) -> None:
    for rank in (0, 5):
        with _as_rank(rank):
            got = _run(factory(), steps)
        for step, (one, other) in enumerate(zip(want, got, strict=True)):
            assert _same(one[0], other[0]), (
                f"step {step}: rank {rank} decides otherwise, or random numbers do"
            )


def _check_round_trip(factory: Callable[[], Any], steps: int, want: Sequence[StepResult]) -> None:
    for stop in (steps // 3, steps // 2):
        file = io.BytesIO()
        torch.save(want[stop - 1][1], file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        got = _run(factory(), steps - stop, stop, state)
        for number, (one, other) in enumerate(zip(want[stop:], got, strict=True)):
            assert _same(one[0], other[0]), (
                f"step {stop + number}: a new policy with the saved state decides otherwise: "
                f"it remembers something outside of its state"
            )


def _check_no_sync(policy: Any) -> None:
    """A fake tensor has no values, so whoever asks for one is found out."""
    real = policy.init(_parameters())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        state = {key: mode.from_tensor(value) for key, value in real.items()}
        for step in range(3):
            with unset_fake_temporarily():
                statistics = _statistics(policy, step)
            try:
                _, state = _ask(policy, _faked(mode, statistics), state)
            except AssertionError:
                raise
            except Exception as error:
                raise AssertionError(contract_units.host_read_message(error)) from error


def _faked(mode: FakeTensorMode, statistics: _Statistics) -> _Statistics:
    fake = mode.from_tensor
    return _Statistics(
        statistics.parameters,
        {order: fake(row) for order, row in statistics.gradients.items()},
        {order: fake(row) for order, row in statistics.weights.items()},
        None if statistics.loss is None else fake(statistics.loss),
    )
