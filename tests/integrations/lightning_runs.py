"""Trainings under Lightning's Trainer, and the same in plain torch, clipped by the oracle."""

from pathlib import Path
from typing import Any

from torch import Tensor

import distclip
from distclip import policies
from tests.integrations.accelerated import (
    Reference,
    batch,
    loss_of,
    make,
    sgd,
)

SPEC: list[dict[str, Any]] = [
    {"name": "agc", "clip_factor": 0.5},
    {"name": "global_norm", "max_norm": 0.4},
]
REMEMBERS = policies.chain(policies.adagc(warmup_steps=2), policies.autoclip(50, window=5))


def reference(
    steps: int, optimizer: Any = sgd, policy: Any = SPEC, net: Any = make, parts: int = 1
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and norms of one process, in plain torch, clipped by the oracle."""
    plain = net()
    trained = Reference(plain, optimizer(plain))
    for step in range(steps):
        micro = [loss_of(plain, batch(step * parts + part)) / parts for part in range(parts)]
        trained.update(policy, *micro)
    return {name: p.detach().clone() for name, p in plain.named_parameters()}, trained.norms


def clip_with(policy: Any, **options: Any) -> Any:
    return distclip.lightning.ClipCallback(policy, **options)


def trained(folder: Path, layout: str, steps: int, *callbacks: Any, **options: Any) -> Any:
    """The module, and its trainer in ``module.trainer``."""
    from tests.integrations.lightnings import fit, module_of, package, trainer_of, world

    pl = package(options.pop("package", "lightning.pytorch"))
    given = {key: options.pop(key) for key in ("ckpt_path", "first") if key in options}
    made = {key: options.pop(key) for key in ("optimizers", "net") if key in options}
    data = world() // 2 if layout == "tp" else world()
    module = options.pop("module", None) or module_of(pl, data=data, **made)
    trainer = trainer_of(folder, layout, list(callbacks), pl, **options)
    fit(trainer, module, steps, **given)
    return module
