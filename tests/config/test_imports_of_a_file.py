"""Modules of policies that a configuration imports."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distclip import config
from distclip.errors import ConfigurationError
from distclip.policies import registry

OWN = """
from dataclasses import dataclass
from typing import ClassVar
from distclip import policies

@policies.register
@dataclass(frozen=True)
class Own(policies.Policy):
    size: float = 1.0
    name: ClassVar[str] = "{name}"

    def update(self, statistics, state):
        return (), state
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for modules; the policies that they register are gone after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(registry._registered)
    yield tmp_path
    registry._registered.clear()
    registry._registered.update(before)


def test_a_policy_of_ones_own_is_named_after_its_module(folder: Path) -> None:
    (folder / "own_one.py").write_text(OWN.format(name="own_one"))
    document = {"imports": ["own_one"], "policy": {"name": "own_one", "size": 2.0}}
    policy = config.load(document).policy
    assert (policy.name, policy.size) == ("own_one", 2.0)  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match=r"policy\.size: should be"):
        config.load({**document, "policy": {"name": "own_one", "size": "big"}})
    ladder = {"name": "ladder", "spikes": document["policy"]}
    with pytest.raises(ConfigurationError, match=r"policy\.spikes: must be one policy that skips"):
        config.load({**document, "policy": ladder})


@pytest.mark.parametrize(
    ("imports", "message"),
    [
        (["no_such_module"], r"imports\[0\]: no module named 'no_such_module'; it has to be inst"),
        (["own_broken"], r"imports\[0\]: own_broken could not be imported: ZeroDivisionError"),
        (["own_needy"], r"imports\[0\]: no module named 'absent_thing', which own_needy imports"),
        (["my/policies.py"], r"imports\[0\]: must be the name of a module, got 'my/policies.py'; "),
        ("own_one", r"imports: .*list.*got 'own_one'"),
        ([3], r"imports\[0\]: .*got 3"),
    ],
)
def test_what_cannot_be_imported(folder: Path, imports: Any, message: str) -> None:
    (folder / "own_broken.py").write_text("1 / 0")
    (folder / "own_needy.py").write_text("import absent_thing")
    with pytest.raises(ConfigurationError, match=message):
        config.load({"imports": imports, "policy": "measure"})


def test_a_class_defined_anew_takes_its_place_and_another_does_not(folder: Path) -> None:
    space: dict[str, Any] = {"__name__": __name__}
    for _ in range(2):  # a notebook cell, run twice
        exec(OWN.format(name="own_cell"), space)
    assert registry.registered()["own_cell"] is space["Own"]
    space["__name__"] = "json"
    with pytest.raises(ConfigurationError, match="taken by Own"):
        exec(OWN.format(name="own_cell"), space)
