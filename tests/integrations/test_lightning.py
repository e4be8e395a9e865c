"""Lightning's Trainer: one clip per step whatever is underneath, and decisions that survive."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("lightning")

import distclip
from distclip import ConfigurationError, policies
from distclip.config import Config
from distclip.monitor.tracking import metrics
from tests.helpers.logs import logged
from tests.integrations.accelerated import (
    LR,
    Halve,
    SkipAbove,
    adamw,
    batch,
    fused,
    loss_of,
    make,
    same,
    sgd,
)
from tests.integrations.lightning_runs import SPEC, clip_with, reference, trained

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.ranks(1, 2, 4, timeout=240)
def test_weights_and_norms_are_those_of_the_oracle(tmp_path: Path, world_size: int) -> None:
    from tests.integrations.lightnings import whole, wide

    layouts = {1: ["ddp"], 2: ["ddp", "fsdp1", "fsdp2"], 4: ["tp"]}[world_size]
    for layout in layouts:
        net = wide if layout == "tp" else make
        want, norms = reference(20, net=net)
        seen: list[float] = []
        callback = clip_with({"policy": SPEC})
        with logged() as messages:
            module = trained(tmp_path, layout, 20, callback, Norms(seen), net=net)
        assert not any("the script" in message for message in messages)  # which calls nothing
        same(whole(module), want)
        assert seen == pytest.approx(norms, rel=1e-5)
        assert float(callback.last_report.coefficient) < 0.9
        in_the_log(module, callback, threshold=True)
        optimizer = module.trainer.optimizers[0]
        assert not optimizer._optimizer_step_pre_hooks  # detached
        assert "configure_gradient_clipping" not in vars(module)


@pytest.mark.ranks(2, timeout=180)
def test_the_other_package(tmp_path: Path) -> None:
    from tests.integrations.lightnings import package, whole

    name = "pytorch_lightning"
    pl = package(name)
    callback = clip_with({"policy": SPEC})
    assert isinstance(callback, pl.Callback)
    assert isinstance(callback, distclip.lightning.ClipCallback)
    same(whole(trained(tmp_path, "ddp", 5, callback, package=name)), reference(5)[0])


def in_the_log(module: Any, callback: Any, threshold: bool) -> None:
    """All that trackers get, and nothing else."""
    logged = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
    want = metrics(callback.last_report.to_dict(per_parameter=False))
    assert ("clip_threshold" in want) == threshold
    assert logged == pytest.approx(want, rel=1e-6)


def Norms(found: list[float]) -> Any:
    """What the Trainer's log has of each step."""
    from lightning.pytorch import Callback

    class Reading(Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            found.append(float(trainer.callback_metrics["grad_norm"]))

    return Reading()


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("kind", [adamw, fused])
def test_accumulated_gradients_are_clipped_once(kind: Any, tmp_path: Path, world_size: int) -> None:
    from tests.integrations.lightnings import whole

    want, _ = reference(4, kind, parts=2)
    callback = clip_with({"policy": SPEC})
    module = trained(tmp_path, "ddp", 8, callback, optimizers=kind, accumulate_grad_batches=2)
    same(whole(module), want)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("kind", [sgd, fused])
def test_a_scaler_has_unscaled_before(kind: Any, tmp_path: Path) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    from tests.integrations.lightnings import whole

    class Full(MixedPrecision):  # type: ignore[misc]
        """With a scaler, and without the rounding of half precision."""

        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    plugin = Full("16-mixed", "cpu", scaler)
    callback = clip_with({"policy": SPEC})
    module = trained(tmp_path, "ddp", 8, callback, optimizers=kind, plugins=[plugin])
    want, norms = reference(8, kind)
    same(whole(module), want)
    assert float(callback.last_report.total_norm) == pytest.approx(norms[-1], rel=1e-5)
    assert scaler.get_scale() > 1024


def manual(kind: str) -> Any:
    """Two models, each with its own optimizer, that are trained by hand."""
    import lightning.pytorch as pl

    class Manual(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.one, self.two = make(0), make(1)
            self.found: list[Tensor] = []

        def training_step(self, x: Tensor, index: int) -> None:
            for optimizer, net in zip(self.optimizers(), (self.one, self.two), strict=True):
                if kind == "closure":
                    optimizer.step(closure=lambda o=optimizer, n=net: self.backward_of(o, n, x))
                    continue
                self.backward_of(optimizer, net, x)
                if kind == "torch":
                    self.found.append(nn.utils.clip_grad_norm_(net.parameters(), 1e-9))
                if kind == "calls":
                    self.clip_gradients(optimizer, 1e-9, "norm")
                    self.clip_gradients(optimizer, 1e-9, "value")
                optimizer.step()

        def backward_of(self, optimizer: Any, net: nn.Module, x: Tensor) -> None:
            optimizer.zero_grad()
            self.manual_backward(loss_of(net, x))

        def configure_optimizers(self) -> Any:
            return sgd(self.one), sgd(self.two)

    return Manual()


@pytest.mark.ranks(1)
@pytest.mark.parametrize("kind", ["plain", "calls", "closure"])
def test_manual_optimization_of_two_optimizers(kind: str, tmp_path: Path) -> None:
    callback = clip_with({"policy": SPEC})
    module = trained(tmp_path, "ddp", 6, callback, module=manual(kind))
    logged = module.trainer.callback_metrics
    for seed, net, key in ((0, module.one, "grad_norm"), (1, module.two, "grad_norm/1")):
        want, norms = reference(6, net=lambda seed=seed: make(seed))
        same({name: p.detach() for name, p in net.named_parameters()}, want)
        assert float(logged[key]) == pytest.approx(norms[-1], rel=1e-5)


def test_every_report_is_logged() -> None:
    """Also one that lies where an older one lay in memory."""
    from distclip.integrations.lightning_attachments import LightningAttachment

    callback = clip_with(Halve())
    callback.handle = handle = object.__new__(
        type("Known", (LightningAttachment,), {"_clip_called": None})
    )
    handle.last_report, handle.reports = None, {}
    logged: list[dict[str, float]] = []
    module = SimpleNamespace(log_dict=lambda values, **options: logged.append(values))
    trainer = SimpleNamespace(barebones=False, optimizers=["one", "two"])
    for number in range(9):
        for name in trainer.optimizers:
            values = {"total_norm": torch.tensor(number)}
            handle.reports[name] = SimpleNamespace(tensors=lambda values=values: values)
        callback.on_train_batch_end(trainer, module, None, None, number)
    assert [values.get("grad_norm/1") for values in logged] == list(range(9))
    assert [values.get("grad_norm") for values in logged] == list(range(9))
    callback.on_train_batch_end(trainer, module, None, None, 9)  # no step in this batch
    assert len(logged) == 9


@pytest.mark.ranks(1)
@pytest.mark.parametrize("scaled", [False, True])
def test_torchs_functions_return_the_norm_and_the_policy_clips(
    scaled: bool, tmp_path: Path
) -> None:
    """As ``distclip run`` has it, which replaces these functions."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    from tests.integrations.scripted import running

    class Full(MixedPrecision):  # type: ignore[misc]
        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    options = {"plugins": [Full("16-mixed", "cpu", scaler)]} if scaled else {}
    with running(Halve()) as scripts:
        callback = clip_with({"policy": SPEC})
        module = trained(tmp_path, "ddp", 4, callback, module=manual("torch"), **options)
        assert scripts.last_report is None
    for seed, net in ((0, module.one), (1, module.two)):
        want, norms = reference(4, net=lambda seed=seed: make(seed))
        same({name: p.detach() for name, p in net.named_parameters()}, want)
        assert [float(norm) for norm in module.found[seed::2]] == pytest.approx(norms, rel=1e-5)
    assert [state["step"] for state in callback.state_dict()["clippers"]] == [4, 4]


@pytest.mark.ranks(1)
def test_a_modules_own_clipping_gives_way(tmp_path: Path) -> None:
    from tests.integrations.lightnings import module_of, package, whole

    module = module_of(package("lightning.pytorch"))
    own = lambda self, optimizer, *a, **k: self.clip_gradients(optimizer, 1e-9, "norm")  # noqa: E731
    own.__module__ = __name__
    type(module).configure_gradient_clipping = own
    with logged() as messages:
        trained(tmp_path, "ddp", 3, clip_with(Halve()), module=module)
    assert [m for m in messages if "Module.configure_gradient_clipping is not called" in m]
    same(whole(module), reference(3, policy=0.5)[0])


@pytest.mark.ranks(1, 2)
def test_a_skipped_step_leaves_everything_alone(tmp_path: Path) -> None:
    from tests.integrations.lightnings import whole

    def optimizers(net: nn.Module) -> Any:
        optimizer = adamw(net)
        rates = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": rates, "interval": "step"}]

    for policy, rate in ((SkipAbove(0.0), LR), (SkipAbove(1e9), LR / 8)):
        callback = clip_with(policy)
        module = trained(tmp_path, "ddp", 3, callback, optimizers=optimizers)
        in_the_log(module, callback, threshold=False)
        assert float(module.trainer.callback_metrics["step_skipped"]) == (rate == LR)
        (optimizer,) = module.trainer.optimizers
        assert optimizer.param_groups[0]["lr"] == rate
        assert bool(optimizer.state) == (rate != LR)
        if rate == LR:
            same(whole(module), dict(make().named_parameters()), 0.0)


# ---- two of them, or none --------------------------------------------------------------------


@pytest.mark.ranks(1)
def test_what_cannot_be_meant_is_reported_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gradient_clip_val=0\.5\).* remove gradient_cl"):
        trained(tmp_path, "ddp", 1, clip_with(Halve()), gradient_clip_val=0.5)
    with pytest.raises(ConfigurationError, match="no policy, and neither"):
        trained(tmp_path, "ddp", 1, clip_with(None))
    trained(tmp_path, "ddp", 1, clip_with(Halve()), gradient_clip_val=0)
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trained(tmp_path, "ddp", 1, clip_with(Halve()), clip_with(Halve()))


@pytest.mark.ranks(1)
def test_without_a_change_to_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning.pytorch.trainer.trainer as module

    from distclip.integrations import lightning_callback as integration
    from distclip.integrations.lightning_factories import callbacks
    from tests.integrations.lightnings import whole

    halved, quartered = (reference(3, policy=factor)[0] for factor in (0.5, 0.25))

    class Quarter(Halve):
        def update(self, statistics: Any, state: Any) -> Any:
            (scale,), state = super().update(statistics, state)
            return (type(scale)(scale.coefficients / 2),), state

    monkeypatch.setattr(module.Trainer, "__init__", module.Trainer.__init__)
    monkeypatch.setattr(integration, "_run", [])
    monkeypatch.delenv("DISTCLIP_CONFIG", raising=False)
    assert callbacks() == []
    monkeypatch.setenv("DISTCLIP_CONFIG", str(tmp_path / "policy.yaml"))
    (given,) = callbacks()  # of the entry points
    assert isinstance(given, distclip.lightning.ClipCallback)
    integration.enable(module, Config(policy=Halve()))
    same(whole(trained(tmp_path, "ddp", 3)), halved)
    assert callbacks() == []
    # One of the script takes its place.
    automatic = integration.AutomaticClipCallback()
    for given in ([automatic, clip_with(Quarter())], [clip_with(Quarter()), automatic]):
        same(whole(trained(tmp_path, "ddp", 3, *given)), quartered)
    with pytest.raises(ConfigurationError, match="start without `distclip run`"):
        trained(tmp_path, "ddp", 1, gradient_clip_val=1.0)


@pytest.mark.ranks(2)
def test_a_policy_that_reads_the_loss(tmp_path: Path) -> None:
    callback = clip_with(policies.skip_spikes(window=8, min_history=3, loss=True))
    trained(tmp_path, "ddp", 2, callback)
    (state,) = callback.state_dict()["clippers"]
    losses = state["states"][""]["shared"]["losses"]
    plain = make()
    first = float(loss_of(plain, batch(0)))
    assert float(losses[0]) == pytest.approx(first, rel=1e-5)
    assert dist.get_world_size() == 2
    with pytest.raises(ConfigurationError, match="reads the loss"):
        trained(tmp_path, "ddp", 1, clip_with(callback.policy_or_config), module=manual("plain"))


def test_a_callback_is_pickled_by_its_policy() -> None:
    import pickle

    import lightning.pytorch as pl

    callback = pickle.loads(pickle.dumps(clip_with(policies.agc(0.1), log=False)))
    assert isinstance(callback, pl.Callback)
    assert isinstance(callback, distclip.lightning.ClipCallback)
    assert callback.policy_or_config == policies.agc(0.1)
    assert not callback._logs
