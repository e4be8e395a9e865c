"""What peers do with gradients that are awkward: each is run, and the answers become a table.

    python -m benchmarks.peers              # the table
    python -m benchmarks.peers docs/field.md    # and into the page, between its two marks

Every peer is called as its users call it, with the threshold 1, on ranks of its own on the CPU. A
cell says what is not as it should be: the norm that is returned, off by more than 1e-4 from
float64; the norm of what is left, off by more than 1e-3 from the threshold; elements that became
NaN or 0; what was raised, and who never answers. Those that are not installed are left out.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from distclip.testing import RankError, run_on_ranks

LIMIT = 60.0
"""Seconds; most cells take less than one."""

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
RIGHT = "right"

Gradients: TypeAlias = list[Tensor | None]
Clipped: TypeAlias = tuple[Any, Gradients]
"""The norm that is returned, and the gradients as they are then."""


@dataclass(frozen=True)
class Fault:
    """Gradients, whole and on this rank; what all ranks have together counts."""

    title: str
    whole: Callable[[], list[Tensor]]
    ranks: int = 1
    here: Callable[[list[Tensor]], Gradients] | None = None


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _one_sharded(whole: list[Tensor]) -> Gradients:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return [whole[0], *(distribute_tensor(each, mesh, [Shard(0)]) for each in whole[1:])]


def _one_missing(whole: list[Tensor]) -> Gradients:
    """Rank 1's rows of the second are 0 in ``whole``; it has no gradient of it at all."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    first, second = (distribute_tensor(each, mesh, [Shard(0)]) for each in whole)
    return [first, None if dist.get_rank() == 1 else second]


FAULTS = [
    Fault("a gradient in bf16", lambda: [(_randn(1000) * 2.7).bfloat16()]),
    Fault("finite fp16 gradients of 60,000", lambda: [torch.full((4,), 6e4).half()]),
    Fault("a gradient of 32 million elements in fp32", lambda: [_randn(1000).repeat(32_000)]),
    Fault("one inf among three elements", lambda: [torch.tensor([1.0, math.inf]), torch.ones(1)]),
    Fault(
        "a plain gradient beside a DTensor",
        lambda: [_randn(3, 4), _randn(4, 4)],
        2,
        _one_sharded,
    ),
    Fault(
        "a DTensor gradient that one of two ranks lacks",
        lambda: [_randn(4, 4), torch.cat((_randn(2, 4), torch.zeros(2, 4)))],
        2,
        _one_missing,
    ),
]


# ---- peers ---------------------------------------------------------------------------------------


class LeftOut(Exception):  # noqa: N818 - no error
    """A peer leaves the whole step out."""


class _Parameters(nn.Module):
    """Parameters of ones with the gradients that are given; the loss has the same gradients."""

    def __init__(self, whole: list[Tensor], here: Gradients) -> None:
        super().__init__()
        self.each = nn.ParameterList()
        for gradient, all_of_it in zip(here, whole, strict=True):
            like = next((g for g in here if isinstance(g, DTensor)), None)
            ones: Tensor = torch.ones_like(all_of_it)
            if like is not None and (gradient is None or isinstance(gradient, DTensor)):
                ones = distribute_tensor(ones, like.device_mesh, like.placements)
            parameter = nn.Parameter(ones)
            parameter.grad = None if gradient is None else gradient.clone()
            self.each.append(parameter)

    def forward(self, whole: list[Tensor]) -> Tensor:
        return sum((p * g).sum().float() for p, g in zip(self.each, whole, strict=True))  # type: ignore[return-value]

    @property
    def gradients(self) -> Gradients:
        return [p.grad for p in self.each]


def _torch(model: _Parameters, whole: list[Tensor]) -> Clipped:
    return nn.utils.clip_grad_norm_(model.parameters(), 1.0), model.gradients


def _accelerate(model: _Parameters, whole: list[Tensor]) -> Clipped:
    return _accelerator().clip_grad_norm_(model.parameters(), 1.0), model.gradients


def _accelerator() -> Any:
    from accelerate import Accelerator

    from distclip.tools.launch import accelerate_cpu

    accelerate_cpu.become_cpu_rank(
        cpu=True
    )  # Accelerate itself does not join gloo ranks that are there
    return Accelerator()


def _transformers(model: _Parameters, whole: list[Tensor]) -> Clipped:
    from transformers import Trainer

    trainer: Any = object.__new__(Trainer)  # its constructor wants a dataset, and moves the model
    trainer.accelerator = _accelerator()
    trainer.args = SimpleNamespace(max_grad_norm=1.0, fp16=False)
    trainer._mixed_mesh_grads = None
    return trainer._clip_grad_norm(model), model.gradients


def _lightning(model: _Parameters, whole: list[Tensor]) -> Clipped:
    from lightning.fabric import Fabric

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fabric = Fabric(accelerator="cpu", devices=1)
    return fabric.clip_gradients(model, optimizer, max_norm=1.0), model.gradients


def _deepspeed(model: _Parameters, whole: list[Tensor]) -> Clipped:
    """ZeRO-1. What it clipped to is how far SGD at the rate 1 moves its fp32 weights from 1."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    dtype = whole[0].dtype
    document: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if dtype is torch.bfloat16:
        document["bf16"] = {"enabled": True}
    if dtype is torch.float16:
        document["fp16"] = {"enabled": True, "loss_scale": 1.0}
    for parameter in model.parameters():
        parameter.grad = None
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = deepspeed.initialize(
        model=model, optimizer=optimizer, config=document, dist_init_required=False
    )[0]
    engine.backward(engine(whole))
    engine.step()
    if engine.skipped_steps:
        raise LeftOut
    return engine.get_global_grad_norm(), [
        1.0 - safe_get_full_fp32_param(p).double() for p in model.parameters()
    ]


def _distclip(model: _Parameters, whole: list[Tensor]) -> Clipped:
    import distclip

    clipper = distclip.GradClipper(model, distclip.policies.global_norm(1.0))
    return clipper.clip_().total_norm, model.gradients


@dataclass(frozen=True)
class Peer:
    """Something that clips, as its users call it."""

    package: str
    call: str
    clip: Callable[[_Parameters, list[Tensor]], Clipped]
    most_ranks: int = 2

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.package).split("+")[0]


PEERS = [
    Peer("torch", "`clip_grad_norm_`", _torch),
    Peer("accelerate", "`Accelerator.clip_grad_norm_`", _accelerate),
    Peer("transformers", "`Trainer`", _transformers),
    Peer("lightning", "`Fabric.clip_gradients`", _lightning, 1),
    Peer("deepspeed", "ZeRO-1", _deepspeed, 1),
    Peer("distclip", "`global_norm`", _distclip),
]


# ---- what comes of it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a peer did on one rank; ``squares`` and the counts are of elements that it counts."""

    raised: str = ""
    norm: float | None = None
    squares: float = 0.0
    elements: int = 0
    nan: int = 0
    zero: int = 0


def answer(peer: str, title: str) -> Answer:
    """Run a peer on a fault, on this rank."""
    fault = next(each for each in FAULTS if each.title == title)
    clip = next(each.clip for each in PEERS if each.package == peer)
    whole = fault.whole()
    model = _Parameters(whole, fault.here(whole) if fault.here else [*whole])
    before = [None if each is None else each.clone() for each in map(_local, model.gradients)]
    try:
        norm, gradients = clip(model, whole)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
    except LeftOut:
        return Answer("leaves the step out")
    except Exception as error:
        same = all(map(_equal, before, map(_local, model.gradients)))
        left = "gradients as they were" if same else "some gradients changed"
        return Answer(f"raises `{type(error).__name__}`, {left}")
    main = not dist.is_initialized() or dist.get_rank() == 0
    mine = [g for g in gradients if g is not None and (main or isinstance(g, DTensor))]
    flat = torch.cat([_local(each).double().flatten() for each in mine])
    return Answer(
        norm=None if norm is None else float(norm),
        squares=float(flat.square().sum()),
        elements=flat.numel(),
        nan=int(flat.isnan().sum()),
        zero=int((flat == 0.0).sum()),
    )


def said(found: Sequence[Answer], whole: Sequence[Tensor]) -> str:
    """What is not as it should be, of all ranks together."""
    truth = math.sqrt(sum(float(each.double().square().sum()) for each in whole))
    each = [_of_one(one, truth) for one in found]
    if any(one.raised for one in found):
        if len(set(each)) == 1:
            return each[0]
        return "; ".join(f"rank {rank} {text or 'returns'}" for rank, text in enumerate(each))
    told = [text for text in dict.fromkeys(each) if text]
    elements, nan, zero = (sum(getattr(o, n) for o in found) for n in ("elements", "nan", "zero"))
    for count, what in ((nan, "NaN"), (zero, "0")):
        if count:
            told.append(f"{count} of {elements} elements become {what}")
    after = math.sqrt(sum(one.squares for one in found))
    if not nan and not zero and not abs(after - min(1.0, truth)) <= 1e-3:
        told.append(f"norm {after:.4g} after clipping to 1")
    return "; ".join(told) or RIGHT


def _of_one(one: Answer, truth: float) -> str:
    if one.raised:
        return one.raised
    if one.norm is None:
        return "no norm"
    if math.isfinite(truth) and not abs(one.norm / truth - 1.0) <= 1e-4:
        return f"norm {one.norm:.4g} for {truth:.4g}"
    return ""


def _local(gradient: Any) -> Any:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def cell(peer: Peer, fault: Fault) -> str:
    """The answer of all ranks."""
    if fault.ranks > peer.most_ranks:
        return ""
    try:
        found = run_on_ranks(answer, fault.ranks, peer.package, fault.title, timeout=LIMIT)
    except RankError as error:
        kinds = {"stuck": Answer(f"no answer in {LIMIT:g} s"), "died": Answer("dies")}
        found = [
            kinds.get(outcome.kind, outcome.result or Answer(outcome.error))
            for _, outcome in sorted(error.outcomes.items())
        ]
    return said(found, fault.whole())


def table() -> str:
    """Markdown: a row a fault, a column a peer."""
    peers = [each for each in PEERS if importlib.util.find_spec(each.package)]
    today = datetime.date.today().isoformat()
    lines = [
        f"Run on {today} by `python -m benchmarks.peers docs/field.md`, on CPU ranks.",
        "",
        "| gradients | " + " | ".join(f"{p.package} {p.version}: {p.call}" for p in peers) + " |",
        "|---" * (len(peers) + 1) + "|",
    ]
    for fault in FAULTS:
        where = f", {fault.ranks} ranks" if fault.ranks > 1 else ""
        cells = " | ".join(cell(peer, fault) or "not run" for peer in peers)
        print(f"{fault.title}: {cells}", file=sys.stderr, flush=True)
        lines.append(f"| {fault.title}{where} | {cells} |")
    return "\n".join(lines)


def put(page: Path, text: str) -> None:
    """Write a table between the marks of a page."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path, nargs="?", help="has the two marks")
    options = parser.parse_args()
    found = table()
    print(found)
    if options.page:
        put(options.page, found)


if __name__ == "__main__":
    from benchmarks import peers  # what is sent to the ranks is found by its module there

    peers.main()
