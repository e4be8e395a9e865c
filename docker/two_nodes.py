"""A training run of a few steps under FSDP2, on any number of nodes; every rank must agree.

Ends with exit code 0 if all ranks hold bitwise the same norm and coefficient, and the norm is that
of the gathered gradients. Run by docker/compose.yaml and tests/test_docker.py.
"""

from __future__ import annotations

import datetime
import os
import socket

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distclip
from distclip import policies
from distclip.tools.launch.leaving import let_gloo_finish


def main() -> None:
    """Train, and compare."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 3)).to(device)
    fully_shard(model, mesh=init_device_mesh(device, (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clipper = distclip.GradClipper(model, policies.global_norm(0.05))
    for step in range(3):
        torch.manual_seed(100 * step + rank)
        model(torch.randn(8, 16, device=device)).square().mean().backward()
        whole = [p.grad.full_tensor().double() for p in model.parameters()]
        wanted = torch.stack([each.norm() for each in whole]).norm().item()
        report = clipper.clip_()
        optimizer.step()
        optimizer.zero_grad()
        mine = report.total_norm.item(), report.coefficient.item()
        told = [None] * ranks
        dist.all_gather_object(told, mine)
        assert set(told) == {mine}, told
        assert abs(mine[0] / wanted - 1) < 1e-6, (mine, wanted)
        if rank == 0:
            print(f"step {step}: norm {mine[0]:.6f}, coefficient {mine[1]:.6f} on {ranks} ranks")
    hosts = [None] * ranks
    dist.all_gather_object(hosts, socket.gethostname())
    if rank == 0:
        print(f"{ranks} ranks on {len(set(hosts))} host(s) agree")
    dist.barrier()
    dist.destroy_process_group()
    let_gloo_finish()


if __name__ == "__main__":
    main()
