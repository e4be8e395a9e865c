"""DreamerV3's own code, executed; every configuration, with given gradients and in closed loop.

``golden_dreamer.npz``: 20 updates; the tensors of ``meta|names`` one after another in the last dim
(their shapes in ``shape|<name>``). Update 3 has no gradient at all but zeros, 7 one of 1000 times
the size.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distclip.optim import LaProp, dreamer_v3
from tests.optim.chain import Chain

GOLDEN = Path(__file__).parent.parent / "golden" / "golden_dreamer.npz"
CONFIGS = [
    "plain",
    "plain_nesterov",
    "plain_eps1e-3",
    "plain_noagc",
    "default",
    "warm5",
    "warm5_wd",
    "warm5_linear20",
    "warm5_cosine20",
    "warm0_nesterov_wd",
]


class Golden:
    def __init__(self) -> None:
        with np.load(GOLDEN, allow_pickle=False) as file:
            self.arrays = dict(file)
        self.names = json.loads(str(self.arrays["meta|names"]))
        self.configs = json.loads(str(self.arrays["meta|configs"]))
        self.shapes = {n: tuple(self.arrays[f"shape|{n}"].tolist()) for n in self.names}
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        self.cuts = np.cumsum(sizes)[:-1]

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        parts = np.split(flat, self.cuts, axis=-1)
        return {
            name: part.reshape(self.shapes[name])
            for name, part in zip(self.names, parts, strict=True)
        }

    def flat(self, parts: dict[str, Any]) -> np.ndarray:
        return np.concatenate([np.asarray(parts[name]).reshape(-1) for name in self.names])

    def gradients(self, mode: str, t: int, p: np.ndarray) -> np.ndarray:
        if mode == "open":
            return self.arrays["in|gseq"][t]
        amp, curv, target = (self.arrays[f"in|{k}"] for k in ("amp", "curv", "target"))
        return amp[t] * curv * (p - target)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


def ours(config: dict[str, Any], plain: bool) -> dict[str, Any]:
    """Our arguments for theirs."""
    keys = {"b1": "beta1", "b2": "beta2", "wd": "weight_decay"}
    result = {keys.get(key, key): value for key, value in config.items()}
    return {**result, "warmup": 0} if plain else result


def for_chain(arguments: dict[str, Any]) -> dict[str, Any]:
    keys = {"beta1": "b1", "beta2": "b2"}
    defaults = {"lr": 4e-5, "warmup": 1000}
    return {**defaults, **{keys.get(key, key): value for key, value in arguments.items()}}


def is_kernel(name: str, parameter: object) -> bool:
    return name.endswith("/kernel")


def test_the_configurations_are_all_here(golden: Golden) -> None:
    assert list(golden.configs) == CONFIGS


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("mode", ["open", "closed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_their_code_is_reproduced(golden: Golden, name: str, mode: str, foreach: bool) -> None:
    arguments = ours(golden.configs[name], name.startswith("plain"))
    start = golden.split(golden.arrays["in|p0"])
    model = {n: nn.Parameter(torch.from_numpy(w.copy())) for n, w in start.items()}
    optimizer = dreamer_v3(model.items(), **arguments, decay_mask=is_kernel, foreach=foreach)
    assert isinstance(optimizer, LaProp)
    oracle = Chain(start, **for_chain(arguments), decays=is_kernel)

    def values() -> np.ndarray:
        return golden.flat({n: p.detach().numpy() for n, p in model.items()})

    for t in range(20):
        before = values()
        flat = golden.gradients(mode, t, before).astype(np.float32)
        for n, gradient in golden.split(flat).items():
            model[n].grad = torch.from_numpy(gradient.copy())
        if f"lr|{name}" in golden.arrays:
            want = golden.arrays[f"lr|{name}"][t]
            # optax has 1 - t / warmup in float32, and then 1 minus that.
            assert optimizer.learning_rates()[0] == pytest.approx(want, rel=3e-5)
        optimizer.step()
        oracle_flat = golden.gradients(mode, t, golden.flat(oracle.p))
        oracle.step(golden.split(oracle_flat))

        np.testing.assert_allclose(
            values(), golden.arrays[f"{mode}|{name}|p"][t], rtol=0, atol=1e-5, err_msg=f"p at {t}"
        )
        np.testing.assert_allclose(
            golden.flat(oracle.p), golden.arrays[f"{mode}|{name}|p"][t], rtol=0, atol=1e-5
        )
        check_update(golden, name, mode, t, optimizer, model)
        if mode == "open" and name.startswith("plain"):
            check_stages(golden, name, t, optimizer, model)
    rate = golden.arrays.get(f"lr|{name}")
    if rate is not None:  # beyond the run: where a schedule ends
        for group in optimizer.param_groups:
            group["updates"] = 24
        assert optimizer.learning_rates()[0] == pytest.approx(rate[24], rel=2e-6)


def check_update(
    golden: Golden, name: str, mode: str, t: int, optimizer: LaProp, model: dict[str, Tensor]
) -> None:
    """The update itself, which the parameters' own rounding hides: from the optimizer's moments."""
    (group,) = optimizer.param_groups
    if group["nesterov"] or group["weight_decay"]:
        return  # not a function of the moments alone; the parameters are held above
    correction = 1 - group["betas"][0] ** (t + 1)
    group["updates"] -= 1
    lr = optimizer.learning_rates()[0]
    group["updates"] += 1
    update = {n: -lr * optimizer.state[p]["exp_avg"] / correction for n, p in model.items()}
    want = golden.arrays[f"{mode}|{name}|upd"][t]
    tolerance = 1e-5 if mode == "open" else 5e-4
    # Of an element whose momentum cancels, nothing is left to be relative to: of the largest then.
    atol = tolerance * float(np.abs(want).max())
    np.testing.assert_allclose(golden.flat(update), want, rtol=tolerance, atol=atol)
    if t == 0 and group["warmup"]:
        assert not want.any()


def check_stages(
    golden: Golden, name: str, t: int, optimizer: LaProp, model: dict[str, Tensor]
) -> None:
    """Clipped gradients and both moments."""
    have = {
        "agc": {n: p.grad for n, p in model.items()},
        "nu": {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.items()},
        "mu": {n: optimizer.state[p]["exp_avg"] for n, p in model.items()},
    }
    for stage, tensors in have.items():
        want = golden.arrays[f"open|{name}|{stage}"][t]
        # jax's 1 - 0.999 ** t is float32 (off by 1.6e-5 at first); it moves the weights, which AGC
        # then clips by.
        atol = 5e-5 * float(np.abs(want).max()) if stage == "mu" else 0
        np.testing.assert_allclose(
            golden.flat(tensors), want, rtol=5e-5, atol=atol, err_msg=f"{stage} at {t}"
        )
