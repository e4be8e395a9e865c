"""The one comparison at construction: which rank differs in what, on all ranks, within seconds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distclip.clipper
from distclip import DistclipError, GradClipper, RankMismatchError, policies
from distclip.engine import handshake, opening
from distclip.engine.handshake import Hail, Notes, common_device, compare_notes, refuse_troubled
from distclip.layouts.differences import quoted_names, ranked, sides
from distclip.layouts.piece import Entry
from distclip.layouts.plan import check_tables, copied
from distclip.statistics import collectives
from tests.helpers.ranks import everyones
from tests.helpers.watching import watch
from tests.sharded import mesh_of

SECONDS = 20
"""A hang is a failure, and not a long wait."""


def refused(
    build: Callable[[], object], *words: str, kind: type[DistclipError] = RankMismatchError
) -> str:
    """Every rank raises the same message, with ``words``, and the group still works."""
    with pytest.raises(kind) as caught:
        build()
    message = str(caught.value)
    assert set(everyones(message)) == {message}
    for word in words:
        assert word in message, message
    return message


def plain(*shape: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, **options))


def is_odd() -> bool:
    """The last rank is the one that differs."""
    return dist.get_rank() == dist.get_world_size() - 1


def others() -> str:
    return ranked(range(dist.get_world_size() - 1))


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
def test_policies_and_options() -> None:
    odd, last = is_odd(), ranked([dist.get_world_size() - 1])
    pairs = [("a", plain(2))]
    one = policies.global_norm(1.0)
    two = policies.chain(one, policies.value(2.0)) if odd else one
    message = refused(
        lambda: GradClipper(pairs, two), "policies", f"{last}: policy=Chain", f"{others()}: policy="
    )
    assert "norms=" not in message  # what they agree on
    for options, words in (
        ({"on_nonfinite": "skip" if odd else "pass"}, ("on_nonfinite='skip'", "'pass'")),
        ({"norms": odd}, ("norms=True", "norms=False")),
        ({"verify_replicas": 5 if odd else "never"}, ("verify_replicas=5", "'never'")),
        ({"fold": odd}, ("fold=True", "fold=False")),
        ({"overlap": odd}, ("overlap=True", "overlap=False")),
    ):
        message = refused(lambda options=options: GradClipper(pairs, one, **options), last, *words)
        assert "policy=" not in message
    # Several differences are told at once.
    refused(
        lambda: GradClipper(pairs, two, norms=odd),
        "policy=Chain",
        "norms=True",
    )


@pytest.mark.ranks(2, 3, timeout=SECONDS)
def test_the_order_of_named_pairs_changes_no_bit() -> None:
    """A float64 sum in another order is another number: here 1 + 2**-53 twice, or 2**-52 + 1."""
    norms = {"a": 1.0, "b": 2.0**-27 * 2**0.5, "c": 2.0**-27 * 2**0.5, "d": 3.0}
    pairs = [(name, plain(1)) for name in norms]
    for (name, parameter), _ in zip(pairs, norms, strict=True):
        parameter.grad = torch.full((1,), norms[name])
    given = pairs[::-1] if is_odd() else pairs
    clipper = GradClipper(given, policies.global_norm(0.3), verify_replicas=1)
    assert clipper.names == tuple(norms)
    clipper.clip_()
    told = everyones([parameter.grad for _, parameter in pairs])
    assert all(torch.equal(*both) for each in told for both in zip(each, told[0], strict=True))
    assert dict(given)["d"] is clipper.here["d"]
    assert not torch.equal(pairs[0][1].grad, pairs[3][1].grad)


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("a", plain(2))]
    last = ranked([dist.get_world_size() - 1])
    build = lambda: GradClipper(pairs, policies.measure())  # noqa: E731
    with monkeypatch.context() as patch:
        if is_odd():
            patch.setattr(torch, "__version__", "2.99.0")
        refused(build, f"different torch versions: {last}: 2.99.0", others())
    with monkeypatch.context() as patch:
        if is_odd():
            patch.setattr(handshake, "__version__", "9.9.9")
        refused(build, f"different distclip versions: {last}: 9.9.9", others())
    build()


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
def test_a_rank_that_speaks_otherwise() -> None:
    """As a version would that exchanges something else in its first word."""
    if is_odd():
        group = dist.group.WORLD
        assert group is not None
        for hail in collectives.gather(b"digest", group)[:-1]:
            assert isinstance(hail, tuple)  # no class that the other version may not have
            assert {type(part) for part in hail} <= {str, bytes, int}
    else:
        with pytest.raises(RankMismatchError, match="another one"):
            GradClipper([("a", plain(2))], policies.measure())
    dist.barrier()


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
def test_names() -> None:
    last = ranked([dist.get_world_size() - 1])
    model = {name: plain(2) for name in "abcdefgh"}
    build = lambda names: GradClipper(  # noqa: E731
        [(name, model[name]) for name in names], policies.measure()
    )
    refused(lambda: build("ab" if is_odd() else "abc"), f"{last} lacks 'c'")
    refused(
        lambda: build("a" if is_odd() else "abcdefgh"), f"{last} lacks 'b', 'c', 'd', 'e' and 3"
    )
    message = refused(lambda: build("abc" if is_odd() else "ab"), "'c'", last)
    assert f"only {last} has 'c'" in message
    refused(lambda: build("ac" if is_odd() else "ab"), f"{last} lacks 'b'", f"only {last} has 'c'")
    refused(lambda: build("" if is_odd() else "ab"), f"{last} lacks 'a', 'b'")
    # Another order is the same model: nobody is refused, and the norms are right.
    for name, parameter in model.items():
        parameter.grad = torch.full((2,), float(ord(name) - ord("a")))
    clipper = build("cba" if is_odd() else "abc")
    assert clipper.clip_().parameter_norms["c"] == pytest.approx(8**0.5)


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
def test_shapes_dtypes_and_frozen_ones() -> None:
    odd, last = is_odd(), ranked([dist.get_world_size() - 1])
    measure = policies.measure()
    listed = [("a", plain(2)), ("w", plain(3 if odd else 2, 4))]
    refused(
        lambda: GradClipper(listed, measure),
        f"'w' is float32 [3, 4] on {last} but float32 [2, 4] on {others()}",
    )
    half = plain(2, dtype=torch.bfloat16 if odd else torch.float32)
    refused(
        lambda: GradClipper([("w", half)], measure),
        f"'w' is bfloat16 [2] on {last} but float32 [2] on {others()}",
    )
    frozen = plain(2).requires_grad_(not odd)
    refused(
        lambda: GradClipper([("a", plain(2)), ("w", frozen)], measure),
        f"'w' requires a gradient on some ranks only: {last}: frozen; {others()}: trained",
    )


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
def test_shardings() -> None:
    odd, last = is_odd(), ranked([dist.get_world_size() - 1])
    world = dist.get_world_size()
    mesh = mesh_of((world,), ("x",))
    made = {
        kind: nn.Parameter(distribute_tensor(torch.ones(5, 6), mesh, [kind], src_data_rank=None))
        for kind in (Shard(0), Shard(1), Replicate())
    }
    measure = policies.measure()
    for one, two in ((Shard(0), Shard(1)), (Shard(0), Replicate())):
        p = made[two if odd else one]
        message = refused(lambda p=p: GradClipper([("w", p)], measure), "'w'", last, "device mesh")
        for placement in (one, two):
            assert str(placement) in message
    p = plain(5, 6) if odd else made[Shard(0)]
    refused(lambda: GradClipper([("w", p)], measure), "'w' is plain on", last, "shard it alike")
    # A rank that believes in another mesh.
    if world > 2:
        small = DeviceMesh("cpu", list(range(world - 1)))
        other = distribute_tensor(torch.ones(5, 6), small, [Shard(0)], src_data_rank=None)
        q = nn.Parameter(other) if dist.get_rank() == 0 else made[Shard(0)]
        refused(lambda: GradClipper([("w", q)], measure), "'w'", "rank 0", "device mesh")


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
def test_an_error_of_any_kind_on_one_rank_ends_all() -> None:
    class Broken(nn.Module):
        def named_parameters(self, *_: Any, **__: Any) -> Any:
            raise OSError("disk on fire")

    last = ranked([dist.get_world_size() - 1])
    model = Broken() if is_odd() else nn.Linear(2, 2)
    with pytest.raises((OSError, RankMismatchError)) as caught:
        GradClipper(model, policies.measure())
    assert isinstance(caught.value, OSError) == is_odd()
    if not is_odd():
        assert f"{last} cannot build its GradClipper: OSError: disk on fire" in str(caught.value)
    dist.barrier()


@pytest.mark.ranks(2, 4, timeout=SECONDS)
def test_one_comparison_where_all_agree() -> None:
    model = nn.Linear(3, 2)
    with watch() as seen:
        clipper = GradClipper(model, policies.measure(), verify_replicas="never")
    names = [name for name in seen.collective_names if "gather" in name]
    assert len(names) == len(seen.collectives) == 2  # sizes, then the pickled digests
    model(torch.ones(1, 3)).sum().backward()
    with watch() as seen:
        clipper.clip_()
    assert seen.collectives == []


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
def test_row_26_one_stage_is_not_finite_and_all_raise() -> None:
    """torchtitan raises before the pipeline's all-reduce: one stage raises, the others hang."""
    stage = nn.Linear(3, 2)
    clipper = GradClipper(
        [nn.ModuleDict({f"stage{dist.get_rank()}": stage})], policies.global_norm(1.0)
    )
    stage(torch.ones(1, 3)).sum().backward()
    assert stage.weight.grad is not None
    if is_odd():
        stage.weight.grad[0, 0] = float("nan")
    before = stage.weight.grad.clone()
    name = f"stage{dist.get_world_size() - 1}.weight"
    refused(clipper.clip_, f"'{name}'", kind=distclip.NonFiniteGradientError)
    assert torch.equal(stage.weight.grad.nan_to_num(9.0), before.nan_to_num(9.0))


@pytest.mark.ranks(2, 3, 4, timeout=SECONDS)
def test_rows_27_and_28_gradients_that_are_missing_on_some_ranks() -> None:
    """Groups made from present gradients hang; so does a return before the collective."""
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    cut = {
        name: nn.Parameter(
            distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)], src_data_rank=None)
        )
        for name in ("a", "b")
    }
    clipper = GradClipper(list(cut.items()), policies.global_norm(1e9))
    for missing in ("", "a", "ab"):
        for name, p in cut.items():
            p.grad = None if is_odd() and name in missing else p.detach().clone()
        rows = 8 - cut["a"].to_local().shape[0] if is_odd() else None
        lost = everyones(rows)
        left = lost[-1]
        want = [3 * (left if name in missing else 8) for name in cut]
        assert clipper.clip_().total_norm.item() == pytest.approx(sum(want) ** 0.5)


# ---- the parts, without ranks ----


def test_the_smaller_side_is_to_blame() -> None:
    assert sides([0, 1, 2], "aba") == [("b", [1]), ("a", [0, 2])]
    assert sides([0, 1], "ab") == [("b", [1]), ("a", [0])]
    assert sides([4, 5, 6], "abc") == [("c", [6]), ("b", [5]), ("a", [4])]
    assert ranked([3]) == "rank 3"
    assert ranked(range(20)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
    assert quoted_names(list("abcdef")) == "'a', 'b', 'c', 'd' and 2 more"


def test_a_thousand_ranks_and_one_that_differs() -> None:
    table = tuple(Entry(f"p{i}", (4, 4), "float32", (0,), tuple(range(1000))) for i in range(5))
    notes = [Notes((("torch", "2"),), (("policy", "x"),), table) for _ in range(1000)]
    compare_notes(notes, range(1000))
    check_tables([note.table for note in notes], range(1000), stages=False)
    notes[700] = Notes((("torch", "2"),), (("policy", "y"),), table[:4])
    with pytest.raises(RankMismatchError, match=r"rank 700: policy=y; ranks 0, 1, .* and 991 more"):
        compare_notes(notes, range(1000))
    with pytest.raises(RankMismatchError, match="rank 700 lacks 'p4'"):
        check_tables([note.table for note in notes], range(1000), stages=False)
    check_tables([note.table for note in notes], range(1000), stages=True)


def test_where_the_statistics_of_all_ranks_lie() -> None:
    """A stage without parameters goes to the backend that the others use, or all would wait."""
    some, none = (Entry("w", (4,), "float32"),), ()
    on = {kind: Notes((), (), some, device=kind) for kind in ("cuda", "cpu")}
    empty = Notes((), (), none)
    assert empty.device == ""
    assert common_device(["cuda", "", "cuda"]) == "cuda"
    assert common_device(["cpu", ""]) == common_device(["", ""]) == "cpu"
    assert common_device(["cuda", "cpu"]) == "cpu"
    assert on["cuda"].digest() != on["cpu"].digest()  # so that they tell each other


@pytest.mark.ranks(2, 3)
def test_a_rank_without_parameters_goes_where_the_others_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first rank says that its parameters are on an accelerator; the others have none."""
    asked = []
    notes_of = opening._notes

    def notes(options: Any, named: Any, table: tuple[Entry, ...]) -> Notes:
        found = notes_of(options, named, table)
        return replace(found, device="cuda") if table else found

    def device_for(group: Any, preferred: torch.device) -> torch.device:
        asked.append(preferred.type)
        return torch.device("cpu")

    monkeypatch.setattr(opening, "_notes", notes)
    monkeypatch.setattr(collectives, "device_for", device_for)
    stage = nn.Linear(3, 2) if dist.get_rank() == 0 else nn.ReLU()
    GradClipper([stage], policies.global_norm(1.0)).clip_()
    assert asked == ["cuda"]


def test_hails() -> None:
    good = Hail("1", b"x")
    assert refuse_troubled([tuple(good), tuple(good)], [0, 1]) == [good, good]
    with pytest.raises(RankMismatchError, match="distclip versions: rank 1: another one"):
        refuse_troubled([good, b"digest of old"], [0, 1])


def test_which_tensors_have_copies() -> None:
    plain_entry = Entry("p", (2,), "float32")
    cut = Entry("w", (2,), "float32", (0,), (0, 1), "S(0)")
    elsewhere = Entry("w", (2,), "float32", (0,), (2, 3), "S(0)")
    assert copied([[cut]] * 2, [0, 1]) == frozenset()
    assert copied([[replace(cut, copies=True)]] * 2, [0, 1]) == {"w"}
    assert copied([[plain_entry, cut]] * 2, [0, 1]) == {"p"}
    assert copied([[cut], [cut], [elsewhere], [elsewhere]], range(4)) == {"w"}
    assert copied([[plain_entry], [cut]], [0, 1]) == frozenset()
