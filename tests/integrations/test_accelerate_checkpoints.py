"""Policies with a memory in ``accelerator.save_state`` and ``load_state``."""

import copy
from pathlib import Path
from typing import Any

import pytest

from distclip import StateError, policies
from tests.helpers.logs import logged
from tests.integrations.accelerated import batch, loss_of, make, sgd, start

pytest.importorskip("accelerate")
POLICY = policies.chain(policies.adagc(warmup_steps=3), policies.autoclip(50, window=20))


def begin(layout: str, policy: Any = POLICY) -> Any:
    import distclip

    accelerator = start(layout)
    handle = distclip.accelerate.attach(accelerator, policy)
    model = make()
    model, optimizer = accelerator.prepare(model, sgd(model))
    return accelerator, handle, model, optimizer


def steps(run: Any, first: int, last: int) -> list[Any]:
    accelerator, handle, model, optimizer = run
    taken = []
    for number in range(first, last):
        accelerator.backward(loss_of(model, batch(number)))
        optimizer.step()
        optimizer.zero_grad()
        taken.append(repr(handle.last_report.to_dict()))  # thresholds may be NaN
    return taken


@pytest.mark.ranks(2)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_resumed_run_decides_as_one_that_was_not_stopped(layout: str, tmp_path: Path) -> None:
    run = begin(layout)
    steps(run, 0, 6)
    run[0].save_state(str(tmp_path / "at6"))
    want = steps(run, 6, 10)
    resumed = begin(layout)
    resumed[0].load_state(str(tmp_path / "at6"))  # before there is a clipper
    assert steps(resumed, 6, 10) == want
    resumed[0].load_state(str(tmp_path / "at6"))  # and in the middle
    assert steps(resumed, 6, 10) == want
    resumed[1].remove()
    assert not resumed[0]._save_model_state_pre_hook


@pytest.mark.ranks(1, 2)
def test_a_checkpoint_that_the_accelerator_does_not_make(tmp_path: Path) -> None:
    """As Trainer's, whose callback would keep ``handle.state_dict()``."""
    import torch

    run = begin("ddp")
    steps(run, 0, 6)
    weights, moments = copy.deepcopy((run[2].state_dict(), run[3].state_dict()))
    file = tmp_path / f"{run[0].process_index}.pt"
    torch.save(run[1].state_dict(), file)
    want = steps(run, 6, 9)
    resumed = begin("ddp")
    resumed[2].load_state_dict(weights)
    resumed[3].load_state_dict(moments)
    resumed[1].load_state_dict(torch.load(file, weights_only=True))
    assert steps(resumed, 6, 9) == want
    assert len(resumed[1].state_dict()["clippers"]) == 1
    with pytest.raises(StateError, match="was given is no state of distclip"):
        resumed[1].load_state_dict({"clippers": 3})


@pytest.mark.ranks(1, 2)
def test_two_models_of_the_same_names_get_their_own_memory() -> None:
    from torch import nn

    def two() -> Any:
        import distclip

        accelerator = start("ddp")
        handle = distclip.accelerate.attach(accelerator, policies.adagc(warmup_steps=2))
        models = [nn.Linear(5, 1), nn.Linear(5, 2)]
        optimizers = [sgd(model) for model in models]
        prepared = accelerator.prepare(*models, *optimizers)
        return accelerator, handle, prepared[:2], prepared[2:]

    def train(run: Any, order: tuple[int, ...]) -> None:
        accelerator, _, models, optimizers = run
        for turn in order:
            accelerator.backward((turn + 1.0) * models[turn](batch(0)).square().mean())
            optimizers[turn].step()
            optimizers[turn].zero_grad()

    run, resumed = two(), two()
    train(run, (0, 1, 0, 1))
    saved = run[1].state_dict()
    resumed[1].load_state_dict(saved)
    train(resumed, (1, 0))  # in another order than before: the shapes tell them apart
    found = {
        str(clipper["shapes"]): clipper["step"] for clipper in resumed[1].state_dict()["clippers"]
    }
    assert found == {"[[1, 5], [1]]": 3, "[[2, 5], [2]]": 3}


@pytest.mark.ranks(1)
def test_other_policies_and_older_checkpoints(tmp_path: Path) -> None:
    run = begin("ddp")
    steps(run, 0, 2)
    run[0].save_state(str(tmp_path / "new"))
    other = begin("ddp", policies.zclip())
    weights = copy.deepcopy(other[2].state_dict())
    file = str(tmp_path / "new" / "distclip.pt")
    message = rf"{file}.*belongs to Chain.* clipper's policy is ZClip.*remove {file}"
    with pytest.raises(StateError, match=message):
        other[0].load_state(str(tmp_path / "new"))
    for name, weight in other[2].state_dict().items():  # nor has Accelerate loaded anything
        assert bool((weight == weights[name]).all()), name
    steps(other, 2, 3)
    higher = policies.chain(policies.adagc(1.5, warmup_steps=3), policies.autoclip(90, window=20))
    same = begin("ddp", higher)
    same[0].load_state(str(tmp_path / "new"))
    steps(same, 2, 3)
    assert same[1].state_dict()["clippers"][0]["step"] == 3
    (tmp_path / "new" / "distclip.pt").unlink()
    older = begin("ddp")
    with logged() as messages:
        older[0].load_state(str(tmp_path / "new"))
    assert any("no distclip.pt" in message for message in messages)
    steps(older, 2, 3)
