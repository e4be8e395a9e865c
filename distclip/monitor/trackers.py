"""Sinks for experiment trackers: TensorBoard, Weights & Biases, MLflow, Trackio, Accelerate's.

Each needs its package (an extra of the same name), which is imported at the first record, on the
main rank. A tracker that fails does not end a training run.
"""

from __future__ import annotations

import os
import re
import time
from typing import Any

from distclip.errors import ConfigurationError, DistclipError
from distclip.monitor.states import States
from distclip.monitor.tracking import TrackerSink


class TensorBoardSink(TrackerSink):
    """Scalars in TensorBoard's event files.

    A clipper that goes on from a checkpoint hides what was written from its first step on before.

    Args:
        log_dir: folder of the event files.
        every: record the steps that are divisible by it.
        per_parameter: with each parameter's norm and coefficient.
        prefix: before every name, such as ``"clip/"``.
        states: see :class:`distclip.monitor.States`.

    Raises:
        DistclipError: tensorboard is not installed.
    """

    _package = "tensorboard"

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        every: int = 1,
        per_parameter: bool = False,
        *,
        prefix: str = "",
        states: States | None = None,
    ) -> None:
        super().__init__(_TensorBoard(os.fspath(log_dir)), every, per_parameter, prefix, states)


class _TensorBoard:
    waits = False

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._writer: Any = None

    def open(self, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=first or None)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink(TrackerSink):
    """Metrics of a run of Weights & Biases: the one that is active, or else a new one.

    The values are logged for the step of the clipper, or for the run's present step where that is
    higher, since W&B drops what comes for an earlier one. They are drawn over ``clip_step``. A
    thread logs them, and they are complete after :meth:`close`: call it before ``wandb.finish()``
    in a run of yours. Where 1,000 records wait for W&B, further ones are lost and counted.

    Args:
        project: of a new run; None: W&B's default. Without effect where a run is active.
        every: record the steps that are divisible by it.
        per_parameter: with each parameter's norm and coefficient.
        prefix: before every name, such as ``"clip/"``.
        states: see :class:`distclip.monitor.States`.
        init: further arguments of ``wandb.init``.

    Raises:
        DistclipError: wandb is not installed.
    """

    _package = "wandb"

    def __init__(
        self,
        project: str | None = None,
        every: int = 1,
        per_parameter: bool = False,
        *,
        prefix: str = "",
        states: States | None = None,
        **init: Any,
    ) -> None:
        super().__init__(_Wandb(project, prefix, init), every, per_parameter, prefix, states)


class _Wandb:
    waits = True  # each call, and the run's step, is a message to W&B's service and back

    def __init__(self, project: str | None, prefix: str, init: dict[str, Any]) -> None:
        self._init = {"project": project, **init}
        self._clock = f"{prefix}clip_step"
        self._known: set[str] = set()
        self._run: Any = None
        self._started = False

    def open(self, first: int) -> None:
        import wandb

        self._started = wandb.run is None
        self._run = wandb.init(**self._init) if self._started else wandb.run
        self._run.define_metric(self._clock, hidden=True)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name in values.keys() - self._known:
            self._run.define_metric(name, step_metric=self._clock)
            self._known.add(name)
        self._run.log({**values, self._clock: step}, step=max(step, self._run.step))

    def close(self) -> None:
        if self._started:
            self._run.finish()


class MLflowSink(TrackerSink):
    """Metrics of a run of MLflow: the active one, or else a new one in an experiment.

    Records are sent in the background and are complete after ``close``. The place is MLflow's
    own: ``mlflow.set_tracking_uri`` or ``MLFLOW_TRACKING_URI``. Characters that MLflow does not
    take in a name become ``_``.

    Args:
        experiment: of a new run; None: MLflow's default. Without effect where a run is active.
        every: record the steps that are divisible by it.
        per_parameter: with each parameter's norm and coefficient.
        prefix: before every name, such as ``"clip/"``.
        states: see :class:`distclip.monitor.States`.

    Raises:
        DistclipError: mlflow is not installed.
    """

    _package = "mlflow"

    def __init__(
        self,
        experiment: str | None = None,
        every: int = 1,
        per_parameter: bool = False,
        *,
        prefix: str = "",
        states: States | None = None,
    ) -> None:
        super().__init__(_MLflow(experiment), every, per_parameter, prefix, states)


class _MLflow:
    waits = False

    BATCH = 1000
    """Metrics that MLflow takes at once."""

    def __init__(self, experiment: str | None) -> None:
        self._experiment = experiment
        self._client: Any = None
        self._run = ""
        self._started = False
        self._sent: list[Any] = []

    def open(self, first: int) -> None:
        import mlflow

        active = mlflow.active_run()
        self._client = mlflow.MlflowClient()
        if active is not None:
            self._run = active.info.run_id
            return
        name = self._experiment or "Default"
        known = self._client.get_experiment_by_name(name)
        number = known.experiment_id if known else self._client.create_experiment(name)
        self._run = self._client.create_run(number).info.run_id
        self._started = True

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [
            Metric(re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII), value, now, step)
            for name, value in values.items()
        ]
        for start in range(0, len(found), self.BATCH):
            part = found[start : start + self.BATCH]
            self._sent.append(self._client.log_batch(self._run, metrics=part, synchronous=False))
        del self._sent[: -self.BATCH]  # they are worked off in order

    def close(self) -> None:
        for sent in self._sent:
            sent.wait()
        if self._started:
            self._client.set_terminated(self._run)


class TrackioSink(TrackerSink):
    """Metrics of a run of Trackio: the one that is active, or else a new one.

    Args:
        project: of a new run. Without effect where a run is active.
        every: record the steps that are divisible by it.
        per_parameter: with each parameter's norm and coefficient.
        prefix: before every name, such as ``"clip/"``.
        states: see :class:`distclip.monitor.States`.
        init: further arguments of ``trackio.init``.

    Raises:
        DistclipError: trackio is not installed.
    """

    _package = "trackio"

    def __init__(
        self,
        project: str = "distclip",
        every: int = 1,
        per_parameter: bool = False,
        *,
        prefix: str = "",
        states: States | None = None,
        **init: Any,
    ) -> None:
        super().__init__(_Trackio(project, init), every, per_parameter, prefix, states)


class _Trackio:
    waits = False

    def __init__(self, project: str, init: dict[str, Any]) -> None:
        self._init = {"project": project, **init}
        self._run: Any = None
        self._started = False

    def open(self, first: int) -> None:
        import trackio
        from trackio import context_vars

        self._run = context_vars.current_run.get()
        self._started = self._run is None
        if self._started:
            self._run = trackio.init(**self._init)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        if self._started:
            import trackio

            trackio.finish()


class AccelerateSink(TrackerSink):
    """``accelerator.log``: whatever trackers an ``Accelerator`` has been given.

    Args:
        accelerator: after ``accelerator.init_trackers(...)``, at the latest at the first step.
        every: record the steps that are divisible by it.
        per_parameter: with each parameter's norm and coefficient.
        prefix: before every name, such as ``"clip/"``.
        states: see :class:`distclip.monitor.States`.

    Raises:
        ConfigurationError: not an ``Accelerator``.
    """

    def __init__(
        self,
        accelerator: Any,
        every: int = 1,
        per_parameter: bool = False,
        *,
        prefix: str = "",
        states: States | None = None,
    ) -> None:
        if not hasattr(accelerator, "init_trackers"):
            raise ConfigurationError(
                f"AccelerateSink: expected an Accelerator, got a {type(accelerator).__name__}"
            )
        super().__init__(_Accelerate(accelerator), every, per_parameter, prefix, states)


class _Accelerate:
    waits = False

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def open(self, first: int) -> None:
        if not getattr(self._accelerator, "trackers", None):
            raise DistclipError("call accelerator.init_trackers(...) before the first step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._accelerator.log(values, step=step)

    def close(self) -> None:
        """The trackers are the script's, which ends them by ``accelerator.end_training()``."""
