"""Work on many accelerator tensors at once: one launch, whatever their number and sizes.

``transfer`` brings numbers from the host without waiting for the device, ``multi_tensor`` is what
the rest of the library calls, ``tables`` tells a kernel where the tensors lie, and ``_triton`` has
the kernels. Where Triton is missing, the callers use torch's own operations.
"""
