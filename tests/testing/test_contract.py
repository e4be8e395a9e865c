"""The contract of policies: ours keep it, and each way of breaking it is found."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from distclip import policies
from distclip.policies import Needs, Policy, RunningMax, Scale
from distclip.testing import check_policy

OURS: list[Callable[[], Policy]] = [
    policies.measure,
    lambda: policies.global_norm(1.0),
    lambda: policies.value(0.1),
    lambda: policies.parameter_norm(1.0, 3.0),
    lambda: policies.group_norm(1.0),
    lambda: policies.block_rms(0.1),
    policies.agc,
    policies.dreamer_agc,
    policies.autoclip,
    lambda: policies.autoclip(90, window=50),
    policies.zclip,
    lambda: policies.zclip(max_norm=None),
    policies.adagc,
    lambda: policies.adagc(max_growth=2.0, warmup_steps=10),
    policies.norm_stabilizer,
    policies.group_ema,
    lambda: policies.group_ema(1.5, 0.5, 0.9, max_down_scale=0.1, max_up_scale=3.0),
    policies.skip_spikes,
    lambda: policies.skip_spikes(16, min_history=4, clip_sigma=2.0),
    lambda: policies.skip_norm(10.0, clip_norm=1.0),
    lambda: policies.skip_spikes(16, min_history=4, loss=True),
    lambda: policies.agc(unit="tensor"),
    RunningMax,
]


@pytest.mark.parametrize("factory", OURS, ids=lambda factory: repr(factory()).split("(")[0])
def test_ours_keep_it(factory: Callable[[], Policy]) -> None:
    check_policy(factory)


@dataclass(frozen=True)
class Base(Policy):
    name: ClassVar[str] = "base"

    @property
    def needs(self) -> Needs:
        return Needs.of(gradients=[2.0])

    def init(self, parameters: Any) -> Any:
        return {"mean": torch.zeros(len(parameters), dtype=torch.float64)}

    def update(self, statistics: Any, state: Any) -> Any:
        norms = statistics.gradient_norms()
        sound = torch.where(torch.isfinite(norms), norms, state["mean"])
        return [Scale(torch.ones_like(norms))], {"mean": 0.9 * state["mean"] + 0.1 * sound}


def test_the_base_of_the_broken_ones_keeps_it() -> None:
    check_policy(Base)


class InPlace(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        actions, new = super().update(statistics, state)
        state["mean"].copy_(new["mean"])
        return actions, state


class Poisoned(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        mean = 0.9 * state["mean"] + 0.1 * statistics.gradient_norms()
        return [Scale(torch.ones(()).double())], {"mean": mean}


class Reads(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        large = statistics.gradient_norms().max().item() > 1e4
        return [Scale(torch.ones(()).double() * (0.5 if large else 1.0))], state


class Alone(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        return statistics.total_norm()


class Lists(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        return [Scale(torch.ones(()).double() * len(statistics.gradient_norms().tolist()))], state


class Masks(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        norms = statistics.gradient_norms()
        return [Scale(torch.ones(()).double() + 0 * norms[norms > 1].isnan().sum())], state


class Random(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        return [Scale(torch.rand((), dtype=torch.float64))], state


class Ranked(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return [Scale(torch.ones(()).double() / (1 + rank))], state


class Talks(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        norms = statistics.gradient_norms().clone()
        if dist.is_initialized():
            dist.all_reduce(norms)
        return [Scale(torch.ones_like(norms))], state


class Remembers(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        once = self.__dict__.setdefault("first", {})
        key = float(statistics.gradient_norms()[0].nan_to_num())
        order = once.setdefault(key, len(once))
        return [Scale(torch.ones(()).double() / (1 + order))], state


class Grows(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        actions, new = super().update(statistics, state)
        return actions, {"mean": torch.cat([new["mean"], new["mean"][:1]])}


class Undeclared(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        return [Scale(1 / (1 + statistics.gradient_norms(3.0)))], state


class Narrow(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        return [Scale(torch.ones(()))], state


class Divides(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        return [Scale(1.0 / statistics.gradient_norms())], state


class Plain(Base):
    def init(self, parameters: Any) -> Any:
        return {"mean": [0.0] * len(parameters)}


class Clamps(Base):
    def update(self, statistics: Any, state: Any) -> Any:
        return [policies.Clamp(0.5), Scale(torch.ones(()).double())], state


class Misspelt(Base):
    memory_fields: ClassVar[frozenset[str] | None] = frozenset({"windw"})


class Addressed(Base):
    def __repr__(self) -> str:
        return f"Addressed({random.random()})"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (InPlace, "changed its state or statistics in place"),
        (Poisoned, r"step 7: NaN or inf entered its state\['mean'\]"),
        (Reads, "reads a value on the host"),
        (Alone, "update must return two things, what it decides and the state, got tensor"),
        (Lists, "reads a value on the host"),
        (Masks, "reads a value on the host"),
        (Random, "not pure"),
        (Ranked, "rank 5 decides otherwise"),
        (Talks, "talks to other ranks"),
        (Remembers, "remembers something outside of its state"),
        (Grows, "changed keys, shapes or dtypes"),
        (Undeclared, r"reads gradient_norms\(3.0\), which its `needs` do not declare"),
        (Narrow, "coefficients are torch.float32"),
        (Divides, "finite norms gave coefficients"),
        (Plain, "must be a tensor"),
        (Addressed, "have a different repr"),
        (Misspelt, r"memory_fields names \['windw'\]"),
        (Clamps, r"step 0: Clamp\(bound=0.5\) is no action of a scaling policy"),
    ],
)
def test_a_broken_policy_is_found(broken: type[Base], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_policy(broken)


# ---- bounds ----------------------------------------------------------------------------------


class Untidy(RunningMax):
    def update_bound(self, statistics: Any, state: Any) -> Any:
        _, new = super().update_bound(statistics, state)
        return new["mean"] - 1e-3, new


class Unknown(RunningMax):
    def update_bound(self, statistics: Any, state: Any) -> Any:
        norms = statistics.gradient_norms(float("inf"))
        return norms / norms, super().update_bound(statistics, state)[1]  # 0 / 0


class Numbers(RunningMax):
    def update_bound(self, statistics: Any, state: Any) -> Any:
        return 1.0, state


class Totals(RunningMax):
    def update_bound(self, statistics: Any, state: Any) -> Any:
        return torch.ones(len(state["mean"]) + 1, dtype=torch.float64), state


class Halves(RunningMax):
    def update_bound(self, statistics: Any, state: Any) -> Any:
        return torch.ones(()), state


class Swallows(RunningMax):
    def update_bound(self, statistics: Any, state: Any) -> Any:
        mean = torch.maximum(state["mean"], statistics.gradient_norms(float("inf")))
        return mean, {**state, "mean": mean}


class Looks(RunningMax):
    def update_bound(self, statistics: Any, state: Any) -> Any:
        return torch.tensor(statistics.gradient_norms(float("inf")).nan_to_num().max().item()), {
            **state
        }


@dataclass(frozen=True)
class Fixed(policies.ClampingPolicy):
    bound: Any = 1.0
    name: ClassVar[str] = "fixed"


class Drifts(policies.ClampingPolicy):
    name: ClassVar[str] = "drifts"

    def __repr__(self) -> str:
        return "Drifts()"

    @property
    def bound(self) -> float:
        return random.random()


class Empty(policies.ClampingPolicy):
    name: ClassVar[str] = "empty"

    def __repr__(self) -> str:
        return "Empty()"


class Both:
    """Of two kinds; a class of ours could not be."""

    name = "both"
    bound = 1.0

    def __repr__(self) -> str:
        return "Both()"

    def update(self, statistics: Any, state: Any) -> Any:
        return [], state


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Untidy, "finite norms gave a bound of"),
        (Unknown, "finite norms gave a bound of"),
        (Numbers, "a bound must be a tensor, got 1.0"),
        (Totals, r"bound of \[5\]"),
        (Halves, "the bound is torch.float32"),
        (Swallows, "NaN or inf entered its state"),
        (Looks, r"the bound is torch.float32|reads a value on the host"),
        (lambda: Fixed(-1.0), "must be a number >= 0, got -1.0"),
        (lambda: Fixed(torch.ones(())), "must be a number >= 0, got tensor"),
        (Drifts, "not the same whenever"),
        (Empty, "it decides nothing"),
        (Both, r"several kinds \(update, bound\)"),
    ],
)
def test_a_broken_clamp_is_found(broken: Callable[[], Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_policy(broken)


# ---- units -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units(policies.UnitPolicy):
    name: ClassVar[str] = "units"

    def unit_dims(self, parameter: Any) -> Any:
        return (0,) if parameter.shape else ()

    def unit_coefficients(self, gradient_norms: Any, weight_norms: Any) -> Any:
        return (1.0 / gradient_norms.clamp(min=1.0)).nan_to_num(nan=1.0)


def test_the_base_of_the_broken_units_keeps_it() -> None:
    check_policy(Units)


class Beyond(Units):
    def unit_dims(self, parameter: Any) -> Any:
        return (1,)


class Listed(Units):
    def unit_dims(self, parameter: Any) -> Any:
        return [0]


class Averaged(Units):
    def unit_coefficients(self, gradient_norms: Any, weight_norms: Any) -> Any:
        return 1.0 / (1.0 + gradient_norms.clamp(max=10.0) + gradient_norms.clamp(max=10.0).mean())


class Changes(Units):
    def unit_coefficients(self, gradient_norms: Any, weight_norms: Any) -> Any:
        return 1.0 / gradient_norms.clamp_(min=1.0)


class Singles(Units):
    def unit_coefficients(self, gradient_norms: Any, weight_norms: Any) -> Any:
        return torch.ones(len(gradient_norms))


class Widens(Units):
    def unit_coefficients(self, gradient_norms: Any, weight_norms: Any) -> Any:
        return torch.ones(len(gradient_norms) + 1, dtype=torch.float64)


class Inverts(Units):
    def unit_coefficients(self, gradient_norms: Any, weight_norms: Any) -> Any:
        return weight_norms / gradient_norms


class Counts(Units):
    def unit_coefficients(self, gradient_norms: Any, weight_norms: Any) -> Any:
        calls = self.__dict__.setdefault("calls", [])
        calls.append(1)
        return gradient_norms.new_ones(()) / (1 + len(calls))


class Rolls(Units):
    def unit_coefficients(self, gradient_norms: Any, weight_norms: Any) -> Any:
        return gradient_norms.new_ones(()) / (1 + (dist.get_rank() if dist.is_initialized() else 0))


class Peeks(Units):
    def unit_coefficients(self, gradient_norms: Any, weight_norms: Any) -> Any:
        for norm in gradient_norms.tolist():
            assert norm != 12345.0
        return torch.ones_like(gradient_norms)


class Labelled(Units):
    @property
    def threshold(self) -> Any:
        return "high"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Beyond, r"must be dims of it, each once and in order, got \(1,\)"),
        (Listed, r"must be a tuple of dims, got \[0\]"),
        (Averaged, "depends on the other units"),
        (Changes, "in place"),
        (Singles, "coefficients are torch.float32"),
        (Widens, r"shape \[11\] for 10 units"),
        (Inverts, "finite norms gave coefficients"),
        (Counts, "not pure"),
        (Rolls, "rank 5 decides otherwise"),
        (Peeks, "reads a value on the host"),
        (Labelled, "`threshold` must be a number or None"),
    ],
)
def test_a_broken_unit_policy_is_found(broken: type[Units], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_policy(broken)
