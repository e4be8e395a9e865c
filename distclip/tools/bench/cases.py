"""The cases of ``distclip bench``: each is one model, and ways to clip it, measured in turn.

The peers that ratios are against are measured in the same run. A new case is one line below: its
name, its title, a function that every rank calls for its :class:`Bench`, and the way that ratios
are against.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distclip.tools.bench import fold, models, ways
from distclip.tools.bench.models import LARGE, SMALL
from distclip.tools.bench.timing import Bench, Taken, time_ways

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLAIN_SIZES: Mapping[str, tuple[int, tuple[int, ...], str]] = {
    "small": (288, (64, 64), "fp32"),
    "many": (2000, (1024,), "fp32"),
    "large": (144, (512, 512), "fp32"),
    "bf16": (144, (512, 512), "bf16"),
    "fp16": (144, (512, 512), "fp16"),
}
"""Number, shape and dtype of plain parameters."""
ENCODERS = {
    "small": (SMALL, "fp32"),
    "large": (LARGE, "fp32"),
    "bf16": (LARGE, "bf16"),
    "fp16": (LARGE, "fp16"),
}
"""Size and dtype of encoders that are wrapped."""
_ELEMENTS = {SMALL: "288 parameters, 1.2 M elements", LARGE: "144 parameters, 38 M elements"}


@dataclass(frozen=True)
class Case:
    """One case of the benchmark: a table of ways to clip the same gradients.

    Attributes:
        name: as the command line takes it.
        title: of the table.
        build: makes the model and the ways, on every rank.
        peer: the way that ratios are against.
        ranks: how many, where the case does not leave it to the command line.
    """

    name: str
    title: str
    build: Callable[[], Bench]
    peer: str
    ranks: int | None = None


CASES: dict[str, Case] = {}


def _add(
    name: str,
    title: str,
    build: Callable[..., Bench],
    *args: Any,
    peer: str,
    ranks: int | None = None,
    **more: Any,
) -> None:
    CASES[name] = Case(name, title, functools.partial(build, *args, **more), peer, ranks)


def _plain(kind: str) -> tuple[str, Callable[[], models.Model]]:
    """Title and maker of plain parameters."""
    count, shape, dtype = PLAIN_SIZES[kind]
    what = " x ".join(f"{extent:,}" for extent in shape)
    title = f"{count:,} plain parameters of {what}, {dtype}"
    return title, functools.partial(models.plain_tensors, count, shape, TORCH_DTYPES[dtype])


def _encoder_case(
    layout: str, make: Callable[..., models.Model], kind: str, **more: Any
) -> tuple[str, Callable[[], models.Model]]:
    """Title and maker of an encoder under a sharding."""
    size, dtype = ENCODERS[kind]
    title = f"{layout}, {_ELEMENTS[size]}, {dtype}"
    return title, functools.partial(make, size, TORCH_DTYPES[dtype], **more)


def _add_norms(
    name: str, model: tuple[str, Callable[[], models.Model]], peer: str = ways.TORCH, **more: Any
) -> None:
    """By the global norm, with a threshold that never clips, and one that always does."""
    title, make = model
    for ending, told, threshold in (("", "not clipping", ways.LOOSE),
                                    ("-clipped", "clipping", ways.TIGHT)):  # fmt: skip
        _add(name + ending, f"{title}, {told}", ways.clip_norm, make, threshold, peer=peer, **more)


def _zero(stage: int, dtype: str) -> Bench:
    from distclip.tools.bench import zero

    return Bench(zero.zero_ways(stage, dtype))


def _count(parameters: int) -> Bench:
    return ways.count(models.dtensors(parameters, (64,)))


for _kind in ENCODERS:
    _add_norms(_kind, _encoder_case("FSDP2", models.fsdp2, _kind), rows=_kind in ("bf16", "fp16"))
_add("bf16-embedding", "FSDP2, one embedding of 32,000 x 1,024 in bf16, not clipping",
     ways.clip_norm, models.embedding, ways.LOOSE, rows=True, peer=ways.TORCH_ROWS)  # fmt: skip
_add("gigabyte", "64 DTensors, 1 GiB of gradients, not clipping",
     ways.clip_norm, functools.partial(models.dtensors, 64, (2048, 2048)), ways.LOOSE,
     peer=ways.TORCH)  # fmt: skip
for _kind in PLAIN_SIZES:
    _add_norms(f"plain-{_kind}", _plain(_kind))
for _kind in ENCODERS:
    _add_norms(f"ddp-{_kind}", _encoder_case("DDP", models.ddp, _kind))
for _kind in ENCODERS:
    _add_norms(f"fsdp1-{_kind}", _encoder_case("FSDP1", models.fsdp1, _kind), ways.FSDP1_CLIP)
_add_norms("fsdp1-views", _encoder_case("FSDP1 with use_orig_params", models.fsdp1, "small",
                                   original=True), ways.FSDP1_CLIP)  # fmt: skip
for _kind in ("small", "large", "bf16"):
    _title, _make = _encoder_case("FSDP2", models.fsdp2, _kind)
    _add(f"agc-{_kind}", f"{_title}, adaptive policies", ways.adaptive, _make, peer=ways.READ)
_title, _make = _encoder_case("FSDP1", models.fsdp1, "small")
_add("agc-fsdp1", f"{_title}, adaptive policies", ways.adaptive, _make, peer=ways.READ)
_TIMM = "timm's formula"
_add("agc-encoder-clipped", f"an encoder on each rank, {_ELEMENTS[LARGE]}, clipping rows",
     ways.adaptive_plain, functools.partial(models.encoder, LARGE), ways.AGC_FACTOR,
     peer=_TIMM)  # fmt: skip
for _kind in PLAIN_SIZES:
    _title, _make = _plain(_kind)
    for _ending, _told, _factor in (("", "not clipping", ways.LOOSE),
                                    ("-clipped", "clipping", ways.AGC_FACTOR)):  # fmt: skip
        _add(f"agc-plain-{_kind}{_ending}", f"{_title}, {_told} rows", ways.adaptive_plain, _make,
             _factor, peer=_TIMM)  # fmt: skip
for _name, (_title, _make) in {
    "plain-small": _plain("small"),
    "plain-large": _plain("large"),
    "fsdp2-small": _encoder_case("FSDP2", models.fsdp2, "small"),
    "fsdp2-large": _encoder_case("FSDP2", models.fsdp2, "large"),
}.items():
    for _function, _build, _peer in (
        ("value", ways.clip_value, "torch clip_grad_value_"),
        ("total", ways.total_norm, "torch get_total_norm"),
    ):
        _add(f"function-{_function}-{_name}", f"{_title}: {_peer[6:]}", _build, _make, peer=_peer)
for _kind in ("small", "large"):
    _title, _make = _plain(_kind)
    _add(f"function-norms-plain-{_kind}", f"{_title}: grad_norms", ways.each_norm, _make,
         peer="torch _foreach_norm")  # fmt: skip
for _kind in PLAIN_SIZES:
    _count_, _shape, _dtype = PLAIN_SIZES[_kind]
    _add(f"threads-{_kind}", f"{_plain(_kind)[0]}, on one and two threads", ways.threaded, _count_,
         _shape, TORCH_DTYPES[_dtype], peer=ways.on_threads(ways.READ, 1), ranks=1)  # fmt: skip
_add("policies", f"FSDP2, {_ELEMENTS[SMALL]}, each policy, clipping", ways.every_policy,
     peer="global_norm")  # fmt: skip
_add("fold", "fused AdamW, 82 parameters, 33.6 M elements: optimizer.step(), clipping",
     fold.fold_bench, peer=ways.FOLD_PEER)  # fmt: skip
for _stage, _dtype in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"),
                       (3, "bf16")):  # fmt: skip  # DeepSpeed has no fp16 on CPUs without it
    _add(f"zero-{_stage}" + ("" if _dtype == "fp32" else f"-{_dtype}"),
         f"DeepSpeed ZeRO-{_stage}, 96 parameters, 6.3 M elements, {_dtype}: engine.step(), "
         "clipping", _zero, _stage, _dtype, peer="DeepSpeed's own clipping")  # fmt: skip
for _number in (1_000, 5_000, 20_000):
    _add(f"count-{_number}", f"{_number:,} DTensor parameters of 64 elements, not clipping", _count,
         _number, peer=ways.TORCH)  # fmt: skip

GROUPS = {
    group: tuple(name for name in CASES if name.startswith(f"{group}-"))
    for group in ("plain", "ddp", "fsdp1", "agc", "function", "threads", "zero", "count")
} | {"fsdp2": tuple(f"{kind}{ending}" for kind in ENCODERS for ending in ("", "-clipped"))}
"""Names that stand for several cases."""


def run_case(name: str, rounds: int, budget: float) -> Taken:
    """All ways of a case, measured on this rank."""
    gc.collect()  # the models of the case before
    return time_ways(CASES[name].build(), rounds, budget)
