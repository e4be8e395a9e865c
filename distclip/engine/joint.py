"""The joint norm of the members of a group that hold different parameters (pipeline stages)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from distclip.engine import handshake
from distclip.engine.session import GO_ON_OF_CALLS, Session
from distclip.engine.walk import raise_together
from distclip.errors import DistclipError, NonFiniteGradientError
from distclip.kernels.plain import is_wide
from distclip.layouts import declared
from distclip.layouts.piece import Entry
from distclip.statistics import collectives
from distclip.statistics.packing import Packet


@contextlib.contextmanager
def joint_norm(
    measuring: contextlib.AbstractContextManager[Session],
    norm_type: float,
    group: ProcessGroup,
    error_if_nonfinite: bool = False,
) -> Iterator[tuple[Tensor, Session]]:
    """The p-norm over the members of ``group``, who hold different parameters.

    Args:
        measuring: gives the session that measures this member's parameters.
        norm_type: the order p.
        group: the members; all of them call this.
        error_if_nonfinite: raise on all of them if the norm is not finite.

    Returns:
        The norm, 0-dim float64, and the session, for the ``with`` block.
    """
    collectives.check_open(group, "pipeline_group")
    with contextlib.ExitStack() as stack:
        trouble: DistclipError | None = None
        entries: tuple[Entry, ...] = ()
        norms = torch.zeros(0, dtype=torch.float64, device="cpu")
        try:
            session = stack.enter_context(measuring)
            norms, entries = session.clip("pass", None).raw, session.plan.entries
        except DistclipError as error:  # the other members have to learn of it before it is raised
            trouble = error
        with torch.no_grad():
            total = _over(group, norms, entries, norm_type, trouble)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise NonFiniteGradientError(
                f"the {norm_type}-norm over the pipeline group is {total.item()}; nothing was "
                f"changed{GO_ON_OF_CALLS}",
                [
                    entry.name
                    for entry, norm in zip(entries, norms.tolist(), strict=True)
                    if not math.isfinite(norm)
                ],
            )
        yield total, session


def _over(
    group: ProcessGroup,
    norms: Tensor,
    entries: tuple[Entry, ...],
    norm_type: float,
    trouble: DistclipError | None,
) -> Tensor:
    """The joint norm from this member's norms, each over its own mesh; 0-dim float64.

    A mesh may reach beyond the group: a parameter whose mesh has several members in the group
    counts once among them. The members need not have equally many parameters, or any.
    """
    here = norms.device.type if entries else ""
    common = handshake.agreements.device(group, here)
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
    return got["norm"].squeeze(0)
