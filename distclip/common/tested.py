"""The versions of torch and of the frameworks that distclip's tests were run with.

A newer version is logged once; an older one is refused, by name, where it is first needed.
"""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

from distclip.errors import DistclipError

_logger = logging.getLogger("distclip")


class Range(NamedTuple):
    """The oldest version that distclip works with, and the newest that its tests were run with.

    Attributes:
        oldest: the version that ``pyproject.toml`` asks for.
        newest: without its patch number: 2.14 stands for 2.14.1 too.
    """

    oldest: str
    newest: str


TESTED = {
    "torch": Range("2.9", "2.15"),
    "accelerate": Range("1.10", "1.15"),
    "transformers": Range("4.57", "5.24"),
    "deepspeed": Range("0.16.9", "0.19"),
    "lightning": Range("2.5", "2.6"),
}
"""Package -> the oldest and the newest version that the tests were run with."""

_checked: set[str] = set()


def check_version(package: str) -> None:
    """Refuse a version of a package that is too old, and log once that one is newer than tested.

    A package that is not installed, or whose version is not a version (of a fork), passes.

    Args:
        package: its name; nothing is known of one that is not in ``TESTED``.

    Raises:
        DistclipError: a version below the oldest.
    """
    if package in _checked or package not in TESTED:
        return
    version = installed(package)
    oldest, newest = TESTED[package]
    found = place(package, version)
    if found < 0:
        raise DistclipError(
            f"distclip needs {package} {oldest} or newer, this is {package} {version}: it is not "
            f"tested with it, and may clip wrongly. pip install '{package}>={oldest}'"
        )
    _checked.add(package)
    if found > 0 and os.environ.get("RANK", "0") == "0":
        _logger.warning(
            "%s %s is newer than the versions that distclip's tests were run with (%s to %s). "
            "`distclip verify` runs its checks here.",
            package, version, oldest, newest,
        )  # fmt: skip


def installed(package: str) -> str:
    """The version of an installed package; empty if it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def place(package: str, version: str) -> int:
    """-1, 0 or 1: older than the tested range of a package, in it, or newer.

    Builds such as ``2.14.0a0+git`` count as what they will be, and what is no version as tested.
    """
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(version).release
    except InvalidVersion:
        return 0
    oldest, newest = (Version(each).release for each in TESTED[package])
    if release < oldest:
        return -1
    return int(release[: len(newest)] > newest)
