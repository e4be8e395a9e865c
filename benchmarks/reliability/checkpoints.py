"""Damaged checkpoints: flipped bits, torn and overwritten files, one bad state among several."""

from __future__ import annotations

import copy
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.reliability.rows import Row
from distclip import GradClipper, StateError, policies
from distclip.integrations.checkpoints import FILE, Shelf

COUNT = 8000
POLICY = policies.chain(policies.autoclip(10, window=200), policies.adagc(), policies.zclip())

Damage = Callable[[bytes, random.Random], bytes]


def flip(raw: bytes, source: random.Random) -> bytes:
    damaged = bytearray(raw)
    damaged[source.randrange(len(raw))] ^= 1 << source.randrange(8)
    return bytes(damaged)


def tear(raw: bytes, source: random.Random) -> bytes:
    return raw[: source.randrange(len(raw))]


def overwrite(raw: bytes, source: random.Random) -> bytes:
    start = source.randrange(len(raw))
    length = source.choice([1, 8, 64, 512])
    return raw[:start] + source.randbytes(min(length, len(raw) - start)) + raw[start + length :]


def swap(raw: bytes, source: random.Random) -> bytes:
    """Two blocks of 512 bytes change places, as after a lost write."""
    one, other = sorted(source.sample(range(len(raw) // 512), 2))
    blocks = [raw[start : start + 512] for start in range(0, len(raw), 512)]
    blocks[one], blocks[other] = blocks[other], blocks[one]
    return b"".join(blocks)


KINDS: list[tuple[str, str, Damage, int]] = [
    ("one bit of distclip.pt", "a random bit flipped", flip, 5),
    ("a torn file", "cut at a random byte", tear, 1),
    ("a file that was written over", "1 to 512 random bytes at a random place", overwrite, 1),
    ("blocks that have changed places", "two blocks of 512 bytes", swap, 1),
]


def clippers() -> list[GradClipper]:
    made = []
    for width in (30, 40):
        model = nn.Linear(width, 20)
        clipper = GradClipper(model, POLICY)
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1.0 + step)
            clipper.clip_()
        made.append(clipper)
    return made


def content(made: list[GradClipper]) -> list[Any]:
    """Everything in their states, exactly."""
    leaves = tree_leaves([clipper.state_dict() for clipper in made])
    return [each.numpy().tobytes() if isinstance(each, Tensor) else each for each in leaves]


def states(made: list[GradClipper]) -> list[Any]:
    return [copy.deepcopy(clipper.state_dict()) for clipper in made]


def run(count: int, seed: int) -> list[Row]:
    """Each damaged file is loaded into two clippers that have gone on: both change, or neither."""
    source, rows = random.Random(seed), []
    saved, made = clippers(), clippers()
    before = content(made)
    for clipper in saved:
        clipper.clip_()
    wanted = content(saved)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        Shelf(POLICY).save(saved, folder)
        raw = path.read_bytes()
        fresh = states(made)
        for fault, how, damage, share in KINDS:
            found: Counter[str] = Counter()
            times = count * share // 8
            for _ in range(times):
                path.write_bytes(damage(raw, source))
                found[_load(made, folder, before, wanted)] += 1
                for clipper, state in zip(made, fresh, strict=True):
                    clipper.load_state_dict(state)
            shown = ", ".join(f"{number} {what}" for what, number in found.most_common())
            good = found["StateError, nothing changed"] + found["loaded as saved"]
            rows.append(Row(fault, how, times, shown, times - good))
    return rows


def _load(made: list[GradClipper], folder: str, before: list[Any], wanted: list[Any]) -> str:
    try:
        Shelf(POLICY).load(made, folder)
    except StateError:
        return "StateError, nothing changed" if content(made) == before else "half loaded"
    except Exception as error:
        return type(error).__name__
    return "loaded as saved" if content(made) == wanted else "loaded, changed"
