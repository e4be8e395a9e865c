"""What measuring and clipping cost on one GPU, beside torch and beside the memory's own speed.

``python -m benchmarks.gpu --output benchmarks/results/DATE-GPU.json``. All of a case's contestants
take turns in drawn order; a time is the median of the rounds, by CUDA events (the device's) and by
the host's clock from call to finished work. Gradients are put back before each round.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distclip import GradClipper, __version__, policies
from distclip.kernels.device import multi_tensor

try:
    from transformer_engine.pytorch import optimizers as transformer_engine
except ImportError:
    transformer_engine = None

Contestant = Callable[[], Any]
GIB = 1 << 30


FIELD: dict[str, dict[str, Any]] = {
    "500 matrices, 225 M elements, float32": {
        "shapes": [(600, 750)] * 500,
        "dtype": torch.float32,
        "published_ms": {"Transformer Engine": 3.93, "Triton": 3.73},
        "aim_ms": 1.5,
    },
    "one tensor, 1.536 G elements, bfloat16": {
        "shapes": [(1_536_000_000,)],
        "dtype": torch.bfloat16,
        "published_ms": {"Transformer Engine": 7.89, "Triton": 7.32},
        "aim_ms": 4.0,
    },
}
"""Norm and clip, as others publish it for one H100: NVIDIA-NeMo/Automodel, pull request 3685."""


def mixed_sizes(total: int) -> list[int]:
    """Sizes of a model's kind: a few large matrices, many middling ones, vectors."""
    sizes: list[int] = []
    kinds = (32_000 * 2048, 2048 * 5632, 2048 * 2048, 2048 * 256, 2048, 77)
    left = total
    for kind, share in zip(kinds, (0.25, 0.4, 0.25, 0.09, 0.0099, 0.0001), strict=True):
        count = max(1, int(total * share / kind))
        sizes += [kind] * min(count, max(0, left // kind))
        left = total - sum(sizes)
    return [*sizes, left] if left > 0 else sizes


def model_of(sizes: list[int], dtype: torch.dtype, *, matrices: bool = False) -> nn.ParameterList:
    """Parameters with gradients, drawn once."""
    torch.manual_seed(0)
    listed = nn.ParameterList()
    for size in sizes:
        shape = (size // 2048, 2048) if matrices and size % 2048 == 0 else (size,)
        parameter = nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype))
        parameter.grad = torch.randn_like(parameter)
        listed.append(parameter)
    return listed


def gradients(model: nn.ParameterList) -> list[Tensor]:
    return [p.grad for p in model if p.grad is not None]


def timed(
    contestants: dict[str, Contestant], rounds: int, before: Contestant | None = None
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each: of the device, and of the host until the work was done.

    Without a GPU, for the tests, the host's stand for both.
    """
    if not torch.cuda.is_available():
        return _timed_on_host(contestants, rounds, before)
    for run in contestants.values():
        for _ in range(3):
            run()
    device: dict[str, list[float]] = {name: [] for name in contestants}
    host: dict[str, list[float]] = {name: [] for name in contestants}
    drawn = random.Random(0)
    for _ in range(rounds):
        for name in drawn.sample(list(contestants), len(contestants)):
            if before is not None:
                before()
            torch.cuda.synchronize()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began = time.perf_counter()
            start.record()
            contestants[name]()
            stop.record()
            torch.cuda.synchronize()
            host[name].append(1e3 * (time.perf_counter() - began))
            device[name].append(start.elapsed_time(stop))
    return {
        name: {
            "device_ms": statistics.median(device[name]),
            "host_ms": statistics.median(host[name]),
            "device_low_ms": min(device[name]),
            "device_high_ms": max(device[name]),
        }
        for name in contestants
    }


def _timed_on_host(
    contestants: dict[str, Contestant], rounds: int, before: Contestant | None
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, run in contestants.items():
        times = []
        for _ in range(rounds):
            if before is not None:
                before()
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
        both = statistics.median(times)
        found[name] = {
            "device_ms": both,
            "host_ms": both,
            "device_low_ms": min(times),
            "device_high_ms": max(times),
        }
    return found


def apex_like(tensors: list[Tensor], limit: float) -> None:
    """What multi-tensor code does: one norm of all, and one multiplication, no read of the host."""
    norm = torch.linalg.vector_norm(foreach_norm(tensors))
    torch._foreach_mul_(tensors, (limit / (norm + 1e-6)).clamp(max=1.0).to(tensors[0].dtype))


def by_transformer_engine(tensors: list[Tensor], limit: float) -> None:
    """As Megatron-Core clips: the norm is read on the host, for the coefficient is a number."""
    overflow = torch.zeros(1, dtype=torch.int, device=tensors[0].device)
    applied = transformer_engine.multi_tensor_applier
    norm, _ = applied(transformer_engine.multi_tensor_l2norm, overflow, [tensors], False)
    coefficient = limit / (norm.item() + 1e-6)
    if coefficient < 1.0:
        applied(transformer_engine.multi_tensor_scale, overflow, [tensors, tensors], coefficient)


def of_the_field(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    rounds: int,
    device: str = "cuda",
    **published: Any,
) -> dict[str, Any]:
    """Norm and clip of a workload that others have published times for."""
    listed = nn.ParameterList(
        nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in shapes
    )
    torch.manual_seed(0)
    for parameter in listed:
        parameter.grad = torch.randn_like(parameter)
    tensors = gradients(listed)
    kept = [tensor.clone() for tensor in tensors]
    contestants: dict[str, Contestant] = {
        f"distclip, {mode}": GradClipper(
            listed, policies.global_norm(1.0), on_nonfinite=mode, verify_replicas="never"
        ).clip_
        for mode in ("pass", "skip", "error_late", "error")
    }
    contestants["torch clip_grad_norm_"] = lambda: nn.utils.clip_grad_norm_(list(listed), 1.0)
    contestants["apex-like"] = lambda: apex_like(tensors, 1.0)
    if transformer_engine is not None:
        contestants["Transformer Engine"] = lambda: by_transformer_engine(tensors, 1.0)
    found = timed(contestants, rounds, lambda: torch._foreach_copy_(tensors, kept))
    before, after = (multi_norm(each) for each in (kept, tensors))
    return {
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "norm_before": before,
        "norm_after_the_last": after,
        "times": found,
        **published,
    }


def multi_norm(tensors: list[Tensor]) -> float:
    """Of all together, accumulated in float64."""
    parts = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return float(torch.linalg.vector_norm(torch.stack(parts)))


def sync_and_graph_tests() -> str:
    """The last line of the tests that look for host reads and capture a clip in a graph."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_cuda.py"],
        capture_output=True, text=True,
    )  # fmt: skip
    return run.stdout.strip().splitlines()[-1] if run.stdout.strip() else run.stderr[-500:]


def foreach_norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, 2.0))


def measuring(sizes: list[int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Norms of all tensors, by the kernels and by torch; and a copy of as many bytes."""
    model = model_of(sizes, dtype)
    tensors = gradients(model)
    read = sum(tensor.nbytes for tensor in tensors)
    source = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    clipper = GradClipper(model, policies.measure(), on_nonfinite="pass")
    found = timed(
        {
            "copy of 1 GiB": lambda: target.copy_(source),
            "kernels": lambda: multi_tensor.norms(tensors, 2.0),
            "distclip": clipper.clip_,
            "torch _foreach_norm": lambda: foreach_norm(tensors),
            "torch get_total_norm": lambda: nn.utils.get_total_norm(tensors),
        },
        rounds,
    )
    bandwidth = 2 * GIB / found["copy of 1 GiB"]["device_ms"]
    reached = {
        name: read / times["device_ms"] / bandwidth
        for name, times in found.items()
        if name != "copy of 1 GiB"
    }
    exact = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors])
    error = ((multi_tensor.norms(tensors, 2.0) - exact) / exact).abs().max().item()
    theirs = ((foreach_norm(tensors).double() - exact) / exact).abs().max().item()
    return {
        "tensors": len(tensors),
        "bytes": read,
        "times": found,
        "copy_GB_per_s": bandwidth / 1e6,
        "share_of_copy_bandwidth": reached,
        "largest_relative_error": {"kernels": error, "torch _foreach_norm": theirs},
    }


def clipping(
    sizes: list[int], dtype: torch.dtype, rounds: int, *, clips: bool = True
) -> dict[str, Any]:
    """A whole clip by the global norm."""
    model = model_of(sizes, dtype)
    tensors = gradients(model)
    kept = [tensor.clone() for tensor in tensors]
    limit = 1.0 if clips else 1e9
    clippers = {
        mode: GradClipper(model, policies.global_norm(limit), on_nonfinite=mode)
        for mode in ("error", "skip", "pass")
    }
    listed = list(model)
    contestants: dict[str, Contestant] = {
        f"distclip, {mode}": clipper.clip_ for mode, clipper in clippers.items()
    }
    contestants["torch clip_grad_norm_"] = lambda: nn.utils.clip_grad_norm_(listed, limit)
    contestants["torch clip_grad_norm_, error"] = lambda: nn.utils.clip_grad_norm_(
        listed, limit, error_if_nonfinite=True
    )
    found = timed(contestants, rounds, lambda: torch._foreach_copy_(tensors, kept))
    return {"tensors": len(tensors), "clips": clips, "times": found}


def by_rows(sizes: list[int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """AGC, unit by unit, beside one read of weights and gradients."""
    model = model_of(sizes, dtype, matrices=True)
    tensors, weights = gradients(model), [p.detach() for p in model]
    kept = [tensor.clone() for tensor in tensors]
    loose = GradClipper(model, policies.agc(1e6), on_nonfinite="pass")
    tight = GradClipper(model, policies.agc(0.01), on_nonfinite="pass")
    found = timed(
        {
            "one read of both": lambda: multi_tensor.norms([*tensors, *weights], 2.0),
            "agc, nothing clipped": loose.clip_,
            "agc, all clipped": tight.clip_,
        },
        rounds,
        lambda: torch._foreach_copy_(tensors, kept),
    )
    return {"tensors": len(tensors), "times": found}


def overlapping(layers: int, width: int, rounds: int) -> dict[str, Any]:
    """How much of the measuring FSDP2's backward hides, on one rank: nothing waits for a network.

    Three equal models take turns: backward alone, backward and then measuring, and measuring
    during backward. What the second takes longer than the first is what there is to hide.
    """
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cuda", (1,))
        inputs = torch.randn(4, 256, width, device="cuda")

        def backward(clipping: dict[str, Any] | None) -> tuple[Contestant, GradClipper | None]:
            torch.manual_seed(0)
            blocks = nn.Sequential(
                *(nn.TransformerEncoderLayer(width, 16, batch_first=True) for _ in range(layers))
            ).cuda()
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(blocks, mesh=mesh)
            clipper = None
            if clipping is not None:
                clipper = GradClipper(blocks, policies.measure(), on_nonfinite="pass", **clipping)

            def step() -> None:
                blocks.zero_grad()
                blocks(inputs).square().mean().backward()
                if clipper is not None:
                    clipper.clip_()

            return step, clipper

        alone, _ = backward(None)
        after, _ = backward({})
        during, early = backward({"overlap": True})
        assert early is not None
        found = timed({"alone": alone, "measured after": after, "during": during}, rounds)
        return {
            "times": found,
            "gradients_measured_early": early.measured_early,
            "share_hidden": {
                clock: 1 - (found["during"][clock] - found["alone"][clock])
                / (found["measured after"][clock] - found["alone"][clock])
                for clock in ("device_ms", "host_ms")
            },
        }  # fmt: skip
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    large = mixed_sizes(GIB // 4)
    generator = random.Random(1)
    small = [generator.randrange(64, 16_384) for _ in range(5000)]
    rounds = chosen.rounds
    result: dict[str, Any] = {
        "distclip": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "host": platform.processor() or platform.machine(),
        "triton_kernels": multi_tensor.is_usable(torch.device("cuda", 0)),
        "rounds": rounds,
        "date": time.strftime("%Y-%m-%d"),
        "transformer_engine": transformer_engine is not None,
        "tests": sync_and_graph_tests(),
        "field": {name: of_the_field(rounds=rounds, **each) for name, each in FIELD.items()},
        "measuring": {
            "1 GiB, float32": measuring(large, torch.float32, rounds),
            "512 MiB, bfloat16": measuring(large, torch.bfloat16, rounds),
            "5,000 small, float32": measuring(small, torch.float32, rounds),
        },
        "clipping": {
            "1 GiB, float32": clipping(large, torch.float32, rounds),
            "1 GiB, float32, not clipping": clipping(large, torch.float32, rounds, clips=False),
            "512 MiB, bfloat16": clipping(large, torch.bfloat16, rounds),
            "5,000 small, float32": clipping(small, torch.float32, rounds),
        },
        "rows": {"1 GiB, float32": by_rows(large, torch.float32, rounds)},
        "overlap": {"16 layers of width 2,048": overlapping(16, 2048, rounds)},
    }
    text = json.dumps(result, indent=1)
    print(text)
    if chosen.output is not None:
        chosen.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
