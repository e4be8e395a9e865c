"""``distclip verify --model``: the user's own model, wrapped in every way, against the oracle.

Every rank builds the same module and the same batch, so that the averaged gradient is the one of a
single process. The gradients of the wrapped model are gathered whole: they must be those of the
unwrapped one, up to rounding; clipped, they must be what the oracle makes of them, to one rounding.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distclip.clipper import GradClipper
from distclip.errors import ConfigurationError, DistclipError
from distclip.layouts.names import without_wrappers
from distclip.testing import expected
from distclip.testing.cases import POLICIES, ROUNDINGS
from distclip.tools.verify.cells import Found, build, judge, together

WRAPPINGS: dict[str, str] = {
    "ddp": "DistributedDataParallel",
    "fsdp1": "FullyShardedDataParallel, FULL_SHARD, use_orig_params",
    "fsdp2": "fully_shard over all ranks",
    "hsdp": "fully_shard over a 2-D mesh of at least 2 x 2 ranks",
}

BACKWARD_ERROR = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
"""Of a gradient of the wrapped model, relative to its norm: sums are taken in another order."""


def load_target(spec: str, option: str) -> Callable[[], Any]:
    """The callable that ``package.module:name`` names.

    Raises:
        ConfigurationError: there is none.
    """
    module, _, name = spec.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in (name or "?").split("."):
            found = getattr(found, part)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit: of a script that was meant to be run
        what = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise ConfigurationError(
            f"verify: {option} {spec}: {what}{error}; name a function as package.module:function, "
            f"of a module that can be imported from here"
        ) from None
    if not callable(found):
        raise ConfigurationError(f"verify: {option} {spec} is no function but {found!r}")
    return found  # type: ignore[no-any-return]


def run_group_on_model(
    layout: str, dtype: str, labels: Sequence[str], model: str, batch: str
) -> list[Found]:
    """Every listed policy on the user's model; to be called on every rank.

    Args:
        layout: one of ``WRAPPINGS``.
        dtype: the model and the batch are cast to it.
        labels: keys of ``POLICIES``.
        model: ``module:function`` that gives an unsharded module.
        batch: ``module:function`` that gives a batch.
    """
    if layout == "hsdp" and (dist.get_world_size() < 4 or dist.get_world_size() % 2):
        return [Found("not run", "needs an even number of ranks, at least 4")] * len(labels)
    kind = getattr(torch, dtype)
    data = _cast(load_target(batch, "--batch")(), kind)
    alone = _made(model, kind)
    _backward(alone, data)
    truth = {without_wrappers(n): p.grad for n, p in alone.named_parameters()}
    try:
        unused = any(p.requires_grad and p.grad is None for p in alone.parameters())
        module = _wrapped(_made(model, kind), layout, unused=unused)
        GradClipper(module, build({"name": "measure"}))
    except (DistclipError, ValueError, TypeError, NotImplementedError) as error:
        return [Found("not run", f"{type(error).__name__}: {error}")] * len(labels)
    _backward(module, data)
    weights, gradients = _gathered(module)
    faults = together(_compared(gradients, truth, BACKWARD_ERROR[dtype]))
    if faults:
        return [Found("failed", "\n".join(faults))] * len(labels)
    kept = [None if g is None else g.clone() for g in _locals(module)]
    results = []
    for label in labels:
        start = time.perf_counter()
        for gradient, saved in zip(_locals(module), kept, strict=True):
            if gradient is not None and saved is not None:
                gradient.copy_(saved)
        wrong = _faults(module, label, weights, gradients, exact=dtype == "float32")
        seconds = time.perf_counter() - start
        results.append(Found("failed" if wrong else "passed", "\n".join(wrong), seconds))
    return results


def _faults(
    module: nn.Module,
    label: str,
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    *,
    exact: bool,
) -> list[str]:
    configuration = POLICIES[label]
    want = expected(configuration, gradients, weights)
    policy = build(configuration)
    report = GradClipper(module, policy).clip_()
    clipped = _gathered(module)[1]
    parts = ((name, gradient, want.gradients[name]) for name, gradient in clipped.items())
    return judge(policy, report, want, parts, exact=exact, roundings=ROUNDINGS.get(label, 1))


def _made(model: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    module = load_target(model, "--model")()
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            f"verify: --model {model} gave a {type(module).__name__}, not a torch.nn.Module"
        )
    return module.to(dtype)


def _wrapped(module: nn.Module, layout: str, *, unused: bool) -> nn.Module:
    world = dist.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(module, find_unused_parameters=unused)
    if layout == "fsdp1":
        return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))
    names = ("replicate", "shard")
    mesh = (
        init_device_mesh("cpu", (world,), mesh_dim_names=names[1:])
        if layout == "fsdp2"
        else init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=names)
    )
    fully_shard(module, mesh=mesh)
    return module


def _backward(module: nn.Module, data: Any) -> None:
    torch.manual_seed(0)
    if isinstance(data, Mapping):
        output = module(**data)
    elif isinstance(data, (tuple, list)):
        output = module(*data)
    else:
        output = module(data)
    torch.autograd.backward(loss_of(output))


def loss_of(output: Any) -> Tensor:
    """The loss that a model's output has or is; of any other tensor the mean of its squares."""
    if isinstance(output, Mapping) and "loss" in output:
        output = output["loss"]
    elif isinstance(getattr(output, "loss", None), Tensor):
        output = output.loss
    elif isinstance(output, (tuple, list)):
        output = output[0]
    if not isinstance(output, Tensor):
        raise ConfigurationError(
            f"verify: the model gave a {type(output).__name__}; it must give a tensor (a loss, or "
            f"any other), a tuple that begins with one, or something that has a loss"
        )
    return output if output.dim() == 0 else output.float().square().mean()


def _cast(data: Any, dtype: torch.dtype) -> Any:
    if isinstance(data, Tensor):
        return data.to(dtype) if data.is_floating_point() else data
    if isinstance(data, Mapping):
        return {key: _cast(value, dtype) for key, value in data.items()}
    if isinstance(data, (tuple, list)):
        return [_cast(value, dtype) for value in data]
    return data


def _locals(module: nn.Module) -> list[Tensor | None]:
    gradients = [parameter.grad for parameter in module.parameters()]
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


def _gathered(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Whole weights and gradients, by clean name, on every rank."""
    if isinstance(module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(module, writeback=False, with_grads=True):
            return _copies(module)
    return _copies(module)


def _copies(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    named = [(without_wrappers(name), p) for name, p in module.named_parameters()]
    weights = {name: _full(p.detach()) for name, p in named}
    return weights, {name: None if p.grad is None else _full(p.grad) for name, p in named}


def _full(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.clone()


def _compared(
    gradients: Mapping[str, Tensor | None], truth: Mapping[str, Tensor | None], most: float
) -> list[str]:
    """Whether the wrapped model's gradients are those of one process."""
    faults = []
    scale = max((float(g.double().norm()) for g in truth.values() if g is not None), default=0.0)
    for name, gradient in gradients.items():
        alone = truth[name]
        if gradient is None or alone is None:
            if alone is not None and bool(alone.any()):
                faults.append(f"no gradient of {name!r}, which has one in one process")
            continue
        error = float((gradient.double() - alone.double()).norm())
        if not error <= most * max(float(alone.double().norm()), 1e-3 * scale):
            faults.append(
                f"before clipping, the gradient of {name!r} is not that of one process: it is off "
                f"by {error:.3g} of {float(alone.double().norm()):.3g}. The wrapper or the model "
                f"(randomness?) is to blame, not the clipping"
            )
    return faults
