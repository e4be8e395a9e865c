"""The joint norm of the members of a group that hold different parameters (pipeline stages)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distclip.engine.program import Program
from distclip.engine.stateless import GO_ON, agreements
from distclip.engine.walk import raise_together, walk
from distclip.errors import DistclipError, NonFiniteGradientError
from distclip.kernels.plain import is_wide
from distclip.layouts import declared
from distclip.layouts.piece import Entry
from distclip.statistics import collectives
from distclip.statistics.packing import Packet


def joint_norm(
    find: Callable[[], Program], norm_type: float, group: ProcessGroup, error_if_nonfinite: bool
) -> Tensor:
    """The p-norm over the members of ``group``, who hold different parameters; 0-dim float64.

    First over each parameter's own mesh, which may reach beyond the group, then over the group: a
    parameter whose mesh has several members in the group counts once among them. The members need
    not have equally many parameters, or any.
    """
    collectives.check_open(group)
    trouble: DistclipError | None = None
    entries: tuple[Entry, ...] = ()
    norms = torch.zeros(0, dtype=torch.float64)
    try:
        program = find()
        norms, entries = walk(program, {}).raw, program.plan.entries
    except DistclipError as error:  # the other members have to learn of it before it is raised
        trouble = error
    here = norms.device.type if entries else ""
    common = agreements.device(group, here)
    device = collectives.device_for(group, norms.device if here == common else torch.device(common))
    members = set(collectives.ranks_of(group))
    spread = [e.ranks is not None or bool(e.others) for e in entries]
    holders = [
        0 if entry.copy else declared.holders(entry, members) if has else 1
        for entry, has in zip(entries, spread, strict=True)
    ]
    shares = [1.0 / count if count else 0.0 for count in holders]
    packet = Packet(group, wide={norm_type: is_wide(torch.float64, norm_type)})
    packet.add_norms(
        "norm",
        norms.to(device),
        norm_type,
        torch.zeros(len(shares), dtype=torch.long, device=device),
        torch.tensor(shares, dtype=torch.float64, device=device),
        1,
    )
    flag = torch.full((1,), float(trouble is not None), dtype=torch.float64, device=device)
    packet.add_flag("trouble", flag)
    got = packet.exchange()
    raise_together(trouble, got["trouble"].item())
    total = got["norm"].squeeze(0)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise NonFiniteGradientError(
            f"the {norm_type}-norm over the process group is {total.item()}; nothing was changed"
            + GO_ON,
            [
                entry.name
                for entry, norm in zip(entries, norms.tolist(), strict=True)
                if not math.isfinite(norm)
            ],
        )
    return total
