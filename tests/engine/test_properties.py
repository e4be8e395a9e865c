"""Any shapes, meshes, placements, dtypes, magnitudes and missing gradients, against the oracle."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import distclip
from distclip import GradClipper
from distclip.testing import assert_rounded, expected, run_on_ranks
from tests.engine.test_matrix import build
from tests.sharded import like, mesh_of, numbers

EXAMPLES = 120
CHAINS = 40

MESHES = {2: [(2,), (2, 1), (1, 2)], 3: [(3,), (3, 1)], 4: [(4,), (2, 2), (4, 1)]}

# Magnitudes as powers of ten. Sums of squares of most of them leave the dtype.
MAGNITUDES = {
    "float32": [-40, -30, -19, -3, 0, 3, 19, 30],
    "float64": [-200, -30, 0, 30, 200],
    "bfloat16": [-30, -3, 0, 3, 30],
    "float16": [-7, -3, 0, 3, 4],
}

POLICIES: list[Any] = [
    {"name": "measure"},
    {"name": "global_norm", "max_norm": 1.0},
    {"name": "global_norm", "max_norm": 0.1, "norm_type": 1.0},
    {"name": "global_norm", "max_norm": 0.1, "norm_type": 3.0},
    {"name": "global_norm", "max_norm": 0.1, "norm_type": math.inf},
    {"name": "parameter_norm", "max_norm": 0.5},
    {"name": "block_rms", "threshold": 0.2},
    {"name": "agc", "clip_factor": 0.1},
    {"name": "agc", "clip_factor": 0.1, "unit": "tensor"},
    {"name": "agc", "clip_factor": 0.1, "unit_dims": "last"},
    {"name": "dreamer_agc"},
    [{"name": "agc", "clip_factor": 0.1}, {"name": "global_norm", "max_norm": 0.5}],
    {
        "by_name": {"p0": None, "p1": {"name": "agc"}},
        "default": {"name": "parameter_norm", "max_norm": 1.0},
    },
]


@dataclass(frozen=True)
class Parameter:
    """One drawn parameter. ``placements``: a dim per mesh dim, -1 for a replica; None: plain."""

    shape: tuple[int, ...]
    dtype: str
    placements: tuple[int, ...] | None
    magnitude: int
    missing: str
    seed: int


@dataclass(frozen=True)
class Case:
    world: int
    mesh: tuple[int, ...]
    parameters: tuple[Parameter, ...]
    policy: Any


@st.composite
def parameters(draw: Any, mesh: tuple[int, ...]) -> Parameter:
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    if shape and draw(st.integers(0, 9)) == 0:
        shape = (0, *shape[1:])
    dtype = draw(st.sampled_from(sorted(MAGNITUDES)))
    placements = None
    if draw(st.integers(0, 4)):
        choice = st.integers(-1, len(shape) - 1)
        placements = tuple(draw(choice) for _ in mesh)
    # A shard may be missing on one rank; of replicas, and of plain tensors, all or none.
    cut = placements is not None and -1 not in placements
    missing = draw(st.sampled_from(["", "", "", "all", "rank 1"] if cut else ["", "", "", "all"]))
    magnitude = draw(st.sampled_from(MAGNITUDES[dtype]))
    return Parameter(shape, dtype, placements, magnitude, missing, draw(st.integers(0, 99)))


@st.composite
def cases(draw: Any, world: int) -> Case:
    mesh = draw(st.sampled_from(MESHES[world]))
    drawn = draw(st.lists(parameters(mesh), min_size=1, max_size=5))
    return Case(world, mesh, tuple(drawn), draw(st.sampled_from(POLICIES)))


def configuration(case: Case) -> Any:
    """The drawn policy, with the last dim of each parameter written out where that is meant."""
    if not isinstance(case.policy, dict) or case.policy.get("unit_dims") != "last":
        return case.policy
    shapes = {f"p{number}": p.shape for number, p in enumerate(case.parameters)}
    dims = {name: [len(shape) - 1] if shape else [] for name, shape in shapes.items()}
    return {**case.policy, "unit_dims": dims}


def values(parameter: Parameter) -> tuple[Tensor, Tensor]:
    """Whole weights and gradient, rounded to the dtype."""
    dtype = getattr(torch, parameter.dtype)
    generator = torch.Generator().manual_seed(parameter.seed)
    weight = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    if parameter.seed % 7 == 0:
        weight.zero_()
    gradient = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return weight.to(dtype), (gradient * 10.0**parameter.magnitude).to(dtype)


def check(case: Case, roundings: int = 1) -> None:
    """On every rank: clip the sharded model, compare each local element with the oracle."""
    mesh = mesh_of(case.mesh, tuple("ab"[: len(case.mesh)]))
    named: list[tuple[str, Tensor]] = []
    elements: dict[str, Tensor] = {}
    weights: dict[str, np.ndarray] = {}
    gradients: dict[str, np.ndarray | None] = {}
    for number, parameter in enumerate(case.parameters):
        name = f"p{number}"
        weight, gradient = values(parameter)
        weights[name] = weight.double().numpy()
        where: Tensor = numbers(parameter.shape)
        if parameter.placements is not None:
            placements: list[Placement] = [
                Replicate() if dim < 0 else Shard(dim) for dim in parameter.placements
            ]
            where = distribute_tensor(where, mesh, placements, src_data_rank=None)
        local = where.to_local() if isinstance(where, DTensor) else where
        elements[name] = local
        tensor = nn.Parameter(like(where, weight.flatten()[local]))
        if parameter.missing == "all":
            gradients[name] = None
        else:
            gone = parameter.missing == "rank 1"
            if not (gone and dist.get_rank() == 1):
                tensor.grad = like(where, gradient.flatten()[local])
            full = gradient.double()
            if gone:
                lost = [local if dist.get_rank() == 1 else None]
                dist.broadcast_object_list(lost, src=1)
                assert lost[0] is not None
                full.view(-1)[lost[0].flatten()] = 0.0
            gradients[name] = full.numpy()
        named.append((name, tensor))
    policy = configuration(case)
    want = expected(policy, gradients, weights)
    report = GradClipper(named, build(policy)).clip_()
    assert report.total_norm.item() == pytest.approx(want.total_norm, rel=1e-6, abs=1e-44)
    if roundings > 1:
        assert report.clipped_norm.item() == pytest.approx(want.clipped_norm, rel=1e-6)
    for name, norm in report.parameter_norms.items():
        assert norm == pytest.approx(want.parameter_norms[name], rel=1e-6, abs=0.0), name
    for name, tensor in named:
        if tensor.grad is not None:
            have = tensor.grad.to_local() if isinstance(tensor.grad, DTensor) else tensor.grad
            whole = want.gradients[name]
            assert whole is not None
            part = whole.reshape(-1)[elements[name].numpy()]
            assert_rounded(have, part, ulps=roundings, coefficient_error=1e-6, name=name)
    # And the function agrees with the class, for the policy that both have.
    if not any(p.missing == "rank 1" for p in case.parameters):
        norms = distclip.grad_norms(named)
        for name, tensor in named:
            after = 0.0 if want.gradients[name] is None else _norm(want.gradients[name])
            tolerance = {"float16": 1e-3, "bfloat16": 8e-3}.get(
                str(tensor.dtype).removeprefix("torch."), 2e-6
            )
            tiny = torch.finfo(tensor.dtype).smallest_normal * 8
            assert norms[name].item() == pytest.approx(after, rel=tolerance, abs=tiny), name


def _norm(values: Any) -> float:
    largest = float(np.abs(values).max(initial=0.0))
    return 0.0 if largest == 0.0 else float(np.sqrt(((values / largest) ** 2).sum())) * largest


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_model_is_clipped_as_on_one_device(world: int) -> None:
    drawn = cases(world) if world > 1 else cases(2)

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def run(case: Case) -> None:
        if world == 1:
            mesh = (1,) * len(case.mesh)
            alone = [p for p in case.parameters if p.missing != "rank 1"]
            assume(alone)
            case = Case(1, mesh, tuple(alone), case.policy)
        run_on_ranks(check, world, case, timeout=30)

    run()


@st.composite
def unit_chains(draw: Any, world: int) -> Case:
    """Per-unit policies in a row, each with units of its own; numbers of ordinary size."""
    mesh = draw(st.sampled_from(MESHES.get(world, [(1,)])))
    drawn = [
        Parameter(
            shape=tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))),
            dtype=draw(st.sampled_from(["float32", "float64"])),
            placements=draw(st.sampled_from([None, (0,) * len(mesh), (-1,) * len(mesh), "last"])),
            magnitude=0,
            missing="",
            seed=draw(st.integers(0, 99)),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    chosen = [
        replace(p, placements=(len(p.shape) - 1,) * len(mesh)) if p.placements == "last" else p
        for p in drawn
    ]
    dims = st.sampled_from(["row", "tensor", (), (0,), (-1,), "all"])
    stages: list[Any] = []
    for _ in range(draw(st.integers(2, 4))):
        stage = {"name": "agc", "clip_factor": draw(st.sampled_from([1e6, 1.0, 0.1, 0.02]))}
        unit = draw(dims)
        if unit in ("row", "tensor"):
            stage["unit"] = unit
        else:
            stage["unit_dims"] = {
                f"p{number}": sorted(
                    range(len(p.shape)) if unit == "all" else {d % len(p.shape) for d in unit}
                )
                for number, p in enumerate(chosen)
            }
        other = draw(st.sampled_from([{}, {}, {"p0": None}, {"p1": {"name": "dreamer_agc"}}]))
        stages.append({"by_name": other, "default": stage} if other else stage)
    return Case(world, mesh, tuple(chosen), stages)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_unit_policies_in_a_row_decide_by_their_own_units(world: int) -> None:
    @settings(
        max_examples=CHAINS,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(unit_chains(world))
    def run(case: Case) -> None:
        # Each change of units reads again what the pass before it has rounded.
        run_on_ranks(check, world, case, len(case.policy) + 1, timeout=30)

    run()


NO_UNITS = Case(
    4,
    (4,),
    (
        Parameter((), "bfloat16", None, -30, "", 0),
        Parameter((0, 1), "bfloat16", (1,), -30, "", 0),
    ),
    [{"name": "agc", "clip_factor": 0.1}, {"name": "global_norm", "max_norm": 0.5}],
)


def test_a_parameter_without_units_beside_others() -> None:
    """Found once by a random search: its table of units is empty, and it is in it."""
    run_on_ranks(check, 4, NO_UNITS)


def test_the_draws_reach_the_extremes() -> None:
    """A property that never meets a hard case proves nothing."""
    seen: set[str] = set()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(4))
    def run(case: Case) -> None:
        for p in case.parameters:
            extremes = {
                "empty": 0 in p.shape,
                "scalar": p.shape == (),
                "plain": p.placements is None,
            }
            seen.update(label for label, holds in extremes.items() if holds)
            seen.update([p.missing, p.dtype, str(p.magnitude), f"mesh {case.mesh}"])
            if p.placements is not None and len(p.placements) == 2:
                seen.add(f"{p.placements[0] >= 0} {p.placements[1] >= 0}")
        seen.add(str(case.policy))

    run()
    want = ["empty", "scalar", "plain", "all", "rank 1", "-40", "30", "200", "-200"]
    want += [f"mesh {mesh}" for mesh in MESHES[4]]
    want += [f"{one} {other}" for one in (True, False) for other in (True, False)]
    want += sorted(MAGNITUDES)
    assert not set(want) - seen
    assert len([policy for policy in POLICIES if str(policy) in seen]) > 10
