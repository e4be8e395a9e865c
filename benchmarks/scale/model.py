"""The cost of a clip as the number of ranks grows: latency and bandwidth (alpha-beta).

The collectives are measured (traced); what one costs on a network is this model, with numbers that
are assumed and can be given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.scale.tracing import Collective


@dataclass(frozen=True)
class Network:
    """What a cluster can do. Assumed, not measured.

    Attributes:
        latency: alpha, seconds for a message to the next rank, with what starts it.
        bandwidth: 1 / beta, bytes per second in and out of a rank.
        memory: bytes per second that a rank reads or writes its gradients with.
    """

    latency: float = 10e-6
    bandwidth: float = 25e9
    memory: float = 3e12


def seconds(one: Collective, ranks: int, network: Network) -> float:
    """Of one collective, on so many ranks.

    An all-reduce by the better of two trees of depth log2 (latency) and a ring (bandwidth): Thakur,
    Rabenseifner and Gropp 2005, section 4; an all-gather by recursive doubling, section 3.
    """
    if ranks == 1:
        return 0.0
    depth, per_byte = math.ceil(math.log2(ranks)), 1 / network.bandwidth
    if "allgather" in one.op or "all_gather" in one.op:
        return depth * network.latency + (ranks - 1) * one.bytes * per_byte
    tree = 2 * depth * network.latency + 2 * one.bytes * per_byte
    around = 2 * (ranks - 1)
    ring = around * network.latency + around / ranks * one.bytes * per_byte
    return min(tree, ring)


@dataclass(frozen=True)
class Way:
    """One way to clip, as the model sees it.

    Attributes:
        collectives: as traced on ``traced_on`` ranks.
        passes: over the gradients, reads and writes, when nothing is clipped.
        per_rank: bytes of the message that grow with each rank (AGC sends one number of each).
    """

    name: str
    collectives: Sequence[Collective]
    traced_on: int
    passes: int
    per_rank: int = 0

    def on(self, ranks: int) -> list[tuple[Collective, int]]:
        """The collectives on another number of ranks; groups inside a node stay as they are."""
        found = []
        for each in self.collectives:
            size = each.bytes + self.per_rank * (ranks - self.traced_on)
            members = each.ranks if each.ranks <= 8 else each.ranks * ranks // self.traced_on
            found.append((Collective(each.op, members, size), members))
        return found

    def talking(self, ranks: int, network: Network) -> float:
        """Seconds in collectives."""
        return sum(seconds(each, members, network) for each, members in self.on(ranks))

    def reading(self, ranks: int, gradient_bytes: float, network: Network) -> float:
        """Seconds in passes over this rank's share of the gradients."""
        return self.passes * gradient_bytes / ranks / network.memory
