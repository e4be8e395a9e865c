"""Docstrings for the site: Sphinx roles, which editors know, become plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?([^`]+)`")
LITERAL = re.compile(r"^( *)::$|(?<=\w)::$", re.MULTILINE)


class Roles(griffe.Extension):
    """:func:`x` becomes ``x``; ``::`` before an indented block goes."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = LITERAL.sub(
                lambda found: (
                    ":" if not found[0].strip(" :") and found[1] is None else found[1] or ""
                ),
                text,
            )
