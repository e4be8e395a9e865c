"""Gradients that torch cannot change in place, or that would be changed twice: found beforehand.

Whatever can raise while gradients are clipped has to be found before the first of them changes, on
all ranks alike. Each check is one call of torch for each gradient and step; only what is unusual is
looked at more closely.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from distclip.errors import DistclipError, UnsupportedGradientError
from distclip.kernels.look import Look, look, there
from distclip.layouts import plain, sparse, zero
from distclip.layouts.piece import Piece
from distclip.layouts.plan import Plan

REAL = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
COMPLEX = frozenset((torch.complex64, torch.complex128))


def inspect(
    plan: Plan,
    present: Sequence[Tensor | None],
    seen: Look | None = None,
    *,
    first: bool,
    changed: bool = True,
) -> tuple[Sequence[Tensor | None], DistclipError | None, Look | None]:
    """Look at the local gradients of a plan before anything is done to them.

    Args:
        plan: whose pieces these are.
        present: the gradient of each piece, or None.
        seen: what a look at those that are there has found, where that was done.
        first: whether to compare shapes, and look for shared memory, too.
        changed: whether they are to be changed, and not only measured.

    Returns:
        What to measure and to act on: the same memory without conjugate and negative bits (neither
        matters to norms, scaling and clamping), and the values of what is sparse; None in place of
        what is refused. The first refusal, if any. And a look at those that are there, where none
        is unusual.
    """
    if not first:
        seen = look(there(present)) if seen is None else seen
        if seen is not None and are_usual(plan, seen, changed=changed):
            return present, None, seen
    looked: list[Tensor | None] = []
    trouble = None
    for piece, gradient in zip(plan.pieces, present, strict=True):
        if gradient is not None:
            try:
                gradient = _look(plan.names[piece.index], gradient, piece.box.extents)
                gradient = sparse.entry_values(gradient) if sparse.is_sparse(gradient) else gradient
                if changed:
                    _check_changeable(plan.names[piece.index], gradient)
            except DistclipError as error:
                gradient, trouble = None, trouble or error
        looked.append(gradient)
    return looked, trouble or (_shared(plan, looked) if changed else None), None


def are_usual(plan: Plan, seen: Look, *, changed: bool) -> bool:
    """Whether nothing about gradients, of which some were looked at closely before, is unusual."""
    dtypes = seen.kinds.distinct
    if not dtypes <= REAL and (
        not dtypes <= REAL | COMPLEX or any(map(Tensor.is_conj, seen.owners))
    ):
        return False
    if any(map(Tensor.is_inference, seen.owners)) or not seen.have_memory_of_their_own():
        return False
    return not (changed and _are_weights(plan, seen))


def _are_weights(plan: Plan, seen: Look) -> bool:
    """Whether a gradient, of all pieces, lies where its weights do.

    Compared with where they were when they were looked at; where they are now is asked for those
    of which that is so.
    """
    known, found, apart = plan.weights_at, seen.places.addresses, plan.apart_from_weights
    if len(known) != len(found) or seen.places in apart:
        return False
    for place in np.flatnonzero(known == found).tolist():
        known[place] = _address(weight_if_any(plan.pieces[place]))
        if known[place] == found[place]:
            return True
    apart[:] = [seen.places]
    return False


def _address(weight: Tensor | None) -> int:
    """Where weights lie; -1, where no gradient does, for none or for empty ones."""
    return -1 if weight is None else weight.data_ptr() or -1


def weight_if_any(piece: Piece) -> Tensor | None:
    """The local weights, None where they are a tensor subclass that offers no values."""
    try:
        return piece.weight()
    except UnsupportedGradientError:
        return None


def check_weights(pieces: Iterable[tuple[str, Piece]]) -> None:
    """Refuse weights that have no values to measure, of parameters that are trained.

    Raises:
        UnsupportedGradientError: names the first.
    """
    for name, piece in pieces:
        if not piece.trainable or isinstance(piece.gradient, zero.StretchBox):
            continue
        dtype = piece.weight().dtype
        if dtype not in REAL | COMPLEX:
            raise UnsupportedGradientError(
                f"parameter {name!r} is {dtype}, of which no norm can be measured, and the policy "
                f"reads weights; leave it out with by_name, or use a policy of gradient norms"
            )


def _look(name: str, gradient: Tensor, extents: Sequence[int]) -> Tensor:
    """``gradient``, or a view of its memory; or a refusal by name."""
    if not sparse.is_sparse(gradient):
        gradient = plain.check_dense(name, gradient)
    gradient = plain.unwrapped(f"the gradient of {name!r}", gradient)
    gradient = gradient.conj() if gradient.is_conj() else gradient
    gradient = gradient._neg_view() if gradient.is_neg() else gradient
    if gradient.dtype not in REAL | COMPLEX:
        kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in REAL | COMPLEX))
        problem, mend = f"is {gradient.dtype}, which has no norm that can be scaled", kinds
        raise _refused(name, problem, f"distclip clips gradients of {mend}")
    if tuple(gradient.shape) != tuple(extents):
        problem = f"has the shape {list(gradient.shape)}, and its parameter {list(extents)}"
        raise _refused(name, problem, "set it to None when the parameter's data is replaced")
    is_plain = type(gradient) in (Tensor, nn.Parameter) and not sparse.is_sparse(gradient)
    if is_plain and gradient.numel() and not gradient.untyped_storage().nbytes():
        raise _refused(name, "has no memory (its storage was freed)", "run backward again")
    return gradient


def _check_changeable(name: str, gradient: Tensor) -> None:
    """Refuse what can be measured, and not be changed in place."""
    if gradient.is_inference() and not torch.is_inference_mode_enabled():
        problem = "was made under torch.inference_mode(), and torch changes it nowhere else"
        raise _refused(name, problem, "use torch.no_grad() there, or set p.grad = p.grad.clone()")
    if _overlaps_itself(gradient):
        problem = (
            f"has elements that share memory (shape {list(gradient.shape)}, strides "
            f"{list(gradient.stride())}), and would be scaled more than once"
        )
        raise _refused(name, problem, "set p.grad = p.grad.contiguous()")


def _refused(name: str, problem: str, mend: str) -> UnsupportedGradientError:
    return UnsupportedGradientError(f"the gradient of {name!r} {problem}; {mend}")


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may lie at one address: a stride that is within what others span."""
    span = 0
    for stride, extent in _dims(tensor):
        if stride <= span:
            return tensor.numel() > 0
        span += stride * (extent - 1)
    return False


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last one in memory; more than there are where gaps are."""
    return 1 + sum(stride * (extent - 1) for stride, extent in _dims(tensor))


def _dims(tensor: Tensor) -> list[tuple[int, int]]:
    """``(stride, extent)`` of each dim of more than one, the smallest stride first."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return sorted((stride, extent) for stride, extent in pairs if extent > 1)


def _shared(plan: Plan, present: Sequence[Tensor | None]) -> DistclipError | None:
    """Whether a gradient shares memory with another one, or with weights: changed twice, then.

    Of what has no gaps: views that are interleaved share a storage and no element.
    """
    plan.apart_from_weights.clear()
    ranges: list[tuple[int, int, str]] = []
    for place, (piece, gradient) in enumerate(zip(plan.pieces, present, strict=True)):
        if gradient is None or isinstance(
            piece.gradient, zero.StretchBox
        ):  # in buffers of ZeRO's own
            continue
        weight = weight_if_any(piece)
        plan.weights_at[place] = _address(weight)
        for what, tensor in (("gradient", gradient), ("weights", weight)):
            if tensor is not None and tensor.data_ptr() and _span(tensor) == tensor.numel():
                name = f"the {what} of {plan.names[piece.index]!r}"
                ranges.append((tensor.data_ptr(), tensor.nbytes, name))
    if len(ranges) < 2:
        return None
    starts = np.array([start for start, _, _ in ranges], np.uint64)
    order = np.argsort(starts, kind="stable")
    ends = starts + np.array([size for _, size, _ in ranges], np.uint64)
    (where,) = np.nonzero(ends[order][:-1] > starts[order][1:])
    for place in where.tolist():
        pair = [ranges[order[place]][2], ranges[order[place + 1]][2]]
        if any("gradient" in each for each in pair):
            return UnsupportedGradientError(
                f"{pair[0]} and {pair[1]} share memory, so that clipping one would change the "
                f"other too; set p.grad = p.grad.clone() for one of them"
            )
    return None
