"""Loops, variables and vectors in LLVM's intermediate representation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

from distclip.kernels.host.formats import INT32, INT64, POINTER, Builder, IRValue

VECTOR_WIDTH = 8
"""Numbers in a vector: 512 bits of float64, which narrower processors take in several parts."""


@contextmanager
def counting(b: Builder, start: IRValue, stop: IRValue, step: int) -> Iterator[IRValue]:
    """``for index in range(start, stop, step)``; yields the index, int64."""
    before = b.block
    head, body = b.append_basic_block("head"), b.append_basic_block("body")
    after = b.append_basic_block("after")
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(INT64)
    index.add_incoming(start, before)
    b.cbranch(b.icmp_signed("<", index, stop), body, after)
    b.position_at_end(body)
    yield index
    index.add_incoming(b.add(index, ir.Constant(INT64, step)), b.block)
    b.branch(head)
    b.position_at_end(after)


def variable(b: Builder, initial: IRValue) -> IRValue:
    """A place on the stack, which the compiler turns into a register."""
    with b.goto_entry_block():
        place = b.alloca(initial.type)
    b.store(initial, place)
    return place


def at(b: Builder, address: IRValue, index: IRValue, size: int) -> IRValue:
    """Pointer to the element ``index`` of an array of ``size`` bytes each."""
    offset = b.mul(index, ir.Constant(INT64, size))
    return b.inttoptr(b.add(address, offset), POINTER)


def tree(
    b: Builder, add: Callable[[IRValue, IRValue], IRValue], parts: Sequence[IRValue]
) -> IRValue:
    """Combine in pairs, the first with the second and so on."""
    while len(parts) > 1:
        parts = [add(parts[n], parts[n + 1]) for n in range(0, len(parts), 2)]
    return parts[0]


def splat(b: Builder, value: IRValue, width: int = VECTOR_WIDTH) -> IRValue:
    """A vector of ``width`` times the scalar ``value``."""
    vector = ir.VectorType(value.type, width)
    one = b.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(INT32, 0))
    mask = ir.Constant(ir.VectorType(INT32, width), [0] * width)
    return b.shuffle_vector(one, one, mask)
