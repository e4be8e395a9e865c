"""DreamerV3's optimizer, with its defaults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from distclip.layouts.names import Target
from distclip.optim.laprop import LaProp
from distclip.optim.options import DecayMask
from distclip.optim.schedule import Schedule
from distclip.options import OnNonfinite


def dreamer_v3(
    params: Target | Iterable[dict[str, Any]],
    lr: float | Tensor = 4e-5,
    agc: float = 0.3,
    pmin: float = 1e-3,
    eps: float = 1e-20,
    beta1: float = 0.9,
    beta2: float = 0.999,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    warmup: int = 1000,
    schedule: Schedule = "const",
    anneal: int = 0,
    *,
    decay_mask: DecayMask = None,
    foreach: bool | None = None,
    on_nonfinite: OnNonfinite = "error",
    process_group: ProcessGroup | None = None,
) -> LaProp:
    """DreamerV3's whole chain as one torch optimizer, on plain and sharded parameters.

    Adaptive clipping, RMS scaling, momentum, decoupled weight decay, warm-up and schedule: Hafner
    et al. (arXiv 2301.04104), ``dreamerv3/agent.py: _make_opt``. Formulas and the remaining
    options: :class:`distclip.optim.LaProp`.

    Args:
        params: module, list of modules, parameters, (name, parameter) pairs, or dicts of options
            with such ``"params"``.
        lr: learning rate after the warm-up.
        agc: largest ratio of gradient norm to weight norm, per tensor; 0 does not clip.
        pmin: floor of the weight norm in that ratio.
        eps: added to the root of the mean square.
        beta1: decay rate of momentum.
        beta2: decay rate of the mean square.
        nesterov: Nesterov's form of momentum.
        weight_decay: decoupled, multiplied by lr.
        warmup: updates over which lr rises from 0; the first update is exactly zero.
        schedule: ``"const"``, ``"linear"`` or ``"cosine"``.
        anneal: the update at which ``"linear"`` and ``"cosine"`` end.
        decay_mask: which parameters decay; by default those of two dims or more.
        foreach: False: tensor by tensor.
        on_nonfinite: what a NaN or inf in a gradient does; raising by default, see
            :class:`distclip.GradClipper`.
        process_group: the ranks that hold these parameters together; all ranks by default.

    Raises:
        ConfigurationError: an argument that cannot be meant, by name.
    """
    return LaProp(
        params,
        lr,
        (beta1, beta2),
        eps,
        weight_decay,
        nesterov=nesterov,
        agc=agc,
        pmin=pmin,
        warmup=warmup,
        schedule=schedule,
        anneal=anneal,
        decay_mask=decay_mask,
        foreach=foreach,
        on_nonfinite=on_nonfinite,
        process_group=process_group,
    )
