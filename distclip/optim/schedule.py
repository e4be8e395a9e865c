"""The learning rate of an update: a warm-up from 0, then one of DreamerV3's schedules."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Schedule: TypeAlias = Literal["const", "linear", "cosine"]

FLOOR = 0.1
"""Where a schedule ends: at this part of lr (linear); as ``alpha = 0.1 * lr`` (cosine)."""


def learning_rate(
    lr: float | Tensor, updates: int | Tensor, warmup: int, schedule: Schedule, anneal: int
) -> float | Tensor:
    """The rate of update number ``updates`` (from 0), as DreamerV3's ``_make_opt`` builds it.

    ``lr * updates / warmup`` while ``updates < warmup``: the first update is exactly zero. Then,
    with ``s`` going from 0 at ``warmup`` to 1 at ``anneal``: ``"const"``: lr; ``"linear"``:
    ``lr * (1 - 0.9 s)``; ``"cosine"``: ``lr * ((1 - a) * (1 + cos(pi s)) / 2 + a)`` with
    ``a = 0.1 * lr``, so that it ends at ``0.1 * lr ** 2``: their code hands the floor, meant as
    a rate, to an argument of optax that is a part of lr. Kept as it is.

    Args:
        lr: the base rate, a number or a 0-dim tensor.
        updates: how many updates were made so far; a 0-dim tensor is not read on the host.
        warmup: updates of the warm-up; 0 for none.
        schedule: what follows it.
        anneal: the update at which the schedule has come to its end; not read for ``"const"``.

    Returns:
        A number where lr and updates are numbers, else a 0-dim float64 tensor.
    """
    on_host = not isinstance(updates, Tensor)
    if on_host and warmup <= updates and schedule == "const":
        return lr
    count = (
        torch.tensor(updates, dtype=torch.float64, device="cpu")
        if not isinstance(updates, Tensor)
        else updates.double()
    )
    base = lr.to(count.device, torch.float64) if isinstance(lr, Tensor) else lr
    rate = base + torch.zeros_like(count)
    if schedule != "const":
        done = ((count - warmup) / (anneal - warmup)).clamp(0.0, 1.0)
        if schedule == "linear":
            rate = base * (1.0 - (1.0 - FLOOR) * done)
        else:
            floor = FLOOR * base
            rate = base * ((1.0 - floor) * 0.5 * (1.0 + torch.cos(math.pi * done)) + floor)
    if warmup:
        rate = torch.where(count < warmup, base * count / warmup, rate)
    return rate.item() if on_host and not isinstance(lr, Tensor) else rate
