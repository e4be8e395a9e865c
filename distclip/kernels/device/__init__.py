"""Accelerator tensors: one Triton launch measures or changes many; the host never waits.

``norms`` and ``changes`` are what the doors of the package call; they choose, per tensor, between
the Triton kernels and torch's own operations. ``multi_tensor`` launches the kernels of ``_triton``
over the addresses and sizes that ``tables`` has put on the device.
"""
