"""Compiles the kernels for an H100, on any machine, and reads how they touch memory.

``python -m tests.helpers.compiled``: a process of its own, since the tests run them interpreted.
"""

import re
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distclip.kernels.device import _triton, multi_tensor, tables

FRACTIONS = {tl.float32: 23, tl.bfloat16: 7, tl.float16: 10}
H100 = GPUTarget("cuda", 90, 32)
TABLE = ["pointers", "numels", "heights", "widths", "firsts", "outputs", "owners"]
POINTERS = dict.fromkeys(TABLE, "*i64")
POINTERS |= dict.fromkeys(["partials", "norms", "coefficients", "bounds"], "*fp64")
POINTERS["counts"] = "*i64"
FLAT: dict[str, Any] = {"BLOCK": tables.BLOCK, "TURNS": tables.TURNS}


def ptx(kernel: Any, warps: int = 8, **constants: Any) -> str:
    """The assembly of one kernel."""
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name, "i32")
        for name in kernel.arg_names
    }
    number = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={number[name]: value for name, value in constants.items()},
        attrs={number[n]: [["tt.divisibility", 16]] for n, t in signature.items() if t[0] == "*"},
    )
    return str(triton.compile(source, target=H100, options={"num_warps": warps}).asm["ptx"])


def wide(text: str, what: str) -> int:
    """Accesses of 16 bytes."""
    return len(re.findall(rf"{what}\.global\.v(?:4\.b32|2\.b64)", text))


def main() -> None:
    """Raise where full chunks are not read, or written, 16 bytes at a time."""
    chunk = tables.BLOCK * tables.TURNS // (8 * 32)  # elements of a thread
    for dtype in (tl.float32, tl.bfloat16, tl.float16):
        size = dtype.primitive_bitwidth // 8
        for kind in (0, 1, 2):
            for bounded, counted in ((False, False), (True, False), (False, True))[
                : 2 + (kind == 2)
            ]:
                text = ptx(
                    _triton.measure_chunk, DTYPE=dtype, SIZE=size, BOUNDED=bounded, KIND=kind,
                    FRACTION=FRACTIONS[dtype] if counted else 0,
                    LEAST=multi_tensor.LEAST_SUM[kind], **FLAT,
                )  # fmt: skip
                assert wide(text, "ld") == chunk * size // 16, ("measure", dtype, kind)
            for columns in (16, 128, 1024):
                text = ptx(
                    _triton.measure_rows, DTYPE=dtype, VECTOR=16 // size, KIND=kind,
                    LEAST=multi_tensor.LEAST_SUM[kind], ROWS=tables.BLOCK // columns,
                    COLUMNS=columns, TURNS=1 if columns < 1024 else 4,
                )  # fmt: skip
                assert wide(text, "ld") > 0, ("measure_rows", dtype, kind, columns)
        for drop in (False, True):
            text = ptx(_triton.scale, DTYPE=dtype, SIZE=size, WIDE=tl.float32, DROP=drop, **FLAT)
            assert wide(text, "st") == chunk * size // 16, ("scale", dtype)
            assert wide(text, "ld") == (0 if drop else chunk * size // 16), ("scale", dtype, drop)
        text = ptx(
            _triton.scale_rows, DTYPE=dtype, VECTOR=16 // size, WIDE=tl.float32, ROWS=2,
            COLUMNS=1024,
        )  # fmt: skip
        assert wide(text, "ld") == wide(text, "st") > 0, ("scale_rows", dtype)
    for kind in (0, 1, 2):
        ptx(_triton.combine, 2, KIND=kind, BLOCK=256)


if __name__ == "__main__":
    main()
    sys.exit(0)
