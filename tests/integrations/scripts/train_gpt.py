"""A small GPT on text, on one process or under torchrun with DDP: micro-batches, AMP-ready, a clip.

python train_gpt.py FOLDER
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

out, steps, batch, block, micro, grad_clip = sys.argv[1], 20, 8, 16, 2, 1.0
text = "the norm of a gradient is the norm of the whole gradient, not of a shard of it. " * 8
chars = sorted(set(text))
data = torch.tensor([chars.index(c) for c in text])

ddp = int(os.environ.get("RANK", -1)) != -1
if ddp:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
else:
    rank, world = 0, 1
assert batch % (world * micro) == 0


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.heads = heads

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.attn(self.ln_1(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(len(chars), width), nn.Embedding(block, width)
        self.h = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, len(chars), bias=False)
        self.wte.weight = self.lm_head.weight  # tied

    def forward(self, ids, targets):
        x = self.wte(ids) + self.wpe.weight
        for layer in self.h:
            x = layer(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self):
        decay = [p for p in self.parameters() if p.dim() >= 2]
        no_decay = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3, betas=(0.9, 0.95))


torch.manual_seed(1337)
raw_model = model = GPT()
optimizer = raw_model.configure_optimizers()
if ddp:
    model = DDP(model)
generator = torch.Generator().manual_seed(0)
norms = []
for _ in range(steps):
    starts = torch.randint(len(data) - block - 1, (batch,), generator=generator)
    starts = starts.chunk(world)[rank]
    for number, part in enumerate(starts.chunk(micro)):
        last = number == micro - 1
        with contextlib.nullcontext() if last or not ddp else model.no_sync():
            x = torch.stack([data[i : i + block] for i in part])
            y = torch.stack([data[i + 1 : i + block + 1] for i in part])
            (model(x, y) / micro).backward()
    norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

if rank == 0:
    weights = {name: p.detach() for name, p in raw_model.named_parameters()}
    torch.save({"weights": weights, "norms": norms}, f"{out}/rank0.pt")
if ddp:
    dist.destroy_process_group()
