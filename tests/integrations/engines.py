"""DeepSpeed engines on gloo ranks, beside the same training in one process on the whole batch."""

import contextlib
import copy
import gc
import logging
from collections.abc import Iterator
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
# torch computes in fp16 on every CPU; DeepSpeed asks oneDNN, which does so on few.
deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True


if dist.is_initialized():  # on a rank, where every engine ends with a collection: see `close`
    gc.collect()
    gc.freeze()  # some 500,000 objects of the imports, 0.2 s each time

VERSION = tuple(map(int, deepspeed.__version__.split("+")[0].split(".")[:2]))


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
        wide = torch.promote_types(target.dtype, torch.float32)
        # Of one dtype: torch 2.9 has no backward of a mixed loss.
        return nn.functional.mse_loss(self.out(x + self.frozen(x)).to(wide), target.to(wide))


def model() -> Model:
    torch.manual_seed(0)
    return Model()


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


def groups_of(ps: list[Any]) -> list[dict[str, Any]]:
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
    if kind == "fp16":  # starts low enough for the first step not to overflow
        document[kind]["initial_scale_power"] = 6
    for key, value in changes.items():
        document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
    return document


def engine_of(
    document: dict[str, Any], optimizer: str = "sgd", *, groups: bool = False, made: Any = None
) -> Any:
    made = model() if made is None else made
    parameters: Any = [p for p in made.parameters() if p.requires_grad]
    parameters = groups_of(parameters) if groups else parameters
    client = None if "optimizer" in document else optimizer_of(parameters, optimizer)
    given = {} if client is not None else {"model_parameters": parameters}
    return deepspeed.initialize(
        model=made,
        optimizer=client,
        config=copy.deepcopy(document),
        dist_init_required=False,
        **given,
    )[0]


def backward(engine: Any, number: int, micro: int = 1, times: float = 1.0) -> float:
    """All micro-batches of a step; ``engine.step()`` is left out after the last.

    Returns this rank's loss, the mean over the micro-batches.
    """
    seen = 0.0
    managed = getattr(engine, "managed_gradient_accumulation", lambda: True)()
    for part in range(micro):
        ids, target = batch(number * micro + part, dist.get_rank(), dist.get_world_size())
        loss = engine(ids, target) * times
        seen += loss.item() / micro
        engine.backward(loss)
        if managed and part < micro - 1:
            engine.step()
    return seen


def step(engine: Any, number: int, micro: int = 1, times: float = 1.0) -> None:
    backward(engine, number, micro, times)
    engine.step()


def whole_masters(engine: Any) -> dict[int, Tensor]:
    """By id of the parameter, the masters of stage 0 in bf16, whose wrapper links nothing."""
    outer = engine.optimizer
    groups = zip(getattr(outer, "fp16_groups", ()), getattr(outer, "fp32_groups", ()), strict=False)
    return {id(p): m for ps, ms in groups for p, m in zip(ps, ms, strict=True)}


def weights_of(engine: Any) -> dict[str, Tensor]:
    """The whole weights that are stepped (fp32 masters), gathered by DeepSpeed's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param

    masters = whole_masters(engine)
    found = {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        master = masters.get(id(p))
        # Where the model itself is in fp32, it says what was stepped: `_hp_mapping`, which
        # DeepSpeed's function goes by, is wrong under round_robin_gradients.
        linked = getattr(p, "_hp_mapping", "absent") != "absent" and p.dtype != torch.float32
        if linked or hasattr(p, "ds_id"):
            master = safe_get_full_fp32_param(p)
        whole = p if master is None else master
        found[name] = whole.detach().float().clone().view(getattr(p, "ds_shape", p.shape))
    return found


def gradients_of(engine: Any) -> dict[str, Tensor]:
    """The whole averaged gradients before the step, float64, by DeepSpeed's own functions."""
    scale = float(getattr(engine.optimizer, "loss_scale", None) or 1.0)
    outer = engine.optimizer
    sums = {}  # BF16_Optimizer keeps them whole on every rank
    for ps, gs in zip(
        getattr(outer, "bf16_groups", ()), getattr(outer, "fp32_groups_gradients", ()), strict=True
    ):
        sums.update({id(p): g for p, g in zip(ps, gs, strict=True)})
    found = {}
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            if id(p) in sums:
                whole = sums[id(p)]
            elif hasattr(p, "ds_id"):
                whole = p._z3_optimizer.get_fp32_grad_for_param(p)
            elif getattr(p, "_hp_mapping", "absent") != "absent":
                whole = p.get_full_hp_grad()
            else:
                whole = torch.zeros_like(p) if p.grad is None else p.grad
            found[name] = whole.detach().double().view(getattr(p, "ds_shape", p.shape)) / scale
    return found


def close(engine: Any) -> None:
    if getattr(engine, "_distclip", None) is not None:
        engine._distclip.remove()
    engine.destroy()
    gc.collect()


@contextlib.contextmanager
def opened(document: dict[str, Any], *args: Any, **options: Any) -> Iterator[Any]:
    """An engine of `engine_of`, closed at the end."""
    engine = engine_of(document, *args, **options)
    try:
        yield engine
    finally:
        close(engine)


class Stepper:
    """A torch optimizer on whole weights, fed with gradients that the float64 oracle clips."""

    def __init__(
        self, policy: Any, named: dict[str, nn.Parameter], optimizer: str, groups: bool
    ) -> None:
        self.policy, self.named, self.grouped = policy, named, groups
        listed = groups_of(list(named.values()))
        self.numbers = {id(p): n for n, g in enumerate(listed) for p in g["params"]}
        self.optimizer = optimizer_of(listed if groups else list(named.values()), optimizer)
        self.largest = 0.0
        self.memory: dict[str, Any] = {}

    def step(
        self, gradients: dict[str, Tensor], *, skip: bool = False, loss: float | None = None
    ) -> Any:
        """Clip, and step unless told to skip. Returns what the oracle says."""
        want = expected(
            self.policy,
            gradients,
            self.named,
            groups={n: self.numbers[id(p)] if self.grouped else 0 for n, p in self.named.items()},
            memory=self.memory,
            loss=loss,
        )
        if not (skip or want.skipped):
            for name, p in self.named.items():
                clipped = torch.from_numpy(np.asarray(want.gradients[name]))
                self.largest = max(self.largest, float(clipped.abs().max()))
                p.grad = clipped.to(p.dtype)
            self.optimizer.step()
        return want

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.named.items()}


class Reference(Stepper):
    """The same training in one process, on the whole batch and in float64."""

    def __init__(
        self, policy: Any, optimizer: str = "sgd", *, groups: bool = False, micro: int = 1
    ) -> None:
        self.model, self.micro = model().double(), micro
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        super().__init__(policy, named, optimizer, groups)

    def train(self, number: int, *, skip: bool = False, times: float = 1.0) -> Any:
        gradients = [torch.zeros_like(p) for p in self.named.values()]  # unused: steps with zeros
        seen = 0.0
        for part in range(self.micro):
            ids, target = batch(number * self.micro + part, 0, 1)
            loss = self.model(ids, target.double()) * times / self.micro
            seen += float(loss)
            found = torch.autograd.grad(loss, list(self.named.values()), allow_unused=True)
            gradients = [g if f is None else g + f for g, f in zip(gradients, found, strict=True)]
        return self.step(dict(zip(self.named, gradients, strict=True)), skip=skip, loss=seen)


class Replay(Stepper):
    """Fp32 masters of their own, stepped with the very gradients that an engine holds.

    Whatever the precision of the model: how the engine came by its gradients does not enter, so
    that what is compared differs by the rounding of a few fp32 operations a step, :meth:`bound`.
    """

    def __init__(
        self, policy: Any, engine: Any, optimizer: str = "sgd", *, groups: bool = False
    ) -> None:
        named = {name: nn.Parameter(weight) for name, weight in weights_of(engine).items()}
        super().__init__(policy, named, optimizer, groups)
        # The dummy step inside `initialize` leaves weight decay in the momentum there.
        masters = whole_masters(engine)
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        for name, p in engine.module.named_parameters():
            if id(p) in masters:
                state = inner.state.get(masters[id(p)], {})
                self.optimizer.state[named[name]] = {k: v.clone() for k, v in state.items()}

    def bound(self, steps: int, roundoff: float = 0.0) -> float:
        """How far weights may be apart after so many steps of SGD.

        With unit roundoff u = 2**-24, each side: the clipped gradient is off by its coefficient
        (1e-6, what norms promise, and its rounding), the multiplication and the unscaling, 3 u;
        momentum, weight decay and the update round four times a step, relative to weights and to
        lr * momentum <= lr / (1 - 0.9) * the largest gradient. ``roundoff``: of what is done to the
        gradients in their own dtype.
        """
        u = 2.0**-24
        weight = max(float(p.detach().abs().max()) for p in self.named.values())
        reach = 0.05 / (1 - 0.9) * self.largest
        return reach * (roundoff + 1e-6 + 3 * u) + 2 * steps * 4 * u * (weight + reach)
