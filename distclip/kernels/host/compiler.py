"""Machine code of the host loops, made when it is first asked for.

It takes a tenth of a second and is not kept on disk: nothing has to be writable, and any number of
processes may start at once.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, cast

from distclip.kernels.host.blocks import Kind

COMPILED_SWITCH = "DISTCLIP_COMPILED"
"""``0`` in the environment: measure and scale host tensors with torch's own operations."""


@functools.cache
def compiled_kinds() -> frozenset[Kind]:
    """The formats that the compiled loops read; empty where there are no compiled loops."""
    if os.environ.get(COMPILED_SWITCH) == "0" or function("squares") is None:
        return frozenset()
    return frozenset(_kinds())


@functools.cache
def function(name: str) -> Callable[[int, int, int, int], None] | None:
    """One of the loops of :mod:`distclip.kernels.host.loops`, compiled; None where it cannot be.

    It takes the address of the table, the first block, the last block + 1, and the address of the
    rows' numbers. A call releases Python's global lock.
    """
    try:
        return _compiled(name)
    except Exception as error:  # whatever it is, there is another way
        missing = importlib.util.find_spec("llvmlite") is None
        why = "llvmlite is not installed" if missing else f"{type(error).__name__}: {error}"
        warnings.warn(
            f"distclip's compiled loops for host tensors cannot be used here ({why}); gradients on "
            f"the CPU are measured with torch's own operations, which gives the same results and "
            f"is several times slower. {COMPILED_SWITCH}=0 in the environment makes this choice "
            f"without a warning",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _kinds() -> list[Kind]:
    import llvmlite.binding as llvm

    is_x86 = llvm.get_process_triple().startswith(("x86", "i686"))
    # Without an instruction for it LLVM would call a function that nobody has.
    if is_x86 and not llvm.get_host_cpu_features().get("f16c"):
        return [kind for kind in Kind if kind is not Kind.FLOAT16]
    return list(Kind)


def _compiled(name: str) -> Callable[[int, int, int, int], None]:
    import llvmlite.binding as llvm

    from distclip.kernels.host.loops import module_text

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple = llvm.get_process_triple()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(module_text(name, _kinds()))
    module.triple, module.data_layout = triple, str(machine.target_data)
    module.verify()
    # The loops are written as they are to run: there is nothing to find but registers.
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options())
    passes = llvm.create_new_function_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    for each in module.functions:
        passes.run(each, builder)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
    return cast(Callable[[int, int, int, int], None], signature(engine.get_function_address(name)))


_engines: list[Any] = []
"""The engines that own the machine code: it lives as long as they do."""
