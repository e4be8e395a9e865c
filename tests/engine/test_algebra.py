"""A chain of scaling policies of any length reads gradients once and scales them once."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distclip import GradClipper, policies
from distclip.testing import assert_rounded, expected
from tests.engine.test_matrix import build
from tests.helpers.shards import local
from tests.helpers.watching import REDUCTION, loops, watch
from tests.sharded import shard, whole

LONG = [
    {"name": "skip_spikes", "window": 16, "min_history": 4},
    {"name": "autoclip", "percentile": 30.0, "window": 20},
    {"name": "adagc", "warmup_steps": 3, "lambda_abs": 5.0},
    {"name": "zclip", "warmup_steps": 3, "max_norm": 4.0},
    {"name": "global_norm", "max_norm": 3.0},
    {"name": "parameter_norm", "max_norm": 2.0},
    {"name": "block_rms", "threshold": 0.2},
    {"name": "adagc", "warmup_steps": 2, "lambda_abs": 1.0},
]
SHORT = [{"name": "global_norm", "max_norm": 1.0}]
CLAMPED = [*SHORT, {"name": "value", "clip_value": 1e-3}, *SHORT]


class Touching(TorchDispatchMode):
    """Ops that take a gradient's memory, by name; loops over it are counted apart."""

    def __init__(self, gradients: list[Tensor]) -> None:
        super().__init__()
        self.storages = {g.untyped_storage().data_ptr() for g in gradients if g.numel()}
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        if any(t.untyped_storage().data_ptr() in self.storages for t in tensors):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def touched(policy: Any) -> tuple[Counter[str], GradClipper]:
    values = whole()
    model = shard("plain", values)
    clipper = GradClipper(model.named(), build(policy))
    for step in range(6):
        factor = 1.0 + 0.2 * (step % 3)  # the last is no spike
        gradients = {n: None if g is None else factor * g for n, g in values.gradients.items()}
        model.set_gradients(gradients)
        clipper.clip_()
    model.set_gradients(gradients)
    local = [gradient for _, gradient in model.local_gradients() if gradient is not None]
    with Touching(local) as mode, loops() as counted:
        report = clipper.clip_()
    assert report.coefficient < 1
    return mode.seen + counted, clipper


def test_a_long_chain_touches_the_gradients_as_a_single_policy_does() -> None:
    one, _ = touched(SHORT)
    many, clipper = touched(LONG)
    assert one.total() > 0
    assert many == one  # the same reading and the same scaling
    assert len(clipper._session.program.passes) == 1
    twice, _ = touched(CLAMPED)
    assert twice.total() > one.total()  # this can fail: a clamp in the middle is read again


@pytest.mark.ranks(2, 3)
def test_a_long_chain_communicates_once_and_equals_the_oracle_step_by_step() -> None:
    values = whole()
    model = shard("fsdp2", values)
    clipper = GradClipper(model.named(), build(LONG))
    memory: dict[str, Any] = {}
    clipped = 0
    for step in range(30):
        factor = 1.0 + 0.5 * (step % 4) + (1000.0 if step == 20 else 0.0)
        gradients = {n: None if g is None else factor * g for n, g in values.gradients.items()}
        model.set_gradients(gradients)
        with watch() as seen:
            report = clipper.clip_()
        assert seen.collective_names == [REDUCTION], step
        want = expected(LONG, gradients, values.weights, memory=memory)
        assert bool(report.skipped) == want.skipped == (step == 20)
        clipped += report.coefficient.item() < 1
        for name, mine, part in model.beside(want.gradients):
            if part is not None and mine is not None:
                assert_rounded(mine, part, coefficient_error=1e-6, name=name)
    assert clipped > 20


class Halved(policies.agc):
    """A policy of units whose coefficient is the same for all of them."""

    def unit_coefficients(self, gradient_norms: Tensor, weight_norms: Tensor) -> Tensor:
        return gradient_norms.new_tensor(0.5)


@pytest.mark.ranks(1, 2, 3)
def test_one_coefficient_for_all_units() -> None:
    values = whole()
    model = shard("fsdp2", values)
    model.set_gradients(values.gradients)
    found = [local(p.grad) for p in model.parameters.values() if p.grad is not None]
    wanted = [0.5 * gradient for gradient in found]
    report = GradClipper(model.named(), Halved(1.0)).clip_()
    for gradient, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, want)
    torch.testing.assert_close(report.clipped_norm, 0.5 * report.total_norm)
