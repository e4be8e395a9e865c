"""A rank ends when gloo has let go of its last tensors, and not before."""

import ctypes
import hashlib
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distclip.tools.launch import leaving
from tests.helpers.processes import python, well

NAME = 15
"""PR_SET_NAME of prctl."""

pytestmark = pytest.mark.skipif(not leaving.TASKS.exists(), reason="no /proc here")


def as_gloo(work: Callable[[], object]) -> threading.Thread:
    """Work in a thread with the name that torch gives to those of gloo."""
    named = threading.Event()

    def run() -> None:
        ctypes.CDLL(None).prctl(NAME, leaving.THREAD.encode(), 0, 0, 0)
        named.set()
        work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert named.wait(10)
    return thread


def compute() -> None:
    """Half a second or more, without the GIL."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)


def test_what_still_runs_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "WAIT_LIMIT", 300.0)
    ended: list[bool] = []
    as_gloo(lambda: (compute(), ended.append(True)))
    leaving.let_gloo_finish()
    assert ended


def test_what_waits_itself_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a peer that is gone, for instance."""
    monkeypatch.setattr(leaving, "WAIT_LIMIT", 1000.0)
    never = threading.Event()
    as_gloo(never.wait)
    began = time.monotonic()
    leaving.let_gloo_finish()
    assert time.monotonic() - began < 60
    never.set()


def test_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "WAIT_LIMIT", 0.05)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            compute()

    thread = as_gloo(work)
    leaving.let_gloo_finish()
    assert thread.is_alive()
    stop.set()
    thread.join()


def test_the_thread_is_still_called_so() -> None:
    """By a process of its own: the group needs a rendezvous."""
    script = """
    import torch.distributed as dist
    from distclip.tools.launch import leaving
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.barrier()
    print(leaving._states() != set())
    """
    assert _python("-c", textwrap.dedent(script)) == "True\n"


def test_a_run_ends_after_it(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("policy: measure\n")
    script = """
    import os
    from distclip.tools.launch import leaving
    from tests.cli.test_leaving import as_gloo, compute
    leaving.WAIT_LIMIT = 300.0
    as_gloo(lambda: (compute(), os.write(1, b"let go")))
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    arguments = ("--config", str(tmp_path / "policy.yaml"), str(tmp_path / "script.py"))
    assert _python("-m", "distclip", "run", *arguments).endswith("let go")


def _python(*arguments: str) -> str:
    return well(python(*arguments))
