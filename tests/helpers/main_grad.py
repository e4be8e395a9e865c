"""Gradients in ``main_grad``, as Megatron-LM keeps them."""

from typing import Any


def accumulate(parameter: Any) -> None:
    """A hook after a parameter's gradient: it is added to ``main_grad``, and ``grad`` is gone."""
    parameter.main_grad.add_(parameter.grad)
    parameter.grad = None
