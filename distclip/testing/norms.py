"""Norms of whole tensors in float64, for the reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
"""float64, or complex128 for complex gradients."""


def norm(values: npt.ArrayLike, norm_type: float = 2.0, axes: tuple[int, ...] | None = None) -> Any:
    """The p-norm of an array, any p > 0 or inf, without overflow or underflow on the way.

    Args:
        values: any shape.
        norm_type: p.
        axes: the dims to reduce, which stay with extent 1; None reduces all to a float.
    """
    magnitudes = np.abs(wide(values))
    where = tuple(range(magnitudes.ndim)) if axes is None else axes
    largest = np.max(magnitudes, axis=where, keepdims=True, initial=0.0)
    if np.isinf(norm_type):
        result = largest
    else:
        with np.errstate(all="ignore"):
            # In extended floats where the machine has them: small orders need their exponents.
            scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
            scaled = magnitudes.astype(np.longdouble) / scale
            sums = np.sum(scaled ** np.longdouble(norm_type), axis=where, keepdims=True)
            result = (sums ** (1 / np.longdouble(norm_type)) * scale).astype(np.float64)
        result = np.where(np.isfinite(largest), result, largest)
    return float(result.reshape(())) if axes is None else result


def wide(values: npt.ArrayLike) -> Array:
    """The values in float64, or complex128; of a tensor too, whatever its dtype and layout.

    Raises:
        TypeError: a ``DTensor``, which is a part of the tensor that is meant.
    """
    if hasattr(values, "full_tensor"):
        raise TypeError(
            "the reference takes whole tensors, and this is a DTensor, of which each rank holds a "
            "part; give what its full_tensor() returns"
        )
    if hasattr(values, "detach"):
        tensor: Any = values
        plain = tensor.detach().cpu().to_dense().resolve_conj().resolve_neg()
        values = (plain.cdouble() if plain.is_complex() else plain.double()).numpy()
    return np.asarray(values, np.complex128 if np.iscomplexobj(values) else np.float64)


def norm_of_norms(norms: Iterable[float], norm_type: float = 2.0) -> float:
    """The norm of all tensors together, from the norm of each."""
    return float(norm(list(norms), norm_type))
