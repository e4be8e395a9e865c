"""The accelerator benchmarks, as far as they run without one."""

import pytest
import torch

from benchmarks import gpu, launches


def test_the_launches_are_few_and_the_host_linear() -> None:
    """What grows with the number of tensors is their addresses, and those cost little each."""
    times = {}
    with launches.nothing_launched() as kernels:
        for count in (1_000, 10_000):
            tensors = [launches.made(count)]
            for kernel in kernels.values():
                kernel.times = 0
            times[count] = launches.timed(launches.step, tensors, 5)
            assert kernels["measure_chunk"].times == kernels["scale"].times == 7
    # 0.5 us where nothing else runs, and ten times as many should cost ten times as much.
    assert times[10_000] / 10_000 < 3.0
    assert times[10_000] < 25 * times[1_000]


def test_a_table_of_mixed_dtypes_has_one_launch_for_each() -> None:
    with launches.nothing_launched() as kernels:
        kinds = (torch.float32, torch.bfloat16, torch.float32)
        launches.step([torch.empty(8, 16, dtype=dtype) for dtype in kinds])
        assert kernels["measure_chunk"].times == 2
        assert kernels["combine"].times == 1


@pytest.mark.parametrize("name", gpu.FIELD)
def test_the_workloads_of_the_field(name: str) -> None:
    """Of their sizes on a GPU; small here, and clipped by all."""
    each = gpu.FIELD[name]
    elements = sum(torch.Size(shape).numel() for shape in each["shapes"])
    assert elements in (225_000_000, 1_536_000_000)
    small = [tuple(extent // 100 for extent in shape[:2]) for shape in each["shapes"][:5]]
    small = [shape if len(shape) > 1 else (shape[0] // 1000,) for shape in small]
    found = gpu.of_the_field(small, each["dtype"], 2, "cpu", aim_ms=each["aim_ms"])
    assert {"distclip, error_late", "apex-like", "torch clip_grad_norm_"} <= set(found["times"])
    assert found["norm_after_the_last"] == pytest.approx(1.0, rel=1e-2)
    assert found["aim_ms"] == each["aim_ms"]
