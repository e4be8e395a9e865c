"""Gradients that lie side by side in one buffer, as FSDP2's do, are measured together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distclip import GradClipper, policies
from distclip.application import inplace
from distclip.statistics import local, neighbours
from distclip.statistics.neighbours import Neighbours, learn
from distclip.testing import assert_rounded
from tests.core.watching import watch

SIZES = [64, 2048, 32, 4096, 96, 7, 512, 64]
CPU = torch.device("cpu")


def buffer(sizes: Sequence[int] = SIZES, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(sum(sizes), generator=generator) * scale
    return list(flat.split(list(sizes)))


def check(tensors: Sequence[Tensor | None], known: Neighbours, order: float = 2.0) -> None:
    found = local.norms(tensors, order, device=CPU, together=known.find(tensors))
    for have, tensor in zip(found.tolist(), tensors, strict=True):
        want = 0.0 if tensor is None else torch.linalg.vector_norm(tensor.double(), order).item()
        assert have == pytest.approx(want, rel=1e-6, abs=0.0, nan_ok=True)


def test_neighbours_are_found_and_no_boundary_cuts_a_lane() -> None:
    known = learn(buffer())
    # The one of 7 elements shares no lane, and parts the buffer in two.
    assert [known.positions[run.first] for run in known.runs] == [0, 6]
    sizes = [64 + 2048 + 32 + 4096 + 96, 512 + 64]
    assert [run.shape for run in known.runs] == [(sizes[0] // 32, 32), (sizes[1] // 64, 64)]
    assert 5 not in known.positions


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_norms_are_those_of_each_tensor(order: float) -> None:
    known = Neighbours()
    for seed in range(3):
        check(buffer(seed=seed), known, order)
    check(list(reversed(buffer())), Neighbours(), order)


def test_they_are_really_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    measure = local._cpu_norm
    monkeypatch.setattr(
        local, "_cpu_norm", lambda t, *rest: calls.append(t.numel()) or measure(t, *rest)
    )
    check(buffer([2048, 4096, 2048]), Neighbours())
    assert calls == []


def test_another_arrangement_is_noticed() -> None:
    known = Neighbours()
    first = buffer()
    check(first, known)
    check([t.clone() for t in first], known)  # nobody's neighbour
    check(list(torch.cat(list(reversed(first))).split(list(reversed(SIZES))))[::-1], known)
    swapped = [first[2], first[1], first[0], *first[3:]]  # sizes of others
    check(swapped, known)
    check([first[0].double(), *first[1:]], known)
    check([first[0], torch.randn(4096)[::2], *first[2:]], known)
    check(first, known)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(lambda flat: flat[128:192], id="further on"),
        pytest.param(lambda flat: flat[64:192:2], id="with gaps"),
        pytest.param(lambda flat: flat[64:192].view(torch.float64), id="of another dtype"),
    ],
)
def test_what_only_one_check_can_tell_is_noticed(second: Callable[[Tensor], Tensor]) -> None:
    """Sizes, the first address, and the room behind it are as they were."""
    flat = torch.rand(256) + 1.0
    known = Neighbours()
    check([flat[:64], flat[64:128]], known)
    check([flat[:64], second(flat)], known)


def half(tensor: Tensor) -> Tensor:
    """As many elements at the same place, of another dtype."""
    return tensor.view(torch.float16)[: tensor.numel()]


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(lambda flat: [flat[:64], flat[128:192], flat[192:256]], id="further on"),
        pytest.param(lambda flat: [flat[64:128], flat[:64], flat[128:192]], id="swapped"),
        pytest.param(lambda flat: [flat[:64], flat[64:128], flat[128:256]], id="a longer last one"),
        pytest.param(lambda flat: [flat[:64], flat[64:128], flat[128:256:2]], id="gaps at the end"),
        pytest.param(lambda flat: [flat[:64], None, flat[128:192]], id="missing"),
        pytest.param(lambda flat: list(flat.double()[:192].split(64)), id="of another dtype"),
        pytest.param(lambda flat: [half(flat[:64]), flat[64:128], flat[128:192]], id="first half"),
        pytest.param(lambda flat: [flat[:64], flat[64:128], half(flat[128:192])], id="last half"),
    ],
)
def test_where_shapes_are_known_places_tell_the_rest(
    changed: Callable[[Tensor], list[Tensor | None]],
) -> None:
    """What the parameters' specs cannot say about gradients: where they lie."""
    flat = torch.rand(256) + 1.0
    known = learn(list(flat[:192].split(64)))
    assert known.spans(list(flat[:192].split(64)), shaped=True) is not None
    assert known.spans(list((flat * 2)[:192].split(64)), shaped=True) is not None
    assert known.spans(changed(flat), shaped=True) is None


def test_a_missing_gradient_is_noticed() -> None:
    known = Neighbours()
    tensors: list[Tensor | None] = list(buffer())
    check(tensors, known)
    tensors[1] = None
    check(tensors, known)


def test_patience_ends_and_norms_stay_right() -> None:
    known = Neighbours()
    for turn in range(3 * neighbours.PATIENCE):
        sizes = SIZES[turn % 5 :] + SIZES[: turn % 5]
        check(buffer(sizes, seed=turn), known)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 3e19, 1e-44])
def test_what_float32_partial_sums_cannot_hold_is_measured_again(scale: float) -> None:
    check(buffer(scale=scale), Neighbours())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_element_stays_with_its_tensor(bad: float) -> None:
    tensors = buffer()
    tensors[1][5] = bad
    check(tensors, Neighbours())


def test_neighbours_by_chance_in_two_storages_are_not_read_across() -> None:
    """Same addresses and sizes, but the storage of the first ends where the second begins."""
    flat = torch.randn(128)
    known = Neighbours()
    check([flat[:64], flat[64:]], known)
    memory = flat.numpy()
    apart = [torch.from_numpy(memory[:64]), torch.from_numpy(memory[64:])]
    assert apart[0].data_ptr() + 256 == apart[1].data_ptr()
    check(apart, known)
    check(apart, Neighbours())


@pytest.mark.ranks(2, 3)
def test_neighbours_are_scaled_together_and_others_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FSDP2's gradients of one module lie side by side; a plain one beside them does not."""
    torch.manual_seed(0)
    modules = nn.ModuleList(nn.Linear(192, 192) for _ in range(3))
    for module in modules:
        fully_shard(module)
    for module in modules:
        module(torch.randn(2, 192)).square().sum().backward()
    alone = nn.Parameter(torch.ones(5))
    alone.grad = torch.full((5,), 2.0)
    named = [*modules.named_parameters(), ("alone", alone)]
    before = {name: full(parameter) for name, parameter in named}
    total = math.sqrt(sum(g.double().square().sum().item() for g in before.values()))
    clipper = GradClipper(named, policies.global_norm(0.5))
    scaled: list[int] = []
    scale = inplace.scale_
    monkeypatch.setattr(
        inplace, "scale_", lambda tensors, c: scaled.append(len(tensors)) or scale(tensors, c)
    )
    with watch() as seen:
        report = clipper.clip_()
    assert report.total_norm.item() == pytest.approx(total, rel=1e-6)
    for name, parameter in named:
        assert_rounded(full(parameter), before[name].double() * (0.5 / (total + 1e-6)), name=name)
    # One for each module and one for the plain one, and none for each parameter.
    assert scaled == [3 + 1]
    assert seen.ops["aten.linalg_vector_norm.default"] <= 3 + 2


def full(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


def unit_norms(tensors: Sequence[Tensor], order: float, *, alone: bool) -> list[float]:
    """Norms of the rows of matrices, and of vectors as a whole."""
    dims: list[tuple[int, ...]] = [(0,) if tensor.dim() > 1 else () for tensor in tensors]
    counts = [len(tensor) if tensor.dim() > 1 else 1 for tensor in tensors]
    widths = [t.numel() // count for t, count in zip(tensors, counts, strict=True)]
    found = None if alone else Neighbours().find(tensors, widths=widths)
    assert alone or found is not None
    norms = local.unit_norms(
        tensors, dims, counts, order, device=CPU, positions=range(len(tensors)), together=found
    )
    values: list[float] = norms.tolist()
    return values


@pytest.mark.parametrize("order", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["usual", "zero rows", "tiny", "huge", "nan"])
def test_units_of_neighbours_are_measured_together(order: float, kind: str) -> None:
    shapes = [(6, 64), (64,), (4, 96), (3, 7), (32,), (2, 512), (20,), (40, 32)]
    flat = buffer([math.prod(shape) for shape in shapes], seed=3)
    tensors = [tensor.view(shape) for tensor, shape in zip(flat, shapes, strict=True)]
    change: dict[str, Callable[[Tensor], object]] = {
        "usual": lambda rows: None,
        "zero rows": lambda rows: rows[0].zero_(),
        "tiny": lambda rows: rows[1].mul_(1e-30),
        "huge": lambda rows: rows[1].mul_(1e25),
        "nan": lambda rows: rows[1, 3].fill_(math.nan),
    }
    for tensor in (tensors[0], tensors[5], tensors[7]):
        change[kind](tensor)
    want = [
        torch.linalg.vector_norm(row.double(), order).item()
        for tensor in tensors
        for row in (tensor if tensor.dim() > 1 else [tensor])
    ]
    for alone in (True, False):
        have = unit_norms(tensors, order, alone=alone)
        assert have == pytest.approx(want, rel=1e-6, abs=0.0, nan_ok=True), alone


def test_no_lane_leaves_its_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(torch.rand(96 * 64 + 96 * 128).split([96 * 64, 96 * 128]))
    tensors = [rows[0].view(96, 64), rows[1].view(96, 128)]
    assert learn(tensors).runs[0].shape[1] == neighbours.LANE
    assert learn(tensors, [64, 128]).runs[0].shape[1] == 64
    calls: list[object] = []
    power_sums = neighbours.power_sums
    monkeypatch.setattr(
        neighbours, "power_sums", lambda r, p, **to: calls.append(r) or power_sums(r, p, **to)
    )
    monkeypatch.setattr(local, "power_sums", None)  # so nothing is measured alone
    unit_norms(tensors, 2.0, alone=False)
    assert len(calls) == 1


def test_a_long_tensor_is_a_run_of_its_own_and_a_short_one_is_not() -> None:
    alone = [torch.rand(2048), torch.rand(neighbours.LANE), torch.rand(4096)]
    assert learn(alone).positions == (0, 2)
    one = learn(alone[:2])
    spans = one.spans(alone[:2])
    assert spans is not None
    assert [span.shape for span in spans] == [(2048 // neighbours.LANE, neighbours.LANE)]
    check(alone, Neighbours())
    check(alone, Neighbours(), 1.0)


def test_parts_that_share_a_lane_are_left_to_others() -> None:
    tensors = list(torch.rand(96 * 64 + 96 * 512).split([96 * 64, 96 * 512]))
    found = Neighbours().find(tensors)
    assert found is not None
    norms, doubtful = found.divided(2.0, {0: 96, 1: 96})
    assert set(norms) == {1}
    assert not doubtful
    want = torch.linalg.vector_norm(tensors[1].view(96, 512).double(), dim=1)
    assert norms[1].tolist() == pytest.approx(want.tolist(), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("order", [1.0, 2.0])
def test_a_chunk_may_end_anywhere(
    monkeypatch: pytest.MonkeyPatch, chunk: int, order: float
) -> None:
    """Also within a tensor, and just at the end of one: nothing is counted twice, or left out."""
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    monkeypatch.setattr(neighbours, "LANES", chunk)
    tensors = buffer()
    tensors[3][5] = math.nan
    tensors[4].zero_()
    known = Neighbours()
    for _ in range(2):
        check(tensors, known, order)
    found = known.find(tensors)
    assert found is not None
    assert len(found.known.batches) == -(-int(found.known.lanes.sum()) // chunk)
    check([*tensors[:3], tensors[0].new_full((4096,), 3e19), *tensors[4:]], known, order)


def test_what_is_kept_and_made_does_not_grow_with_the_gradients() -> None:
    """40 M elements are 625,000 lanes of 64: together they would take 7.5 MB."""
    flat = torch.ones(40_000_000)
    found = Neighbours().find([flat[:64], flat[64:]])
    assert found is not None
    assert found.known.runs[0].shape == (625_000, 64)
    assert found.norms(2.0)[0].tolist() == [8.0, pytest.approx(math.sqrt(40e6 - 64), rel=1e-9)]
    parts, doubtful = found.divided(2.0, {1: 3})
    assert not doubtful
    assert parts[1].tolist() == pytest.approx([math.sqrt(40e6 / 3)] * 3, rel=1e-5)
    divided = found.known.division({1: 3}).batches
    assert max(batch.sums.nbytes for batch in divided) == 4 * neighbours.LANES
    batches = found.known.batches
    assert len(batches) == 39
    assert max(batch.sums.nbytes for batch in batches) == 4 * neighbours.LANES
    assert len({batch.sums.ctypes.data for batch in batches}) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_not_ours(dtype: torch.dtype) -> None:
    tensors, before = buffer(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        check(tensors, Neighbours())
        check(tensors, Neighbours(), 1.0)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("lanes", [5, neighbours.LANES])
def test_tensors_measured_part_by_part_are_not_read_again(
    monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    monkeypatch.setattr(neighbours, "LANES", lanes)
    tensors = [t.view(4, -1) for t in buffer([128, 2048, 256, 4096])]
    found = Neighbours().find(tensors, widths=[t.shape[1] for t in tensors])
    assert found is not None
    rows, _ = found.divided(2.0, {1: 4, 3: 4})
    for position in (1, 3):
        want = torch.linalg.vector_norm(tensors[position].double(), dim=1)
        torch.testing.assert_close(rows[position], want, rtol=1e-6, atol=0.0)
    monkeypatch.setattr(neighbours, "power_sums", None)
    norms, doubtful = found.norms(2.0)
    assert not doubtful
    want = torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors])
    torch.testing.assert_close(norms, want, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("chunk", [300, neighbours.CHUNK])
def test_of_doubtful_parts_the_zero_ones_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Rows in several runs and chunks; only those in doubt are read a second time."""
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    monkeypatch.setattr(neighbours, "LANES", min(chunk, neighbours.LANES))
    one, other = torch.rand(40 * 1024), torch.rand(64 * 512)
    tensors = [one[:1024].view(1, 1024), one[1024:].view(39, 1024), other.view(64, 512)]
    tensors[1][::2] = 0.0  # a unit that is never active has no gradient
    tensors[2][10:50] = 0.0
    found = Neighbours().find(tensors)
    assert found is not None
    assert len(found.spans) == 2
    parts = {0: 1, 1: 39, 2: 64}
    assert found.divided(2.0, parts)[1] == set()
    for tensor, row, value in ((1, 38, 1e-25), (1, 0, math.nan), (2, 49, 3e19)):
        before = tensors[tensor][row].clone()
        tensors[tensor][row, -1] = value
        assert found.divided(2.0, parts)[1] == {tensor}, value
        tensors[tensor][row] = before
    assert found.divided(2.0, parts)[1] == set()

    read: list[int] = []
    select = Tensor.index_select
    monkeypatch.setattr(
        Tensor, "index_select", lambda t, d, rows: read.append(len(rows)) or select(t, d, rows)
    )
    found.divided(2.0, parts)
    assert sum(read) == 20 * 2 + 40
