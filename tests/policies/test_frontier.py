"""The kept goldens are what their script makes, and each is used."""

from pathlib import Path

import numpy as np

from tests.policies.frontier import script


def test_the_script_makes_the_kept_goldens(frontier: dict[str, np.ndarray]) -> None:
    made = script().make()
    assert made.keys() == frontier.keys()
    for key, value in made.items():
        np.testing.assert_allclose(frontier[key], value, rtol=1e-12, err_msg=key)


def test_every_golden_is_used(frontier: dict[str, np.ndarray]) -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for key in frontier:
        assert f'"{key}"' in text, key
