"""Run a script or a module in this process as ``python`` itself would."""

from __future__ import annotations

import builtins
import importlib.machinery
import os
import runpy
import sys
import zipfile
from collections.abc import Sequence
from types import CodeType, ModuleType, TracebackType
from typing import Any

from distclip.common.foreign import in_one_line
from distclip.errors import ConfigurationError
from distclip.tools.launch import reason


class Script:
    """A program and its arguments.

    Args:
        target: path of a file, folder or zip with a ``__main__``; with ``module`` a module name.
        arguments: what the program sees as ``sys.argv[1:]``.
        module: as ``python -m``.
    """

    def __init__(self, target: str, arguments: Sequence[str], *, module: bool = False) -> None:
        self.target = target
        self.arguments = list(arguments)
        self.module = module

    def check(self) -> None:
        """Refuse a file that is not there, before anything else happens.

        Raises:
            ConfigurationError: naming the file and the folder.
        """
        if not self.module and not os.path.exists(self.target):
            raise ConfigurationError(
                f"no script {in_one_line(self.target, 300)!r} in {in_one_line(os.getcwd())}"
                f"{'' if self.target.endswith('.py') else '; for a module use -m'}"
            )
        if not self.module and not os.path.isdir(self.target) and not os.path.isfile(self.target):
            raise ConfigurationError(
                f"{in_one_line(self.target)} is neither a file nor a folder; "
                f"write the script to a file"
            )

    def prepare(self) -> None:
        """Set ``sys.argv`` and ``sys.path`` as the program will find them.

        Before the configuration is read: the modules that it imports may lie beside the program.
        """
        sys.argv = [self.target, *self.arguments]
        if getattr(sys.flags, "safe_path", False):  # python -P: no folder of the script's
            return
        if self.module:
            folder = os.getcwd()
        elif _has_main_inside(self.target):
            folder = self.target
        else:
            folder = os.path.dirname(os.path.realpath(self.target))
        # What is there now is the place of the `distclip` program, or the current folder for -m.
        sys.path[0] = folder

    def run(self) -> Any:
        """Run to the end and return the exit code, as ``sys.exit`` takes it.

        An exception is shown with the program's own frames, by ``sys.excepthook`` as ever, and
        gives 1 (130 after Ctrl-C).
        """
        try:
            self.prepare()
            self._execute()
        except SystemExit as exit_:
            return exit_.code
        except BaseException as error:
            own = _own(error.__traceback__)
            reason.leave(reason.reason_of(error))
            if self.module and isinstance(error, ImportError) and own is None:
                print(f"distclip run: {error}", file=sys.stderr)  # as python -m words it
                return 1
            sys.excepthook(type(error), error.with_traceback(own), own)
            return 130 if isinstance(error, KeyboardInterrupt) else 1
        return None

    def _execute(self) -> None:
        if self.module:
            runpy.run_module(self.target, run_name="__main__", alter_sys=True)
        elif _has_main_inside(self.target) or self.target.endswith(".pyc"):
            runpy.run_path(self.target, run_name="__main__")
        else:
            _execute_file(self.target)


def _has_main_inside(path: str) -> bool:
    return os.path.isdir(path) or zipfile.is_zipfile(path)


def _execute_file(target: str) -> None:
    """Not ``runpy.run_path``: that takes ``__main__`` away again when the script ends.

    Threads, ``atexit`` functions and pickles of the script's classes still need it then.
    """
    path = os.path.abspath(target)
    with open(path, "rb") as file:
        source = file.read()
    main = ModuleType("__main__")
    main.__dict__.update(
        __file__=path,
        __builtins__=builtins,
        __loader__=importlib.machinery.SourceFileLoader("__main__", path),
        __cached__=None,
    )
    sys.modules["__main__"] = main
    code: CodeType = compile(source, path, "exec", dont_inherit=True)
    exec(code, main.__dict__)


def _own(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame that is the program's and not of this machinery."""
    machinery = {__file__, runpy.__file__, "<frozen runpy>"}
    while traceback is not None and (
        traceback.tb_frame.f_code.co_filename in machinery
        or traceback.tb_frame.f_code.co_filename.startswith("<frozen importlib")
    ):
        traceback = traceback.tb_next
    return traceback
