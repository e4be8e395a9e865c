"""Following a launch to its end, with launchers and ranks that are programs of a few lines."""

import os
import sys
import textwrap
from pathlib import Path

import pytest

from distclip.tools.simulate import watch
from distclip.tools.simulate.layouts import Launch
from distclip.tools.simulate.watch import Ending

RANK = """
import faulthandler, json, os, signal, sys, time
rank, folder = int(sys.argv[1]), sys.argv[2]
stacks = open(f"{folder}/rank{rank}.stacks", "a")
faulthandler.register(signal.SIGUSR1, stacks)
journal = open(f"{folder}/rank{rank}.jsonl", "a", buffering=1)
def tell(event, **fields):
    journal.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\\n")
tell("start", pid=os.getpid(), world=2)
"""

LAUNCHER = """
import subprocess, sys
folder = sys.argv[1]
ranks = [subprocess.Popen([sys.executable, f"{folder}/rank.py", str(r), folder]) for r in (0, 1)]
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""


@pytest.fixture
def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(watch, "LAUNCH_GRACE", 0.3)

    def follow(body: str, limit: float = 1.0, launcher: str = LAUNCHER) -> Ending:
        (tmp_path / "rank.py").write_text(RANK + textwrap.dedent(body))
        command = (sys.executable, "-c", launcher, str(tmp_path))
        ending = watch.follow_launch(
            Launch("test", 2, (command,), {"GLOO_SOCKET_IFNAME": ""}), tmp_path, limit
        )
        for rank in ending.ranks:
            assert rank.pid is None or not watch._runs(rank)
        return ending

    return follow


def test_the_end(follow) -> None:  # type: ignore[no-untyped-def]
    ending = follow("tell('end', step=3, code=0)")
    assert (ending.how, ending.stacks, ending.died) == ("ended", {}, [])


def test_nobody_moves(follow) -> None:  # type: ignore[no-untyped-def]
    ending = follow("def waiting():\n    time.sleep(600)\nwaiting()")
    assert ending.how == "hung"
    assert all("in waiting" in ending.stacks[rank] for rank in (0, 1))
    assert ending.seconds < 20


def test_who_computes_is_alive(follow) -> None:  # type: ignore[no-untyped-def]
    body = """
    end = time.process_time() + 3
    while rank == 0 and time.process_time() < end: pass
    tell("end", step=0, code=0)
    """
    assert follow(body, limit=2.0).how == "ended"


def test_but_not_for_ever(follow, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(watch, "COMPUTING_LIMITS", 1)
    assert follow("while True: pass").how == "hung"


def test_one_dies(follow) -> None:  # type: ignore[no-untyped-def]
    body = "os.kill(os.getpid(), 9) if rank == 1 else time.sleep(600)"
    ending = follow(body, limit=60.0)
    assert (ending.how, ending.died) == ("failed", [1])
    assert list(ending.stacks) == [0]
    assert ending.seconds < 30


def test_one_raises(follow) -> None:  # type: ignore[no-untyped-def]
    body = "tell('raised', error='E: x', trace='t') if rank == 1 else time.sleep(600)"
    ending = follow(body, limit=60.0)
    assert (ending.how, ending.died, ending.ranks[1].error) == ("failed", [], "E: x")
    assert ending.seconds < 30


def test_a_launcher_that_fails(follow) -> None:  # type: ignore[no-untyped-def]
    ending = follow("", launcher="print('no such option', flush=True); raise SystemExit(2)")
    assert (ending.how, ending.log) == ("not started", "no such option\n")


def test_a_pid_that_is_no_more() -> None:
    from distclip.tools.simulate.records import Rank

    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not watch._runs(Rank(0, pid=child))  # a zombie
    os.waitpid(child, 0)
    assert not watch._runs(Rank(0, pid=child))
    assert watch._runs(Rank(0, pid=os.getpid()))
