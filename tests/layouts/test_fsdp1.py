"""FSDP1: what no other layout has. Policies, dtypes and rank counts are in the matrix."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import distclip
from distclip import GradClipper, policies
from distclip.errors import ConfigurationError, UnsupportedGradientError
from distclip.testing import expected
from distclip.testing.models.flattened import flatten, wrap
from tests.helpers.field import still_a_defect
from tests.helpers.ranks import everyones
from tests.helpers.watching import REDUCTION, watch
from tests.layouts.flattened import (
    ORIG,
    batch,
    held,
    loss_of,
    make,
    mine,
    total,
    trained,
    truth,
    wrapped,
)
from tests.sharded import SHAPES, mesh_of, whole

NAMES = ["body.weight", "body.bias", "middle.weight", "middle.bias", "head.weight", "head.bias"]


@pytest.mark.ranks(2, 3)
def test_every_element_is_on_one_rank() -> None:
    """The matrix means something: FSDP1 has really cut, and rows too."""
    for layout in ("fsdp1", "fsdp1_orig"):
        model = flatten(layout, whole())
        for name, shape in SHAPES.items():
            mine_ = model.elements[name].flatten().tolist()
            everywhere = everyones(mine_)
            if name == "scalar":  # ignored: FSDP1 takes none
                continue
            assert sorted(itertools.chain.from_iterable(everywhere)) == list(
                range(math.prod(shape))
            )
        assert any(
            len(model.elements[name].flatten()) % math.prod(shape[1:])
            for name, shape in SHAPES.items()
        )


@pytest.mark.ranks(1, 2, 3)
@ORIG
def test_training_is_that_of_one_process(orig: bool) -> None:
    """20 steps, nested, attached; names, groups and by_name patterns are those of one device."""
    document = {
        "by_name": {"*.bias": None, "head*": {"name": "global_norm", "max_norm": 0.1}},
        "default": {"name": "agc", "clip_factor": 0.02},
    }
    policy = policies.by_name(
        {"*.bias": None, "head*": policies.global_norm(0.1)}, default=policies.agc(0.02)
    )
    model, plain = wrapped(orig), make()
    optimizer, reference = (
        torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, plain)
    )
    clipper = GradClipper(model, policy)
    assert sorted(clipper.names) == sorted(NAMES)
    clipper.attach(optimizer)
    for number in range(20):
        optimizer.zero_grad()
        loss_of(model, mine(batch(number))).backward()
        optimizer.step()
        reference.zero_grad()
        loss_of(plain, batch(number)).backward()
        named = dict(plain.named_parameters())
        gradients = {n: p.grad for n, p in named.items() if p.grad is not None}
        want = expected(document, gradients, named)
        for name, gradient in want.gradients.items():
            named[name].grad = torch.from_numpy(np.asarray(gradient, dtype=np.float32))
        reference.step()
    for name, value in trained(model).items():
        torch.testing.assert_close(value, named[name].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.ranks(2)
@ORIG
def test_groups_of_the_optimizer(orig: bool) -> None:
    model = wrapped(orig)
    parameters = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in parameters if ("middle" in n) is inside]}
        for inside in (True, False)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    loss_of(model, mine(batch())).backward()
    clipper = GradClipper(model, policies.group_norm(0.1), optimizer=optimizer)
    found, gradients = clipper.clip_().parameter_coefficients, truth()
    rest = {n: g for n, g in gradients.items() if "middle" not in n}
    for name, coefficient in found.items():
        norm = total(gradients, "middle") if "middle" in name else total(rest)
        assert coefficient == pytest.approx(min(1.0, 0.1 / (norm + 1e-6)), rel=1e-5)
    with pytest.raises(ConfigurationError, match="steps none"):
        clipper.attach(torch.optim.SGD(make().parameters(), lr=0.1))


@pytest.mark.ranks(2, 3)
@ORIG
def test_a_skipped_step_changes_nothing(orig: bool) -> None:
    model = wrapped(orig)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    GradClipper(model, policies.global_norm(1.0), on_nonfinite="skip").attach(optimizer)
    loss_of(model, mine(batch())).backward()
    optimizer.step()
    before = trained(model)
    optimizer.zero_grad()
    (loss_of(model, mine(batch(1))) * math.nan).backward()
    optimizer.step()
    for name, value in trained(model).items():
        assert torch.equal(value, before[name])
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


@pytest.mark.ranks(2)
@ORIG
@pytest.mark.parametrize(
    "precision",
    [
        MixedPrecision(param_dtype=torch.bfloat16),
        MixedPrecision(reduce_dtype=torch.bfloat16),
        MixedPrecision(param_dtype=torch.bfloat16, keep_low_precision_grads=True),
    ],
    ids=["param", "reduce", "low"],
)
def test_mixed_precision(orig: bool, precision: MixedPrecision) -> None:
    model = wrapped(orig, mixed_precision=precision)
    for _ in range(2):
        model.zero_grad()
        loss_of(model, mine(batch())).backward()
        local = [p.grad.double() for p in model.parameters() if p.grad is not None]
        square = torch.stack([gradient.square().sum() for gradient in local]).sum()
        dist.all_reduce(square)
        before = [gradient.clone() for gradient in local]
        report = GradClipper(model, policies.global_norm(0.01)).clip_()
        assert report.total_norm.item() == pytest.approx(square.sqrt().item(), rel=1e-6)
        assert report.total_norm.item() == pytest.approx(total(truth()), rel=2e-2)
        after = [p.grad.double() for p in model.parameters() if p.grad is not None]
        for old, new in zip(before, after, strict=True):
            torch.testing.assert_close(new, old * 0.01 / square.sqrt(), rtol=4e-3, atol=1e-9)


@pytest.mark.ranks(2, 3)
@ORIG
@pytest.mark.parametrize(
    "strategy",
    [ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD],
    ids=["full", "grad_op", "none"],
)
def test_accumulation(orig: bool, strategy: ShardingStrategy) -> None:
    """Refused on all ranks while not reduced, right after the synchronised backward."""
    model = wrapped(orig, sharding_strategy=strategy)
    clipper = GradClipper(model, policies.global_norm(0.1))
    with model.no_sync():
        loss_of(model, mine(batch(0))).backward()
    for _ in range(2):
        with pytest.raises(UnsupportedGradientError, match=r"no_sync\(\)"):
            clipper.clip_()
    with pytest.raises(UnsupportedGradientError, match=r"no_sync\(\)"):
        distclip.clip_grad_norm_(model.parameters(), 0.1)
    loss_of(model, mine(batch(1))).backward()
    both = {name: g + truth(1)[name] for name, g in truth(0).items()}
    assert clipper.clip_().total_norm.item() == pytest.approx(total(both), rel=1e-5)
    assert clipper.clip_().total_norm.item() == pytest.approx(0.1, rel=1e-4)
    loss_of(model, mine(batch(1))).backward()  # on top, without no_sync()
    assert clipper.clip_().total_norm.item() > 0.1


@pytest.mark.ranks(2)
@ORIG
def test_gathered_parameters_are_refused(orig: bool) -> None:
    model = wrapped(orig)
    clipper = GradClipper(model, policies.agc(0.1))
    loss_of(model, mine(batch())).backward()
    with (
        FullyShardedDataParallel.summon_full_params(model),
        pytest.raises(UnsupportedGradientError, match="has gathered"),
    ):
        clipper.clip_()
    assert clipper.clip_().total_norm.item() == pytest.approx(total(truth()), rel=1e-5)


@pytest.mark.ranks(2)
@ORIG
def test_one_collective_and_the_functions_take_any_subset(orig: bool) -> None:
    """Parts of a model, at every call alike, on every rank."""
    model, gradients = wrapped(orig), truth()
    named = list(model.named_parameters())
    for part in ("", "middle"):
        chosen = [p for n, p in named if part in n]
        model.zero_grad()
        loss_of(model, mine(batch())).backward()
        with watch() as seen:
            norm = distclip.clip_grad_norm_(chosen, 1e9)
        assert norm.item() == pytest.approx(total(gradients, part), rel=1e-5)
        distclip.clip_grad_norm_(chosen, 1e9)  # a mesh of its own makes its group at the first
        with watch() as seen:
            distclip.clip_grad_norm_(chosen, 1e9)
        assert seen.collective_names == [REDUCTION]
    norms = distclip.grad_norms(model)
    assert {n: pytest.approx(v.item(), rel=1e-5) for n, v in norms.items()} == {
        n: g.norm().item() for n, g in gradients.items()
    }
    distclip.clip_grad_value_(model.parameters(), 1e-3)
    assert all(p.grad.abs().max() <= 1e-3 for p in model.parameters() if p.grad is not None)


@pytest.mark.ranks(2)
def test_a_subset_is_wrong_in_torch() -> None:
    """FIELD row 11: torch's function has the norm of this rank's shards."""
    model = wrapped(True)
    loss_of(model, mine(batch())).backward()
    chosen = [p for n, p in model.named_parameters() if "middle" in n]
    right = total(truth(), "middle")
    theirs = torch.nn.utils.clip_grad_norm_(chosen, 1e9)
    assert theirs.item() != pytest.approx(right, rel=1e-3)
    assert distclip.clip_grad_norm_(chosen, 1e9).item() == pytest.approx(right, rel=1e-5)


@pytest.mark.ranks(2)
def test_the_inf_norm_does_not_stick() -> None:
    """FIELD row 9: torch reports an old maximum on a rank without gradients."""
    torch.manual_seed(0)
    model = wrap(nn.Linear(3, 1, bias=False), use_orig_params=True)
    theirs, ours = [], []
    for size in (128.0, 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, size) if dist.get_rank() == 0 else None
        ours.append(distclip.clip_grad_norm_(model.parameters(), 1e9, math.inf).item())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.append(model.clip_grad_norm_(1e9, math.inf).item())
    assert ours == [128.0, 1.0]
    assert theirs == [128.0, 128.0]


FULL, ZERO2, NONE, HYBRID = (
    ShardingStrategy.FULL_SHARD,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.NO_SHARD,
    ShardingStrategy.HYBRID_SHARD,
)


def parallelized(orig: bool, strategy: ShardingStrategy) -> tuple[nn.Module, Tensor]:
    """FSDP1 over tensor parallelism, and this rank's rows of the batch."""
    tensor_parallel = dist.get_world_size() // 2
    shape = (1, 2, tensor_parallel) if strategy == HYBRID else (2, tensor_parallel)
    names = ("replicas", "dp", "tp")[-len(shape) :]
    grid = mesh_of(shape, names)
    model = make()
    plan = {"body": ColwiseParallel(), "middle": RowwiseParallel()}
    parallelize_module(model, grid["tp"], plan)
    mesh = grid["replicas", "dp"] if strategy == HYBRID else grid["dp"]
    model = wrap(model, use_orig_params=orig, device_mesh=mesh, sharding_strategy=strategy)
    return model, batch().chunk(grid["dp"].size())[grid["dp"].get_local_rank()]


@pytest.mark.ranks(2, 4)
@ORIG
@pytest.mark.parametrize("strategy", [FULL, ZERO2, NONE, HYBRID], ids=lambda each: each.name)
def test_over_tensor_parallelism(orig: bool, strategy: ShardingStrategy) -> None:
    """FIELD row 10: torch reduces over the FSDP group alone, and ranks clip differently."""
    if strategy == NONE and orig:
        model, rows = parallelized(orig, strategy)
        with pytest.raises(RuntimeError):  # torch itself cannot, in its forward
            model(rows)
        return
    model, rows = parallelized(orig, strategy)
    loss_of(model, rows).backward()
    gradients = truth()
    clipper = GradClipper(model, policies.agc(0.02))
    assert sorted(clipper.names) == sorted(NAMES)
    if dist.get_world_size() == 4 and strategy == FULL:
        theirs = model.clip_grad_norm_(1e9).item()
        assert theirs != pytest.approx(total(gradients), rel=1e-3)
    ours = distclip.clip_grad_norm_(model.parameters(), 1e9)
    assert ours.item() == pytest.approx(total(gradients), rel=1e-5)
    weights = dict(make().named_parameters())
    want = expected({"name": "agc", "clip_factor": 0.02}, gradients, weights)
    with watch() as seen:
        report = clipper.clip_()
    assert seen.collective_names == [REDUCTION]
    for name, norm in report.parameter_norms.items():
        assert norm == pytest.approx(want.parameter_norms[name], rel=1e-5), name
    assert report.clipped_norm.item() == pytest.approx(want.clipped_norm, rel=1e-5)


@pytest.mark.ranks(2)
@ORIG
def test_hybrid_sharding_with_one_shard_is_not_reduced_over_its_replicas(orig: bool) -> None:
    """By torch, in silence; the replica check says so."""
    grid = mesh_of((2, 1), ("replicas", "shards"))
    model = wrap(make(), use_orig_params=orig, device_mesh=grid, sharding_strategy=HYBRID)
    loss_of(model, mine(batch())).backward()
    still_a_defect(
        held(model) != pytest.approx(math.sqrt(2) * total(truth()), rel=1e-3),
        "leaves replicas apart under HYBRID_SHARD with one shard",
    )
    with pytest.raises(distclip.ReplicaDriftError, match=r"body\.weight"):
        GradClipper(model, policies.global_norm(1.0)).clip_()
