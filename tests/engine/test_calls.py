"""What the functions without memory remember between calls, and what they must not."""

import gc
import math
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import distclip
from distclip import functional, policies
from distclip.engine import calls, given
from distclip.layouts import fsdp2 as layouts_fsdp2
from tests.helpers.shards import full
from tests.sharded import mesh_of

Make = Callable[[], list[Tensor]]


@pytest.fixture(autouse=True)
def fresh() -> None:
    functional.clear_cache()


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cut(tensor: Tensor, *placements: object) -> DTensor:
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    return distribute_tensor(tensor, mesh, placements or [Shard(0)], src_data_rank=None)  # type: ignore[arg-type]


def trained(weight: Tensor, gradient: Tensor) -> Tensor:
    parameter = nn.Parameter(weight)
    parameter.grad = gradient
    return parameter


def norm_of(tensors: list[Tensor]) -> float:
    """The joint norm, from whole tensors in float64."""
    whole = map(full, tensors)
    return math.sqrt(sum(each.double().square().sum().item() for each in whole))


# ---- get_total_norm: by what tensors are, not by which ----


def alike(seed: int) -> dict[str, list[Tensor]]:
    """Lists that a careless key would take for one another."""
    base = drawn((4, 6), seed)
    return {
        "plain": [base.clone(), drawn((3,), seed + 1)],
        "other shape, as many elements": [drawn((6, 4), seed), drawn((3,), seed + 1)],
        "other order": [drawn((3,), seed + 1), base.clone()],
        "float64": [base.double(), drawn((3,), seed + 1)],
        "bfloat16": [base.bfloat16(), drawn((3,), seed + 1)],
        "transposed": [drawn((6, 4), seed).t(), drawn((3,), seed + 1)],
        "the same tensor twice": [base, base],
        "a parameter": [nn.Parameter(base.clone()), drawn((3,), seed + 1)],
    }


def test_alike_tensors_have_one_session_and_their_own_norm() -> None:
    for seed in (0, 10, 20):  # new tensors at every call, at the addresses of those before
        for name, tensors in alike(seed).items():
            norm = distclip.get_total_norm(tensors)
            assert norm.item() == pytest.approx(norm_of(tensors), rel=1e-6), name
            assert norm.dtype is (torch.float64 if name == "float64" else torch.float32)
            del tensors
    assert len(calls._kept) == len(alike(0)) - 2  # one of parameters is one of tensors; gaps: none
    for order in (1.0, math.inf):
        tensors = alike(0)["plain"]
        want = torch.linalg.vector_norm(torch.cat([t.flatten().double() for t in tensors]), order)
        assert distclip.get_total_norm(tensors, order).item() == pytest.approx(want.item())


def test_nothing_of_a_call_is_left_in_the_next() -> None:
    first = [drawn((4, 4), 0), drawn((2,), 1)]
    watched = [weakref.ref(tensor) for tensor in first]
    distclip.get_total_norm(first)
    distclip.get_total_norm(first)
    first.clear()
    gc.collect()
    assert [each() for each in watched] == [None, None]
    bad = [torch.full((4, 4), math.nan), drawn((2,), 1)]
    with pytest.raises(distclip.NonFiniteGradientError, match="'0'"):
        distclip.get_total_norm(bad, error_if_nonfinite=True)
    good = [drawn((4, 4), 5), drawn((2,), 6)]
    assert distclip.get_total_norm(good).item() == pytest.approx(norm_of(good), rel=1e-6)


@pytest.mark.ranks(2, 3)
def test_alike_shards_of_other_tensors() -> None:
    ranks = dist.get_world_size()
    for seed in (0, 7):
        whole = drawn((2 * ranks, 4), seed)
        same = drawn((2, 4), seed)  # as large as a shard, and the same on every rank
        for tensors in (
            [cut(whole)],
            [same],
            [cut(same, Replicate())],
            [cut(whole), same],
            [cut(whole.t().contiguous(), Shard(1))],
        ):
            norm = distclip.get_total_norm(tensors)
            assert norm.item() == pytest.approx(norm_of(tensors), rel=1e-6)
        mesh = mesh_of((ranks,), ("x",))
        terms = DTensor.from_local(drawn((2, 4), seed), mesh, [Partial()], run_check=False)
        want = ranks * drawn((2, 4), seed).double().norm().item()
        assert distclip.get_total_norm([terms]).item() == pytest.approx(want, rel=1e-6)


# ---- parameters: an id may belong to another tensor by now ----


def look_alikes() -> dict[str, Make]:
    """Parameters that are told apart, though all of them have one id here."""

    def plain(shape: tuple[int, ...] = (4, 4), dtype: torch.dtype = torch.float32) -> Tensor:
        return trained(drawn(shape, 1, dtype), drawn(shape, 2, dtype))

    def stepped() -> Tensor:
        parameter = plain()
        setattr(parameter, "_in_backward_optimizers", [object()])  # noqa: B010 - as torch sets it
        return parameter

    def elsewhere() -> Tensor:
        parameter = plain()
        parameter.main_grad, parameter.grad = parameter.grad, None  # type: ignore[attr-defined]
        return parameter

    def gathered() -> Tensor:
        model = nn.Linear(4, 4, bias=False)
        fully_shard(model, mesh=mesh_of((dist.get_world_size(),), ("x",)))
        model(torch.ones(1, 4)).sum().backward()
        model.unshard()
        keep.append(model)
        return model.weight

    keep: list[nn.Module] = []
    return {
        "plain": lambda: [plain()],
        "other values": lambda: [trained(torch.ones(4, 4), torch.ones(4, 4))],
        "other shape": lambda: [plain((2, 8))],
        "float64": lambda: [plain(dtype=torch.float64)],
        "without a gradient": lambda: [nn.Parameter(torch.ones(4, 4))],
        "main_grad": lambda: [elsewhere()],
        "sharded": lambda: [trained(cut(drawn((4, 4), 1)), cut(drawn((4, 4), 2)))],
        "sharded otherwise": lambda: [
            trained(cut(drawn((4, 4), 1), Shard(1)), cut(drawn((4, 4), 2), Shard(1)))
        ],
        "stepped in backward": lambda: [stepped()],
        "gathered by FSDP2": lambda: [gathered()],
    }


CALLS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "norm": lambda listed: distclip.clip_grad_norm_(listed, 0.1),
    "agc": lambda listed: distclip.clip_grad_agc_(listed, 0.1),
}


def outcome(call: str, parameters: list[Tensor]) -> object:
    """All that the caller gets to see."""
    try:
        norm = CALLS[call](parameters)
    except distclip.UnsupportedGradientError as error:
        return str(error)
    owner = parameters[0]
    gradient = getattr(owner, "main_grad", owner.grad)
    if isinstance(gradient, DTensor):
        gradient = gradient.to_local()
    shown = None if gradient is None else gradient.tolist()
    return norm.item(), norm.dtype, shown


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("call", CALLS)
def test_parameters_of_one_id_are_told_apart(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "id", lambda each: 0, raising=False)
    for fsdp2 in (False, True):
        if not fsdp2:  # of the warm rank's other tests
            monkeypatch.setattr(layouts_fsdp2, "is_in_use", lambda: False)
        else:
            monkeypatch.undo()
            monkeypatch.setattr(calls, "id", lambda each: 0, raising=False)
        names = [name for name in look_alikes() if fsdp2 or "FSDP2" not in name]
        wanted = {}
        for name in names:
            functional.clear_cache()
            wanted[name] = outcome(call, look_alikes()[name]())
        assert len(set(map(repr, wanted.values()))) >= 6
        assert "during backward" in str(wanted["stepped in backward"])
        for one in names:
            for other in names[-1:] if fsdp2 else names:
                for name in (one, other):
                    assert outcome(call, look_alikes()[name]()) == wanted[name], (one, other)


def test_a_gradient_may_lie_where_the_weights_of_an_earlier_call_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "id", lambda each: 0, raising=False)
    memory = torch.zeros(16)
    for _ in range(2):
        distclip.clip_grad_norm_([trained(memory.view(4, 4), torch.ones(4, 4))], 1.0)
    later = trained(torch.ones(2, 8), memory.view(2, 8).fill_(3.0))
    assert distclip.clip_grad_norm_([later], 1.0).item() == 12.0
    later.grad = later.data  # which is found all the same
    with pytest.raises(distclip.UnsupportedGradientError):
        distclip.clip_grad_norm_([later], 1.0)


def test_a_session_in_use_is_nobody_elses() -> None:
    """A call in the middle of another with the same parameters, as a second thread makes it."""
    parameters = [trained(torch.ones(3), torch.full((3,), 2.0))]
    distclip.clip_grad_norm_(parameters, math.inf)
    with calls.on_parameters(given.Given(parameters), policies.global_norm(math.inf)) as outer:
        assert distclip.clip_grad_norm_(parameters, math.inf).item() == pytest.approx(12**0.5)
        assert outer.clip("pass", None).total_norm.item() == pytest.approx(12**0.5)


# ---- conversions, and what is kept alive ----


def sharded_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mesh = mesh_of((dist.get_world_size(),), ("x",))
    if kind == "fsdp2":
        fully_shard(model[0], mesh=mesh)  # type: ignore[index]
        fully_shard(model, mesh=mesh)
    elif kind == "tp":
        plan = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model, mesh, {"0": plan, "1": plan})
    return model


def backward(model: nn.Module, scale: float = 1.0) -> float:
    """Gradients by one backward; their true joint norm."""
    for parameter in model.parameters():
        parameter.grad = None
    dtype = next(model.parameters()).dtype
    (model(torch.arange(4.0, dtype=dtype).view(1, 4)).sum() * scale).backward()
    return norm_of([p.grad for p in model.parameters() if p.grad is not None])


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("kind", ["plain", "fsdp2", "tp"])
def test_a_model_is_converted_before_and_after_clips(kind: str) -> None:
    model = sharded_model(kind)
    overlap = kind == "fsdp2"
    by_hand = distclip.GradClipper(model, policies.global_norm(1e-3), overlap=overlap)
    attached = distclip.GradClipper(model, policies.agc(0.01))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached.attach(optimizer)
    # FSDP2 fixes the dtype of its gathered parameters at the first forward.
    others = () if kind == "fsdp2" else (nn.Module.double, nn.Module.float)
    for convert in (nn.Module.cpu, *others, nn.Module.cpu):
        convert(model)
        want = backward(model)
        assert by_hand.clip_().total_norm.item() == pytest.approx(want, rel=1e-6)
        assert norm_of([p.grad for p in model.parameters()]) == pytest.approx(1e-3, rel=1e-2)  # type: ignore[misc]
        convert(model)
        want = backward(model, 3.0)
        optimizer.step()
        assert attached.last_report is not None
        assert attached.last_report.total_norm.item() == pytest.approx(want, rel=1e-6)
        convert(model)
        want = backward(model, 0.5)
        listed = list(model.parameters())
        grads = [p.grad for p in listed if p.grad is not None]
        assert distclip.get_total_norm(grads).item() == pytest.approx(want, rel=1e-6)
        norms = distclip.grad_norms(model).values()
        assert math.hypot(*(n.item() for n in norms)) == pytest.approx(want, rel=1e-6)
        distclip.clip_grad_value_(listed, 1e9)
        distclip.clip_grad_agc_(listed, 1e9)
        distclip.clip_grads_with_norm_(listed, math.inf, want)
        assert distclip.clip_grad_norm_(listed, 1e-3).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("kind", ["plain", "fsdp2", "tp"])
def test_a_dropped_model_is_freed_though_its_reports_are_kept(kind: str) -> None:
    def use() -> tuple[list[weakref.ref[Tensor]], distclip.ClipReport]:
        model = sharded_model(kind)
        clipper = distclip.GradClipper(model, policies.global_norm(1.0))
        clipper.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        model.clipper = clipper  # type: ignore[assignment]  # a cycle, as trainers make it
        model.register_forward_hook(lambda *_: clipper.names and None)
        backward(model)
        report = clipper.clip_()
        distclip.clip_grad_norm_(model.parameters(), 1.0)
        return [weakref.ref(p) for p in model.parameters()], report

    references, report = use()
    gc.collect()
    gc.collect()
    assert [each() for each in references] == [None] * len(references)
    assert report.total_norm.item() > 0.0
    assert report.parameter_norms["0.weight"] > 0.0
