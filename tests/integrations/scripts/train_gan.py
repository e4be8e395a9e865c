"""A GAN on points of a ring: two models, two optimizers, under DDP or alone; clips nothing.

python train_gan.py FOLDER
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

distributed = "RANK" in os.environ
if distributed:
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)

torch.manual_seed(0)
net_g = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 2))
net_d = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
modules = net_g, net_d
if distributed:
    net_g = DistributedDataParallel(net_g)
    net_d = DistributedDataParallel(net_d)
optimizer_d = torch.optim.Adam(net_d.parameters(), lr=1e-2, betas=(0.5, 0.999), eps=1e-2)
optimizer_g = torch.optim.Adam(net_g.parameters(), lr=1e-2, betas=(0.5, 0.999), eps=1e-2)
criterion = nn.BCEWithLogitsLoss()
random = torch.Generator().manual_seed(1)

for _ in range(20):
    angle = torch.rand(16, 1, generator=random) * 6.2832
    real = torch.cat([angle.cos(), angle.sin()], 1).chunk(world)[rank]
    noise = torch.randn(16, 4, generator=random).chunk(world)[rank]

    net_d.zero_grad()
    fake = net_g(noise)
    pair = net_d(torch.cat([real, fake.detach()]))
    labels = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
    criterion(pair, labels).backward()
    optimizer_d.step()

    net_g.zero_grad()
    criterion(net_d(fake), torch.ones(len(real), 1)).backward()  # also into the discriminator
    optimizer_g.step()

if rank == 0:
    weights = {
        f"{name}.{n}": p.detach()
        for name, module in zip("GD", modules, strict=True)
        for n, p in module.named_parameters()
    }
    torch.save({"weights": weights, "norms": []}, f"{sys.argv[1]}/rank0.pt")
if distributed:
    dist.destroy_process_group()
