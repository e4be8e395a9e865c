"""What decides nothing takes no walk from the second call on, and is checked as before."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distclip
from distclip.engine import session
from distclip.errors import UnsupportedGradientError
from distclip.kernels.host import compiler
from distclip.layouts import plan
from tests.functional.drawn import cut, gradients, parameter, plain, randn
from tests.helpers.watching import loops
from tests.sharded import mesh_of

BOUND, NORM = 0.7, 4.0
CALLS: dict[str, Callable[[list[nn.Parameter]], None]] = {
    "clamp": lambda given: distclip.clip_grad_value_(given, BOUND),
    "scale": lambda given: distclip.clip_grads_with_norm_(given, 1.0, NORM),
}
WANTED: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda gradient: gradient.clamp(-BOUND, BOUND),
    "scale": lambda gradient: (gradient.double() * (1.0 / (NORM + 1e-6))).to(gradient.dtype),
}


def check(call: str, gradient: Tensor, before: Tensor) -> None:
    """Bit for bit; torch multiplies in float32 where there are no loops."""
    want = WANTED[call](before)
    if call == "clamp" or compiler.compiled_kinds():
        assert torch.equal(gradient, want)
    else:
        torch.testing.assert_close(gradient, want)


def walks_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each walk from now on."""
    taken: list[str] = []
    walk = session.walk

    def counting(*args: object, **more: object) -> object:
        taken.append("walk")
        return walk(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "walk", counting)
    return taken


def drawn_anew(parameters: list[nn.Parameter], seed: int) -> list[Tensor]:
    """What the gradients are now, of those parameters that had any."""
    having = [p for p in parameters if p.grad is not None]
    for number, p in enumerate(having):
        p.grad = randn(*p.shape, seed=seed + number, scale=3.0).to(p.dtype)
    return [p.grad.clone() for p in having if p.grad is not None]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_later_calls_take_one_loop_and_no_walk(
    call: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = walks_of(monkeypatch)
    mixed = [*plain(dtype=dtype), *plain(seed=50)]
    for parameters in (mixed[:5], mixed):  # all with gradients, and some without
        for step in range(4):
            before = drawn_anew(parameters, 1000 * step)
            taken = len(walks)
            with loops() as counted:
                CALLS[call](parameters)
            for gradient, old in zip(gradients(parameters), before, strict=True):
                check(call, gradient, old)
            assert len(walks) - taken == (step == 0)
            if step and compiler.compiled_kinds():
                assert sum(counted.values()) == 1


def unusual() -> dict[str, tuple[Callable[[nn.Parameter, nn.Parameter], None], str]]:
    """What becomes of two parameters, and what is said then."""

    def put(make: Callable[[], Tensor]) -> Callable[[nn.Parameter, nn.Parameter], None]:
        def act(one: nn.Parameter, other: nn.Parameter) -> None:
            one.grad = make()

        return act

    def share(one: nn.Parameter, other: nn.Parameter) -> None:
        one.grad = other.grad

    def inference() -> Tensor:
        with torch.inference_mode():
            return torch.full((4, 4), 3.0)

    def freed() -> Tensor:
        gradient = torch.ones(4, 4)
        gradient.untyped_storage().resize_(0)
        return gradient

    return {
        "of inference_mode()": (put(inference), "inference_mode"),
        "shared": (share, "share memory"),
        "that overlaps itself": (put(lambda: torch.ones(4, 1).expand(4, 4)), "share memory"),
        "without memory": (put(freed), "no memory"),
        "of integers": (put(lambda: torch.ones(4, 4, dtype=torch.int32)), r"torch\.int32"),
    }


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", unusual())
def test_what_becomes_unusual_later_is_refused_by_name(call: str, kind: str) -> None:
    change, message = unusual()[kind]
    two = [parameter(torch.ones(4, 4), torch.full((4, 4), 3.0)) for _ in range(2)]
    for _ in range(3):
        CALLS[call](two)
    if kind == "of integers":
        two[0].grad_dtype = None  # type: ignore[attr-defined]
    change(two[0], two[1])
    two[1].grad = torch.full((4, 4), 3.0) if kind != "shared" else two[1].grad
    before = [p.grad.tolist() if kind != "without memory" or n else None  # type: ignore[union-attr]
              for n, p in enumerate(two)]  # fmt: skip
    for _ in range(2):
        with pytest.raises(UnsupportedGradientError, match=message):
            CALLS[call](two)
        after = [p.grad.tolist() if kind != "without memory" or n else None  # type: ignore[union-attr]
                 for n, p in enumerate(two)]  # fmt: skip
        assert after == before


@pytest.mark.parametrize("call", CALLS)
def test_a_gradient_that_was_never_there_before_is_looked_at_closely(call: str) -> None:
    """Its memory may be another parameter's weights."""
    one, other = (parameter(torch.ones(4, 4), torch.full((4, 4), 3.0)) for _ in range(2))
    other.grad = None
    for _ in range(3):
        CALLS[call]([one, other])
    other.grad = one.data
    one.grad = torch.full((4, 4), 3.0)
    with pytest.raises(UnsupportedGradientError, match="share memory"):
        CALLS[call]([one, other])
    assert one.grad.tolist() == torch.full((4, 4), 3.0).tolist()


@pytest.mark.parametrize("call", CALLS)
def test_sparse_strided_and_nan_gradients_later(call: str) -> None:
    parameters = [parameter(torch.ones(4, 4), torch.full((4, 4), 3.0)) for _ in range(2)]
    for _ in range(3):
        CALLS[call](parameters)
    dense = torch.zeros(4, 4)
    dense[1] = 5.0
    parameters[0].grad = dense.to_sparse(1)
    parameters[1].grad = randn(4, 4).t()
    parameters[1].grad[0, 0] = math.nan
    wanted = [WANTED[call](dense), WANTED[call](parameters[1].grad.clone())]
    CALLS[call](parameters)
    for p, want in zip(parameters, wanted, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad.to_dense(), want, equal_nan=True)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("call", CALLS)
def test_dtensors_and_later_partial_ones(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = walks_of(monkeypatch)
    rank, mesh = dist.get_rank(), mesh_of((2,), ("x",))
    sharded = parameter(cut(torch.ones(5, 3)), cut(randn(5, 3)))
    for step in range(3):
        before = randn(5, 3, seed=step)
        sharded.grad = cut(before)
        CALLS[call]([sharded])
        assert isinstance(sharded.grad, DTensor)
        check(call, sharded.grad.full_tensor(), before)
    assert len(walks) == 1
    replica = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()]))
    terms = [randn(4, 3, seed=each) for each in range(2)]
    for placement in (Replicate(), Replicate(), Partial()):
        local = sum(terms) if placement == Replicate() else terms[rank]
        replica.grad = DTensor.from_local(local.clone(), mesh, [placement], run_check=False)  # type: ignore[union-attr]
        CALLS[call]([replica, sharded])
        assert isinstance(replica.grad, DTensor)
        assert replica.grad.placements == (Replicate(),)
        check(call, replica.grad.to_local(), sum(terms))  # type: ignore[arg-type]
    # A rank that sees nothing unusual comes along, and adds zeros.
    sharded.grad = cut(randn(5, 3))
    replica.grad = None
    if rank == 1:
        replica.grad = DTensor.from_local(terms[1].clone(), mesh, [Partial()], run_check=False)
    CALLS[call]([replica, sharded])
    assert isinstance(replica.grad, DTensor)
    check(call, replica.grad.to_local(), terms[1])
    sharded.grad = cut(randn(5, 3), Shard(1))
    with pytest.raises(UnsupportedGradientError):
        CALLS[call]([sharded, parameter(torch.ones(2), torch.ones(2))])


def test_complex_numbers_have_no_order_to_clamp_by() -> None:
    p = parameter(torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64))
    for _ in range(2):
        with pytest.raises(distclip.ConfigurationError, match="is complex"):
            distclip.clip_grad_value_([p], BOUND)
    for _ in range(3):
        p.grad = torch.full((2,), 1 + 2j)
        distclip.clip_grads_with_norm_([p], 1.0, NORM)
        torch.testing.assert_close(p.grad, torch.full((2,), (1 + 2j) / NORM))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_norms_of_each_take_no_walk_from_the_second_call_on(
    norm_type: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = walks_of(monkeypatch)
    parameters = [*plain(), *plain(dtype=torch.float64), *plain(dtype=torch.bfloat16)]
    for step in range(5):
        drawn_anew(parameters, 1000 * step)
        if step == 3:
            parameters[3].grad = None
        named = [(f"module.p{n}", p) for n, p in enumerate(parameters)]
        found = distclip.grad_norms(named, norm_type)
        assert list(found) == [f"p{n}" for n in range(len(parameters))]
        for norm, p in zip(found.values(), parameters, strict=True):
            assert norm.dtype is (torch.float64 if p.dtype is torch.float64 else torch.float32)
            gradient = torch.zeros(1) if p.grad is None else p.grad
            elements = gradient.double().flatten()
            want = (
                torch.linalg.vector_norm(elements, norm_type) if len(elements) else elements.sum()
            )
            assert norm.item() == pytest.approx(want.item(), rel=1e-6)
        assert len(walks) == 1
    with pytest.raises(distclip.ConfigurationError, match="'p'"):
        distclip.grad_norms([("module.p", parameters[0]), ("p", parameters[1])])


@pytest.mark.ranks(2)
def test_norms_of_shards_are_reduced() -> None:
    sharded = parameter(cut(torch.ones(5, 3)), cut(randn(5, 3)))
    for step in range(3):
        sharded.grad = cut(randn(5, 3, seed=step))
        (norm,) = distclip.grad_norms([("w", sharded)]).values()
        assert norm.item() == pytest.approx(randn(5, 3, seed=step).double().norm().item(), rel=1e-6)


@pytest.mark.ranks(1)
def test_norms_where_a_parameter_is_no_piece() -> None:
    """FSDP1 gives an empty parameter no place."""
    layer = nn.Linear(3, 2)
    layer.extra = nn.Parameter(torch.empty(0))
    model = FullyShardedDataParallel(layer, device_id=torch.device("cpu"))
    for scale in (1.0, 2.0, 3.0):
        model.zero_grad()
        (model(torch.ones(1, 3)).sum() * scale).backward()
        norms = {name: norm.item() for name, norm in distclip.grad_norms(model).items()}
        assert norms == pytest.approx(
            {"weight": scale * math.sqrt(6), "bias": scale * math.sqrt(2), "extra": 0.0}
        )


@pytest.mark.parametrize("call", CALLS)
def test_autograd_hears_of_the_change(call: str) -> None:
    p = parameter(torch.ones(4), torch.full((4,), 3.0))
    for _ in range(3):
        assert p.grad is not None
        version = p.grad._version
        CALLS[call]([p])
        assert p.grad._version > version


def test_the_parameters_of_a_known_list_are_reached_without_a_loop() -> None:
    """The holds of a session that is kept are one row: ``of_all`` copies it."""
    parameters = plain()
    row = [plan.Hold(p) for p in parameters]
    assert list(plan.Hold.of_all(row)()) == parameters
    assert plan.Hold.of_all(row) == row[0]._row.copy  # a GradClipper's are made one, too
    together: list[Tensor] = [*parameters]
    for place, hold in enumerate(row):
        hold.move(together, place)
    assert plan.Hold.of_all(row) == together.copy
    assert plan.Hold.of_all(row[::-1])() == parameters[::-1]
    assert plan.Hold.of_all(row[2:])() == parameters[2:]
    assert plan.Hold.of_all(row) == together.copy  # and so they stay
    row[0].release()
    assert together[0] is None
    alone, box = plan.Hold(parameters[0]), [parameters[1]]
    alone.move(box, 0)
    assert plan.Hold.of_all([alone]) == box.copy
