"""Runs one loop on as many threads as torch would use.

What a thread works on never changes a result: every row is summed by one thread, in one order.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from distclip.kernels.host.blocks import Blocks

WORTHWHILE = 1 << 21
"""Elements per thread below which another thread costs more than it brings: 0.1 ms to wake one."""


def run_blocks(loop: Callable[[int, int, int, int], None], table: Blocks, values: int) -> None:
    """Run ``loop`` over all blocks, on as many threads as pay.

    Args:
        loop: a compiled function.
        table: of the blocks, with their addresses.
        values: address of the rows' numbers.
    """
    address, count = table.address, len(table.blocks)
    threads = min(torch.get_num_threads(), table.elements // WORTHWHILE, count)
    if threads <= 1:
        loop(address, 0, count, values)
        return
    shares = table.shares(threads)
    others = [
        _pool(threads - 1).submit(loop, address, first, last, values)
        for first, last in itertools.pairwise(shares[1:])
    ]
    loop(address, shares[0], shares[1], values)
    for each in others:
        each.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="distclip")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
