"""The pool of ranks: what it guarantees, and each guard broken once."""

import os
import random
import signal
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distclip.testing import RankError, RankPool, run_on_ranks
from distclip.testing.ranks import forkserver
from distclip.testing.ranks.pool import shared_pool
from tests.helpers.processes import python

WORLDS = [1, 2, 3, 4]


def summed(value=1.0):
    total = torch.full((2,), float(value)) * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return total


def fail_on(rank, how="raise"):
    print(f"about to {how}")
    sys.stderr.write("on stderr\n")
    if dist.get_rank() == rank:
        if how == "raise":
            left, right = [1, 2], [1, 3]
            assert left == right
        if how == "exit":
            os._exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "return":
            return "early"
    dist.all_reduce(torch.ones(()))
    return "late"


@pytest.mark.parametrize("world", WORLDS)
def test_results_come_back_by_rank(world):
    assert run_on_ranks(dist.get_rank, world) == list(range(world))
    for total in run_on_ranks(summed, world, value=2):
        assert torch.equal(total, torch.full((2,), 2.0 * sum(range(1, world + 1))))


def test_a_warm_pool_keeps_its_processes():
    run_on_ranks(summed, 2)
    pids = shared_pool(2).pids
    for _ in range(100):
        run_on_ranks(summed, 2)
    assert shared_pool(2).pids == pids
    assert run_on_ranks(os.getpid, 2) == list(pids)


def test_every_call_starts_from_the_same_state(tmp_path, monkeypatch):
    def draws_then_spoils():
        drawn = torch.rand(()).item(), np.random.rand(), random.random(), torch.ones(()).dtype
        devices = torch.get_default_device().type, torch.ones(()).device.type
        torch.set_default_device("meta")
        surroundings = os.environ.get("DISTCLIP_TEST"), os.getcwd(), torch.is_grad_enabled()
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        os.environ["DISTCLIP_TEST"] = "spoilt"
        os.chdir("/")
        return drawn + surroundings + devices

    monkeypatch.setenv("DISTCLIP_TEST", "set")
    monkeypatch.chdir(tmp_path)
    first, second = run_on_ranks(draws_then_spoils, 2), run_on_ranks(draws_then_spoils, 2)
    assert first == second
    assert first[0] == first[1]
    assert first[0][3:] == (torch.float32, "set", str(tmp_path), True, "cpu", "cpu")


def test_ranks_look_like_a_launched_world():
    def look():
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        return [os.environ[name] for name in names], torch.get_num_threads(), dist.get_backend()

    assert run_on_ranks(look, 2) == [([str(r), str(r), "2"], 1, "gloo") for r in range(2)]


class Methods:
    def __init__(self, factor):
        self.factor = factor

    def scaled(self, value):
        return self.factor * value

    @staticmethod
    def doubled(value):
        return 2 * value


def test_functions_of_every_kind_are_sent():
    factor = 3

    def local(value, more=1):
        return factor * value + more

    def factorial(n):
        return 1 if n < 2 else n * factorial(n - 1)

    assert run_on_ranks(local, 2, 5) == [16, 16]
    assert run_on_ranks(lambda value: value + factor, 2, 5) == [8, 8]
    assert run_on_ranks(factorial, 2, 5) == [120, 120]
    assert run_on_ranks(partial(local, more=2), 2, 5) == [17, 17]
    assert run_on_ranks(Methods(4).scaled, 2, 5) == [20, 20]
    assert run_on_ranks(Methods.doubled, 2, 5) == [10, 10]
    assert run_on_ranks(lambda f: f(7), 2, Methods.doubled) == [14, 14]


def test_what_cannot_be_sent_is_refused_and_what_cannot_come_back_is_named():
    with pytest.raises(TypeError, match=r"cannot be sent to the ranks: .*lock"):
        run_on_ranks(summed, 2, threading.Lock())
    with pytest.raises(RankError, match=r"the result, a lock, cannot be sent back"):
        run_on_ranks(threading.Lock, 2)
    assert len(run_on_ranks(summed, 2)) == 2


def test_a_world_has_at_least_one_rank():
    with pytest.raises(ValueError, match="world_size=0"):
        RankPool(0)


def test_ranks_start_no_ranks():
    with pytest.raises(RankError, match="cannot be started from a rank"):
        run_on_ranks(run_on_ranks, 1, summed, 1)


def test_an_exception_shows_the_traceback_and_where_the_others_were():
    started = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_on_ranks(fail_on, 3, 1, timeout=300)
    assert time.monotonic() - started < 60  # the others are not waited for
    message = str(caught.value)
    assert message.startswith("rank 1 of 3 raised AssertionError: assert [1, 2] == [1, 3]")
    assert "assert left == right" in message
    assert message.count("about to raise") == 2  # ranks 0 and 2 share a section
    assert "on stderr" in message
    assert "ranks 0, 2: was still running" in message
    assert "in all_reduce" in message
    assert "worker.py" not in message
    assert [caught.value.outcomes[rank].kind for rank in range(3)] == ["stuck", "raised", "stuck"]
    assert len(run_on_ranks(summed, 3)) == 3


def test_the_same_exception_everywhere_is_told_once():
    def fail():
        raise ValueError("the same")

    with pytest.raises(RankError) as caught:
        run_on_ranks(fail, 3)
    assert str(caught.value).count("raise ValueError") == 1
    assert "ranks 0, 1, 2: raised ValueError: the same" in str(caught.value)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("exit", "exited with code 3"),
        ("kill", "was killed by SIGKILL"),
        ("segfault", "was killed by SIGSEGV"),
    ],
)
def test_a_dead_rank_is_noticed_at_once(how, text):
    started = time.monotonic()
    with pytest.raises(RankError, match=f"rank 1 of 2 {text}") as caught:
        run_on_ranks(fail_on, 2, 1, how, timeout=300)
    assert time.monotonic() - started < 60
    assert f"about to {how}" in str(caught.value)
    if how == "segfault":
        assert "in fail_on" in caught.value.outcomes[1].trace
    assert len(run_on_ranks(summed, 2)) == 2


def test_a_hang_shows_every_stack_within_the_limit():
    pids = run_on_ranks(os.getpid, 2)
    with pytest.raises(RankError) as caught:
        run_on_ranks(fail_on, 2, 1, "return", timeout=2)
    message = str(caught.value)
    assert message.startswith("no answer within 2 s from rank 0 of 2")
    assert "in all_reduce" in message
    assert "in fail_on" in message
    assert "rank 1: returned 'early'" in message
    assert not set(pids) & set(run_on_ranks(os.getpid, 2))
    assert not any(map(alive, pids))


def test_a_rank_that_holds_the_interpreter_lock_is_shown_too():
    def stuck():
        import re

        re.match(r"(a+)+$", "a" * 64 + "b")

    with pytest.raises(RankError, match="no answer") as caught:
        run_on_ranks(stuck, 1, timeout=1.5)
    assert "in stuck" in caught.value.outcomes[0].trace


def test_a_rank_that_died_idle_is_replaced():
    with RankPool(2) as pool:
        for rank in [0, 1] * 5:  # more than once: the news of a death takes its time
            pool.run(summed)
            os.kill(pool.pids[rank], signal.SIGKILL)
            wait_until(lambda rank=rank: not alive(pool.pids[rank]))
        assert len(pool.run(summed)) == 2


def loaded(names):
    return [name for name in names if name in sys.modules]


def test_all_is_replaced_when_what_ranks_are_forked_from_has_died(monkeypatch):
    """The new one takes from its caller's imports what the caller has by then, and can be had."""
    followed = {"os": "wave", "sys": "no_such_module", "no_caller_has_it": "sched"}
    monkeypatch.setattr(forkserver, "FOLLOWED", {**forkserver.FOLLOWED, **followed})
    with RankPool(2) as pool:
        (zygote,) = set(pool.run(os.getppid))
        os.kill(zygote, signal.SIGKILL)
        wait_until(lambda: not any(map(alive, (zygote, *pool.pids))))
        assert set(pool.run(os.getppid)) != {zygote}
        assert pool.run(loaded, [*followed.values()]) == [["wave"]] * 2


def test_exit_in_a_rank_is_an_exception():
    with pytest.raises(RankError, match="raised SystemExit: 4"):
        run_on_ranks(sys.exit, 1, 4)


@pytest.mark.parametrize("world", [1, 3])
def test_a_pool_recovers_from_a_destroyed_group(world):
    with RankPool(world) as pool:
        pool.run(dist.destroy_process_group)
        assert len(pool.run(summed)) == world


def test_a_collective_left_half_done_does_not_reach_the_next_call():
    def half_done():
        if dist.get_rank() == 0:
            dist.all_reduce(torch.full((2,), 1000.0), async_op=True)

    with RankPool(2) as pool:
        pool.run(half_done)
        assert pool.pids == ()
        assert pool.run(summed)[1].tolist() == [3.0, 3.0]


def test_subgroups_may_be_left_behind_but_not_piled_up():
    def subgroup():
        group = dist.new_group([0])
        if dist.get_rank() == 0:
            dist.all_reduce(torch.ones(()), group=group)

    with RankPool(2) as pool:
        pool.run(subgroup)
        pids = pool.pids
        pool.run(subgroup)
        assert pool.pids == pids
        for _ in range(32):
            pool.run(subgroup)
        assert pool.pids != pids


def test_meshes_of_equal_shape_serve_call_after_call():
    def mesh_sum():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        tensor = distribute_tensor(torch.arange(12.0).reshape(4, 3), mesh, [Shard(0), Shard(1)])
        return (tensor * 2).sum().full_tensor().item()

    for _ in range(3):
        assert run_on_ranks(mesh_sum, 4) == [132.0] * 4


def test_output_of_a_success_is_passed_on(capsys):
    run_on_ranks(print, 2, "hello\nthere")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"[rank {rank}] {word}" for rank in range(2) for word in ("hello", "there")]


def test_a_skip_counts_where_all_ranks_skip():
    def skip_on(*ranks):
        if dist.get_rank() in ranks:
            pytest.skip("no reason")

    with pytest.raises(pytest.skip.Exception, match="no reason"):
        run_on_ranks(skip_on, 2, 0, 1)
    with pytest.raises(RankError, match=r"rank 1 of 2 skipped no reason, but not every rank"):
        run_on_ranks(skip_on, 2, 1)


def test_calls_from_several_threads_take_turns():
    totals = []
    threads = [
        threading.Thread(target=lambda n=n: totals.append(run_on_ranks(summed, 2, n)[0][0].item()))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(totals) == [0.0, 3.0, 6.0, 9.0]


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_process_outlives_the_caller(tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal, time
            from distclip.testing import RankPool
            def sleep_on_one(seconds):
                import torch.distributed as dist
                print("a rank ran")
                if dist.get_rank() == 1:
                    time.sleep(seconds)
                return os.getpid(), os.getppid()
            if __name__ == "__main__":
                pool = RankPool(2)
                for pids in pool.run(sleep_on_one, 0):
                    print("pids", *pids, flush=True)
                {end}
            """
        )
    )
    done = python(str(script), timeout=120)
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("pids")]
    pids = {int(pid) for line in lines for pid in line}
    assert len(pids) == 3, done.stderr  # two ranks and what they were forked from
    assert end != "pass" or (done.returncode == 0 and not done.stderr), done.stderr
    wait_until(lambda: not any(map(alive, pids)))


def test_an_interrupt_ends_the_ranks():
    # A run in the background of a shell (`... &`, nohup) ignores interrupts; this one must not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt_ends_the_ranks()
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_ends_the_ranks():
    with RankPool(1) as pool:
        (pid,) = pool.run(os.getpid)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool.run(time.sleep, 60)
        timer.join()
        assert pool.pids == ()
        wait_until(lambda: not alive(pid))


def alive(pid):
    """Also while only some thread of it is left: its files are open until the last has gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, limit=20.0):
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
