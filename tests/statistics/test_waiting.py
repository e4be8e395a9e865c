"""A rank that is stuck or dies in a clip: the others raise, and say which rank and which step."""

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip import CollectiveError, ConfigurationError, DistclipError, GradClipper, policies
from distclip.statistics import waiting
from distclip.statistics.waiting import ENVIRONMENT, Wait, limit_from_environment
from distclip.testing import RankError, RankPool, run_on_ranks

HANG = 1000


def clipped(fault: str, limit: float | None, odd: int) -> Any:
    """Clip by stages, whose only collective is the clip; in step 2 something happens to a rank."""
    rank = dist.get_rank()
    stage = nn.Linear(3, 2)
    given = [nn.ModuleDict({f"stage{rank}": stage})]
    clipper = GradClipper(given, policies.global_norm(1.0), stuck_after=limit)
    for step in range(3):
        stage(torch.ones(1, 3)).sum().backward()
        if rank == odd and step == 2:
            if fault == "sleep":
                time.sleep(HANG)
            elif fault == "exit":
                os._exit(3)
            elif fault == "late":
                time.sleep(1.0)
            else:
                os.kill(os.getpid(), getattr(signal, fault))
        try:
            clipper.clip_()
        except CollectiveError as error:
            return error.step, error.ranks, str(error), repr(error.__cause__)
    return None


def clipped_or_raised(fault: str, limit: float | None, odd: int) -> Any:
    found = clipped(fault, limit, odd)
    if found is not None:
        raise CollectiveError(repr(found))
    return found


def outcomes_of(fault: str, limit: float | None, odd: int, world: int) -> dict[int, Any]:
    with RankPool(world) as pool, pytest.raises(RankError) as caught:
        pool.run(clipped_or_raised, fault, limit, odd, timeout=10.0)
    return caught.value.outcomes


@pytest.mark.parametrize(("fault", "odd"), [("SIGSTOP", 1), ("sleep", 0)])
def test_a_stuck_rank_is_named_with_the_step(fault: str, odd: int) -> None:
    """Rank 0 too, which holds the store of this pool and still answers there."""
    found = outcomes_of(fault, 1.5, odd, 3)
    assert found.pop(odd).kind == "stuck"
    for outcome in found.values():
        assert outcome.error.startswith(f"CollectiveError: (2, ({odd},), 'the clipping of step 2 ")
        assert f"waited 1.5 s for rank {odd}." in outcome.error
        assert "stuck_after" in outcome.error


def test_a_stopped_rank_that_holds_the_store() -> None:
    """Nobody can say who is missing, but nobody waits for the answer either."""
    start = time.monotonic()
    with RankPool(2) as pool, pytest.raises(RankError, match=r"^rank 0 of 2 stopped") as caught:
        pool.run(clipped_or_raised, "SIGSTOP", 1.5, 0, timeout=10.0)
    found = caught.value.outcomes
    assert time.monotonic() - start < 10
    assert "waited 1.5 s for the other ranks, and the store" in found[1].error
    assert found[0].error.startswith("stopped")


@pytest.mark.parametrize("fault", ["SIGKILL", "exit"])
def test_a_rank_that_dies_breaks_the_collective_of_a_step(fault: str) -> None:
    found = outcomes_of(fault, None, 2, 3)
    assert found.pop(2).kind == "died"
    for outcome in found.values():
        assert "(2, (2,), 'the clipping of step 2 failed: a rank has died" in outcome.error
        assert "no word from rank 2" in outcome.error
        assert "RuntimeError(" in outcome.error.partition("failed")[2]  # gloo's, as the cause


@pytest.mark.ranks(2, timeout=20)
def test_a_late_rank_is_waited_for() -> None:
    """Beyond the second after which a note is written, and without a trace of it in the steps."""
    assert clipped("late", 15.0, 1) is None
    assert clipped("late", None, 0) is None


def hangs(fault: str) -> None:
    if dist.get_rank() == 1:
        if fault == "SIGSTOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(HANG)
    dist.barrier()


@pytest.mark.parametrize("fault", ["SIGSTOP", "sleep"])
def test_the_pool_names_the_stuck_rank_and_not_those_that_wait(fault: str) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(hangs, 3, fault, timeout=1.0)
    headline, section, *_ = str(caught.value).splitlines()
    stopped = "stopped (SIGSTOP, or a debugger)"
    blame, deed = {
        "SIGSTOP": (f"rank 1 of 3 {stopped}", stopped),
        "sleep": ("no answer within 1 s from rank 1 of 3", "was still running, its stacks:"),
    }[fault]
    assert headline == f"{blame}; ranks 0, 2: waiting in a collective for other ranks"
    assert section == f"---- rank 1: {deed} ----"


def test_the_limit_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.ones(2))
    for text, limit in (("", None), ("12.5", 12.5)):
        monkeypatch.setenv(ENVIRONMENT, text)
        assert limit_from_environment() == limit
        assert GradClipper([parameter], policies.measure())._session._limit == limit
        assert GradClipper([parameter], policies.measure(), stuck_after=3)._session._limit == 3.0
    for text in ("0", "-1", "soon", "inf", "nan"):
        monkeypatch.setenv(ENVIRONMENT, text)
        with pytest.raises(ConfigurationError, match=f"{ENVIRONMENT} must be .* got '{text}'"):
            GradClipper([parameter], policies.measure())


def test_it_is_caught_as_what_it_is() -> None:
    assert issubclass(CollectiveError, DistclipError)
    assert issubclass(CollectiveError, RuntimeError)


def test_a_device_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the host waits in the driver, and a thread ends the process when it has named who."""
    ended: list[Exception] = []

    def give_up(error: Exception) -> None:
        ended.append(error)

    monkeypatch.setattr(waiting, "give_up", give_up)
    monkeypatch.setattr(waiting, "_watchdog", waiting._Watchdog())
    monkeypatch.setattr(waiting, "_Notes", lambda group: SimpleNamespace(
        write=lambda: None, missing=lambda: (5,)))  # fmt: skip
    done, stuck = (
        SimpleNamespace(wait=lambda: None, is_completed=lambda each=each: each)
        for each in (True, False)
    )
    group: Any = None
    before = waiting.wait_for(Wait(7, 1.2))
    for work in (done, stuck):
        waiting.finish(work, group, on_host=False)  # type: ignore[arg-type]
    assert waiting.wait_for(before) == Wait(7, 1.2)
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
    (error,) = ended
    assert isinstance(error, distclip.CollectiveError)
    assert (error.step, error.ranks) == (7, (5,))
    assert [each.work for each in waiting._watchdog._watched] == [stuck]
