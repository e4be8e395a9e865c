"""The reference: DreamerV3's chain in float64 numpy, on whole tensors, in one process.

Written from the published formulas; it shares no code with the library. Slow and plain on purpose.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from distclip.testing.norms import wide

Array = npt.NDArray[np.float64]


def rate(t: int, lr: float, warmup: int, schedule: str, anneal: int) -> float:
    """The learning rate of update t, from 0."""
    if t < warmup:
        return lr * t / warmup
    if schedule == "const":
        return lr
    s = min(1.0, (t - warmup) / (anneal - warmup))
    if schedule == "linear":
        return lr + s * (0.1 * lr - lr)
    alpha = 0.1 * lr  # their code: a rate, given where optax wants a part of lr
    return lr * ((1 - alpha) * 0.5 * (1 + math.cos(math.pi * s)) + alpha)


class Chain:
    """agc -> scale_by_rms -> scale_by_momentum -> weight decay -> -lr(t)."""

    def __init__(
        self,
        weights: Mapping[str, npt.ArrayLike],
        *,
        lr: float,
        agc: float = 0.3,
        pmin: float = 1e-3,
        eps: float = 1e-20,
        b1: float = 0.9,
        b2: float = 0.999,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        warmup: int = 0,
        schedule: str = "const",
        anneal: int = 0,
        decays: Callable[[str, Array], bool] = lambda name, p: p.ndim > 1,
        sign: float = 1.0,
    ) -> None:
        self.p = {name: wide(w).copy() for name, w in weights.items()}
        self.v = {name: np.zeros_like(p) for name, p in self.p.items()}
        self.m = {name: np.zeros_like(p) for name, p in self.p.items()}
        self.t = dict.fromkeys(self.p, 0)
        self.updates = 0
        self.clipped: dict[str, Array] = {}
        self.lr, self.agc, self.pmin, self.eps = lr, agc, pmin, eps
        self.b1, self.b2, self.nesterov, self.sign = b1, b2, nesterov, sign
        self.weight_decay, self.decays = weight_decay, decays
        self.schedule = (warmup, schedule, anneal)

    def step(self, gradients: Mapping[str, npt.ArrayLike | None]) -> None:
        lr = rate(self.updates, self.lr, *self.schedule)
        self.updates += any(g is not None for g in gradients.values())
        for name, given in gradients.items():
            if given is None:
                continue
            p = self.p[name]
            g = wide(given)
            if self.agc:
                upper = self.agc * max(self.pmin, np.sqrt(np.sum(p * p)))
                g = g / max(1.0, np.sqrt(np.sum(g * g)) / upper)
            self.clipped[name] = g
            g = self.sign * g
            self.t[name] += 1
            t = self.t[name]
            self.v[name] = self.b2 * self.v[name] + (1 - self.b2) * g * g
            u = g / (np.sqrt(self.v[name] / (1 - self.b2**t)) + self.eps)
            self.m[name] = self.b1 * self.m[name] + (1 - self.b1) * u
            d = (1 - self.b1) * u + self.b1 * self.m[name] if self.nesterov else self.m[name]
            d = d / (1 - self.b1**t)
            if self.decays(name, p):
                d = d + self.weight_decay * p
            self.p[name] = p - lr * d
