"""What ``distclip simulate`` makes of what ranks did: right training is sound, wrong is named.

The recorder runs on warm ranks; real launches are in test_simulate.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from distclip import GradClipper, policies
from distclip.testing import run_on_ranks
from distclip.tools.simulate import agreement, findings, stuck
from distclip.tools.simulate.recorder import Journal, Recorder, samples
from distclip.tools.simulate.records import Rank, Reader, Step
from distclip.tools.simulate.task import journal_of
from distclip.tools.simulate.watch import Ending

STEPS, BATCH = 4, 12


class Model(nn.Module):
    """Shapes that no number of ranks divides; ``extra`` is in use only where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.extra = nn.Linear(7, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor, extra: bool = False) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return self.last(self.extra(x) if extra else x)


@contextlib.contextmanager
def recorded(folder: Path, rank: int, steps: int | None = None) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(journal_of(folder, rank))
    journal.write("start", pid=0, world=1)
    recorder = Recorder(journal, steps)
    with recorder, contextlib.suppress(SystemExit):
        yield
    journal.write("end", step=recorder.step, code=0)
    journal.close()


@contextlib.contextmanager
def recorded_alone(folder: Path, steps: int | None = None) -> Iterator[Rank]:
    """The rank of a single process; what it wrote is read at the end."""
    reader = Reader(folder, 1)
    with recorded(folder, 0, steps):
        yield reader.ranks[0]
    reader.read()


def wrapped(layout: str) -> nn.Module:
    torch.manual_seed(0)
    model = Model()
    if layout == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if layout == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return fully_shard(model) if layout == "fsdp2" else model


def train(folder: Path, layout: str = "ddp", fault: str = "") -> None:
    """A training run that is right, but for one fault on rank 1."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    at = rank == 1
    layout = "none" if fault in ("seed", "one step fewer") else layout
    with recorded(folder, rank):
        model = wrapped(layout)
        if fault == "other weights" or (fault == "seed" and at):
            with torch.no_grad():
                dict(model.named_parameters())[f"{'module.' * (layout == 'ddp')}last.bias"] += 1
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        GradClipper(model, policies.global_norm(0.05), verify_replicas="never").attach(optimizer)
        data = torch.Generator().manual_seed(1)
        for step in range(STEPS):
            x = torch.randn(BATCH, 5, generator=data)
            if fault == "one step fewer" and at and step == 3:
                break
            mine = x[: BATCH // world] if fault in ("seed", "one step fewer") else x[rank::world]
            if fault == "order" and at and step == 2:
                mine = x.flip(0)[: BATCH // world]
            optimizer.zero_grad()
            output = model(mine, extra=fault == "module" and at and step == 2)
            loss = output.square().mean()
            if fault == "operations" and at and step == 2:
                loss = loss * 2
            if fault == "sum":
                loss = loss * world
            loss.backward()
            if fault == "missing" and at and step == 1:
                model.get_parameter("module.last.bias").grad = None
            if fault == "local":
                model.get_parameter("module.last.bias").grad.mul_(1 + 1e-6 * rank * (step == 1))
            optimizer.step()


def loaded(folder: Path, seed_of: Callable[[int], int]) -> None:
    """Three epochs of a DataLoader whose sampler pads the last batch."""
    rank = dist.get_rank()
    with recorded(folder, rank):
        model = wrapped("ddp")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = TensorDataset(torch.randn(23, 5, generator=torch.Generator().manual_seed(0)))
        sampler = DistributedSampler(data, seed=seed_of(rank))
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for (x,) in DataLoader(data, batch_size=4, sampler=sampler):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()


FAULTS = ("operations", "module", "missing", "local", "order", "seed", "one step fewer", "sum",
          "other weights")  # fmt: skip
SOUND = ("ddp", "fsdp1", "fsdp2")


def same(rank: int) -> int:
    return 0


def own(rank: int) -> int:
    return int(rank == 1)


def everything(folder: Path) -> None:
    for layout in SOUND:
        train(folder / layout, layout)
    for fault in FAULTS:
        train(folder / fault, fault=fault)


def loaders(folder: Path) -> None:
    loaded(folder / "loader", same)
    loaded(folder / "loader, own order", own)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Rank]]:
    folder = tmp_path_factory.mktemp("runs")
    run_on_ranks(everything, 2, folder)
    run_on_ranks(loaders, 3, folder)
    train(folder / "single", "none")
    result = {}
    for path in folder.iterdir():
        reader = Reader(path, {"single": 1, "loader": 3, "loader, own order": 3}.get(path.name, 2))
        reader.read()
        result[path.name] = reader.ranks
    return result


def found(ranks: list[Rank], how: Any = "ended", **options: Any) -> list[findings.Finding]:
    return findings.find(Ending(how, ranks, **options))


@pytest.mark.parametrize("name", [*SOUND, "single", "loader"])
def test_what_is_right_is_sound(runs: dict[str, list[Rank]], name: str) -> None:
    assert found(runs[name]) == []
    assert all(rank.code == 0 for rank in runs[name])


@pytest.mark.parametrize("layout", SOUND)
def test_layouts_agree_with_one_process(runs: dict[str, list[Rank]], layout: str) -> None:
    assert (
        agreement.compare_layouts(("single", runs["single"]), (layout, runs[layout]), 1e-5) is None
    )
    rows = agreement.step_rows(runs[layout])
    assert len(rows) == STEPS
    assert all(0 < row.coefficient < 1 for row in rows)
    # The recorder's own norm, put together of all ranks' pieces, is that of the report.
    for row, steps in zip(
        rows, zip(*(r.completed for r in runs[layout]), strict=True), strict=True
    ):
        squares = findings.whole_squares(steps)
        assert sum(squares.values()) ** 0.5 == pytest.approx(row.norm, rel=1e-6)
        assert set(squares) >= {"first.weight", "last.bias"}


@pytest.mark.parametrize(
    ("name", "kind", "step", "words"),
    [
        ("operations", "operations", 2, "loss of rank 1 was computed by other operations"),
        ("module", "modules", 2, "rank 1 ran 'extra', which rank 0 did not"),
        ("missing", "missing gradient", 1, "rank 1 has no gradient of 'last.bias'"),
        ("local", "drift", 1, "gradient of 'last.bias' on rank 1: norm"),
        ("seed", "drift", 0, "weights of 'last.bias' on rank 1: norm"),
        ("one step fewer", "steps", 3, "rank 1 took 3 steps, rank 0 4"),
    ],
)
def test_a_fault_is_named_with_rank_and_step(
    runs: dict[str, list[Rank]], name: str, kind: str, step: int | None, words: str
) -> None:
    first = next(f for f in found(runs[name]) if f.fault)
    assert (first.kind, first.ranks) == (kind, (1,)), first
    assert words in first.text
    if step is not None:
        assert first.step == step


def test_data_in_another_order(runs: dict[str, list[Rank]]) -> None:
    (pair,) = found(runs["order"])
    assert (pair.kind, pair.step, pair.ranks) == ("data order", 2, (0, 1))
    assert "rank 1 saw a sample that rank 0 saw at step 2, within one pass" in pair.text
    (odd,) = found(runs["loader, own order"])  # of three ranks it can be told which
    assert (odd.kind, odd.ranks) == ("data order", (1,))


def test_branches_may_be_allowed(runs: dict[str, list[Rank]]) -> None:
    told = findings.find(Ending("ended", runs["operations"]), branches=False)
    assert [(f.kind, f.fault) for f in told] == [("operations", False)]


def test_why_layouts_differ(runs: dict[str, list[Rank]]) -> None:
    def told(name: str) -> findings.Finding:
        difference = agreement.compare_layouts(("single", runs["single"]), (name, runs[name]), 1e-4)
        assert difference is not None
        return difference

    assert "every gradient has 2 times the norm" in told("sum").text
    assert told("sum").step == 0
    assert told("order").step == 2
    assert "12 are the same" in told("order").text or "rank 1 of order" in told("order").text
    assert told("operations").step == 2
    assert "the weights differ before the first step: 'last.bias'" in told("other weights").text


def test_a_batch_per_process_is_told(runs: dict[str, list[Rank]], tmp_path: Path) -> None:
    with recorded_alone(tmp_path) as rank:
        model = wrapped("none")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(6, 5)).square().mean().backward()
        optimizer.step()
    difference = agreement.compare_layouts(("single", [rank]), ("ddp", runs["ddp"]), 1e-4)
    assert difference is not None
    assert "saw 12 samples on 2 rank(s), one of single 6" in difference.text
    assert "split_batches" in difference.text


def test_further_reasons_why_layouts_differ() -> None:
    def told(mine: list[Step], theirs: list[Step]) -> str:
        found = [[Rank(number, [step]) for number, step in enumerate(e)] for e in (mine, theirs)]
        difference = agreement.compare_layouts(("single", found[0]), ("other", found[1]), 1e-4)
        assert difference is not None
        return difference.text

    def step(*sizes: int, loss: float = 1.0, norm: float | None = None) -> Step:
        some = [str(number) for number in range(sum(sizes))]
        return Step(samples=some, sizes=list(sizes), losses=[loss], norm=norm, world=1)

    shown = told([step(3, 3)], [step(4, 2, loss=1.1)])
    assert "micro-batches of other have 2 and 4 samples" in shown
    shown = told([step(6)], [step(6, norm=2.0)])
    assert "norm 2 and not nan" in shown
    assert "under DeepSpeed (other) a script's own clipping of gradients does nothing" in shown


def test_enough_steps(tmp_path: Path) -> None:
    with recorded_alone(tmp_path, steps=2) as rank:
        model = wrapped("none")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            model(torch.randn(2, 5)).square().mean().backward()
            optimizer.step()
    assert rank.done == 2


def test_checkpointing_and_evaluation_are_no_further_data(tmp_path: Path) -> None:
    with recorded_alone(tmp_path) as rank:
        model = wrapped("none")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(4, 5)
        block = nn.Sequential(model.first, nn.Tanh(), model.last)
        entry = torch.zeros(4, 5, requires_grad=True)
        torch.utils.checkpoint.checkpoint(block, x + entry, use_reentrant=True).sum().backward()
        with torch.no_grad():
            model(torch.randn(9, 5))
        model.eval()(torch.randn(9, 5))
        model.train()(x).sum().backward()
        optimizer.step()
    (step,) = rank.steps
    assert (step.samples, step.sizes) == (samples([x]), [4])
    assert len(step.losses) == 2


def test_gradients_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with recorded_alone(tmp_path) as rank:
        model = nn.ModuleDict({"table": nn.Embedding(9, 5, sparse=True), "last": nn.Linear(5, 1)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        marked: Any = model["last"].bias
        marked._in_backward_optimizers = [optimizer]
        for _ in range(2):
            model["last"](model["table"](torch.arange(4))).sum().backward()
            optimizer.step()
    (remark,) = found([rank])
    assert (remark.kind, remark.fault) == ("unseen", False)
    assert "parameter 'bias'" in remark.text
    assert len(rank.steps[1].pieces) == 2


# ---- hangs, from stacks ------------------------------------------------------------------------

SLEEPS = """Current thread 0x1 (most recent call first):
  File "/home/me/train.py", line 18 in step
  File "/home/me/train.py", line 30 in <module>
  File "/x/distclip/tools/launch/script.py", line 107 in _execute_file
  File "/x/distclip/tools/simulate/rank.py", line 108 in main
"""
WAITS = """Thread 0x2 (most recent call first):
  File "/x/site-packages/tqdm/_monitor.py", line 60 in run

Current thread 0x1 (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 3000 in all_reduce
  File "/home/me/train.py", line 22 in <module>
  File "/x/distclip/tools/launch/script.py", line 107 in _execute_file
  File "/x/distclip/tools/simulate/rank.py", line 108 in main
"""


def test_who_hangs_where(runs: dict[str, list[Rank]]) -> None:
    def blame(one: str, other: str, steps: tuple[int, int] = (2, 2)) -> tuple[int, ...]:
        ranks = [Rank(0), Rank(1)]
        for rank, done in zip(ranks, steps, strict=True):
            rank.steps = runs["ddp"][0].steps[:done]
        finding = found(ranks, "hung", stacks={0: one, 1: other})[0]
        assert finding.kind == "hung"
        assert finding.step == min(steps)
        assert "/home/me/train.py:22 in <module>, in all_reduce" in finding.text
        return finding.ranks

    assert blame(WAITS, SLEEPS) == (1,)
    assert blame(SLEEPS, WAITS) == (0,)
    assert blame(WAITS, WAITS, (3, 2)) == (1,)
    assert blame(WAITS, WAITS.replace("all_reduce", "barrier")) == (1,)
    assert blame(WAITS, WAITS) == ()
    assert stuck.where(SLEEPS) == "/home/me/train.py:18 in step"


def test_who_failed_first() -> None:
    ranks = [Rank(0, error="RuntimeError: Connection closed", trace="gloo", failed_at=2.0),
             Rank(1, error="ValueError: mine", trace="Traceback\nmine", failed_at=1.0)]  # fmt: skip
    finding = found(ranks, "failed")[0]
    assert (finding.kind, finding.ranks) == ("raised", (1,))
    assert finding.detail.startswith(
        "---- rank 1 ----\nTraceback\nmine\nrank 0: raised RuntimeError"
    )
    ranks[1] = Rank(1, code=0, ended_at=1.0)
    finding = found(ranks, "failed")[0]
    assert (finding.kind, finding.ranks) == ("stopped early", (1,))
