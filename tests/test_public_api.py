"""The public surface, exactly: names, signatures, docstrings and errors."""

import dataclasses
import inspect
import re
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import distclip
import distclip.optim
import distclip.testing
from distclip import policies

EXPORTED = {
    "distclip": {
        "ClipReport", "ClippedStep", "ConfigurationError", "DistclipError", "GradClipper",
        "MicroBatchClipper", "LadderExhaustedError", "NonFiniteGradientError", "CollectiveError",
        "ProcessGroupError", "RankMismatchError", "ReplicaDriftError", "RewindRequested",
        "StateError", "UnsupportedGradientError", "__version__", "clip_grad_agc_",
        "clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "declare_sharded", "errors",
        "from_config", "get_total_norm", "grad_norms", "policies",
    },
    "distclip.policies": {
        "AGC", "Action", "AdaGC", "AutoClip", "BlockRMS", "ByName", "ByPart", "Chain", "Clamp",
        "ClampingPolicy", "DreamerAGC", "ExpertAware", "GlobalNorm", "GroupEMA", "GroupNorm",
        "Ladder", "Limit", "Measure", "MuonAware", "Needs", "NormGate", "NormStabilizer",
        "ParameterInfo", "ParameterNorm", "Policy", "RunningMax", "Scale", "ScalingPolicy",
        "SideBySide", "Skip", "SkipNorm", "SkipSpikes", "State", "Statistics", "UnitPolicy",
        "Value", "ZClip", "adagc", "agc", "autoclip", "block_rms", "by_name", "by_part", "chain",
        "dreamer_agc", "expert_aware", "global_norm", "group_ema", "group_norm", "ladder",
        "measure", "muon_aware", "norm_gate", "norm_stabilizer", "parameter_norm", "register",
        "running_max", "skip_norm", "skip_spikes", "value", "zclip",
    },
    "distclip.optim": {"LaProp", "dreamer_v3"},
    "distclip.testing": {
        "Expected", "Outcome", "PoolError", "RankError", "RankPool", "assert_rounded",
        "check_policy", "expected", "on_rank", "run_on_ranks",
    },
}  # fmt: skip

SIGNATURES = {
    "clip_grad_norm_": "(parameters: Parameters, max_norm: float, norm_type: float = 2.0, "
    "error_if_nonfinite: bool = False, foreach: bool | None = None, *, "
    "pipeline_group: ProcessGroup | None = None, "
    "process_group: ProcessGroup | None = None) -> Tensor",
    "clip_grads_with_norm_": "(parameters: Parameters, max_norm: float, "
    "total_norm: Tensor | float, foreach: bool | None = None) -> None",
    "clip_grad_value_": "(parameters: Parameters, clip_value: float, foreach: bool | None = None) "
    "-> None",
    "clip_grad_agc_": "(parameters: Parameters, clip_factor: float = 0.01, eps: float = 0.001, "
    "unit: Literal[row, tensor] = row, "
    "norm_type: float = 2.0, *, pipeline_group: ProcessGroup | None = None, "
    "process_group: ProcessGroup | None = None) -> Tensor",
    "get_total_norm": "(tensors: Tensors, norm_type: float = 2.0, "
    "error_if_nonfinite: bool = False, foreach: bool | None = None, *, "
    "pipeline_group: ProcessGroup | None = None, "
    "process_group: ProcessGroup | None = None) -> Tensor",
    "grad_norms": "(module_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]], "
    "norm_type: float = 2.0, *, pipeline_group: ProcessGroup | None = None, "
    "process_group: ProcessGroup | None = None) -> dict[str, Tensor]",
    "declare_sharded": "(parameter: Tensor, process_group: ProcessGroup, *, "
    "dim: int | None = None) -> None",
    "from_config": "(config: str | os.PathLike[str] | Mapping[str, Any] | Config, target: Target, "
    "*, optimizer: Optimizer | Sequence[Optimizer] | None = None, "
    "process_group: ProcessGroup | None = None) -> GradClipper",
    "GradClipper": "(target: Target, policy: Policy, *, "
    "optimizer: Optimizer | Sequence[Optimizer] | None = None, "
    "on_nonfinite: OnNonfinite = error, process_group: ProcessGroup | None = None, "
    "sinks: StepSink | Sequence[StepSink] = (), norms: bool = True, "
    "verify_replicas: VerifyReplicas = first, fold: bool = True, overlap: bool = False, "
    "stuck_after: float | None = None, ratios: Every = None, exponents: Every = None) -> None",
    "GradClipper.clip_": "(self, loss: Tensor | float | None = None) -> ClipReport",
    "GradClipper.observe": "(self, loss: Tensor | float) -> None",
    "GradClipper.note": "(self, batch: Any = None, "
    "recompute: Callable[[], object] | None = None) -> None",
    "GradClipper.note_update": "(self, step: int, report: Update) -> None",
    "GradClipper.attach": "(self, optimizer: Optimizer | Sequence[Optimizer], *more: Optimizer) "
    "-> AttachHandle",
    "GradClipper.close": "(self) -> None",
    "GradClipper.state_dict": "(self) -> dict[str, object]",
    "GradClipper.raise_late": "(self) -> None",
    "GradClipper.load_state_dict": "(self, state: dict[str, object]) -> None",
    "MicroBatchClipper": "(model: nn.Module, policy: Policy, *, "
    "process_group: ProcessGroup | None = None) -> None",
    "MicroBatchClipper.average_": "(self) -> None",
    "ClippedStep": "(clipper: GradClipper, optimizer: Any, *, "
    "scaler: torch.amp.GradScaler | None = None) -> None",
    "ClippedStep.optimizer_step": "(self, loss: Tensor | float | None = None) -> Tensor",
    "ClipReport.to_dict": "(self, *, per_parameter: bool = True, "
    "modules: int | None = None) -> dict[str, Any]",
    "policies.measure": "(norm_type: float = 2.0) -> None",
    "policies.global_norm": "(max_norm: float, norm_type: float = 2.0) -> None",
    "policies.value": "(clip_value: float) -> None",
    "policies.parameter_norm": "(max_norm: float, norm_type: float = 2.0) -> None",
    "policies.group_norm": "(max_norm: float, norm_type: float = 2.0) -> None",
    "policies.block_rms": "(threshold: float) -> None",
    "policies.agc": "(clip_factor: float = 0.01, eps: float = 0.001, "
    "unit: Literal[row, tensor] = row, unit_dims: Mapping[str, Sequence[int]] | None = None, "
    "norm_type: float = 2.0) -> None",
    "policies.dreamer_agc": "(clip: float = 0.3, pmin: float = 0.001) -> None",
    "policies.autoclip": "(percentile: float = 10.0, window: int | None = None) -> None",
    "policies.zclip": "(z_thresh: float = 2.5, alpha: float = 0.97, warmup_steps: int = 25, "
    "max_norm: float | None = 1.0) -> None",
    "policies.adagc": "(lambda_rel: float = 1.05, beta: float = 0.98, warmup_steps: int = 100, "
    "lambda_abs: float = 1.0, floor: float = 1e-06, max_growth: float | None = None) -> None",
    "policies.skip_spikes": "(window: int = 128, sigma: float = 6.0, min_history: int = 64, "
    "max_consecutive: int = 10, loss: bool = False, clip_sigma: float | None = None) -> None",
    "policies.ladder": "(spikes: Policy, clips: int = 0, skips: int = 5, recomputes: int = 1, "
    "rewinds: int = 2, calm: int = 100, margin: int = 0, tolerance: float = 0.001, "
    "updates: Policy | None = None) -> None",
    "policies.running_max": "(theta: float = 0.999) -> None",
    "policies.norm_stabilizer": "(gamma1: float = 0.7, gamma2: float = 0.9, eps: float = 1e-08) "
    "-> None",
    "policies.group_ema": "(high_mult: float = 1.05, low_mult: float = 0.0, "
    "ema_beta: float = 0.98, max_down_scale: float = 0.0, max_up_scale: float = 1.1, "
    "high_late: float | None = None, low_late: float | None = None, late_start: int = 0, "
    "late_stop: int = 0) -> None",
    "policies.skip_norm": "(max_norm: float, norm_type: float = 2.0, "
    "clip_norm: float | None = None) -> None",
    "policies.chain": "(*policies: Policy) -> None",
    "policies.by_name": "(mapping: Mapping[str, Policy | None], default: Policy | None = None) "
    "-> None",
    "policies.by_part": "(mapping: Mapping[str, Policy | None], default: Policy | None = None) "
    "-> None",
    "policies.muon_aware": "(max_norm: float, norm_type: float = 2.0) -> None",
    "policies.norm_gate": "(part: str, max_norm: float, norm_type: float = 2.0) -> None",
    "policies.expert_aware": "(max_norm: float, expert_max_norm: float | None = None, "
    "norm_type: float = 2.0) -> None",
    "policies.register": "(policy: PolicyType) -> PolicyType",
    "optim.dreamer_v3": "(params: Target | Iterable[dict[str, Any]], lr: float | Tensor = 4e-05, "
    "agc: float = 0.3, pmin: float = 0.001, eps: float = 1e-20, beta1: float = 0.9, "
    "beta2: float = 0.999, nesterov: bool = False, weight_decay: float = 0.0, warmup: int = 1000, "
    "schedule: Schedule = const, anneal: int = 0, *, decay_mask: DecayMask = None, "
    "foreach: bool | None = None, on_nonfinite: OnNonfinite = error, "
    "process_group: ProcessGroup | None = None) -> LaProp",
    "testing.run_on_ranks": "(function: Callable[..., T], world_size: int, *args: Any, "
    "timeout: float = 60.0, **kwargs: Any) -> list[T]",
    "testing.on_rank": "(make: Callable[..., Any], *arguments: Any) -> Any",
    "testing.expected": "(policy: PolicySpec, gradients: Mapping[str, npt.ArrayLike | None], "
    "weights: Mapping[str, npt.ArrayLike], *, groups: Mapping[str, int] | None = None, "
    "on_nonfinite: NonFinite = pass, memory: dict[str, Memory] | None = None, "
    "loss: float | None = None, stored: Stored | None = None) -> Expected",
    "testing.check_policy": "(factory: Callable[[], Any], *, steps: int = 300) -> None",
}
"""Relied on from outside. An argument may be added; none may be renamed, moved or taken away."""

REPORT = {
    "leave_out", "total_norm", "clipped_norm", "coefficient", "threshold", "skipped",
    "clipped_fraction", "names", "parameter_norms", "part_norms", "parameter_coefficients",
    "nonfinite", "weight_norm", "noise_scale", "parameter_ratios", "module_norms", "module_ratios",
    "exponents", "exponents_by_dtype",
}  # fmt: skip


MODULES = [sys.modules[name] for name in EXPORTED]
POLICIES = [
    value
    for name, value in vars(policies).items()
    if name in EXPORTED["distclip.policies"]
    and type(value) is not types.GenericAlias  # Python 3.10 takes one for a class
    and inspect.isclass(value)
    and issubclass(value, policies.Policy)
    and not inspect.isabstract(value)
    and value not in (policies.Policy, policies.ClampingPolicy)
]


def public_names(module: ModuleType) -> set[str]:
    names = getattr(module, "__all__", None)
    if names is not None:
        return set(names)
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }


def signature(value: Any) -> str:
    return str(inspect.signature(value)).translate({ord(quote): None for quote in "\"'"})


def undocumented(module: ModuleType) -> list[str]:
    """Public functions, classes, methods and properties without a docstring of their own.

    A method that overrides is documented where it is declared.
    """
    missing = []
    for name in public_names(module) - {"accelerate", "optim"}:
        value = getattr(module, name)
        if not inspect.isclass(value) and not inspect.isfunction(value):
            continue
        missing += [] if value.__doc__ and not _generated(value) else [name]
        for attribute, member in vars(value).items() if inspect.isclass(value) else ():
            member = getattr(member, "__func__", getattr(member, "func", member))
            if attribute.startswith("_") or not (
                inspect.isfunction(member) or isinstance(member, property)
            ):
                continue
            missing += [] if inspect.getdoc(getattr(value, attribute)) else [f"{name}.{attribute}"]
    return missing


def _generated(value: Any) -> bool:
    """Whether the docstring is the signature that a dataclass without one is given."""
    return dataclasses.is_dataclass(value) and str(value.__doc__).startswith(
        f"{value.__name__}("  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_exported_names_are_exactly_these(module: ModuleType) -> None:
    assert public_names(module) == EXPORTED[module.__name__]
    assert public_names(module) <= set(dir(module))


def test_dir_shows_the_public_names_only() -> None:
    # Namespaces that are lazy.
    assert dir(distclip) == sorted(
        {*EXPORTED["distclip"], "accelerate", "deepspeed", "lightning", "optim", "transformers"}
    )
    with pytest.raises(AttributeError, match="no attribute 'clip_grad_norm'"):
        distclip.clip_grad_norm  # noqa: B018 - the attribute access is the test


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_as_they_were(name: str) -> None:
    value: Any = distclip
    for part in name.split("."):
        value = getattr(value, part)
    shown = re.sub(r"Annotated\[(\w+), [^]]*\]", r"\1", signature(value))
    shown = re.sub("NormOrder|Threshold|Positive|Factor|Fraction|Share", "float", shown)
    assert shown == SIGNATURES[name]


def test_a_report_has_exactly_these_fields() -> None:
    report = distclip.ClipReport
    fields = {field.name for field in dataclasses.fields(report)}
    assert {name for name in fields | set(vars(report)) if not name.startswith("_")} - {
        "of",
        "fetch",
        "tensors",
        "to_dict",
    } == REPORT


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_everything_public_is_documented(module: ModuleType) -> None:
    assert undocumented(module) == []


def test_an_undocumented_name_is_seen() -> None:
    module = ModuleType("bare")

    @dataclasses.dataclass
    class Bare:
        """Text."""

        def method(self) -> None: ...

    @dataclasses.dataclass
    class Barer:
        size: int

    module.Bare, module.Barer = Bare, Barer  # type: ignore[attr-defined]
    assert sorted(undocumented(module)) == ["Bare.method", "Barer"]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_argument_of_a_policy_is_described(policy: type[policies.Policy]) -> None:
    text = inspect.getdoc(policy) or ""
    for name in inspect.signature(policy).parameters:
        assert f"\n    {name}: " in text, name


def test_the_package_is_typed() -> None:
    folder = Path(distclip.__file__).parent
    assert (folder / "py.typed").exists()


def test_the_exception_tree_is_as_it_is_drawn() -> None:
    drawn = distclip.errors.__doc__ or ""
    for name in EXPORTED["distclip"]:
        error = getattr(distclip, name) if name.endswith("Error") else None
        if error is None:
            continue
        assert issubclass(error, distclip.DistclipError)
        assert name in drawn
        builtins = [base.__name__ for base in error.__bases__ if base.__module__ == "builtins"]
        if name != "DistclipError":
            assert f"{name} ({', '.join(builtins)})" in drawn
