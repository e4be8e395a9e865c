"""Optimizers: DreamerV3's chain (adaptive clipping, RMS, momentum, schedule) as one of torch's.

::

    optimizer = distclip.optim.dreamer_v3(model, lr=4e-5)
    loss.backward()
    optimizer.step()
"""

from distclip.optim.dreamer import dreamer_v3 as dreamer_v3
from distclip.optim.laprop import LaProp as LaProp
