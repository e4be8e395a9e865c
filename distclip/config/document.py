"""Typed, strict configuration from YAML, JSON or a mapping.

::

    policy: {name: agc, clip_factor: 0.01}   # a list is a chain in that order; a policy without
                                             # required arguments may be just its name: measure
    by_name:                                 # optional: other policies for some parameters, the
      "*.bias": null                         # first match wins, null leaves alone;
      "embed*": {name: value, clip_value: 0.1}   # `policy` is then for all the others
    by_part:                                 # or by kind, optimizer, key of a parameter group
      "optimizer=Muon": null
    on_nonfinite: skip                       # error (default) | error_late | skip | zero | pass
    log: {jsonl: runs/clip.jsonl, every: 10, per_parameter: true}   # tensorboard, wandb, ...
    norms: true                              # false: do not measure what only a report would show
    verify_replicas: first                   # compare replicas: first (default) | never | every n
    fold: true                               # false: never leave the multiplying to the optimizer
    overlap: false                           # true: under FSDP2, measure during backward
    stuck_after: null                        # seconds to wait for other ranks in a clip
    ratios: 10                               # every 10th report has gradient-to-weight ratios
    exponents: 100                           # every 100th report has histograms of exponents
    imports: [my_project.clipping]           # modules that register policies of one's own; they
                                             # are run once everything else has been found valid

A file with the key ``gradient_clip_norm`` and none of the above, such as the
``hyperparams_config.json`` of a training project, means ``global_norm`` with that threshold; its
other keys are not ours and are ignored.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distclip import policies
from distclip.config import schema
from distclip.config.files import read_configuration
from distclip.config.forms import module_name, right_form
from distclip.config.log import LogConfig, NoiseConfig, StatesConfig
from distclip.config.policies import as_policy, build_policy, taken_by
from distclip.config.problems import Path, Problems, key_text, said, shown
from distclip.errors import ConfigurationError
from distclip.options import LOOKS, OPTION_NAMES, Every, OnNonfinite, Options, VerifyReplicas
from distclip.policies import Policy
from distclip.policies.sound import likely_meant

HYPERPARAMETER = "gradient_clip_norm"
"""The key of a hyperparameter file that is read as ``global_norm``."""

_THRESHOLDS = ("max_grad_norm", "gradient_clip_val", "gradient_clipping", "clip_grad", "grad_clip",
               "clip_grad_norm")  # fmt: skip
"""Keys under which other libraries have a threshold."""


@dataclass(frozen=True)
class Config(Options):
    """A checked configuration: the options of a ``GradClipper``, and where its reports go.

    ``policy`` is built and ready; ``log`` says where reports are written (None: nowhere).
    """

    log: LogConfig | None = None


class _Document(BaseModel):
    """Gradient clipping by distclip."""

    model_config = ConfigDict(extra="forbid", strict=True)

    policy: Any = Field(
        default=None, description="The policy of all parameters that by_name does not match."
    )
    by_name: dict[str, Any] | None = Field(
        default=None,
        description="Name pattern (*, ?, [...]) -> policy, or null to leave the parameters that "
        "match alone. The first match wins.",
    )
    by_part: dict[str, Any] | None = Field(
        default=None,
        description="Part of the model (kind=matrix, optimizer=Muon, group.clip=False, "
        "name=*.bias, ...) -> policy, or null to leave it alone. The first match wins.",
    )
    on_nonfinite: OnNonfinite = Field(
        default=Options.on_nonfinite,
        description="What to do about NaN and inf gradients: error raises on all ranks; error_late "
        "drops the update and raises in the next step, so that no step waits for its device; skip "
        "leaves parameters and optimizer as they are; zero zeroes the gradients concerned; pass "
        "does as torch does.",
    )
    log: LogConfig | None = None
    norms: bool = Field(
        default=Options.norms, description="false: do not measure what only a report would show."
    )
    verify_replicas: VerifyReplicas = Field(
        default=Options.verify_replicas,
        description="When to compare the copies of tensors that lie on several ranks: in the first "
        "step, never, or in the first and every n-th step after it.",
    )
    fold: bool = Field(
        default=Options.fold,
        description="Let a fused optimizer multiply as it reads, where one coefficient is for "
        "everything that it steps; false: clip the gradients before the step.",
    )
    overlap: bool = Field(
        default=Options.overlap,
        description="Under FSDP2, measure gradients during backward, as soon as they are reduced; "
        "elsewhere without effect.",
    )
    stuck_after: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = Field(
        default=Options.stuck_after,
        description="Seconds that a clip waits for other ranks until it raises and names those "
        "that are missing; null: no limit but that of the process group.",
    )
    ratios: Every = Field(
        default=Options.ratios,
        description="Every n-th step, measure the weights too, for ratios of gradient to weight in "
        "its report; null: never.",
    )
    exponents: Every = Field(
        default=Options.exponents,
        description="Every n-th step, count the gradients' elements by binary exponent, which "
        "shows what underflows; null: never.",
    )
    imports: list[str] = Field(
        default_factory=list,
        description="Modules that register policies of one's own. Their code is run, once all that "
        "can be checked without it has been found valid.",
    )
    schema_: str | None = Field(
        default=None, alias="$schema", description="For editors; ignored by distclip."
    )


_KEYS = {
    "log": [*LogConfig.model_fields],
    "log.noise_scale": [*NoiseConfig.model_fields],
    "log.states": [*StatesConfig.model_fields],
}
"""Part -> its keys, for the nearest name of a key that is unknown."""


@dataclass(frozen=True)
class Examined:
    """A configuration of which everything was checked that can be without running code of others.

    Attributes:
        config: None where ``unknown`` are policies that only ``imports`` could make known.
        imports: modules that :func:`load` would import.
        unknown: names of these policies.
    """

    config: Config | None
    imports: tuple[str, ...]
    unknown: tuple[str, ...]


def load(
    source: str | os.PathLike[str] | Mapping[str, Any], *, name: str = "configuration"
) -> Config:
    """Read and check a configuration, and import what it names under ``imports``.

    Nothing is imported where anything else is wrong with the configuration.

    Args:
        source: path of a YAML or JSON file, or a mapping of the same form.
        name: what error messages call a mapping (a file is called by its path).

    Raises:
        ConfigurationError: every problem found, a line each, with its key path.
    """
    raw, name = _read(source, name)
    examined = _examined(raw, name)
    problems = Problems()
    for position, module in enumerate(examined.imports):
        _import(module, ("imports", position), problems)
    problems.raise_if_any(name)
    if not examined.unknown:
        assert examined.config is not None
        return examined.config
    policy = _policy(raw, problems)
    problems.raise_if_any(name)
    assert policy is not None  # None comes with a problem only
    return _config(_Document.model_validate(raw), policy)


def examine(
    source: str | os.PathLike[str] | Mapping[str, Any], *, name: str = "configuration"
) -> Examined:
    """Check a configuration as :func:`load` does, and run nothing that it names.

    Args:
        source: as for :func:`load`.
        name: as for :func:`load`.

    Raises:
        ConfigurationError: every problem found, a line each, with its key path.
    """
    return _examined(*_read(source, name))


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a configuration, with every policy registered by now.

    It describes the form above, not the hyperparameter files that :func:`load` takes as well.
    """
    return schema.complete(_Document.model_json_schema())


def digest(config: Config) -> str:
    """A short text that is the same on two ranks if they clip alike.

    ``log`` does not count: it changes no gradient, and paths may differ between machines.
    """
    text = repr(config.arguments())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(source: object, name: str) -> tuple[Mapping[Any, Any], str]:
    """The mapping, and what to call it."""
    if isinstance(source, Mapping):
        return source, name
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigurationError(
            f"{name}: expected the path of a YAML or JSON file, or a mapping, got a "
            f"{type(source).__name__}{likely_meant(source)}"
        )
    return read_configuration(source), os.fspath(source)


def _examined(raw: Mapping[Any, Any], source: str) -> Examined:
    problems = Problems()
    if HYPERPARAMETER in raw:
        raw = _from_hyperparameters(raw, problems)
        problems.raise_if_any(source)
    document = _document(raw, problems)
    modules = tuple(document.imports) if document else ()
    _check_names(modules, problems)
    unknown: list[str] = []
    policy = _policy(raw, problems, unknown if modules else None)
    if document is not None:
        _check_steps(document, problems)
    problems.raise_if_any(source)
    assert document is not None  # None comes with a problem only
    config = None if unknown or policy is None else _config(document, policy)
    return Examined(config, modules, tuple(dict.fromkeys(unknown)))


def _config(document: _Document, policy: Policy) -> Config:
    given = {name: getattr(document, name) for name in OPTION_NAMES} | {"policy": policy}
    return Config(**given, log=document.log)


def _check_steps(document: _Document, problems: Problems) -> None:
    """What is measured for the log is measured in steps that are written."""
    written = document.log.every if document.log else 1
    for name in LOOKS:
        every = getattr(document, name)
        if every is not None and every % written:
            problems.add(
                (name,),
                f"{every} is no multiple of log.every, {written}: most of what it measures would "
                f"not be written; write {written * -(-every // written)}",
            )


def _check_names(modules: Sequence[str], problems: Problems) -> None:
    for position, name in enumerate(modules):
        if not all(part.isidentifier() for part in name.split(".")):
            mend = f"; write {module_name(name)}" if "/" in name else ""
            problems.add(
                ("imports", position), f"must be the name of a module, got {shown(name)}{mend}"
            )


def _import(name: str, path: Path, problems: Problems) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        problems.add(
            path,
            f"no module named {error.name!r}"
            + ("" if error.name == name else f", which {name} imports")
            + "; it has to be installed, or lie beside the script that is run, in the current "
            "folder, or on PYTHONPATH"
            + (f"; of a file {name} write {module_name(name)}" if name.endswith(".py") else ""),
        )
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit: of a script that was meant to be run
        problems.add(path, f"{name} could not be imported: {type(error).__name__}: {said(error)}")


def _from_hyperparameters(raw: Mapping[Any, Any], problems: Problems) -> Mapping[Any, Any]:
    max_norm = raw[HYPERPARAMETER]
    own = [key for key in _Document.model_fields if key in raw]
    if own:
        value = shown(max_norm)
        problems.add(
            (HYPERPARAMETER,),
            f"alone it means global_norm({value}), but {', '.join(own)} stands beside it; "
            f"remove {HYPERPARAMETER}, and write "
            f"policy: {{name: global_norm, max_norm: {value}}} if that is meant",
        )
    elif isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not max_norm > 0:
        # 0 is a threshold as good as any other in a policy; here it mostly means "off", and would
        # set every gradient to zero.
        problems.add(
            (HYPERPARAMETER,),
            f"must be a number > 0, got {shown(max_norm)}; to clip nothing use a configuration "
            f"of its own with policy: measure",
        )
    return {"policy": {"name": policies.GlobalNorm.name, "max_norm": max_norm}}


def _document(raw: Mapping[Any, Any], problems: Problems) -> _Document | None:
    known = [field.alias or key for key, field in _Document.model_fields.items()]
    own = {key: value for key, value in raw.items() if key in known}
    for key in raw:
        if key not in own:
            takes = [name for name in known if name != "$schema"]
            of_policy = taken_by(key, raw)
            if key in _THRESHOLDS or of_policy:
                write = of_policy or as_policy(policies.GlobalNorm, raw[key])
                problems.add((key,), f"unknown key; it belongs to a policy: write policy: {write}")
            else:
                problems.add_unknown((key_text(key),), raw[key], takes, "a configuration")
    try:
        return _Document.model_validate(own)
    except ValidationError as error:
        problems.add_validation((), own, error, known=_KEYS, written=right_form)
        return None


def _policy(
    raw: Mapping[Any, Any], problems: Problems, unknown: list[str] | None = None
) -> Policy | None:
    """The policy of the whole.

    Returns:
        None after a fault, or where a name is unknown.
    """
    spec = raw.get("policy")
    given = [(make, raw.get(make.name)) for make in (policies.by_name, policies.by_part)]
    given = [(make, mapping) for make, mapping in given if mapping]
    if len(given) == 2:
        problems.add(
            ("by_name",), "given beside by_part; write each pattern as a part: name=PATTERN"
        )
        return None
    if spec is None and not given:
        problems.add(("policy",), "missing; write for instance {name: global_norm, max_norm: 1.0}")
    default = None if spec is None else build_policy(spec, ("policy",), problems, unknown)
    make, parts = given[0] if given else (policies.by_name, None)
    if not isinstance(parts, Mapping):
        return default
    mapping = {}
    for key, each in parts.items():
        path = (make.name, key_text(key))
        mapping[key] = None if each is None else build_policy(each, path, problems, unknown)
        try:
            make({key: None})
        except ConfigurationError as error:
            problems.add(path, str(error))
    return None if problems or unknown else make(mapping, default=default)
