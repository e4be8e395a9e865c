"""Replicas that have drifted apart: found in the step's all-reduce, by name and rank."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import ConfigurationError, GradClipper, ReplicaDriftError, policies
from distclip.statistics.fingerprint import box_fingerprint
from tests.helpers.ranks import everyones
from tests.helpers.watching import bits, same_bits, watch
from tests.sharded import mesh_of, shard, whole

SECONDS = 30


# ---- fingerprints ----


def number(tensor: Tensor) -> int:
    return int(box_fingerprint(tensor, tensor.shape, (0,) * tensor.dim()))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.parametrize("shape", [(), (1,), (5000,), (7, 3), (40, 300), (3, 4, 5, 2), (0, 3)])
def test_a_change_of_one_bit_anywhere_is_seen(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensor = tensor.to(dtype)
    before = number(tensor)
    assert number(tensor.clone()) == before
    raw = tensor.view(-1).view(torch.uint8)
    for place in range(0, raw.numel(), max(1, raw.numel() // 40)):
        for bit in (1, 128):
            raw[place] ^= bit
            assert number(tensor) != before
            raw[place] ^= bit
    assert number(tensor) == before


def test_what_a_norm_does_not_see() -> None:
    tensor = torch.randn(30, 300)
    swapped = tensor.clone()
    swapped[0, 0], swapped[7, 250] = tensor[7, 250], tensor[0, 0]
    moved = tensor[torch.arange(29, -1, -1)]
    for other in (-tensor, swapped, moved, tensor.roll(1), torch.zeros_like(tensor)):
        assert number(other) != number(tensor)
    assert number(torch.zeros(3)) != 0  # a missing gradient is 0
    assert number(torch.zeros(3)) != number(-torch.zeros(3))


@pytest.mark.parametrize("shape", [(9,), (6, 5), (4, 70, 3), (3, 2, 2, 200), (70000,), (300, 400)])
def test_pieces_add_up_however_a_tensor_is_cut(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    for dim in range(len(shape)):
        total, start = 0, 0
        for part in tensor.tensor_split(3, dim):
            offsets = [0] * len(shape)
            offsets[dim], start = start, start + part.shape[dim]
            total += int(box_fingerprint(part, shape, offsets))
        assert (total - number(tensor)) % 2**64 == 0
    assert number(tensor.t().contiguous().t() if len(shape) == 2 else tensor) == number(tensor)


def test_random_changes_are_never_missed() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20, 30, generator=generator)
    seen = {number(base)}
    for _ in range(2000):
        other = base.clone()
        places = torch.randint(600, (3,), generator=generator)
        other.view(-1)[places] *= -1.0  # the top bit of a word, the hardest case
        if not torch.equal(other, base):
            seen.add(number(other))
    assert len(seen) > 1990


# ---- the check ----


def nudge(tensor: Tensor, place: int) -> None:
    """One ulp in one element."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    flat = local.detach().view(-1)
    flat[place] = torch.nextafter(flat[place], torch.tensor(math.inf))


def raised(clipper: GradClipper) -> ReplicaDriftError:
    """The same error on every rank, and a group that still works."""
    with pytest.raises(ReplicaDriftError) as caught:
        clipper.clip_()
    assert len(set(everyones((str(caught.value), caught.value.drifts)))) == 1
    return caught.value


def replica_of(layout: str, world: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Of some tensors that have copies: a rank, and who has the same piece."""
    everybody = tuple(range(world))
    if layout in ("plain", "replicate"):
        return {"fc.weight": (world - 1, everybody), "conv.weight": (1, everybody)}
    if layout == "tp":
        return {"fc.bias": (world - 1, everybody), "wide.weight": (1, everybody)}
    if layout == "hsdp":
        return {"fc.weight": (2, (0, 2)), "embed.weight": (3, (1, 3))}
    if layout == "mixed":
        # plain; on the sub-mesh of columns; on that of rows; replicated over rows of the grid
        return {
            "embed.weight": (2, everybody),
            "fc.bias": (3, (1, 3)),
            "conv.weight": (1, (0, 1)),
            "wide.weight": (3, (1, 3)),
        }
    return {"scalar": (1, everybody)}


@pytest.mark.ranks(2, 3, 4, timeout=60)
@pytest.mark.parametrize(
    "layout", ["plain", "replicate", "tp", "hsdp", "fsdp2", "fsdp2_tp", "mixed"]
)
def test_one_ulp_in_one_element_of_one_replica(layout: str) -> None:
    world = dist.get_world_size()
    if layout in ("hsdp", "mixed") and world < 4:
        pytest.skip("no copies there but in trivial places")
    values = whole()
    for name, (rank, holders) in replica_of(layout, world).items():
        for what in ("gradient", "weights"):
            model = shard(layout, values)
            model.set_gradients(values.gradients)
            clipper = GradClipper(model.named(), policies.global_norm(1.0))
            parameter = model.parameters[name]
            if dist.get_rank() == rank:
                tensor = parameter if what == "weights" else parameter.grad
                assert tensor is not None
                nudge(tensor, 0)
            before = [bits(p.grad) for p in model.parameters.values()]
            error = raised(clipper)
            assert error.parameters == (name,)
            # Of two copies neither is right: then the one that is not on the lowest rank is named.
            assert error.drifts == ((name, what, (rank,)),), (name, holders)
            assert f"{what} of {name!r} on rank {rank}" in str(error)
            after = [bits(p.grad) for p in model.parameters.values()]
            assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.ranks(1, 2, 3, 4, timeout=60)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "mixed"])
def test_equal_replicas_are_never_reported(kind: str) -> None:
    for layout in ("plain", "fsdp2", "hsdp", "tp", "replicate", "fsdp2_tp", "mixed"):
        values = whole(kind, seed=3)
        gradient = values.gradients["fc.weight"]
        assert gradient is not None
        gradient[0, 0], gradient[1, 0], gradient[2, 0] = math.nan, math.inf, -0.0
        model = shard(layout, values)
        clipper = GradClipper(
            model.named(), policies.agc(0.1), on_nonfinite="zero", verify_replicas=1
        )
        for _ in range(2):
            model.set_gradients(values.gradients)
            clipper.clip_()


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
def test_the_minority_is_named() -> None:
    world = dist.get_world_size()
    parameters = {name: nn.Parameter(torch.ones(3, 4)) for name in ("a", "b", "c")}
    for parameter in parameters.values():
        parameter.grad = torch.ones(3, 4)
    clipper = GradClipper(list(parameters.items()), policies.global_norm(1.0))
    if dist.get_rank() == 0:  # the counted copy itself
        nudge(parameters["a"], 5)
    if dist.get_rank() == 1:
        parameters["b"].grad = None
        parameters["c"].data.neg_()  # the same norm
    error = raised(clipper)
    odd = 1 if world == 2 else 0  # of two nobody can tell
    assert error.drifts == (
        ("a", "weights", (odd,)),
        ("b", "gradient", (1,)),
        ("c", "weights", (1,)),
    )
    assert error.ranks == tuple(sorted({odd, 1}))
    assert "none on rank 1, norm 3.46410162 on rank 0" in str(error)
    assert "no_sync" in str(error)
    assert "broadcast" in str(error)
    assert "declare_sharded" in str(error)
    assert "never" in str(error)


@pytest.mark.ranks(4, timeout=SECONDS)
def test_the_same_tensor_on_other_sub_meshes() -> None:
    """TP under DDP: each pair of ranks holds the whole tensor, the pairs cut it as they like."""
    grid = mesh_of((2, 2), ("a", "b"))
    for alike in (True, False):
        cut = Shard(0) if alike or dist.get_rank() < 2 else Shard(1)
        p = nn.Parameter(distribute_tensor(torch.ones(5, 6), grid["b"], [cut], src_data_rank=None))
        p.grad = distribute_tensor(torch.ones(5, 6), grid["b"], [cut], src_data_rank=None)
        GradClipper([("w", p)], policies.global_norm(1.0)).clip_()
        p.grad = distribute_tensor(torch.ones(5, 6), grid["b"], [cut], src_data_rank=None)
        clipper = GradClipper([("w", p)], policies.global_norm(1.0))
        if dist.get_rank() == 3:
            nudge(p.grad, 4)
        error = raised(clipper)
        # Copies that are cut differently cannot be compared rank by rank.
        assert error.drifts == (("w", "gradient", (3,) if alike else ()),)


@pytest.mark.ranks(2, 4, timeout=SECONDS)
def test_a_backward_without_synchronisation() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 3))
    data = torch.full((2, 4), dist.get_rank() + 1.0)
    clipper = GradClipper(model, policies.global_norm(1.0))
    with model.no_sync():
        model(data).square().sum().backward()
    error = raised(clipper)
    assert error.parameters == ("bias", "weight")
    assert {drift.what for drift in error.drifts} == {"gradient"}
    # With it, all is well: nothing of the refused step is kept.
    model.zero_grad()
    model(data).square().sum().backward()
    GradClipper(model, policies.global_norm(1.0)).clip_()


@pytest.mark.ranks(2, timeout=SECONDS)
def test_when_it_looks() -> None:
    looked: dict[Any, list[int]] = {}
    for every in ("first", "never", 1, 3):
        p = nn.Parameter(torch.ones(4))
        clipper = GradClipper([("w", p)], policies.measure(), verify_replicas=every)
        looked[every] = []
        for step in range(7):
            p.grad = torch.ones(4)
            with watch() as seen:
                clipper.clip_()
            if seen.collectives:
                looked[every].append(step)
    assert looked == {"first": [0], "never": [], 1: [*range(7)], 3: [0, 3, 6]}
    # After a refusal it looks again: the first step that went through is the one compared.
    clipper = GradClipper([("w", p)], policies.measure())
    p.grad = torch.full((4,), float(dist.get_rank()))
    raised(clipper)
    raised(clipper)
    p.grad = torch.ones(4)
    clipper.clip_()
    p.grad = torch.full((4,), float(dist.get_rank()))
    clipper.clip_()


@pytest.mark.ranks(2, timeout=SECONDS)
def test_a_wholly_sharded_model_pays_nothing() -> None:
    mesh = mesh_of((2,), ("x",))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)], src_data_rank=None))
    q = nn.Parameter(distribute_tensor(torch.ones(2, 3), mesh, [Replicate()], src_data_rank=None))
    p.grad, q.grad = p.detach().clone(), q.detach().clone()
    sizes = {}
    for name, listed in {"sharded": [p], "with a replica": [p, q]}.items():
        for every in ("first", "never"):
            clipper = GradClipper(listed, policies.global_norm(1e9), verify_replicas=every)
            with watch() as seen:
                clipper.clip_()
            ((_, sizes[name, every]),) = seen.collectives
    assert sizes["sharded", "first"] == sizes["sharded", "never"]
    assert sizes["with a replica", "first"] == sizes["with a replica", "never"] + 8 * 11


@pytest.mark.ranks(2, 3, timeout=SECONDS)
def test_a_rank_in_trouble_and_a_drift_in_one_step() -> None:
    """The rank that refuses its own gradient must not leave the others comparing notes."""
    embedding = nn.Embedding(5, 3)
    embedding.weight.data.fill_(1.0)
    embedding(torch.tensor([1, 2])).sum().backward()
    if dist.get_rank() == 1:
        assert embedding.weight.grad is not None
        embedding.weight.grad.untyped_storage().resize_(0)
    clipper = GradClipper(embedding, policies.measure())
    with pytest.raises(distclip.UnsupportedGradientError) as caught:
        clipper.clip_()
    assert ("freed" in str(caught.value)) == (dist.get_rank() == 1)
    dist.barrier()


@pytest.mark.ranks(2, timeout=SECONDS)
def test_pipeline_stages_have_no_replicas() -> None:
    stage = nn.ParameterDict({f"p{dist.get_rank()}": nn.Parameter(torch.ones(3))})
    tied = nn.Parameter(torch.full((2,), 3.0))
    stage["tied"] = tied
    for p in stage.values():
        p.grad = torch.ones_like(p)
    clipper = GradClipper([stage], policies.measure())
    if dist.get_rank() == 1:
        stage["p1"].data.fill_(7.0)
    clipper.clip_()
    clipper = GradClipper([stage], policies.measure())
    if dist.get_rank() == 1:
        tied.data[1] = 2.0
    assert raised(clipper).drifts == (("tied", "weights", (1,)),)


@pytest.mark.parametrize("bad", [0, -1, True, 2.0, "always", None])
def test_what_is_no_time_to_look(bad: Any) -> None:
    with pytest.raises(ConfigurationError, match="verify_replicas"):
        GradClipper(nn.Linear(2, 2), policies.measure(), verify_replicas=bad)


@pytest.mark.ranks(3, timeout=SECONDS)
def test_a_check_that_sees_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: a fingerprint that is a norm misses what it must see."""
    import distclip.engine.replicas

    def norm(tensor: Tensor, *_: object) -> Tensor:
        return (tensor.detach().double().norm() * 1024).round().long()

    monkeypatch.setattr(distclip.engine.replicas, "box_fingerprint", norm)
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4) * (1 if dist.get_rank() == 1 else -1)
    GradClipper([("w", p)], policies.measure()).clip_()
    monkeypatch.undo()
    raised(GradClipper([("w", p)], policies.measure()))
