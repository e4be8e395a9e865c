"""The contract of policies: ours keep it, and each way of breaking it is found."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from distclip import policies
from distclip.policies import Needs, Policy, Scale
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
    policies.skip_spikes,
    lambda: policies.skip_spikes(16, min_history=4, loss=True),
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


class Addressed(Base):
    def __repr__(self) -> str:
        return f"Addressed({random.random()})"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (InPlace, "changed its state or statistics in place"),
        (Poisoned, r"step 7: NaN or inf entered its state\['mean'\]"),
        (Reads, "reads a value on the host"),
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
    ],
)
def test_a_broken_policy_is_found(broken: type[Base], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_policy(broken)
