"""Policies with a memory: published runs, defects of peers, the oracle's trajectory, long runs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, distribute_tensor

from distclip import ConfigurationError, GradClipper, policies
from distclip.policies import ParameterInfo, Policy, Skip, Statistics
from distclip.testing import memory as reference
from tests.policies.driving import GOOD, drive
from tests.sharded import mesh_of

OTHERS = {
    "zclip_official|nomax_mean": "another form of clipping",
    "zclip_official|nomax_percentile": "another form of clipping, mu + k sigma",
    "zclip_official|nomax_skipupd": "leaves the statistics alone at a spike",
    "levanter_clip_update_official|32x3": "clips where skip_spikes skips",
    "adagc_pytorch_optimizer_4.1.0": "norms after clipping in the warm-up: field row 23",
    "bitsandbytes_port|percentile=95": "removed upstream; autoclip(95, window=100) serves",
}
"""Published runs of what is no policy here."""


def test_every_golden_is_used_or_left_out_for_a_reason(published: dict[str, np.ndarray]) -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for key in published:
        assert key in OTHERS or key.split("|")[0] in text, key


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policies.autoclip(101), "percentile must be 0 to 100"),
        (lambda: policies.autoclip(10, window=0), "window must be a whole number of at least 1"),
        (lambda: policies.autoclip(10, window=2.5), "window must be a whole number"),
        (lambda: policies.autoclip(10, window=10**18), "window must be at most 1,000,000"),
        (lambda: policies.skip_spikes(window=10**7), "window must be at most 1,000,000"),
        (lambda: policies.zclip(z_thresh=0), "z_thresh must be finite and > 0"),
        (lambda: policies.zclip(alpha=1.0), "alpha must be >= 0 and < 1"),
        (lambda: policies.zclip(max_norm=-1), "max_norm must be >= 0"),
        (lambda: policies.adagc(lambda_rel=0.9), "lambda_rel must be >= 1"),
        (lambda: policies.adagc(floor=0), "floor must be finite and > 0"),
        (lambda: policies.adagc(max_growth=0.5), "max_growth must be >= 1"),
        (lambda: policies.skip_spikes(window=32), "min_history must be at most window"),
        (lambda: policies.skip_spikes(max_consecutive=0), "max_consecutive must be a whole"),
        (lambda: policies.skip_spikes(loss=1), "loss must be true or false"),  # type: ignore
        (lambda: policies.skip_spikes(clip_sigma=7), "clip_sigma must be at most sigma"),
        (lambda: policies.skip_spikes(clip_sigma=0), "clip_sigma must be finite and > 0"),
    ],
)
def test_impossible_arguments(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def nasty(steps: int, seed: int = 0) -> np.ndarray:
    """A drifting norm with 1 % each of NaN, inf and spikes of 1000 times."""
    random = np.random.default_rng(seed)
    drift = np.exp(np.sin(np.arange(steps) / 500.0))
    norms = drift * random.lognormal(0.0, 0.2, steps)
    kind = random.random(steps)
    norms[kind < 0.03] *= 1000.0
    norms[kind < 0.02] = math.inf
    norms[kind < 0.01] = math.nan
    return norms


LONG: dict[str, Policy] = {
    "autoclip": policies.autoclip(90),
    "autoclip window": policies.autoclip(90, window=200),
    "zclip": policies.zclip(max_norm=None),
    "adagc": policies.adagc(max_growth=100.0),
    "skip_spikes": policies.skip_spikes(),
}


RUNS, STEPS = 50, 2_000
"""Fifty runs of 2,000 steps side by side: 100,000 steps of each policy."""


def bounds(label: str, seen: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the docstrings say of a threshold, from the finite norms seen: ``(runs, steps)``."""
    low = torch.where(torch.isfinite(seen), seen, math.inf).amin(1)
    high = torch.where(torch.isfinite(seen), seen, 0.0).amax(1)
    if label == "autoclip":
        error = 1 + policies.AutoClip.relative_error
        return low / error, high * error
    if label == "zclip":  # between mu and mu + z_thresh * sigma, as they were before this step
        return low, state["mean"] + 2.5 * state["deviation"]
    if label == "adagc":
        return torch.full_like(low, 1e-6), 100.0 * state["first"][:, 0]
    return low, high


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap of clamp_
@pytest.mark.parametrize("label", LONG)
def test_a_hundred_thousand_steps(label: str) -> None:
    policy, infos = LONG[label], [ParameterInfo("p", (3,))]
    norms = torch.from_numpy(np.stack([nasty(STEPS, seed) for seed in range(RUNS)]))
    state = {k: v.expand(RUNS, *v.shape).clone() for k, v in policy.init(infos).items()}
    sizes = {key: (value.shape, value.dtype) for key, value in state.items()}

    @torch.vmap
    def step_of_all(norm: Tensor, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        (action, *_), new = policy.update(Statistics(infos, {2.0: norm}), state)
        if isinstance(action, Skip):
            return new, action.flag
        limit = new["gamma"][0] if label == "adagc" else action.threshold
        return new, limit  # type: ignore[return-value]

    skips, checked = torch.zeros(RUNS), 0
    with torch.no_grad():
        for step in range(STEPS):
            before = state
            state, decided = step_of_all(norms[:, step : step + 1], state)
            if label == "skip_spikes":
                skips += decided
            if step % 97 and not (decided > 1e3).any():
                continue
            assert all(value.isfinite().all() for value in state.values()), step
            assert {key: (v.shape, v.dtype) for key, v in state.items()} == sizes
            if label != "skip_spikes" and step >= 200:
                low, high = bounds(label, norms[:, : step + 1], before)
                known = ~torch.isnan(decided)
                sound = (low * (1 - 1e-9) <= decided) & (decided <= high * (1 + 1e-9))
                assert sound[known].all(), step
                checked += int(known.sum())
    finite = torch.isfinite(norms)
    if label == "skip_spikes":
        bad = (~finite).sum(1) + (finite & (norms > 50.0)).sum(1)
        assert ((skips > bad * 0.9) & (skips < bad * 1.1)).all()
    else:
        assert checked > 20  # zclip shows a threshold at outliers only
    if label == "autoclip":
        nothing = torch.full((RUNS, 1), math.nan, dtype=torch.float64)
        _, limits = step_of_all(nothing, state)
        for run, limit in zip(norms, limits, strict=True):
            exact = np.percentile(run[torch.isfinite(run)].numpy(), 90)
            assert limit.item() == pytest.approx(exact, rel=policies.AutoClip.relative_error)


def test_norms_at_the_ends_of_float64_leave_every_state_finite() -> None:
    norms = np.r_[GOOD[:130], 1e300, 1e308, 5e-324, 1e-300, GOOD[:5]]
    for policy in LONG.values():
        _, states = drive(policy, norms)
        assert all(v.isfinite().all() for state in states for v in state.values()), policy


def stepped(clipper: GradClipper, parameter: nn.Parameter, norm: float, **kwargs: Any) -> Any:
    parameter.grad = torch.tensor([norm, 0.0], dtype=parameter.dtype)
    return clipper.clip_(**kwargs)


def test_a_skipped_step_leaves_no_trace_in_other_policies() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    spikes = policies.skip_spikes(window=16, min_history=4, sigma=6.0)
    clipper = GradClipper(
        [("p", parameter)], policies.chain(spikes, policies.autoclip(50, window=16))
    )
    for norm in (1.0, 1.1, 0.9, 1.0, 1.05):
        stepped(clipper, parameter, norm)
    before = clipper.state_dict()["states"]
    report = stepped(clipper, parameter, 1000.0)
    after: Any = clipper.state_dict()["states"]
    assert bool(report.skipped)
    assert torch.equal(parameter.grad, torch.tensor([1000.0, 0.0]))  # type: ignore[arg-type]
    assert torch.equal(after["1"]["shared"]["seen"], before["1"]["shared"]["seen"])  # type: ignore
    assert after["0"]["shared"]["series"].item() == 1


def test_the_loss_is_judged_too() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    policy = policies.skip_spikes(window=16, min_history=4, loss=True)
    clipper = GradClipper([("p", parameter)], policy)
    for loss in (2.0, 2.1, 1.9, 2.05, 1.95):
        clipper.observe(torch.tensor(loss - 0.1))  # two micro-batches
        assert not stepped(clipper, parameter, 1.0 + loss / 100, loss=loss + 0.1).skipped
    assert stepped(clipper, parameter, 1.02, loss=50.0).skipped
    assert not stepped(clipper, parameter, 1.02, loss=2.0).skipped
    silent = GradClipper([("p", parameter)], policy)
    with pytest.warns(UserWarning, match="reads the loss, and this step has none"):
        stepped(silent, parameter, 1.0)
    with pytest.raises(ConfigurationError, match=r"one number, got a tensor of shape \[2\]"):
        clipper.observe(torch.ones(2))


@pytest.mark.ranks(2)
def test_a_loss_that_is_spread_over_ranks_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    policy = policies.skip_spikes(window=16, min_history=4, loss=True)
    clipper = GradClipper([("p", parameter)], policy)
    with pytest.raises(ConfigurationError, match=r"loss\.full_tensor\(\)"):
        clipper.observe(distribute_tensor(torch.tensor(1.0), mesh_of((2,), ("x",)), [Replicate()]))


def test_the_reference_agrees_on_scripted_norms() -> None:
    """Both were written from the formulas; here they meet on nasty norms."""
    norms = nasty(600, seed=3)
    cases: list[tuple[Policy, Any]] = [
        (policies.autoclip(30, window=50), lambda m, n: reference.autoclip(m, n, 30, 50)),
        (policies.zclip(), reference.zclip),
        (policies.skip_spikes(), lambda m, n: reference.skip_spikes(m, n, None)),
    ]
    for policy, step in cases:
        actions, _ = drive(policy, norms)
        memory: Any = {}
        for action, norm in zip(actions, norms, strict=True):
            decided, memory = step(memory, float(norm))
            if isinstance(action, Skip):
                assert bool(action.flag) == decided
            else:
                shown = float(action.threshold)
                assert (math.isnan(shown) and math.isinf(decided)) or shown == pytest.approx(
                    decided, rel=1e-9
                )
