"""A training script that knows nothing of distclip: several small trainings, one after another.

python train_variants.py RESULT.json
"""

import json
import sys

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FullyShardedDataParallel

STEPS, BATCH = 20, 24
VARIANTS = ("norm", "value", "never", "accumulate", "parts", "fused", "bf16")

accelerator = Accelerator()
kinds = set()  # of what prepare made of the model


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(13, 33)
        self.middle = torch.nn.Linear(33, 7)
        self.head = torch.nn.Linear(7, 1)

    def forward(self, x):
        return self.head(self.middle(torch.tanh(self.body(x))))


def train(variant):
    micro = 2 if variant == "accumulate" else 1
    accelerator.gradient_accumulation_steps = micro
    torch.manual_seed(0)
    model = Model()
    if variant in ("fused", "bf16"):  # with an eps that lets the size of the gradient matter
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=0.1, fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    data = torch.Generator().manual_seed(1)
    share = BATCH // accelerator.num_processes
    for _ in range(STEPS):
        x = torch.randn(BATCH, 13, generator=data)
        mine = x[accelerator.process_index * share :][:share]
        for part in mine.chunk(micro):
            with accelerator.accumulate(model):
                target = part[:, :1].sin() * 9 + part[:, 1:2]
                accelerator.backward(torch.nn.functional.mse_loss(model(part).float(), target))
                if (variant == "norm" and accelerator.sync_gradients) or variant == "accumulate":
                    accelerator.clip_grad_norm_(model.parameters(), 1e-9)
                elif variant == "value":
                    accelerator.clip_grad_value_(model.parameters(), 1e-9)
                elif variant == "parts":  # the middle is not clipped
                    for module in ("head", "body"):
                        part_of = [p for n, p in model.named_parameters() if module in n]
                        accelerator.clip_grad_norm_(part_of, 1e-9)
                optimizer.step()
                optimizer.zero_grad()
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            whole = [p.detach().clone() for p in model.parameters()]
    else:
        parameters = [p.detach() for p in model.parameters()]
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
    kinds.add(type(model).__name__)
    accelerator.free_memory()
    return torch.cat([p.flatten() for p in whole]).tolist()


result = {variant: train(variant) for variant in VARIANTS[:-1]}
AcceleratorState._reset_state(reset_partial_state=True)  # or it refuses another precision
accelerator = Accelerator(mixed_precision="bf16")
result["bf16"] = train("bf16")
result["models"] = sorted(kinds)
result["ranks"] = accelerator.num_processes
result["kind"] = accelerator.distributed_type.value
if accelerator.is_main_process:
    with open(sys.argv[1], "w") as file:
        json.dump(result, file)
accelerator.wait_for_everyone()
accelerator.end_training()
