"""DeepSpeed engines on gloo ranks, beside the same training in one process on the whole batch."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distclip.testing import expected

# The shared-memory op would be compiled at first use.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


class Model(nn.Module):
    """Shapes that no number of ranks divides; a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.fc = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.out = nn.Linear(13, 3)
        self.unused = nn.Linear(3, 5, bias=False)
        self.frozen = nn.Linear(13, 13, bias=False)
        self.frozen.weight.requires_grad_(False)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.fc(self.embed(ids))))
        return nn.functional.mse_loss(self.out(x + self.frozen(x)).float(), target)


def model(kind: str = "fp32") -> Model:
    torch.manual_seed(0)
    made = Model()
    if kind != "fp32":  # so that both sides start from the same numbers
        for p in made.parameters():
            p.data = p.data.to(DTYPES[kind]).float()
    return made


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def batch(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This rank's share of 12 examples; errors large enough for every policy to bite."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(11, (12,), generator=generator)
    target = torch.randn(12, 3, generator=generator) * 4
    return ids[rank::world], target[rank::world]


def optimizer_of(parameters: Any, name: str = "sgd") -> torch.optim.Optimizer:
    if name == "adam":  # with an eps that lets the size of the gradient matter
        return torch.optim.AdamW(parameters, lr=0.05, eps=1.0, weight_decay=0.1)
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    ps = [p for p in module.parameters() if p.requires_grad]
    return [{"params": ps[:2]}, {"params": ps[2:], "lr": 0.03}]


def json_of(stage: int, kind: str = "fp32", **changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 12 // dist.get_world_size(),
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, **changes.pop("zero", {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if kind != "fp32":
        document[kind] = {"enabled": True}
    if kind == "fp16":
        document[kind]["initial_scale_power"] = 6
    for key, value in changes.items():
        document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
    return document


def engine_of(
    document: dict[str, Any], kind: str = "fp32", optimizer: str = "sgd", groups: bool = False
) -> Any:
    made = model(kind)
    parameters: Any = (
        groups_of(made) if groups else [p for p in made.parameters() if p.requires_grad]
    )
    client = None if "optimizer" in document else optimizer_of(parameters, optimizer)
    given = {} if client is not None else {"model_parameters": parameters}
    return deepspeed.initialize(
        model=made,
        optimizer=client,
        config=copy.deepcopy(document),
        dist_init_required=False,
        **given,
    )[0]


def step(engine: Any, number: int, micro: int = 1) -> None:
    world = dist.get_world_size()
    for part in range(micro):
        ids, target = batch(number * micro + part, dist.get_rank(), world)
        engine.backward(engine(ids, target))
        if (
            engine.managed_gradient_accumulation()
            if hasattr(engine, "managed_gradient_accumulation")
            else True
        ):
            engine.step()
    if hasattr(engine, "managed_gradient_accumulation") and not (
        engine.managed_gradient_accumulation()
    ):
        engine.step()


def weights_of(engine: Any) -> dict[str, Tensor]:
    """The whole fp32 weights, gathered by DeepSpeed's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        master = None
        if hasattr(p, "ds_id") or getattr(p, "_hp_mapping", "absent") != "absent":
            master = safe_get_full_fp32_param(p)
        found[name] = (
            (p if master is None else master)
            .detach()
            .float()
            .clone()
            .view(getattr(p, "ds_shape", p.shape))
        )
    return found


def close(engine: Any) -> None:
    if getattr(engine, "_distclip", None) is not None:
        engine._distclip.remove()
    engine.destroy()
    gc.collect()


class Reference:
    """The same training in one process in fp32, clipped by the float64 oracle."""

    def __init__(
        self,
        policy: Any,
        kind: str = "fp32",
        optimizer: str = "sgd",
        *,
        groups: bool = False,
        micro: int = 1,
        skip: Sequence[int] = (),
    ) -> None:
        self.model = model(kind)
        self.policy, self.micro, self.skip = policy, micro, skip
        self.numbers = {}
        parameters: Any = [p for p in self.model.parameters() if p.requires_grad]
        listed = groups_of(self.model)
        self.numbers = {id(p): n for n, g in enumerate(listed) for p in g["params"]}
        self.grouped = groups
        self.optimizer = optimizer_of(listed if groups else parameters, optimizer)

    def step(self, number: int) -> Any:
        self.optimizer.zero_grad()
        for part in range(self.micro):
            ids, target = batch(number * self.micro + part, 0, 1)
            (self.model(ids, target) / self.micro).backward()
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        for p in named.values():  # DeepSpeed steps unused parameters with gradient 0
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        want = expected(
            self.policy,
            {n: p.grad.double().numpy() for n, p in named.items()},
            {n: p.detach().double().numpy() for n, p in named.items()},
            groups={n: self.numbers[id(p)] if self.grouped else 0 for n, p in named.items()},
        )
        if number not in self.skip:
            for n, p in named.items():
                p.grad = torch.from_numpy(np.asarray(want.gradients[n])).float()
            self.optimizer.step()
        return want

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}


Check = Callable[[Any], None]
