"""``RankNoiseScale`` where the clipper goes back, and what it says how often."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distclip
from distclip import ConfigurationError, GradClipper, NonFiniteGradientError, policies
from distclip.monitor import RankNoiseScale


class Followed:
    """A model, its clipper and the noise scale."""

    def __init__(self, every: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.clipper = GradClipper(self.model, policies.measure())
        self.noise = RankNoiseScale(self.clipper, batch=8, micro_batches=2, every=every)

    def step(self, seed: int, backwards: int = 2, spoilt: bool = False) -> None:
        self.model.zero_grad()
        torch.manual_seed(seed)
        for _ in range(backwards):
            loss = self.model(torch.randn(4, 4)).square().mean() / 2
            (loss * math.nan if spoilt else loss).backward()
        self.clipper.clip_()


@pytest.mark.filterwarnings("error")
def test_a_step_gone_back_to_is_sampled_with_its_own_backwards() -> None:
    """Where nothing was armed for the step, and where a step was given up after its backwards."""
    found, want = Followed(every=5), Followed(every=5)
    states: list[Any] = []
    for step in range(8):
        states.append(found.clipper.state_dict())
        found.step(step)
        if step < 6:
            want.step(step)
    found.clipper.load_state_dict(states[5])
    assert found.noise.samples == 1
    found.step(5)
    assert found.noise.state_dict() == want.noise.state_dict()
    assert found.noise.samples == 2
    state = (found := Followed(every=1)).clipper.state_dict()
    with pytest.raises(NonFiniteGradientError):
        found.step(0, spoilt=True)
    found.clipper.load_state_dict(state)
    found.step(0)
    assert found.noise.samples == 1


def test_a_step_without_hooks_is_no_sample() -> None:
    """As after a checkpoint that has no noise scale."""
    found = Followed(every=5)
    state = GradClipper(found.model, policies.measure()).state_dict()
    for step in range(3):
        found.step(step)
    before = found.noise.state_dict()
    found.clipper.load_state_dict(state)
    found.step(0)
    assert found.noise.state_dict() == before


def test_a_clipper_is_followed_by_one() -> None:
    found = Followed(every=1)
    with pytest.raises(ConfigurationError, match="followed by one already"):
        RankNoiseScale(found.clipper, batch=8, micro_batches=2)
    found.noise.close()
    RankNoiseScale(found.clipper, batch=8, micro_batches=2)


def test_an_error_of_the_log_names_the_key(tmp_path: Path) -> None:
    document = {
        "policy": {"name": "global_norm", "max_norm": 1.0},
        "log": {"jsonl": str(tmp_path / "clip.jsonl"), "noise_scale": {"batch": 8}},
    }
    with pytest.raises(ConfigurationError, match=r"^log\.noise_scale: .*one micro-batch are one"):
        distclip.from_config(document, nn.Linear(4, 3))


@pytest.mark.ranks(2, timeout=60)
@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"batch": 1}, r"batch=1 is less than one .* \(found by rank 1\)"),
        ({"every": 3}, "rank 0 was given batch=8, .*every=1.* rank 1 batch=8, .*every=3"),
    ],
)
def test_no_rank_waits_for_one_that_was_given_others(other: dict[str, int], says: str) -> None:
    clipper = GradClipper(DistributedDataParallel(nn.Linear(4, 3)), policies.measure())
    given = {"batch": 8, **(other if dist.get_rank() else {})}
    with pytest.raises(ConfigurationError, match=f"^RankNoiseScale: {says}"):
        RankNoiseScale(clipper, **given)
    assert clipper.sinks == ()
