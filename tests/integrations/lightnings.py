"""Trainers and Fabrics of Lightning on the ranks of the pool, and modules that they train."""

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.helpers.shards import full
from tests.integrations.accelerated import batch, loss_of, make, sgd

warnings.filterwarnings("ignore", module="torch.distributed.fsdp")
Optimizers = Callable[[nn.Module], Any]


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(x: Tensor, data: int) -> Tensor:
    """This rank's rows of a batch, with ``data`` ranks that have different ones."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return x.chunk(data)[rank // (world() // data)]


def package(name: str) -> Any:
    """``lightning.pytorch`` or ``pytorch_lightning``."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    return importlib.import_module(name)


class Batches(torch.utils.data.IterableDataset[Tensor]):
    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __iter__(self) -> Iterator[Tensor]:
        return (batch(number) for number in range(self.first, self.count))


def wide() -> nn.Module:
    """For tensor parallelism, which wants sizes that the ranks can divide."""
    model = make()
    torch.manual_seed(1)
    model.body, model.head = nn.Linear(5, 8), nn.Linear(8, 1)
    return model


def shard(net: nn.Module, mesh: Any) -> nn.Module:
    """FSDP2 over the data, tensor parallelism over the rest of a mesh of Lightning."""
    if mesh["tensor_parallel"].size() > 1:
        plan = {"body": ColwiseParallel(), "head": RowwiseParallel()}
        parallelize_module(net, mesh["tensor_parallel"], plan)
    if mesh["data_parallel"].size() > 1:
        fully_shard(net, mesh=mesh["data_parallel"])
    return net


def module_of(pl: Any, optimizers: Optimizers = sgd, *, net: Any = make, data: int = 1) -> Any:
    """A module for automatic optimization."""

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def configure_model(self) -> None:
            mesh = getattr(self, "_device_mesh", None)
            if mesh is not None:
                shard(self.net, mesh)

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return loss_of(self.net, mine(x, data))

        def configure_optimizers(self) -> Any:
            return optimizers(self.net)

    return Module()


def environment() -> None:
    ranks = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank()}
    sizes = {"WORLD_SIZE": world(), "LOCAL_WORLD_SIZE": world(), "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in (ranks | sizes).items()}


def wrapped(strategy: Any, module: nn.Module) -> nn.Module:
    """In place of Lightning's, which knows no device for FSDP1 on a machine without a GPU."""
    return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))


def strategy_of(layout: str, strategies: Any, environments: Any) -> Any:
    """A strategy that uses the process group of the pool."""
    if world() == 1:
        return "auto"
    environment()
    options = {"cluster_environment": environments.TorchElasticEnvironment()}
    if layout == "ddp":
        return strategies.DDPStrategy(process_group_backend="gloo", **options)
    if layout == "fsdp1":  # Lightning refuses its own class on the CPU
        own = type("OnCPU", (strategies.FSDPStrategy,), {"_setup_model": wrapped})
        return own(process_group_backend="gloo", **options)
    tensor = 2 if layout == "tp" else 1
    strategy = strategies.ModelParallelStrategy(world() // tensor, tensor)
    strategy.cluster_environment = options["cluster_environment"]
    return strategy


def trainer_of(folder: Path, layout: Any, callbacks: list[Any], pl: Any, **options: Any) -> Any:
    """``layout``: a name, or a strategy."""
    strategies = importlib.import_module(f"{pl.__name__}.strategies")
    environments = importlib.import_module(f"{pl.__name__}.plugins.environments")
    named = isinstance(layout, str)
    return pl.Trainer(
        accelerator="cpu",
        devices=world(),
        strategy=strategy_of(layout, strategies, environments) if named else layout,
        callbacks=callbacks,
        **{
            "default_root_dir": folder,
            "max_epochs": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "logger": False,
            **options,
        },
    )


def fit(trainer: Any, module: Any, steps: int, first: int = 0, **options: Any) -> None:
    loader = torch.utils.data.DataLoader(Batches(first, steps), batch_size=None)
    trainer.fit(module, loader, **options)


def whole(module: Any) -> dict[str, Tensor]:
    """Whole weights by the names of the bare model."""

    def gathered(net: nn.Module) -> dict[str, Tensor]:
        return {
            name.split("net.")[-1]: full(p).detach().clone() for name, p in net.named_parameters()
        }

    wrapped = module.trainer.strategy.model if hasattr(module, "trainer") else module
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            return gathered(module)
    return gathered(module.net if hasattr(module, "net") else module)


def fabric_of(layout: str, callbacks: list[Any], **options: Any) -> Any:
    """A Fabric on the ranks of the pool; ``setup`` models and optimizers with :func:`prepared`."""
    from lightning.fabric import Fabric, strategies
    from lightning.fabric.plugins import environments

    strategy: Any = "auto"
    if world() > 1:
        environment()
        elastic = environments.TorchElasticEnvironment()
        if layout == "ddp":
            strategy = strategies.DDPStrategy(
                cluster_environment=elastic, process_group_backend="gloo"
            )
        else:
            strategy = strategies.ModelParallelStrategy(shard, world(), 1)
            strategy.cluster_environment = elastic
    fabric = Fabric(
        accelerator="cpu", devices=world(), strategy=strategy, callbacks=callbacks, **options
    )
    fabric.launch()
    return fabric


def prepared(fabric: Any, layout: str, optimizers: Optimizers = sgd) -> tuple[Any, Any]:
    """A model and its optimizer, as Fabric wants them of each strategy."""
    if layout == "ddp":
        net = make()
        found: tuple[Any, Any] = fabric.setup(net, optimizers(net))
        return found
    model = fabric.setup_module(make())
    return model, fabric.setup_optimizers(optimizers(model))
