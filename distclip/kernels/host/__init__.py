"""Compiled loops over host memory: one call measures or changes many tensors.

``loops`` writes the loops in LLVM's intermediate representation (with ``changes``, those that
change numbers in place, ``formats`` and ``building``), ``compiler`` turns them into machine code
when the first host gradient is measured, ``blocks`` describes tensors to them, and ``kernels`` is
what the rest of the package calls.
"""
