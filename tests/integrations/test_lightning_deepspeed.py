"""Lightning's Trainer and Fabric over DeepSpeed: the engine gets the policy.

Lightning's strategy asks for CUDA before it begins. Here that question is left out; all after it
is Lightning's and DeepSpeed's own, on CPU ranks.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lightning")
pytest.importorskip("deepspeed")

import distclip
from tests.integrations.accelerated import batch, loss_of, make, same, sgd
from tests.integrations.test_lightning import SPEC, reference

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 6


def strategy_of(kind: Any, elastic: Any, stage: int, section: Any) -> Any:
    """A ``DeepSpeedStrategy`` that does not ask for CUDA."""
    from tests.integrations.engines import json_of
    from tests.integrations.lightnings import environment

    class OnCPU(kind):  # type: ignore[misc]
        def setup_environment(self) -> None:
            super(kind, self).setup_environment()

        @property
        def parallel_devices(self) -> list[torch.device]:
            """With numbers, which both ask for."""
            return [torch.device("cpu", number) for number in range(dist.get_world_size())]

        @parallel_devices.setter
        def parallel_devices(self, devices: object) -> None: ...

    environment()
    os.environ.setdefault("MASTER_ADDR", "localhost")
    document = {**json_of(stage), **({} if section is None else {"distclip": section})}
    del document["gradient_accumulation_steps"]  # which the Trainer sets
    return OnCPU(config=document, cluster_environment=elastic, process_group_backend="gloo")


def compare(engine: Any, callback: Any, want: Any, norms: list[float]) -> None:
    from tests.integrations.engines import weights_of

    found = {name.split("net.")[-1]: w.double() for name, w in weights_of(engine).items()}
    same(found, {name: w.double() for name, w in want.items()})
    assert float(callback.last_report.total_norm) == pytest.approx(norms[-1], rel=1e-5)


@pytest.mark.ranks(2, 4, timeout=240)
@pytest.mark.parametrize("section", [None, {"policy": SPEC}], ids=["callback", "JSON"])
def test_the_engine_of_a_trainer_gets_the_policy(section: Any, tmp_path: Path) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DeepSpeedStrategy

    from tests.integrations.engines import close
    from tests.integrations.lightnings import fit, module_of, trainer_of

    want, norms = reference(STEPS)
    for stage in (2, 3):
        strategy = strategy_of(DeepSpeedStrategy, TorchElasticEnvironment(), stage, section)
        callback = distclip.lightning.ClipCallback({"policy": SPEC} if section is None else None)
        trainer = trainer_of(tmp_path, strategy, [callback], pl)
        fit(trainer, module_of(pl, data=dist.get_world_size()), STEPS)
        engine = trainer.strategy.model
        compare(engine, callback, want, norms)
        assert float(engine.get_global_grad_norm()) == pytest.approx(norms[-1], rel=1e-5)
        close(engine)


@pytest.mark.ranks(2, timeout=240)
def test_the_engine_of_a_fabric_gets_the_policy() -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.fabric.strategies import DeepSpeedStrategy

    from tests.integrations.engines import close
    from tests.integrations.lightnings import mine

    want, norms = reference(STEPS)
    strategy = strategy_of(DeepSpeedStrategy, TorchElasticEnvironment(), 2, None)
    callback = distclip.lightning.ClipCallback({"policy": SPEC})
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, callbacks=[callback])
    fabric.launch()
    net = make()
    model, optimizer = fabric.setup(net, sgd(net))
    for number in range(STEPS):
        fabric.backward(loss_of(model, mine(batch(number), 2)))
        optimizer.step()
        optimizer.zero_grad()
    engine = model._forward_module
    compare(engine, callback, want, norms)
    close(engine)
