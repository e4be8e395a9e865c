"""Gradients and buffers put aside while a step is computed a second time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def set_aside(parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[None]:
    """A block that begins without gradients (``.grad``, ``main_grad``); restores them at its end.

    Buffers are restored too: running statistics would count the batch twice.
    """
    statistics = [buffer.clone() for buffer in buffers]
    found = (getattr(parameter, "main_grad", None) for parameter in parameters)
    mains = [(main, main.clone()) for main in found if main is not None]
    kept = [None if p.grad is None else p.grad.clone() for p in parameters]
    try:
        with torch.no_grad():
            for main, _ in mains:
                main.zero_()
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, statistics, strict=True):
                buffer.copy_(before)
            for main, gradient in mains:
                main.copy_(gradient)
            for parameter, gradient in zip(parameters, kept, strict=True):
                if gradient is None or parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad.copy_(gradient)
