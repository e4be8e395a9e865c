"""Modes of DeepSpeed in which distclip cannot clip: why, and where its JSON asks for one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distclip.errors import ConfigurationError

ONE_BIT = ("OnebitAdam", "ZeroOneAdam", "OnebitLamb")

REASONS = {
    "fp16 at stage 0": (
        "fp16 at ZeRO stage 0: DeepSpeed 0.19.8 unscales the gradients but never scales the loss; "
        "use bf16, or fp16 with ZeRO stage 1"
    ),
    "nvme": "optimizer states on NVMe are not in memory when their weights are measured",
    "one bit": "1-bit optimizers reduce gradients themselves, in their step",
    "muon": (
        "Muon under ZeRO 1 to 3: DeepSpeed puts the orthogonalised update in the gradient's place "
        "(at stages 1 and 2 when backward ends, at stage 3 before its norm), whose length says "
        "nothing of the gradient; use ZeRO stage 0, or torch.optim.Muon under FSDP2"
    ),
    "zenflow": (
        "ZenFlow steps a few columns at once and adds up the others' gradients for later steps, so "
        'that no step has the gradient of one batch; leave "zenflow" out'
    ),
    "super_offload": (
        "SuperOffload steps on the CPU while backward is running, before there is a norm; leave "
        '"super_offload" out'
    ),
    "autotp": (
        'AutoTP ("tensor_parallel") cuts weights into slices that are plain tensors, which was not '
        "run with distclip; use FSDP2 with DTensor"
    ),
    "autoep": (
        'AutoEP ("expert_parallel") was not run with distclip; DeepSpeed\'s own MoE layers were'
    ),
}


def refuse_document(document: Mapping[str, Any], name: str) -> None:
    """What is seen in a DeepSpeed JSON; for a check of the file, before there is an engine.

    Raises:
        ConfigurationError: with the place in the file, and the reason.
    """
    for where, reason in _asked(document):
        raise ConfigurationError(f"{name}: {where}: distclip cannot clip here: {REASONS[reason]}")


def _asked(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    zero, offload = "zero_optimization", "zero_optimization.offload_optimizer"
    # As DeepSpeed reads it: true, an older form, is stage 1, and "2" is 2.
    staged = document.get(zero) is True or str(_at(document, f"{zero}.stage") or 0) != "0"
    kind = str(_at(document, "optimizer.type") or "").lower()
    if _at(document, "fp16.enabled") is True and not staged:
        yield "fp16.enabled", "fp16 at stage 0"
    if _at(document, f"{offload}.device") == "nvme":
        yield f"{offload}.device", "nvme"
    if kind in map(str.lower, ONE_BIT):
        yield "optimizer.type", "one bit"
    if kind == "muon" and staged:
        yield "optimizer.type", "muon"
    if _at(document, f"{zero}.zenflow") is not None:  # {} is on, with its defaults
        yield f"{zero}.zenflow", "zenflow"
    if _at(document, f"{offload}.super_offload") is True:
        yield f"{offload}.super_offload", "super_offload"
    size = _at(document, "tensor_parallel.autotp_size")
    if isinstance(size, int) and size > 1:
        yield "tensor_parallel.autotp_size", "autotp"
    if _at(document, "expert_parallel.enabled") is True:
        yield "expert_parallel.enabled", "autoep"


def _at(document: Mapping[str, Any], path: str) -> Any:
    value: Any = document
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
