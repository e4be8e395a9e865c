"""Every tracker by its own library: the values of a run with a spike and a NaN are all there.

TensorBoard is in the test installation; wandb, mlflow and trackio are run where they are installed.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import distclip
from benchmarks import recorded_run
from benchmarks.stores import NAMES, Values, of_mlflow, of_tensorboard, of_trackio, of_wandb
from distclip import monitor, policies
from distclip.errors import ConfigurationError, DistclipError
from distclip.monitor.tracking import TrackerSink

STEPS, SPIKE, BAD = 12, 5, 8


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)


def norm_at(step: int) -> float:
    return math.nan if step == BAD else 50.0 if step == SPIKE else 0.5 + 0.1 * step


def train(sinks: Sequence[Any] = (), log: dict[str, Any] | None = None, start: int = 0) -> None:
    """Steps of which the gradient has a known norm."""
    model = torch.nn.Linear(1, 1, bias=False)
    config = {
        "policy": {"name": "global_norm", "max_norm": 1.0}, "on_nonfinite": "skip", "log": log,
    }  # fmt: skip
    clipper = distclip.from_config(config, model)
    if start:
        earlier = distclip.GradClipper(model, policies.global_norm(1.0))
        for _ in range(start):
            model.weight.grad = torch.ones(1, 1)
            earlier.clip_()
        clipper.load_state_dict(earlier.state_dict())
    clipper.sinks = (*clipper.sinks, *sinks)
    for step in range(start, STEPS):
        model.weight.grad = torch.tensor([[norm_at(step)]])
        clipper.clip_()
    for sink in clipper.sinks:
        sink.close()
        assert sink.lost == 0


def check(found: Values, steps: Sequence[int] = range(STEPS)) -> None:
    assert set(found) >= NAMES
    for step in steps:
        norm = norm_at(step)
        after, coefficient = min(norm, 1.0), min(1.0, 1.0 / (norm + 1e-6))
        if step == BAD:  # skipped: what was not clipped has no other norm after
            after, coefficient = math.nan, 1.0
        expected = {
            "grad_norm": norm, "grad_norm_clipped": after, "clip_coefficient": coefficient,
            "clip_threshold": 1.0, "clipped_fraction": float(norm > 1.0 and step != BAD),
            "step_skipped": float(step == BAD), "nonfinite": float(step == BAD),
        }  # fmt: skip
        for name, value in expected.items():
            got = found[name][step]
            assert got == pytest.approx(value, rel=1e-5, nan_ok=True), (name, step)


# ---- TensorBoard -------------------------------------------------------------------------------


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(log={"tensorboard": "tb", "per_parameter": True})
    found = of_tensorboard(tmp_path / "tb")
    check(found)
    assert found["grad_norm/weight"][SPIKE] == 50.0
    # From a checkpoint of step 6 again: TensorBoard hides what was there from then on.
    train([monitor.TensorBoardSink("tb", prefix="again/")], start=6)
    assert set(of_tensorboard(tmp_path / "tb")["again/grad_norm"]) == set(range(6, STEPS))


def test_two_clippers_of_one_configuration_have_a_folder_each(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = {"policy": "measure", "log": {"tensorboard": "tb", "jsonl": "c.jsonl", "every": 2}}
    models = [torch.nn.Linear(1, 1) for _ in range(2)]
    clippers = [distclip.from_config(config, model) for model in models]
    for model, clipper in zip(models, clippers, strict=True):
        model(torch.ones(1)).backward()
        clipper.clip_()
    del clippers, clipper
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "c.2.jsonl", "c.jsonl", "tb", "tb.2",
    ]  # fmt: skip


# ---- trackers that are not in the test installation --------------------------------------------


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield module
    module.teardown()


def test_wandb(wandb: Any, tmp_path: Path) -> None:
    train(log={"wandb": "distclip"})
    assert wandb.run is None  # the run that the sink started has ended
    check(of_wandb(tmp_path))


def test_wandb_in_a_run_of_the_script_that_counts_its_own_steps(wandb: Any, tmp_path: Path) -> None:
    with wandb.init(project="mine") as run:
        for _ in range(3):
            run.log({"loss": 1.0})
        sink = monitor.WandbSink()
        train([sink])
        run.log({"loss": 3.0})
        assert wandb.run is run  # left to the script
    check(of_wandb(tmp_path), [*range(4, STEPS)])


@pytest.mark.filterwarnings("default")  # its own libraries deprecate each other
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    train(log={"mlflow": "clipping"})
    with mlflow.start_run() as run:
        train([monitor.MLflowSink(prefix="mine/", per_parameter=True)])
        assert mlflow.active_run() is not None
    for mine, experiment in ((False, "clipping"), (True, "Default")):
        found, runs = of_mlflow(tmp_path / "mlflow.db", experiment)
        assert [(uuid == run.info.run_id, status) for uuid, status in runs] == [(mine, "FINISHED")]
        check({name.removeprefix("mine/"): values for name, values in found.items()})
        assert ("mine/grad_norm/weight" in found) == mine


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    train(log={"trackio": "clipping"})
    check(of_trackio("clipping"))


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir="acc")
    accelerator.init_trackers("clip")
    model, optimizer = accelerator.prepare(
        torch.nn.Linear(1, 1, bias=False), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 1.0)
    )
    del optimizer
    train([monitor.AccelerateSink(accelerator)])
    accelerator.end_training()
    check(of_tensorboard(tmp_path / "acc" / "clip"))
    with pytest.raises(ConfigurationError, match="expected an Accelerator, got a Linear"):
        monitor.AccelerateSink(model)


def test_accelerate_by_name(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    model = torch.nn.Linear(1, 1, bias=False)
    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir="acc")
    accelerator.init_trackers("clip")
    config = {"policy": "measure", "log": {"accelerate": True}}
    with pytest.raises(ConfigurationError, match=r"log\.accelerate: this clipper does not belong"):
        distclip.from_config(config, model)
    handle = distclip.accelerate.attach(accelerator, config)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.0))
    for _ in range(3):
        accelerator.backward(3.0 * model(torch.ones(1, 1)).sum())
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    accelerator.end_training()
    assert of_tensorboard(tmp_path / "acc" / "clip")["grad_norm"] == {0: 3.0, 1: 3.0, 2: 3.0}


# ---- what goes wrong ---------------------------------------------------------------------------


class Broken:
    waits = False

    def __init__(self, fails: int) -> None:
        self.fails, self.logged = fails, []

    def open(self, first: int) -> None:
        if self.fails:
            self.fails -= 1
            raise OSError("no\x1b[2J route")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged.append(step)

    def close(self) -> None:
        raise RuntimeError("closing")


def test_a_tracker_that_fails_costs_records_and_no_run(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Broken(fails=2)
    sink = TrackerSink(tracker, 1, False, "", None)
    model = torch.nn.Linear(1, 1)
    clipper = distclip.GradClipper(model, policies.measure(), sinks=sink)
    for _ in range(8):
        model(torch.ones(1)).backward()
        clipper.clip_()
    sink.close()
    assert tracker.logged == [6, 7]  # tried at 0, 2 and 6: it may take long to find out
    assert sink.lost == 7
    told = [r.getMessage() for r in caplog.records if "took no record" in r.getMessage()]
    assert told == [
        "TrackerSink took no record (OSError: no\\x1b[2J route); training goes on, and later "
        "records try again"
    ]


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (lambda: monitor.TensorBoardSink("x"), "tensorboard"),
        (monitor.WandbSink, "wandb"),
        (monitor.MLflowSink, "mlflow"),
        (monitor.TrackioSink, "trackio"),
    ],
)
def test_a_tracker_that_is_not_installed(
    make: Callable[[], object], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else found(name)
    )
    with pytest.raises(DistclipError, match=f"pip install 'distclip\\[{package}\\]'"):
        make()


def test_the_comparison_of_all_sinks_sees_what_is_lacking_or_off(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(log={"tensorboard": "tb", "jsonl": "r.jsonl"})
    want = recorded_run.of_jsonl(tmp_path / "r.jsonl")
    assert recorded_run.differs(of_tensorboard(tmp_path / "tb"), want) == 0.0
    for changed in ({"grad_norm": {0: 1.0}}, {"step_skipped": {}}):
        assert (
            recorded_run.differs({**of_tensorboard(tmp_path / "tb"), **changed}, want) == math.inf
        )
    found = of_tensorboard(tmp_path / "tb")
    found["grad_norm"][0] *= 1.001
    assert recorded_run.differs(found, want) == pytest.approx(1e-3, rel=0.01)
    found["grad_norm"][BAD] = 1.0  # where the log has NaN
    assert recorded_run.differs(found, want) == math.inf
