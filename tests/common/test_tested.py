"""Versions that are too old are refused by name, and newer ones are mentioned once."""

import logging
from importlib import metadata

import pytest
from packaging.requirements import Requirement

import distclip
from distclip.common import tested
from distclip.common.namespaces import namespace
from distclip.common.tested import TESTED
from distclip.errors import DistclipError
from distclip.integrations import hooks

REQUIREMENTS = [Requirement(each) for each in metadata.requires("distclip") or ()]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The installed versions, to be set; as if nothing had been checked in this process."""
    found: dict[str, str] = {}
    monkeypatch.setattr(tested, "_checked", set())
    monkeypatch.setattr(metadata, "version", lambda name: found[name])
    monkeypatch.delenv("RANK", raising=False)
    return found


@pytest.mark.parametrize("package", TESTED)
def test_the_oldest_version_is_the_one_that_is_required(package: str) -> None:
    stated = [str(each.specifier) for each in REQUIREMENTS if each.name == package]
    assert stated
    assert set(stated) == {f">={TESTED[package].oldest}"}


def test_no_requirement_has_an_upper_limit() -> None:
    tools = {"mkdocs-material"}  # makes the site; whoever uses distclip does without it
    needed = [each for each in REQUIREMENTS if each.name not in tools]
    operators = {limit.operator for each in needed for limit in each.specifier}
    assert operators == {">="}


@pytest.mark.parametrize(
    ("version", "place"),
    [
        ("2.12.1", -1),
        ("2.13.0", 0),
        ("2.13.0+cpu", 0),
        ("2.14.9", 0),
        ("2.14.0a0+0123abc.nv26.1", 0),
        ("2.15.0.dev20261101", 1),
        ("3.0", 1),
        ("of a fork", 0),
    ],
)
def test_places(version: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TESTED, "torch", tested.Range("2.13", "2.14"))
    assert tested.place("torch", version) == place


def test_a_newer_version_is_mentioned_once(
    versions: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    versions["torch"] = "99.1.2"
    with caplog.at_level(logging.WARNING, "distclip"):
        distclip.__getattr__("GradClipper")
        distclip.__getattr__("clip_grad_norm_")
    (line,) = caplog.messages
    oldest, newest = TESTED["torch"]
    assert "torch 99.1.2 is newer than" in line
    assert f"({oldest} to {newest})" in line


def test_the_first_rank_mentions_it(
    versions: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions["torch"] = "99.1.2"
    monkeypatch.setenv("RANK", "1")
    tested.check_version("torch")
    assert not caplog.messages


def test_an_older_version_is_refused_by_name(versions: dict[str, str]) -> None:
    versions["torch"] = "2.0.1"
    for _ in range(2):
        with pytest.raises(DistclipError, match=r"needs torch .* or newer, this is torch 2\.0\.1"):
            distclip.__getattr__("GradClipper")


@pytest.mark.parametrize("name", sorted(TESTED.keys() & hooks.INTEGRATIONS.keys()))
def test_an_older_framework_is_refused_by_name(name: str, versions: dict[str, str]) -> None:
    versions.update(dict.fromkeys(TESTED, "99.0"), **{name: "0.1"})
    with pytest.raises(DistclipError, match=f"pip install '{name}>="):
        namespace(name)
    with pytest.raises(DistclipError, match=f"pip install '{name}>="):
        hooks._enable(name, None, hooks)
