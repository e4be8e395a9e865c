"""The clipping functions of ``torch.nn.utils``, and FSDP1's method, replaced by a policy."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import utils

from distclip.application.eager import eagerly
from distclip.integrations import hooks
from distclip.integrations.patches import replace, replace_everywhere
from distclip.layouts import tensors

FSDP1_MODULE = "torch.distributed.fsdp.fully_sharded_data_parallel"


class ByHand(Protocol):
    """Clips in place of a call of the script."""

    def __call__(
        self, parameters: list[Tensor], call: str, norm_type: float | None, *, only_measures: bool
    ) -> Tensor | None:
        """Apply the policy.

        Args:
            parameters: what the script has given.
            call: what it calls, in words.
            norm_type: order of the norm to return; None: none is wanted.
            only_measures: whether the call changes nothing (``max_norm=inf``).

        Returns:
            The norm before clipping; None: torch's own function is to do it.
        """


class Functions:
    """Calls ``by_hand`` in place of each function, until :meth:`restore`.

    A function is replaced in every module that has it by now, under whatever name.
    """

    def __init__(self, by_hand: ByHand) -> None:
        self._by_hand = by_hand
        ours: dict[Callable[..., Any], Callable[..., Any]] = {
            utils.clip_grad_norm_: self._clip_grad_norm_,
            utils.clip_grad_value_: self._without_norm,
            utils.clip_grads_with_norm_: self._without_norm,
        }
        self._undo = replace_everywhere(ours)
        self._undo.append(hooks.on_import(FSDP1_MODULE, self._replace_method).remove)

    def restore(self) -> None:
        """Put torch's own functions back."""
        while self._undo:
            self._undo.pop()()

    def _replace_method(self, module: ModuleType) -> None:
        kind = module.FullyShardedDataParallel
        self._undo.append(replace(kind, "clip_grad_norm_", self._method))

    @eagerly
    def _clip_grad_norm_(
        self,
        original: Callable[..., Tensor],
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        listed = _listed(parameters)
        call = f"clip_grad_norm_(max_norm={max_norm})"
        only = math.isinf(max_norm)
        norm = self._by_hand(listed, call, float(norm_type), only_measures=only)
        if norm is None:
            return original(listed, max_norm, norm_type, error_if_nonfinite, foreach)
        if error_if_nonfinite and not bool(torch.isfinite(norm)):
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is "
                f"non-finite, so it cannot be clipped (clip_grad_norm_ was called with "
                f"error_if_nonfinite=True)"
            )
        return tensors.as_torch_returns(norm, listed)

    @eagerly
    def _method(
        self, original: Callable[..., Tensor], model: Any, max_norm: float, norm_type: float = 2.0
    ) -> Tensor:
        """FSDP1's, of a root module."""
        call = f"FullyShardedDataParallel.clip_grad_norm_(max_norm={max_norm})"
        only = math.isinf(max_norm)
        listed = list(model.parameters())
        norm = self._by_hand(listed, call, float(norm_type), only_measures=only)
        return original(model, max_norm, norm_type) if norm is None else norm

    @eagerly
    def _without_norm(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """``clip_grad_value_`` and ``clip_grads_with_norm_``, which return nothing."""
        given = inspect.signature(original).bind(*args, **kwargs)
        given.arguments["parameters"] = listed = _listed(given.arguments["parameters"])
        limit = list(given.arguments)[1]
        value = given.arguments[limit]
        call = f"{original.__name__}({limit}={value})"
        if self._by_hand(listed, call, None, only_measures=math.isinf(value)) is None:
            original(*given.args, **given.kwargs)


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)
