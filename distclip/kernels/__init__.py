"""The one door to the numbers of local tensors, wherever they lie.

``measuring`` (norms of tensors and of their units) and ``changing`` (multiply, clamp, drop) are
what the rest of the library calls. Behind them: ``host`` (compiled loops over host memory),
``device`` (one Triton launch for many accelerator tensors), and ``plain`` (torch's own operations,
for all the rest). ``transfer`` brings numbers from the host to a device without waiting for it.
"""
