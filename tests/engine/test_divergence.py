"""What differs between ranks after construction is found in the step, and named, on all ranks."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distclip import GradClipper, RankMismatchError, policies
from distclip.engine.agreement import EVERY, Agreement, LastClip, disagreement
from distclip.layouts.differences import ranked
from distclip.statistics.packing import Stamp
from tests.engine.test_handshake import SECONDS, is_odd, others, refused
from tests.helpers.logs import logged
from tests.helpers.watching import REDUCTION, watch

LAYOUTS = ("plain", "fsdp2")


def built(layout: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    if layout == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def backward(model: nn.Module, factor: float = 1.0) -> None:
    model.zero_grad()
    (model(torch.ones(4, 5)).square().sum() * factor).backward()


def local(tensor: Any) -> torch.Tensor:
    tensor = getattr(tensor, "_local_tensor", tensor)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def refused_unchanged(model: nn.Module, step: Callable[[], object], *words: str) -> str:
    """As ``refused``, and no gradient has changed."""
    before = [local(parameter.grad).clone() for parameter in model.parameters()]
    message = refused(step, *words)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(local(parameter.grad), old)
    return message


def last() -> str:
    return ranked([dist.get_world_size() - 1])


@pytest.mark.ranks(2, 3, timeout=SECONDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameter_groups(layout: str) -> None:
    model = built(layout)
    parameters = list(model.parameters())
    for cut, swapped in ((1, False), (2, True)):
        cut = cut if is_odd() else 2
        groups = [{"params": parameters[:cut]}, {"params": parameters[cut:]}]
        if swapped and is_odd():
            groups.reverse()
        optimizer = torch.optim.SGD(groups, lr=0.1)
        clipper = GradClipper(model, policies.group_norm(0.1))
        handle = clipper.attach(optimizer)
        backward(model)
        weights = [local(parameter).clone() for parameter in parameters]
        message = refused_unchanged(
            model,
            optimizer.step,
            "parameter groups",
            f"{last()}: '0.bias'",
            f"{others()}: '0.bias'",
        )
        assert ("'2.bias'" in message) == swapped  # those that differ, and no others
        assert all(torch.equal(local(p), old) for p, old in zip(parameters, weights, strict=True))
        handle.remove()
    # A policy that does not ask for groups may have any.
    clipper = GradClipper(model, policies.global_norm(0.1))
    clipper.attach(torch.optim.SGD(groups, lr=0.1))
    clipper.clip_()


@pytest.mark.ranks(2, 3, timeout=SECONDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("policy", "more"),
    [
        (policies.adagc(warmup_steps=2), {}),
        # Due at step 0 and not at step 3: the ranks would send messages of different lengths.
        (policies.global_norm(1.0), {"ratios": 2, "exponents": 2}),
    ],
)
def test_a_state_that_one_rank_has_loaded(
    layout: str, policy: policies.Policy, more: dict[str, Any]
) -> None:
    model = built(layout)
    clipper = GradClipper(model, policy, **more)
    for _ in range(3):
        backward(model)
        clipper.clip_()
    state = copy.deepcopy(clipper.state_dict())
    clipper = GradClipper(model, policy, **more)
    if is_odd():
        clipper.load_state_dict(state)
    backward(model, 50.0)
    refused_unchanged(
        model, clipper.clip_, f"loaded state: {last()}: that of step 3", f"{others()}: none"
    )
    # On all ranks it is no difference, whatever each had done before.
    clipper = GradClipper(model, policy, **more)
    if is_odd():
        clipper.load_state_dict(state)
    clipper.load_state_dict(state)
    clipper.clip_()


@pytest.mark.ranks(2, timeout=SECONDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_memory_that_changed_on_one_rank(layout: str) -> None:
    """As by a faulty chip: compared when replicas are."""
    model = built(layout)
    clipper = GradClipper(model, policies.adagc(warmup_steps=2), verify_replicas=2)
    for step in range(3):
        backward(model)
        if step == 2:
            bits = clipper._session.states[""]["gamma"].view(torch.int64)
            bits[1] ^= int(is_odd())
            refused_unchanged(model, clipper.clip_, "memory of the policy", last(), others())
        else:
            clipper.clip_()


@pytest.mark.ranks(2, timeout=SECONDS)
@pytest.mark.parametrize("order", [2.0, float("inf")])
def test_what_travels(order: float) -> None:
    """Two numbers more, with sums and with maxima, in the one collective that there was."""
    model = built("fsdp2")
    clipper = GradClipper(
        model, policies.global_norm(1.0, norm_type=order), verify_replicas="never"
    )
    for _ in range(3):
        backward(model)
        with watch() as seen:
            clipper.clip_()
        assert [name for name, _ in seen.collectives] == [REDUCTION]
        assert seen.collectives[0][1] == 8 * (4 + 1 + 2)
    if is_odd():
        clipper._session.step += 1
    backward(model)
    refused_unchanged(model, clipper.clip_, f"step: {last()}: 4; {others()}: 3")


@pytest.mark.ranks(2, timeout=SECONDS)
def test_one_clip_too_many_is_said_before_the_collective() -> None:
    """Nothing that travels can tell: the n-th clips of all ranks meet. The rank itself can."""
    with logged() as messages:
        model = built("fsdp2")
        clipper = GradClipper(model, policies.global_norm(0.1))
        for step in range(2):
            backward(model, step + 1.0)
            clipper.clip_()
        assert not messages
        for _ in range(2):
            clipper.clip_()
        assert len(messages) == 1  # and not at every step
        assert f"rank {dist.get_rank()} clips again at step 2" in messages[0]


@pytest.mark.parametrize("ranks", [2, 3, 8192])
def test_a_stamp_shows_every_difference_to_every_rank(ranks: int) -> None:
    """Exactly, at the largest numbers and for one rank of thousands that is off by one."""
    limit = 1 << (53 - (ranks - 1).bit_length()) // 2
    for number in (0, 1, limit // 3, limit - 2):
        for odd in (number, number + 1):
            stamps = [Stamp(number, limit, ranks), Stamp(odd, limit, ranks)]
            for maximum in (False, True):
                pairs = torch.tensor(
                    [stamp.pair(maximum=maximum) for stamp in stamps], dtype=torch.float64
                )
                everyones = torch.cat([pairs[:1].expand(ranks - 1, 2), pairs[1:]])
                reduced = everyones.amax(0) if maximum else everyones.sum(0)
                seen = [s.is_everybodys(reduced.tolist(), maximum=maximum) for s in stamps]
                assert seen == [odd == number] * 2


@pytest.mark.ranks(2, timeout=SECONDS)
def test_a_device_that_the_host_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a difference is raised at the comparison after that which found it, on all ranks."""
    assert dist.group.WORLD is not None

    class Event:
        record = synchronize = lambda self: None

    monkeypatch.setattr(torch, "Event", lambda device: Event())
    agreement = Agreement(dist.group.WORLD, torch.device("meta"), immediate=False)
    sent = []
    for step in range(3 * EVERY):
        here = step + (is_odd() and step >= EVERY)
        agreed = agreement.of_step(here, memory="", now=False)
        summed = torch.tensor([0.0, *agreed.stamp.pair(maximum=False)], dtype=torch.float64)
        dist.all_reduce(summed)
        reduced: Any = SimpleNamespace(flags=summed, as_maxima=False)
        if not agreed.stamp.idle:
            sent.append(step)
        if step == 2 * EVERY:
            refused(lambda a=agreed, r=reduced: a.judge(r), f"step: {last()}: {EVERY + 1}")
            break
        agreed.judge(reduced)
    assert sent == [0, EVERY, 2 * EVERY]


def test_two_clips_of_the_same_gradients() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(9)]
    seen = LastClip(parameters)
    assert not seen.is_repeated()
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    assert not seen.is_repeated()
    seen.remember()
    assert seen.is_repeated()
    parameters[0].grad.mul_(2)  # type: ignore[union-attr]
    assert not seen.is_repeated()
    seen.remember()
    parameters[0].grad = torch.ones(2)
    assert not seen.is_repeated()
    seen.remember()
    for parameter in parameters:
        parameter.grad = None
    assert not seen.is_repeated()


def test_the_message_of_a_difference() -> None:
    facts: list[Any] = [
        {"step": "4", "parameter groups": {"a": 0, "b": 1, "c": None}},
        {"step": "4", "parameter groups": {"a": 0, "b": 0, "c": 1}},
    ]
    error = disagreement({0: facts[0], 3: facts[1]})
    assert isinstance(error, RankMismatchError)
    for words in (
        "rank 3: 'b' in group 0, 'c' in group 1",
        "rank 0: 'b' in group 1, 'c' in no group",
        "same parameter groups, in the same order, on every rank",
    ):
        assert words in str(error)
    assert "step" not in str(error).partition("changed in this step")[0]
