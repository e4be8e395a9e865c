"""What each process of a simulated launch runs: the user's script, with a recorder around it.

``python -m distclip.tools.simulate``, started by a launcher, with the name of a task file in
the environment. The script sees what it sees under ``python``; further arguments are those that the
launcher adds.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from distclip import config as configuration
from distclip.common.environment import CONFIG_VARIABLE
from distclip.integrations import hooks
from distclip.integrations.patches import replace
from distclip.testing.ranks import loopback
from distclip.testing.ranks.stuck import STACK_SIGNAL
from distclip.testing.ranks.zygote import die_with_parent
from distclip.tools.launch import accelerate_cpu
from distclip.tools.launch.leaving import let_gloo_finish
from distclip.tools.launch.script import Script
from distclip.tools.simulate.recorder import Journal, Recorder
from distclip.tools.simulate.task import TASK, Task, journal_of, output_of, stacks_of

LAST_WAIT = 20.0
"""Seconds that a rank which has taken all its steps waits for the others to take theirs."""


def main() -> None:
    """Run the task and exit as the script does."""
    task = Task.load(os.environ[TASK])
    folder, rank = Path(task.folder), int(os.environ.get("RANK", "0"))
    die_with_parent()
    loopback.listen_on_loopback()
    with open(output_of(folder, rank), "ab", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    stacks = open(stacks_of(folder, rank), "a")  # noqa: SIM115 - until exit
    faulthandler.enable(stacks)
    faulthandler.register(STACK_SIGNAL, stacks, all_threads=True)
    journal = Journal(journal_of(folder, rank))
    journal.write("start", pid=os.getpid(), world=int(os.environ.get("WORLD_SIZE", "1")))
    recorder = Recorder(journal, task.steps)
    script = Script(task.script, [*sys.argv[1:], *task.arguments], module=task.module)
    sys.excepthook = _telling(journal, sys.excepthook)
    with recorder:
        try:
            script.prepare()  # the configuration may import modules that lie beside it
            _prepare(task, recorder)
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
            sys.exit(1)
        code = script.run()
    sys.stdout.flush()
    journal.write(
        "end", step=recorder.step, code=code if isinstance(code, int) else int(bool(code))
    )
    if recorder.enough:
        _wait_for_others(folder, recorder.step)
    let_gloo_finish()
    sys.exit(code)


def _prepare(task: Task, recorder: Recorder) -> None:
    hooks.on_import("deepspeed.runtime.engine", recorder.watch_engine)
    hooks.on_import("deepspeed.ops", accelerate_cpu.without_compiler)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        # The launcher's default, 1, would take the place of what the script asks for.
        os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
        hooks.on_import("accelerate.accelerator", _with_batch_size)
    if task.accelerate:
        accelerate_cpu.become_cpu_rank(cpu=True)
    if task.config is not None:
        loaded = configuration.load(task.config)
        os.environ[CONFIG_VARIABLE] = task.config
        if loaded.log is not None and task.log is not None:  # not into the log of a real run
            log = loaded.log.model_copy(update={"jsonl": str(Path(task.folder) / task.log)})
            loaded = dataclasses.replace(loaded, log=log)
        hooks.install(loaded)
    if task.accelerate:
        accelerate_cpu.watch_accelerators()


def _with_batch_size(module: Any) -> None:
    """Let a script prepare no DataLoader: Accelerate wants a batch size then, for its logs."""
    key = "train_micro_batch_size_per_gpu"

    def prepare(original: Any, accelerator: Any, *args: Any) -> Any:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.is_auto(key) and not any(hasattr(each, "batch_size") for each in args):
            plugin.deepspeed_config[key] = 1
        return original(accelerator, *args)

    replace(module.Accelerator, "_prepare_deepspeed", prepare)


def _telling(journal: Journal, hook: Any) -> Any:
    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        first = str(error).strip().partition("\n")[0]
        journal.write("raised", error=f"{kind.__name__}: {first}".rstrip(": "), trace=text)
        hook(kind, error, trace)

    return tell


def _wait_for_others(folder: Path, steps: int) -> None:
    """Not to hang up on ranks that are still in their last step."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    deadline = time.monotonic() + LAST_WAIT
    waiting = set(range(world))
    while waiting and time.monotonic() < deadline:
        for rank in list(waiting):
            path = journal_of(folder, rank)
            text = path.read_text() if path.exists() else ""
            if '"event": "end"' in text or '"event": "raised"' in text:
                waiting.discard(rank)
        time.sleep(0.05)
