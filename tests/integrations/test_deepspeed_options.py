"""DeepSpeed's options that move gradients about: each gives what one process gives."""

from typing import Any

import pytest

pytest.importorskip("deepspeed")

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip import policies
from distclip.errors import ConfigurationError, DistclipError, UnsupportedGradientError
from distclip.layouts import zero
from distclip.statistics import collectives
from tests.helpers.logs import logged
from tests.helpers.watching import watch
from tests.integrations.engines import (
    VERSION,
    Reference,
    backward,
    close,
    engine_of,
    gradients_of,
    json_of,
    opened,
    step,
    weights_of,
)
from tests.integrations.test_deepspeed import GLOBAL, POLICIES, train

pytestmark = pytest.mark.filterwarnings("ignore")

NEW = VERSION >= (0, 19)
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
ADAM = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 0.05, "eps": 1.0,
                                                  "weight_decay": 0.1}}}  # fmt: skip

# stage, options of train(), JSON
CELLS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "offload 1": (1, {}, {"zero": OFFLOAD}),
    "offload 2": (2, {}, {"zero": OFFLOAD}),
    "offload 3": (3, {}, {"zero": OFFLOAD}),
    "offload all 3": (
        3,
        {},
        {"zero": {**OFFLOAD, "offload_param": {"device": "cpu", "pin_memory": False}}},
    ),
    "hierarchical 3": (3, {}, {"zero": {"zero_hpz_partition_size": 2}}),
    "offload and accumulation 2": (2, {"micro": 2}, {"zero": OFFLOAD}),
    "round robin 1": (1, {}, {"zero": {"round_robin_gradients": True}}),
    "round robin 2": (2, {}, {"zero": {"round_robin_gradients": True}}),
    "round robin, groups": (2, {"groups": True}, {"zero": {"round_robin_gradients": True}}),
    "scattered 2": (2, {}, {"zero": {"contiguous_gradients": False}}),
    "scattered 3": (3, {}, {"zero": {"contiguous_gradients": False}}),
    "no reduce-scatter 1": (1, {}, {"zero": {"reduce_scatter": False}}),
    "no reduce-scatter 2": (2, {}, {"zero": {"reduce_scatter": False}}),
    "small buckets 2": (2, {}, {"zero": {"reduce_bucket_size": 30}}),
    "small buckets 3": (3, {}, {"zero": {"reduce_bucket_size": 200}}),
    "sub-groups 3": (3, {}, {"zero": {"sub_group_size": 40}}),
    "sub-groups, groups 3": (3, {"groups": True}, {"zero": {"sub_group_size": 40}}),
    "persistent 3": (3, {}, {"zero": {"stage3_param_persistence_threshold": 0}}),
    **{f"accumulation {stage}": (stage, {"micro": 2}, {}) for stage in range(4)},
    **{f"groups {stage}": (stage, {"groups": True}, {}) for stage in range(4)},
    **{f"client Adam {stage}": (stage, {"optimizer": "adam"}, {}) for stage in range(4)},
    **{f"JSON AdamW {stage}": (stage, {"optimizer": "adam"}, ADAM) for stage in range(4)},
}
# Where DeepSpeed itself, without distclip, trains otherwise than one process: at the first step its
# own norm is 11.31 for 6.57 (0.16.9 and 0.18.0), and 2.71 for 5.24 (0.18.0).
if not NEW:
    del CELLS["scattered 2"]
if VERSION == (0, 18):
    del CELLS["accumulation 2"]
if NEW:
    for stage in (1, 2):
        for also in (False, True):
            aligned = {"parameter_alignment": True, "round_robin_gradients": also}
            CELLS[f"aligned {stage}{', round robin' * also}"] = (stage, {}, {"zero": aligned})
    own = {"managed_gradient_accumulation": False}
    quick = {"zero": {"compute_grad_norm": False}, "gradient_clipping": 0.0}
    for stage in range(4):
        CELLS[f"own accumulation {stage}"] = (stage, {"micro": 2}, own)
    CELLS["no norm 1"], CELLS["no norm 2"] = (1, {}, quick), (2, {}, quick)


@pytest.mark.ranks(2, 3, timeout=400)
@pytest.mark.parametrize("part", range(3))
def test_options(part: int, world_size: int) -> None:
    for label, (stage, options, changes) in list(CELLS.items())[part::3]:
        if world_size == 3 and not any(word in label for word in ("offload", "robin", "sub-g")):
            continue
        micro = options.get("micro", 1)
        document = json_of(stage, **changes, gradient_accumulation_steps=micro)
        try:
            policy = POLICIES["group" if options.get("groups") else "agc"]
            train(policy, document, steps=4, **options)
        except Exception as error:
            raise AssertionError(f"{label}: {error}") from error


@pytest.mark.ranks(2, timeout=120)
def test_one_all_reduce_a_step_takes_the_place_of_deepspeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted against the same engine without distclip, and without clipping at all."""
    monkeypatch.setattr(collectives, "FEW_RANKS", 0)  # DeepSpeed gathers weights

    def reductions(stage: int, kind: str, options: dict[str, Any], how: str) -> list[str]:
        clipping = {"gradient_clipping": 0.0 if how == "ours" else 0.5}
        with opened(json_of(stage, kind, **clipping, **options)) as engine:
            if how == "ours":
                distclip.deepspeed.attach(engine, policies.global_norm(0.5))
            step(engine, 0)
            backward(engine, 1)
            with watch() as seen:
                engine.step()
            return [name for name in seen.collective_names if "reduce" in name]

    fp32_sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    # Up to 0.18 other wrappers serve bf16: those of 0.18.0 keep everything on every rank.
    by_version = (1, 1) if VERSION < (0, 18) else (0, 0) if not NEW else (0, 1)
    # DeepSpeed's own: one for the norm of each group or sub-group, one for overflows. In bf16 with
    # fp32 sums every rank has reduced, and measures, all gradients.
    cells: list[tuple[int, str, dict[str, Any], int, int]] = [
        (0, "fp32", {}, 0, 1),
        (0, "bf16", {}, by_version[0], 0),
        (1, "fp32", {}, 1, 1),
        (1, "bf16", fp32_sums, by_version[1], 0),
        (2, "bf16", {}, 1, 2 if NEW else 1),
        (3, "fp32", {}, 1, 1),
        (3, "fp32", {"zero": {"sub_group_size": 40}}, 1, 3),
        (1, "fp16", {}, 1, 2),
        (3, "fp16", {}, 1, 2),
    ]
    found = [
        (*cell[:3], *(len(reductions(*cell[:3], how)) for how in ("ours", "theirs")))
        for cell in cells
    ]
    for one, cell in zip(found, cells, strict=True):
        assert str(one) == str(cell), (one, cell)


@pytest.mark.ranks(2, timeout=120)
def test_remove_gives_deepspeed_its_clipping_back() -> None:
    for stage, kind in [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (0, "bf16")]:
        document = json_of(stage, kind, gradient_clipping=0.25)
        with opened(document) as plain, opened(document) as ours:
            outer = ours.optimizer
            names = set(outer.__dict__), set(ours.__dict__)
            handle = distclip.deepspeed.attach(ours, policies.value(1e-4))
            with pytest.raises(ConfigurationError, match=r"remove\(\) on the first handle"):
                distclip.deepspeed.attach(ours, policies.value(1.0))
            assert ours.gradient_clipping() == 0.0
            handle.remove()
            handle.remove()
            assert (set(outer.__dict__), set(ours.__dict__) - {"_distclip"}) == names
            for number in range(2):
                step(plain, number)
                step(ours, number)
            theirs = weights_of(plain)
            for name, weight in weights_of(ours).items():
                assert torch.equal(weight, theirs[name]), (stage, kind, name)
            for p in ours.module.parameters():
                assert zero.extent_of(p) is None
            distclip.deepspeed.attach(ours, policies.global_norm(0.5)).remove()


@pytest.mark.ranks(2, timeout=120)
def test_the_default_of_1_clips_no_second_time() -> None:
    """FIELD 15: DeepSpeed 0.19.3 and later clip to 1.0 where the JSON says nothing."""
    for stage in range(4):
        with opened(json_of(stage)) as engine:
            theirs = engine.gradient_clipping()
            assert theirs == (1.0 if NEW else 0.0)  # still_a_defect
            distclip.deepspeed.attach(engine, policies.global_norm(3.0))
            reference = Reference({"name": "global_norm", "max_norm": 3.0})
            for number in range(3):
                step(engine, number)
                want = reference.train(number)
                assert want.total_norm > 3.0  # so that a second clip to 1 would show
            for name, weight in weights_of(engine).items():
                assert torch.allclose(weight.double(), reference.weights()[name], atol=1e-6)


@pytest.mark.ranks(2, timeout=120)
def test_the_norm_is_a_norm_or_what_it_is() -> None:
    """FIELD 16: `get_global_grad_norm()` of stage 0 in fp32 is None, and -1 stands for inf."""
    for stage in (0, 1, 3):
        with opened(json_of(stage)) as plain, opened(json_of(stage)) as ours:
            handle = distclip.deepspeed.attach(
                ours, {"policy": GLOBAL, "on_nonfinite": "skip", "verify_replicas": "never"}
            )
            for engine in (plain, ours):
                backward(engine, 0)
                engine.step()
            theirs = plain.get_global_grad_norm()
            assert (theirs is None) == (stage == 0)  # still_a_defect
            assert float(ours.get_global_grad_norm()) == float(handle.last_report.total_norm) > 0
            with torch.no_grad():
                ours.module.out.bias.data.fill_(float("inf"))
            step(ours, 1)
            assert not float(ours.get_global_grad_norm()) < float("inf")


NORMS = ("scaled_global_norm", "_get_norm_groups", "get_grads_for_norm")


def asked(engine: Any) -> dict[str, float]:
    """DeepSpeed's own norms of the gradients that are there, by the name of the method."""
    found = {}
    for name in NORMS:
        method = getattr(engine.optimizer, name, None)
        if method is None:
            continue
        value = method()
        if name == "get_grads_for_norm":
            value = [torch.linalg.vector_norm(each) for each in value[0]]
            squares = sum(norm.double().square() for norm in value)
            dist.all_reduce(squares)  # of each rank's own share
            value = squares.sqrt()
        elif name == "_get_norm_groups":
            value = torch.stack([torch.as_tensor(each) for each in value]).norm()
        found[name] = float(value)
    return found


@pytest.mark.ranks(2, timeout=120)
def test_deepspeeds_norms_outside_of_a_step() -> None:
    """They are asked by users; within a step distclip answers, and only tells what overflows."""
    seen = set()
    for stage, kind in [(0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp16"), (3, "fp32")]:
        document = json_of(stage, kind, gradient_clipping=0.05)
        with opened(document) as plain, opened(document) as ours:
            distclip.deepspeed.attach(ours, policies.global_norm(0.05))
            for number in range(2):
                for engine in (plain, ours):
                    backward(engine, number)
                truth = torch.cat([g.flatten() for g in gradients_of(ours).values()]).norm()
                truth *= float(getattr(ours.optimizer, "loss_scale", None) or 1.0)
                found = asked(ours)
                assert found == pytest.approx(asked(plain), rel=1e-2), (stage, kind)
                wanted = dict.fromkeys(found, float(truth))
                assert found == pytest.approx(wanted, rel=1e-3), (stage, kind)
                seen |= found.keys()
                for engine in (plain, ours):
                    engine.step()
                assert ours.was_step_applied()
    assert seen >= {"scaled_global_norm", "_get_norm_groups"}


@pytest.mark.ranks(1, 2, timeout=120)
def test_overlap_is_told_to_have_no_effect() -> None:
    engine = engine_of(json_of(2))
    with logged("distclip.deepspeed") as said:
        for overlap in (False, True):
            handle = distclip.deepspeed.attach(engine, {"policy": GLOBAL, "overlap": overlap})
            expected = int(overlap and dist.get_rank() == 0)
            assert sum("overlap has no effect under DeepSpeed" in each for each in said) == expected
            handle.remove()
    close(engine)


@pytest.mark.ranks(2, timeout=120)
def test_what_cannot_be_clipped_is_refused_by_name() -> None:
    engine = engine_of(json_of(0, "fp16"))
    with pytest.raises(DistclipError, match=r"fp16 at ZeRO stage 0: .* never scales the loss"):
        distclip.deepspeed.attach(engine, policies.global_norm(1.0))
    close(engine)

    engine = engine_of(json_of(2))
    outer = engine.optimizer

    class ZenFlowZeroOptimizer(type(outer)):  # type: ignore[misc]
        """A subclass steps in ways of its own."""

    outer.__class__ = ZenFlowZeroOptimizer
    with pytest.raises(UnsupportedGradientError, match=r"test_deepspeed_options\.ZenFlowZero"):
        distclip.deepspeed.attach(engine, policies.global_norm(1.0))
    outer.__class__ = ZenFlowZeroOptimizer.__mro__[1]
    engine.pipeline_parallelism = True
    with pytest.raises(DistclipError, match="pipeline parallelism was not run"):
        distclip.deepspeed.attach(engine, policies.global_norm(1.0))
    engine.pipeline_parallelism = False
    assert getattr(engine, "_distclip", None) is None
    assert all(zero.extent_of(p) is None for p in engine.module.parameters())

    close(engine)


@pytest.mark.ranks(2, timeout=120)
def test_no_gradient_is_held_between_steps() -> None:
    import gc
    import weakref

    engine = engine_of(json_of(2))
    distclip.deepspeed.attach(engine, policies.agc(0.05))
    backward(engine, 0)
    held = [weakref.ref(g) for listed in engine.optimizer.averaged_gradients.values()
            for g in listed]  # fmt: skip
    engine.step()
    gc.collect()
    assert held
    assert not any(reference() is not None for reference in held)
    close(engine)


@pytest.mark.ranks(2, timeout=120)
def test_a_zero_gradient_is_a_step() -> None:
    """BF16_Optimizer up to 0.18 asserts that the norm is > 0."""
    fp32_sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    for stage, kind, options in [(1, "bf16", fp32_sums), (1, "fp32", {}), (3, "fp32", {})]:
        engine = engine_of(json_of(stage, kind, **options))
        distclip.deepspeed.attach(engine, policies.global_norm(1.0))
        loss = engine(*_nothing())
        engine.backward(loss * 0.0)
        engine.step()
        assert float(engine.get_global_grad_norm()) == 0.0
        assert engine.was_step_applied()
        close(engine)


def _nothing() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.zeros(6, dtype=torch.long)
    return ids, torch.zeros(6, 3)


@pytest.mark.ranks(2, timeout=60)
def test_an_engine_without_an_optimizer_is_told() -> None:
    assert dist.get_world_size() == 2
    engine = deepspeed.initialize(
        model=nn.Linear(2, 2), config=json_of(0), dist_init_required=False
    )[0]
    with pytest.raises(DistclipError, match="no optimizer: there is nothing to clip for"):
        distclip.deepspeed.attach(engine, policies.global_norm(1.0))
