"""FSDP2 within pipeline stages, in torchtitan's manner; on one process the whole model.

python train_titan.py FOLDER
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor

LAYERS, WIDTH, BATCH, STEPS, MICRO = 4, 6, 8, 20, 2


class OptimizersContainer(torch.optim.Optimizer):
    """One optimizer for each model part, stepped as one."""

    def __init__(self, model_parts):
        self.optimizers = [
            torch.optim.SGD(part.parameters(), lr=0.5, momentum=0.9) for part in model_parts
        ]
        super().__init__([p for part in model_parts for p in part.parameters()], {})

    def step(self, *args, **kwargs):
        for optimizer in self.optimizers:
            optimizer.step(*args, **kwargs)

    def zero_grad(self, *args, **kwargs):
        for optimizer in self.optimizers:
            optimizer.zero_grad(*args, **kwargs)


@torch.no_grad()
def clip_grad_norm_(parameters, max_norm, pp_mesh):
    grads = [p.grad for p in parameters if p.grad is not None]
    total_norm = torch.nn.utils.get_total_norm(grads, 2.0, False, None)
    if isinstance(total_norm, DTensor):
        total_norm = total_norm.full_tensor()
    if pp_mesh is not None:
        total_norm **= 2
        dist.all_reduce(total_norm, group=pp_mesh.get_group())
        total_norm **= 0.5
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total_norm, None)
    return total_norm


world = int(os.environ.get("WORLD_SIZE", "1"))
torch.manual_seed(3)
whole = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)))
pp_mesh = schedule = None
parts = [whole]
if world > 1:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("pp", "dp"))
    pp_mesh, place = mesh["pp"], mesh["pp"].get_local_rank()
    part = nn.Sequential()
    for number in range(place * LAYERS // 2, (place + 1) * LAYERS // 2):
        part.add_module(str(number), whole[number])
        if world > 2:
            fully_shard(part[-1], mesh=mesh["dp"])
    if world > 2:
        fully_shard(part, mesh=mesh["dp"])
    parts = [part]
    del whole
    stage = PipelineStage(part, place, 2, torch.device("cpu"), group=pp_mesh.get_group())
    schedule = Schedule1F1B(stage, MICRO, loss_fn=nn.functional.mse_loss)

optimizers = OptimizersContainer(parts)
data = torch.Generator().manual_seed(0)
norms = []
for _ in range(STEPS):
    x, y = torch.randn(BATCH, WIDTH, generator=data), torch.randn(BATCH, WIDTH, generator=data)
    optimizers.zero_grad()
    if schedule is None:
        nn.functional.mse_loss(parts[0](x), y).backward()
    elif place == 0:
        schedule.step(x)
    else:
        schedule.step(target=y)
    parameters = [p for part in parts for p in part.parameters()]
    norms.append(clip_grad_norm_(parameters, 1.0, pp_mesh).item())
    optimizers.step()

weights = {
    name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
    for part in parts
    for name, p in part.named_parameters()
}
rank = dist.get_rank() if world > 1 else 0
torch.save({"weights": weights, "norms": norms}, f"{sys.argv[1]}/rank{rank}.pt")
