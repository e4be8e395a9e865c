"""Options: named once, checked once, handed on everywhere, and fixed after construction."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import distclip
from distclip import ConfigurationError, GradClipper, config, policies
from distclip.integrations.clippers import Clippers
from distclip.options import OPTION_NAMES, Options

OTHER: dict[str, Any] = {
    "policy": policies.measure(1.0),
    "on_nonfinite": "skip",
    "norms": False,
    "verify_replicas": 3,
    "fold": False,
    "overlap": True,
    "stuck_after": 90.0,
    "ratios": 5,
    "exponents": 7,
}
"""A value of each option that is not its default."""
pytestmark = pytest.mark.filterwarnings("ignore:overlap=True has no effect")


def shown(clipper: GradClipper) -> dict[str, Any]:
    return {name: getattr(clipper, name) for name in OPTION_NAMES}


def test_every_option_is_named_in_every_place_that_has_to_name_it() -> None:
    assert set(OTHER) == set(OPTION_NAMES)
    signature = inspect.signature(GradClipper.__init__).parameters
    assert set(signature) - {"self", "target", "optimizer", "process_group", "sinks"} == set(
        OPTION_NAMES
    )
    defaults = Options(policies.measure())
    for name in OPTION_NAMES[1:]:
        assert signature[name].default == getattr(defaults, name) != OTHER[name], name
    keys = set(config.json_schema()["properties"])
    assert keys - {"by_name", "by_part", "log", "imports", "$schema"} == set(OPTION_NAMES)
    for name in OPTION_NAMES[1:]:
        loaded = config.load({"policy": "measure", name: OTHER[name]})
        assert getattr(loaded, name) == OTHER[name], name
        assert config.digest(loaded) != config.digest(config.load({"policy": "measure"})), name


def test_from_config_hands_every_option_on() -> None:
    document = {**OTHER, "policy": {"name": "measure", "norm_type": 1.0}}
    assert shown(distclip.from_config(document, nn.Linear(2, 2))) == OTHER


def test_accelerate_hands_every_option_on() -> None:
    model = nn.Linear(2, 2)
    prepared: Any = SimpleNamespace(
        meant=lambda parameters: ([(str(n), p) for n, p in enumerate(parameters)], []),
        accelerator=SimpleNamespace(is_main_process=False),
    )
    clippers = Clippers(prepared, config.Config(**OTHER))
    assert shown(clippers.of(list(model.parameters()))) == OTHER
    measuring = clippers.of(list(model.parameters()), measuring=2.0)
    assert measuring.on_nonfinite == "pass"
    assert measuring.policy == policies.measure()


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_an_option_cannot_be_changed_later(name: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    clipper = GradClipper([("w", weight)], policies.global_norm(1.0))
    before = shown(clipper)
    message = rf"GradClipper.{name} cannot be changed.*build a new GradClipper\(\.\.\., {name}="
    with pytest.raises(ConfigurationError, match=message):
        setattr(clipper, name, OTHER[name])
    with pytest.raises((ConfigurationError, AttributeError)):
        delattr(clipper, name)
    assert shown(clipper) == before


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("policy", 1.0),
        ("policy", policies.GlobalNorm),
        ("on_nonfinite", "warn"),
        ("on_nonfinite", None),
        ("norms", 1),
        ("verify_replicas", 0),
        ("verify_replicas", True),
        ("verify_replicas", "always"),
        ("fold", "no"),
        ("overlap", None),
        ("stuck_after", 0),
        ("stuck_after", "1"),
        ("stuck_after", True),
        ("stuck_after", float("inf")),
        ("ratios", 0),
        ("ratios", True),
        ("ratios", "always"),
        ("exponents", 1.0),
    ],
)
def test_a_bad_option_is_refused_by_name(name: str, bad: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be"):
        GradClipper(nn.Linear(2, 2), **{"policy": policies.measure(), name: bad})
    with pytest.raises(ConfigurationError, match=f"{name} must be"):
        config.Config(**{"policy": policies.measure(), name: bad})
