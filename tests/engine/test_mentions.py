"""Names that match nothing, and what is no policy: said in plain words, with the nearest name."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from distclip import ConfigurationError, GradClipper, policies
from distclip.policies.compose import nearest


@pytest.mark.parametrize(
    ("given", "mend"),
    [
        ("agc", "write policies.agc(...)"),
        ("acg", "write policies.agc(...)"),
        (policies.agc, "write policies.agc(...)"),
        ("runs/policy.yaml", "distclip.from_config("),
        (Path("policy"), "distclip.from_config("),
        ({"name": "agc"}, "distclip.from_config("),
        (1.0, "got 1.0"),
    ],
)
def test_what_is_no_policy(given: Any, mend: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        GradClipper(nn.Linear(2, 2), given)
    assert mend in str(caught.value)
    assert (";" in str(caught.value)) == (given != 1.0)


def test_the_nearest_name_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    agc = policies.agc(unit_dims={"1.wieght": (0,), "0.weight": (0,)})
    GradClipper(model, policies.by_name({"*.baiss": None, "0.*": agc}, default=agc))
    by_name, unit_dims = (record.getMessage() for record in caplog.records)
    assert "by_name: no parameter's name matches '*.baiss'" in by_name
    assert by_name.endswith("; nearest: '0.bias'")
    assert "unit_dims: no parameter's name matches '1.wieght', so these dims" in unit_dims
    assert unit_dims.endswith("; nearest: '1.weight'")
    caplog.clear()
    GradClipper(model, policies.agc(unit_dims={"*.weight": (0,)}))
    assert not caplog.records


def test_no_name_is_near() -> None:
    assert nearest("quite*else", ["0.weight", "0.bias"]) is None
    assert nearest("layers.0.atn.*", ["layers.0.attn.weight", "head.weight"]) is not None
