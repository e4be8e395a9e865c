"""A Lightning script under ``distclip run``, unchanged, that starts its second rank itself.

That rank does not go through ``distclip run``: the entry points give it the same policy.
"""

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from tests.helpers.processes import python, well
from tests.integrations.accelerated import same
from tests.integrations.lightning_runs import SPEC, reference

SCRIPT = """
import torch
import lightning as L
from tests.integrations.accelerated import batch, loss_of, make, sgd
from tests.integrations.lightnings import Batches

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make()

    def training_step(self, x, index):
        return loss_of(self.net, x.chunk(self.trainer.world_size)[self.global_rank])

    def configure_optimizers(self):
        return sgd(self.net)

quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False,
             enable_progress_bar=False, enable_model_summary=False)
module = Module()
trainer = L.Trainer(devices=2, strategy="ddp", max_epochs=1, use_distributed_sampler=False, **quiet)
trainer.fit(module, torch.utils.data.DataLoader(Batches(0, 5), batch_size=None))
net = make()
fabric = L.Fabric(accelerator="cpu", devices=1)
model, optimizer = fabric.setup(net, sgd(net))
for number in range(5):
    optimizer.zero_grad()
    fabric.backward(loss_of(model, batch(number)))
    optimizer.step()
torch.save([trainer.world_size, module.net.state_dict(), net.state_dict()],
           f"rank{trainer.global_rank}.pt")
"""


@pytest.mark.skipif(
    "distclip" not in entry_points(group="lightning.pytorch.callbacks_factory").names,
    reason="distclip is not installed",
)
def test_two_ranks_and_a_fabric(tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(json.dumps({"policy": SPEC}))
    (tmp_path / "train.py").write_text(SCRIPT)
    command = ("-m", "distclip", "run", "--config", "policy.json", "train.py")
    done = python(*command, folder=tmp_path)
    well(done)
    assert "clipped nothing" not in done.stderr
    want, _ = reference(5)
    for rank in range(2):
        world, weights, of_fabric = torch.load(tmp_path / f"rank{rank}.pt")
        assert world == 2
        same(weights, want)
        same(of_fabric, want)
