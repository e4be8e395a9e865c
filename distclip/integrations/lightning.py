"""Clipping in Lightning and Fabric: a callback, and training that goes back before a spike."""

from distclip.integrations.lightning_callback import ClipCallback as ClipCallback
from distclip.integrations.lightning_callback import automatic as automatic
from distclip.integrations.lightning_callback import enable as enable
from distclip.integrations.lightning_rewinds import fit_with_rewinds as fit_with_rewinds
