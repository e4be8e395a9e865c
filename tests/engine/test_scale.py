"""On thousands of ranks: the same one all-reduce, of a size that is known, and no loop over them.

torch's fake process group stands in for ranks that are not there; see benchmarks/scale.
"""

import hashlib
import json
import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.scale import __main__ as script
from benchmarks.scale import render, tracing
from benchmarks.scale.model import Network, seconds
from benchmarks.scale.tracing import Collective, Weight, llama
from distclip import GradClipper, policies
from distclip.engine.handshake import Notes, compare_notes
from distclip.layouts import plan as plans
from distclip.layouts.detect import describe
from distclip.layouts.piece import Entry
from distclip.policies import Policy
from distclip.statistics import collectives
from tests.helpers.ranks import everyones
from tests.helpers.watching import watch
from tests.sharded import shard, whole

SMALL = llama(2, 256, 512, 64, 1024)
"""21 parameters; shards of it are empty on most of 16,384 ranks."""

COUNT = len(SMALL)
NUMBER = 8
"""Bytes of a float64."""

CUT_ROWS = 2 * 2 * 256
"""Rows of w_o and w_2, which tensor parallelism cuts along dim 1."""


def taken(
    ranks: int, rank: int, layout: str, policy: Policy, weights: list[Weight] = SMALL
) -> tracing.Taken:
    with tracing.world(ranks, rank):
        named = tracing.sharded(weights, layout, tracing.mesh_of(layout, ranks))
        return tracing.clipper(named, policy)


def agc_numbers(ranks: int, layout: str) -> int:
    """Norms before and after, rows clipped, the norms of rows in the middle; one slot a rank.

    Here and below with a flag and two numbers by which the ranks see that they agree.
    """
    cut = 2 * CUT_ROWS if layout == "fsdp2_tp" else 0
    return 4 * COUNT + ranks + 3 + cut


SIZES: dict[str, tuple[Policy, Callable[[int, str], int]]] = {
    "global_norm": (policies.global_norm(1e9), lambda ranks, layout: COUNT + 3),
    "agc": (policies.agc(1e9), agc_numbers),
    "p=inf": (policies.parameter_norm(1e9, math.inf), lambda ranks, layout: COUNT + 3),
    "dreamer_agc": (policies.dreamer_agc(1e9), lambda ranks, layout: 2 * COUNT + 3),
}


@pytest.mark.parametrize(
    ("ranks", "layout", "name"),
    [
        *(
            (1024, layout, name)
            for layout in ("fsdp2", "hsdp", "fsdp2_tp")
            for name in ("global_norm", "agc")
        ),
        (1024, "fsdp2", "p=inf"),
        (1024, "fsdp2", "dreamer_agc"),
        (16384, "fsdp2_tp", "global_norm"),
        (16384, "hsdp", "agc"),
    ],
)
def test_one_all_reduce_of_known_size(ranks: int, layout: str, name: str) -> None:
    policy, numbers = SIZES[name]
    first, last = (taken(ranks, rank, layout, policy) for rank in (0, ranks - 1))
    assert first.later == (Collective("allreduce", ranks, NUMBER * numbers(ranks, layout)),)
    # The replica check rides along once: 10 numbers for each tensor with copies, and a flag.
    copies = {"fsdp2": 0, "hsdp": COUNT, "fsdp2_tp": 2 * 2 + 1}[layout]
    more = NUMBER * (10 * copies + 1) if copies else 0
    assert first.first == (Collective("allreduce", ranks, first.later[0].bytes + more),)
    sizes, hail = first.construction
    assert sizes == Collective("allgather", ranks, 8)
    assert (hail.op, hail.ranks) == ("allgather", ranks)
    assert hail.bytes < 100
    # Every rank issues the same, the last one too, whose shards are empty or copies.
    assert (last.construction, last.first, last.later) == (
        first.construction,
        first.first,
        first.later,
    )


def test_a_second_all_reduce_would_be_seen() -> None:
    between = policies.chain(
        policies.global_norm(1.0), policies.value(0.1), policies.global_norm(1.0)
    )
    assert [each.op for each in taken(64, 0, "fsdp2", between).later] == ["allreduce"] * 2


def calls(function: Callable[[], Any]) -> int:
    """Python and C functions called by it: a measure of work that no busy machine disturbs."""
    count = 0

    def profile(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def test_building_does_not_take_ranks_times_parameters() -> None:
    ranks, work = 4096, []
    with tracing.world(ranks):
        mesh = tracing.mesh_of("hsdp", ranks)
        for layers in (2, 12):
            weights = llama(layers, 64, 64, 64, 64)
            named = tracing.sharded(weights, "hsdp", mesh)
            _, described = describe(named)
            assert len({id(entry.ranks) for entry, _ in described}) == 1
            work.append(
                (len(named), calls(lambda named=named: GradClipper(named, policies.measure())))
            )
    (few, short), (many, long) = work
    assert (long - short) / (many - few) < 500  # per parameter, and not per parameter and rank


def stages(ranks: int, number: int, parameters: int) -> list[Notes]:
    """Notes of pipeline stages, as :func:`.collectives.gather_by_key` shares them."""
    size = ranks // number
    notes: list[Notes] = []
    for stage in range(number):
        members = tuple(range(stage * size, (stage + 1) * size))
        tied = Entry("tied", (4, 4), "float32", (0,), members, "S(0)")
        table = [
            Entry(f"{stage}.{i}", (4, 4), "float32", (0,), members, "S(0)")
            for i in range(parameters)
        ]
        names = tuple(entry.name for entry in table)
        notes += [Notes((), (("policy", "x"),), (tied, *table), names)] * size
    return notes


def test_comparing_stages_does_not_take_ranks_times_parameters() -> None:
    ranks, number = 4096, 4

    def compared(parameters: int) -> int:
        notes = stages(ranks, number, parameters)
        tables = [note.table for note in notes]
        described = [(entry, ()) for entry in notes[-1].table]
        cpu = torch.device("cpu")
        nobody: Any = None

        def everything() -> None:
            assert notes[0].digest() != notes[-1].digest()
            compare_notes(notes, range(ranks))
            plans.check_tables(tables, range(ranks), stages=True)
            assert plans.needs_reduction(tables)
            assert plans.differ(tables)
            plan = plans.merged_plan(described, tables, ranks - 1, range(ranks), cpu, nobody)
            assert len(plan.entries) == number * parameters + 1
            assert plans.copied(tables, range(ranks)) == {"tied"}

        return calls(everything)

    assert (compared(120) - compared(20)) / (number * 100) < 200


def test_notes_grow_with_parameters_and_with_ranks_and_not_with_their_product() -> None:
    ranks = tuple(range(16384))
    one, many = (
        Notes((), (), tuple(Entry(f"{i}", (2,), "float32", (0,), ranks) for i in range(count)))
        for count in (1, 300)
    )
    assert len(pickle.dumps(many)) - len(pickle.dumps(one)) < 300 * 200


def test_the_digest_reads_the_ranks_of_a_mesh_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, read = tuple(range(16384)), []
    real = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data: read.append(len(data)) or real(data))
    for count in (1, 300):
        entries = [Entry(f"{i}", (2,), "float32", (0,), ranks) for i in range(count)]
        Notes((), (), tuple(entries)).digest()
    one, many = read
    assert many - one < 300 * 300


def test_the_digest_knows_every_field() -> None:
    entry = Entry("w", (2, 3), "float32", (0,), (0, 1), "S(0)", (0, 2), False, False)
    others = [
        replace(entry, **change)
        for change in (
            {"name": "v"},
            {"shape": (3, 2)},
            {"dtype": "bfloat16"},
            {"split_dims": (1,)},
            {"ranks": (0, 2)},
            {"ranks": None},
            {"layout": "S(1)"},
            {"others": (0, 1)},
            {"others": ()},
            {"replicated": True},
            {"copies": True},
        )
    ]
    digests = {Notes((), (), (each,)).digest() for each in (entry, *others)}
    assert len(digests) == len(others) + 1
    # The same ranks in another object are the same.
    again = replace(entry, ranks=tuple(range(2)), others=tuple(range(0, 4, 2)))
    assert Notes((), (), (again,)).digest() == Notes((), (), (entry,)).digest()


@pytest.mark.ranks(2, 3, 4)
def test_one_rank_of_each_kind_tells() -> None:
    group = dist.group.WORLD
    assert group is not None
    here, size = dist.get_rank(), dist.get_world_size()
    keys = [rank % 2 for rank in range(size)]
    with watch() as seen:
        told = collectives.gather_by_key({"kind": keys[here]}, keys, group)
    assert told == [{"kind": key} for key in keys]
    assert all(told[rank] is told[rank % 2] for rank in range(size))
    assert set(seen.collective_names) == {"broadcast_"}
    assert len(seen.collectives) == 2 * len(set(keys))  # a length, then a value


@pytest.mark.ranks(4)
@pytest.mark.parametrize("layout", ["fsdp2", "hsdp", "tp", "fsdp2_tp", "mixed", "fsdp1_mixed"])
def test_a_table_says_which_of_its_tensors_have_copies(layout: str) -> None:
    """What a rank counts elsewhere (a share of 0) is what its entry says, on all ranks alike."""
    _, described = describe(shard(layout, whole()).named())
    mine = {e.name for e, pieces in described if any(piece.share == 0.0 for piece in pieces)}
    assert set().union(*everyones(mine)) == {entry.name for entry, _ in described if entry.copies}


def test_the_page_is_made_from_the_record() -> None:
    document = json.loads(script.last_record().read_text(encoding="utf-8"))
    page = script.PAGE.read_text(encoding="utf-8")
    assert render.fill(page, document) == page
    document["distclip"][0]["later"][0]["bytes"] += 1000
    assert render.fill(page, document) != page


def test_the_model_on_numbers_done_by_hand() -> None:
    network = Network(latency=1.0, bandwidth=2.0)
    small, large = Collective("allreduce", 8, 1), Collective("allreduce", 8, 1000)
    assert seconds(small, 8, network) == 2 * 3 + 2 * 1 / 2  # two trees of depth 3
    assert seconds(large, 8, network) == 2 * 7 + 2 * 7 / 8 * 1000 / 2  # a ring
    assert seconds(Collective("allgather", 8, 4), 8, network) == 3 + 7 * 4 / 2
    assert seconds(large, 1, network) == 0.0
