"""What comes from outside: files that may be anything, and text that is shown.

A path that a user names may lead to a folder, a pipe that nobody writes to, or bytes of any kind;
a key, a name or a value in a file may hold what moves a terminal's cursor. Files are opened here
after a look at what they are, and foreign text is shown through :func:`in_one_line`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from distclip.errors import ConfigurationError

LINE = 2**26
"""Bytes; a longer line of a log is passed over."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def in_one_line(text: object, longest: int | None = None) -> str:
    r"""``str(text)`` on one line, with escapes such as ``\x1b`` for what is not printable.

    Args:
        text: anything that ``str`` takes.
        longest: cut in the middle to about so many characters.
    """
    shown = str(text)
    if longest is not None and len(shown) > longest:
        shown = f"{shown[: longest // 2]}...{shown[-longest // 2 :]}"
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def clean_lines(text: object) -> str:
    """As :func:`in_one_line`, for text of several lines."""
    return "\n".join(in_one_line(line) for line in str(text).split("\n"))


def read_text(path: str | os.PathLike[str], most: int) -> str:
    """The UTF-8 text of a regular file, without a byte order mark.

    Args:
        path: of the file.
        most: bytes; a longer file is refused.

    Raises:
        FileNotFoundError: there is none.
        ConfigurationError: it cannot be read, is no regular file, is too long, or is not UTF-8.
    """
    with _opened(path) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise _unreadable(path, error.strerror or error) from None
    if len(content) > most:
        raise _unreadable(path, f"it is longer than {most:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(
            path, f"it is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from None


def read_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The lines of a regular file, one after another; those of more than 64 MiB are left out.

    Raises:
        ConfigurationError: it cannot be read, or is no regular file.
    """
    try:
        with _opened(path) as file:
            while line := file.readline(LINE):
                if len(line) == LINE and not line.endswith(b"\n"):
                    while rest := file.readline(LINE):
                        if rest.endswith(b"\n"):
                            break
                    continue
                yield line
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from None


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Looked at before it is opened: the opening of a pipe waits for somebody who writes."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(path, getattr(error, "strerror", None) or error) from None
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")
    raise _unreadable(path, f"it is {kind}; name a file")


def _unreadable(path: str | os.PathLike[str], why: object) -> ConfigurationError:
    return ConfigurationError(f"{in_one_line(os.fspath(path))}: cannot be read: {in_one_line(why)}")
