"""Sparse gradients against the same ones written out."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import GradClipper, policies

POLICIES: dict[str, Any] = {
    "measure": policies.measure(),
    "global": policies.global_norm(0.1),
    "global p=3": policies.global_norm(0.1, 3.0),
    "global p=inf": policies.global_norm(0.1, math.inf),
    "parameter": policies.parameter_norm(0.1),
    "value": policies.value(0.05),
    "block rms": policies.block_rms(0.01),
    "agc": policies.agc(0.01),
    "agc of columns": policies.agc(0.01, unit_dims={"*weight": [1]}),
    "agc of both": policies.agc(0.01, unit_dims={"*weight": [0, 1]}),
    "agc of tensors": policies.agc(0.01, unit="tensor"),
    "value, agc, global": policies.chain(
        policies.value(0.05), policies.agc(0.01), policies.global_norm(0.01)
    ),
    "agc, value, global": policies.chain(
        policies.agc(0.1), policies.value(0.05), policies.global_norm(0.01)
    ),
    "global, agc": policies.chain(policies.global_norm(0.2), policies.agc(0.01)),
}


class Model(nn.Module):
    """Two embeddings, of which one has rows twice in a batch, and a dense layer."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(11, 5, sparse=sparse)
        self.bag = nn.EmbeddingBag(7, 5, sparse=sparse, mode="sum")
        self.last = nn.Linear(5, 2)

    def forward(self, words: Tensor, bag: Tensor) -> Tensor:
        result: Tensor = self.last(self.words(words) + self.bag(bag))
        return result


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(10 * step + rank)
    return torch.tensor([1, 4, 1, 9 - rank]), torch.randint(0, 7, (4, 2))


def models(step: int = 0) -> tuple[nn.Module, nn.Module]:
    """The same model with sparse and with dense gradients, under DDP where there are ranks."""
    both: list[nn.Module] = [Model(sparse=True), Model(sparse=False)]
    if dist.is_initialized():
        both = [DistributedDataParallel(model) for model in both]
    for model in both:
        model(*batch(step)).square().sum().backward()
    return both[0], both[1]


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.to_dense() for p in model.parameters() if p.grad is not None]


def assert_alike(sparse: nn.Module, dense: nn.Module, *, equal: bool = False) -> None:
    for mine, theirs in zip(gradients(sparse), gradients(dense), strict=True):
        assert torch.allclose(
            mine, theirs, rtol=0.0 if equal else 1e-5, atol=0.0 if equal else 1e-9
        )
    for layer in (getattr(sparse, "module", sparse).words, getattr(sparse, "module", sparse).bag):
        assert layer.weight.grad.is_sparse


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_makes_the_same_of_them(name: str) -> None:
    sparse, dense = models()
    reports = [GradClipper(each, POLICIES[name]).clip_() for each in (sparse, dense)]
    assert_alike(sparse, dense)
    first, second = reports
    assert first.parameter_norms == pytest.approx(second.parameter_norms, rel=1e-6)
    assert float(first.clipped_norm) == pytest.approx(float(second.clipped_norm), rel=1e-6)
    assert first.parameter_coefficients == pytest.approx(second.parameter_coefficients, rel=1e-6)
    clipped = {"measure": 0}.get(name, 1)
    assert (float(first.coefficient) < 1.0 or name.startswith("value")) == bool(clipped)


@pytest.mark.ranks(1, 2)
def test_the_functions() -> None:
    calls: list[Callable[[nn.Module], Any]] = [
        lambda m: distclip.clip_grad_norm_(m.parameters(), 0.1),
        lambda m: distclip.clip_grad_norm_(m.parameters(), 0.1, math.inf),
        lambda m: distclip.clip_grad_value_(m.parameters(), 0.02),
        lambda m: distclip.clip_grad_agc_(m.parameters(), 0.01),
        lambda m: list(distclip.grad_norms(m).values()),
        lambda m: distclip.get_total_norm([p.grad for p in m.parameters()]),
    ]
    for call in calls:
        sparse, dense = models()
        mine, theirs = call(sparse), call(dense)
        assert_alike(sparse, dense)
        if mine is not None:
            assert torch.allclose(torch.as_tensor(mine), torch.as_tensor(theirs), rtol=1e-6)
    if dist.is_initialized():
        sparse, dense = models()
        for each in (sparse, dense):
            distclip.clip_grad_norm_(each.parameters(), 0.1, pipeline_group=dist.group.WORLD)
        assert_alike(sparse, dense)


def test_measuring_leaves_a_tensor_as_it_is() -> None:
    given = torch.sparse_coo_tensor([[1, 1]], [3.0, 4.0], (3,), check_invariants=True)
    assert distclip.get_total_norm([given]).item() == 7.0
    assert given._nnz() == 2


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite(value: float) -> None:
    for mode in ("skip", "zero", "error"):
        sparse, _ = models()
        weight: Any = getattr(sparse, "module", sparse).words.weight
        weight.grad = weight.grad.coalesce()
        weight.grad._values()[0, 0] = value
        before = copy.deepcopy(gradients(sparse))
        clipper = GradClipper(sparse, policies.global_norm(0.1), on_nonfinite=mode)  # type: ignore[arg-type]
        if mode == "error":
            with pytest.raises(distclip.NonFiniteGradientError, match=r"words\.weight"):
                clipper.clip_()
        else:
            report = clipper.clip_()
            (name,) = report.nonfinite
            assert name.endswith("words.weight")
        if mode == "zero":
            assert not weight.grad.to_dense().any()
        else:
            assert all(
                torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0))
                for a, b in zip(before, gradients(sparse), strict=True)
            )


def test_optimizers_of_sparse_gradients_step_with_them() -> None:
    for make in (torch.optim.SparseAdam, torch.optim.SGD):
        ends = []
        for sparse in (True, False):
            model = Model(sparse=sparse)
            if make is torch.optim.SparseAdam and not sparse:
                continue
            tables = [*model.words.parameters(), *model.bag.parameters()]
            optimizer = make(tables, lr=0.1)
            clipper = GradClipper(
                [("words", tables[0]), ("bag", tables[1])], policies.global_norm(0.1)
            )
            handle = clipper.attach(optimizer)
            start = tables[0].detach().clone()
            for step in range(3):
                model.zero_grad()
                model(*batch(step)).square().sum().backward()
                optimizer.step()
                assert tables[0].grad is not None
                assert float(distclip.get_total_norm([t.grad for t in tables])) == pytest.approx(
                    0.1
                )
            handle.remove()
            assert not torch.equal(start, tables[0])
            ends.append([t.detach() for t in tables])
        if len(ends) == 2:
            assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(*ends, strict=True))


@pytest.mark.ranks(2)
def test_a_drift_between_copies_is_seen() -> None:
    for change in ("value", "row"):
        sparse, _ = models()
        weight: Any = getattr(sparse, "module", sparse).words.weight
        if dist.get_rank() == 1:
            gradient = weight.grad.coalesce()
            indices, values = gradient.indices().clone(), gradient.values().clone()
            if change == "value":
                values[1, 2] += 1.0
            else:
                indices[0, -1] += 1  # the same values in another row
            weight.grad = torch.sparse_coo_tensor(
                indices, values, weight.shape, check_invariants=True
            )
        with pytest.raises(distclip.ReplicaDriftError, match=r"words\.weight"):
            GradClipper(sparse, policies.global_norm(0.1)).clip_()


@pytest.mark.parametrize("dims", [(3,), (3, 4), (2, 3, 4)])
def test_any_number_of_sparse_dims(dims: tuple[int, ...]) -> None:
    for sparse_dims in range(1, len(dims) + 1):
        for unit_dims in ([], [0], [len(dims) - 1]):
            torch.manual_seed(1)
            whole = torch.randn(dims) * (torch.rand(dims[:sparse_dims]) < 0.5).view(
                *dims[:sparse_dims], *[1] * (len(dims) - sparse_dims)
            )
            mine, theirs = (nn.Parameter(torch.ones(dims)) for _ in range(2))
            mine.grad, theirs.grad = whole.to_sparse(sparse_dims), whole.clone()
            policy = policies.chain(
                policies.agc(0.3, unit_dims={"w": unit_dims}), policies.global_norm(0.5)
            )
            for each in (mine, theirs):
                GradClipper([("w", each)], policy).clip_()
            assert torch.allclose(mine.grad.to_dense(), theirs.grad, rtol=1e-6)


def test_no_entries_at_all() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    for policy in (policies.global_norm(1.0), policies.agc(), policies.value(0.1)):
        parameter.grad = torch.sparse_coo_tensor(
            torch.zeros(1, 0, dtype=torch.long),
            torch.zeros(0, 2),
            (3, 2),
            check_invariants=True,
        )
        assert float(GradClipper([("w", parameter)], policy).clip_().total_norm) == 0.0


@pytest.mark.parametrize("rows", [3, 300])
def test_values_beside_a_dense_gradient_in_memory(rows: int) -> None:
    """Neighbours are measured as one, by the shapes of their parameters: values have others."""
    torch.manual_seed(2)
    memory = torch.randn(5 * rows, 2)
    first, table, last = (nn.Parameter(torch.ones(n, 2)) for n in (rows, 4 * rows, 2 * rows))
    first.grad, values, last.grad = memory.split([rows, 2 * rows, 2 * rows])
    table.grad = torch.sparse_coo_tensor(
        torch.arange(1, 2 * rows + 1)[None], values, table.shape, check_invariants=True
    )._coalesced_(True)
    assert table.grad._values().data_ptr() == values.data_ptr()
    whole = [first.grad.clone(), table.grad.to_dense(), last.grad.clone()]
    named = [("first", first), ("table", table), ("last", last)]
    for policy in (policies.agc(0.01), policies.global_norm(1.0)):
        reference = [(name, nn.Parameter(torch.ones_like(p))) for name, p in named]
        for (_, dense), (_, mine), gradient in zip(reference, named, whole, strict=True):
            assert mine.grad is not None
            dense.grad = mine.grad.to_dense().clone()
            assert dense.grad.shape == gradient.shape
        reports = [GradClipper(each, policy).clip_() for each in (named, reference)]
        assert reports[0].parameter_norms == pytest.approx(reports[1].parameter_norms, rel=1e-6)
        for (_, mine), (_, dense) in zip(named, reference, strict=True):
            assert mine.grad is not None
            assert torch.allclose(mine.grad.to_dense(), dense.grad, rtol=1e-6)
