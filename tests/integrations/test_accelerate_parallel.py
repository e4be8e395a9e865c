"""Accelerate's ``ParallelismConfig``: sharded, replicated, tensor parallel, against one process."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("accelerate.parallelism_config", reason="Accelerate below 1.10")

import distclip
from distclip.tools.launch import accelerate_cpu
from tests.integrations.accelerated import (
    Reference,
    batch,
    clip_all,
    loss_of,
    make,
    mine,
    same,
    sgd,
    start,
    whole,
)

pytestmark = pytest.mark.filterwarnings("ignore")

POLICY: list[dict[str, Any]] = [
    {"name": "agc", "clip_factor": 0.2},
    {"name": "global_norm", "max_norm": 0.5},
]
STEPS = 10
SIZES: dict[int, dict[str, dict[str, int]]] = {
    2: {"fsdp2": {"dp_shard_size": 2}, "ddp": {"dp_replicate_size": 2}},
    4: {"fsdp2": {"dp_replicate_size": 2, "dp_shard_size": 2}},
}


def config_of(sizes: dict[str, int]) -> Any:
    from accelerate import ParallelismConfig

    return ParallelismConfig(**sizes)


@pytest.mark.ranks(2, 4, timeout=180)
def test_sharded_and_replicated(world_size: int) -> None:
    for layout, sizes in SIZES[world_size].items():
        accelerator = start(layout, parallelism_config=config_of(sizes))
        handle = distclip.accelerate.attach(accelerator, {"policy": POLICY})
        made = make()
        model, optimizer = accelerator.prepare(made, sgd(made))
        accelerate_cpu.verify_ranks(accelerator, model)
        reference_model = make()
        reference = Reference(reference_model, sgd(reference_model))
        for number in range(STEPS):
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, mine(batch(number))))
            norm = clip_all(accelerator, model)
            optimizer.step()
            reference.update(POLICY, loss_of(reference_model, batch(number)))
            assert float(norm) == pytest.approx(reference.norms[-1], rel=1e-5), (layout, number)
        same(whole(model), dict(reference_model.named_parameters()))
        assert handle.last_report.coefficient < 0.9
        handle.remove()
        for name in [n for n in os.environ if n.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))]:
            del os.environ[name]


@pytest.mark.ranks(2, timeout=180)
def test_a_model_that_is_tensor_parallel_when_it_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("transformers.distributed.mixin", reason="transformers below 5.20")
    from transformers.distributed import DistributedConfig

    from tests.integrations.test_trainer_parallel import make as pretrained

    accelerator = start("ddp", parallelism_config=config_of({"tp_size": 2}))
    if dist.get_rank() == 0:
        pretrained("dense").save_pretrained(tmp_path)
    dist.barrier()
    made = type(pretrained("dense")).from_pretrained(
        tmp_path, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"),
        dtype=torch.float32,
    )  # fmt: skip
    handle = distclip.accelerate.attach(accelerator, {"policy": POLICY})
    model, optimizer = accelerator.prepare(made, sgd(made))
    accelerate_cpu.verify_ranks(accelerator, model)
    alone = pretrained("dense")
    reference = Reference(alone, sgd(alone))
    for number in range(STEPS):
        ids = torch.randint(17, (4, 9), generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        norm = clip_all(accelerator, model)
        optimizer.step()
        reference.update(POLICY, alone(input_ids=ids, labels=ids).loss)
        assert float(norm) == pytest.approx(reference.norms[-1], rel=1e-5), number
    same(whole(model), dict(alone.named_parameters()), 1e-5)
    handle.remove()


class Gather(torch.autograd.Function):
    """The tokens of all ranks, along dim 1; backward adds what all ranks ask of this rank's."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: Any) -> Tensor:
        ctx.group = group
        everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyones, mine.contiguous(), group=group)
        return torch.cat(everyones, 1)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None]:
        total = given[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        place, count = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        return total.chunk(count, 1)[place], None


class Attention(nn.Module):
    """Of every token to every token, whose order does not matter; each rank has some tokens.

    In place of torch's ring attention, which is for the attention functions of CUDA.
    """

    def __init__(self, group: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.group = group
        self.norm = nn.LayerNorm(6)
        self.query, self.key, self.value = (nn.Linear(6, 5) for _ in range(3))
        self.out = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        key, value = self.key(x), self.value(x)
        if self.group is not None:
            key, value = Gather.apply(key, self.group), Gather.apply(value, self.group)
        return self.out(x[..., :5] + (self.query(x) @ key.mT).softmax(-1) @ value).square().mean()


@pytest.mark.ranks(2, 4, timeout=180)
def test_context_parallel(world_size: int) -> None:
    """Accelerate's mesh and its sharding of sequences, with an attention that CPU ranks have."""
    sizes = {"cp_size": 2, "dp_shard_size": world_size // 2}
    accelerator = start("fsdp2", parallelism_config=config_of(sizes))
    handle = distclip.accelerate.attach(accelerator, {"policy": POLICY})
    made = Attention(accelerator.torch_device_mesh["cp"].get_group())
    model, optimizer = accelerator.prepare(made, sgd(made))
    alone = Attention()
    reference = Reference(alone, sgd(alone))
    for number in range(STEPS):
        x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(number)) * 3
        rows = x.chunk(world_size // 2)[dist.get_rank() // 2].clone()
        optimizer.zero_grad()
        with accelerator.maybe_context_parallel(buffers=[rows], buffer_seq_dims=[1]):
            assert rows.shape[1] == 4
            accelerator.backward(model(rows))
            norm = clip_all(accelerator, model)
            optimizer.step()
        reference.update(POLICY, alone(x))
        assert float(norm) == pytest.approx(reference.norms[-1], rel=1e-5), number
    same(whole(model), dict(alone.named_parameters()))
    assert handle.last_report.coefficient < 0.9
    handle.remove()
