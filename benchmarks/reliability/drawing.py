"""Draw a case of :mod:`benchmarks.reliability.properties` from its number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHAPES = ((), (1,), (5,), (7,), (0,), (0, 3), (3, 4), (4, 1), (1, 6), (5, 3), (2, 3, 2), (3, 700))
DTYPES = ("float32", "bfloat16", "float16", "float64", "complex64", "complex128")
MODES = ("pass", "zero", "skip", "error")
ORDERS = (0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 4.5, 12.0, 50.0, 100.0, math.inf)
BEYOND_FLOAT16 = 1e6
LIMITS = (0.0, 1e-30, 1e-6, 0.1, 1.0, 30.0, BEYOND_FLOAT16, math.inf)
EXPONENTS = {
    "float32": (-44, -38, -30, -3, 0, 0, 3, 19, 37),
    "bfloat16": (-39, -30, -3, 0, 0, 3, 37),
    "float16": (-7, -4, -1, 0, 0, 3, 4),
    "float64": (-322, -300, -150, -30, 0, 0, 30, 150, 290),
    "complex64": (-30, -3, 0, 0, 3, 37),
    "complex128": (-200, 0, 0, 290),
}
"""Powers of ten: subnormal and close to the largest at the ends."""

SCALING = ("global_norm", "parameter_norm", "group_norm", "block_rms", "dreamer_agc", "measure")
MEMORY = ("autoclip", "zclip", "adagc", "skip_spikes")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One drawn parameter; ``placement``: a dim to shard, -1 for a replica, None for plain."""

    shape: tuple[int, ...]
    dtype: str
    placement: int | None
    exponent: int
    fill: str
    missing: bool


@dataclasses.dataclass(frozen=True)
class Case:
    """One drawn case. ``policy`` as in a configuration."""

    seed: int
    number: int
    parameters: tuple[Parameter, ...]
    policy: Any
    mode: str
    steps: int
    group: str


def draw(seed: int, number: int) -> Case:
    """The case of this number."""
    random = np.random.default_rng((seed, number))

    def pick(choices: Any) -> Any:
        return choices[int(random.integers(len(choices)))]

    kinds = (pick(DTYPES),) if random.random() < 0.75 else tuple(pick(DTYPES) for _ in range(3))
    parameters = []
    for _ in range(int(random.integers(1, 5))):
        shape = pick(SHAPES)
        placement = pick((None, -1, *range(len(shape)), *range(len(shape))))
        dtype = pick(kinds)
        fill = pick(("", "", "", "", "zeros", "mixed", "nan", "inf"))
        exponent = int(pick(EXPONENTS[dtype]))
        parameters.append(Parameter(shape, dtype, placement, exponent, fill, random.random() < 0.1))
    drawn = _Drawn(
        pick, len(parameters), clamps=not any(p.dtype.startswith("complex") for p in parameters)
    )
    kind, policy = drawn.policy()
    if f"'clip_value': {BEYOND_FLOAT16}" in str(policy):
        parameters = [_without_float16_inf(each) for each in parameters]
    # In the third, gradients are what they were before: distclip/statistics/again.py.
    steps = 3 if drawn.remembers or number % 3 == 0 else 1
    dtypes = {p.dtype for p in parameters}
    return Case(
        seed, number, tuple(parameters), policy, pick(MODES), steps, f"{kind}|{_of(dtypes)}"
    )


def _without_float16_inf(parameter: Parameter) -> Parameter:
    """A clamp to a bound that float16 rounds to inf leaves an inf, which the oracle clamps."""
    has_inf = parameter.dtype == "float16" and parameter.fill == "inf"
    return dataclasses.replace(parameter, fill="nan") if has_inf else parameter


def _of(dtypes: set[str]) -> str:
    for name, members in KINDS.items():
        if dtypes <= members:
            return name
    return "several dtypes"


KINDS = {
    "float32": {"float32"},
    "bf16, fp16": {"bfloat16", "float16"},
    "float64": {"float64"},
    "complex": {"complex64", "complex128"},
}


class _Drawn:
    """Draws policies. ``remembers``: whether any of them has a memory."""

    def __init__(self, pick: Callable[[Any], Any], parameters: int, *, clamps: bool) -> None:
        self._pick, self._parameters, self._clamps = pick, parameters, clamps
        self.remembers = False

    def policy(self) -> tuple[str, Any]:
        kind = self._pick(
            ("scaling", "scaling", "value", "agc", "memory", "chain", "chain", "by_name")
        )
        if kind == "value" and not self._clamps:
            kind = "scaling"
        made: dict[str, Callable[[], Any]] = {
            "scaling": self.scaling,
            "value": self.value,
            "agc": self.agc,
            "memory": self.memory,
            "chain": self.chain,
            "by_name": self.by_name,
        }
        return kind, made[kind]()

    def scaling(self) -> Any:
        name = self._pick(SCALING)
        if name == "measure":
            return {"name": name}
        if name == "block_rms":
            return {"name": name, "threshold": self._pick((1e-6, 0.1, 10.0))}
        if name == "dreamer_agc":
            return {"name": name, "clip": self._pick((1e-3, 0.3)), "pmin": self._pick((1e-3, 1e-9))}
        return {"name": name, "max_norm": self._pick(LIMITS), "norm_type": self._pick(ORDERS)}

    def value(self) -> Any:
        return {"name": "value", "clip_value": self._pick(LIMITS)}

    def agc(self) -> Any:
        return {
            "name": "agc",
            "clip_factor": self._pick((1e-3, 0.1, 2.0)),
            "unit": self._pick(("row", "row", "tensor")),
        }

    def memory(self) -> Any:
        self.remembers = True
        return dict(
            self._pick(
                (
                    {"name": "autoclip", "window": 4},
                    {"name": "zclip", "warmup_steps": 2},
                    {"name": "adagc", "warmup_steps": 1},
                    {"name": "skip_spikes", "min_history": 2},
                )
            )
        )

    def leaf(self) -> Any:
        made = [self.scaling, self.scaling, self.agc]
        return self._pick([*made, self.value, self.value] if self._clamps else made)()

    def chain(self) -> Any:
        links = [self.leaf() for _ in range(self._pick((2, 2, 3, 4)))]
        return [*links, self.by_name()] if self._pick(range(6)) == 0 else links

    def by_name(self) -> Any:
        def part() -> Any:
            return self._pick((self.leaf, self.leaf, lambda: None, self._short_chain))()

        patterns = ("p0", "p[12]")[: self._parameters]
        return {"by_name": {each: part() for each in patterns}, "default": part()}

    def _short_chain(self) -> Any:
        return [self.leaf(), self.leaf()]


def values(case: Case, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole weights and gradient of each parameter, as rounded to its dtype."""
    for number, parameter in enumerate(case.parameters):
        random = np.random.default_rng((case.seed, case.number, number))
        dtype = getattr(torch, parameter.dtype)
        wide = torch.complex128 if dtype.is_complex else torch.float64

        def uniform(random: np.random.Generator = random, parameter: Parameter = parameter) -> Any:
            drawn = random.uniform(-1, 1, (*parameter.shape, 2))
            return drawn[..., 0] + 1j * drawn[..., 1]

        weights = torch.from_numpy(np.asarray(uniform() * random.choice([0.3, 0.0, 1e-4, 20.0])))
        random = np.random.default_rng((case.seed, case.number, number, step))
        gradient = uniform(random) * 10.0**parameter.exponent
        if parameter.fill == "mixed":
            spread = random.integers(-25, 1, parameter.shape)
            gradient = gradient * 10.0 ** np.where(random.random(parameter.shape) < 0.5, spread, 0)
            gradient = np.where(random.random(parameter.shape) < 0.2, -0.0, gradient)
        gradient = np.asarray(gradient * (0.0 if parameter.fill == "zeros" else 1.0))
        whole = torch.from_numpy(gradient)
        if not dtype.is_complex:
            whole, weights = whole.real, weights.real
        whole = whole.to(wide).to(dtype)
        if parameter.fill in ("nan", "inf") and whole.numel():
            bad = math.nan if parameter.fill == "nan" else -math.inf
            whole.view(-1)[int(random.integers(whole.numel()))] = bad
        yield weights.to(wide).to(dtype), whole
