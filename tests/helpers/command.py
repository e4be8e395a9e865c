"""The command line in this process, by its entry point, as ``python -m distclip`` would run it."""

import contextlib
import io
import sys
from typing import NamedTuple
from unittest import mock

from distclip.__main__ import main


class Ended(NamedTuple):
    """How a command ended, and what it printed to stdout and stderr."""

    code: object
    out: str
    err: str


def command(*words: str) -> Ended:
    """Run one command; it leaves ``sys.argv`` and ``sys.path`` as they were."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", ["distclip", *words]),
        mock.patch.object(sys, "path", [*sys.path]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code or 0
    return Ended(code, out.getvalue(), err.getvalue())
