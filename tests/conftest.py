import os

import torch

pytest_plugins = ["distclip.testing.plugin", "pytester"]

# Triton reads this when it defines a function: its own, at its import, which may come from any test
# that meets torch.compile, Accelerate or DeepSpeed first, and ours.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
