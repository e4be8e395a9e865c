"""The process that ranks are forked from: it imports torch once and then only forks.

Importing torch takes seconds, forking a process that has it takes milliseconds, and the forks
share its memory. Not `multiprocessing`'s forkserver: that one runs the caller's ``__main__`` again
in every child, and its list of preloaded modules belongs to the whole application.

The zygote has one thread and no process group, which is what makes forking it safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from typing import NoReturn

READY = b"+"
REQUEST = struct.Struct("ii")  # rank, world size; file descriptors travel beside it
PID = struct.Struct("i")
EXIT_CODE = struct.Struct("i")  # as subprocess: negative for a signal
DESCRIPTORS = 4  # connection, exit status, output, stacks

_PR_SET_PDEATHSIG = 1


def main(control_fd: int, preload: Sequence[str], followed: Sequence[str]) -> NoReturn:
    """Import, report, then fork a rank for every request until the caller is gone.

    Args:
        control_fd: the caller's socket.
        preload: modules that must be there.
        followed: modules that are left to the ranks where they cannot be imported.
    """
    control = socket.socket(fileno=control_fd)
    for name in preload:
        importlib.import_module(name)
    for name in followed:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    from distclip.testing.ranks import rewriting

    if "pytest" in followed:
        rewriting.loader()
    gc.collect()
    gc.freeze()  # a collection in a rank would otherwise copy every shared page
    wake, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    control.sendall(READY)

    exit_status: dict[int, int] = {}  # pid -> where its exit code is to be written
    while True:
        readable, _, _ = select.select([wake, control.fileno()], [], [])
        if wake in readable:
            os.read(wake, 4096)
            _reap(exit_status)
        if control.fileno() in readable:
            message, descriptors, _, _ = socket.recv_fds(control, REQUEST.size, DESCRIPTORS)
            if not message:  # the caller has closed its end, or was killed
                for pid in exit_status:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                os._exit(0)
            connection, status, output, stacks = descriptors
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                control.close()
                rank, world_size = REQUEST.unpack(message)
                for fd in (wake, wake_write, status, *exit_status.values()):
                    os.close(fd)
                _become_rank(rank, world_size, connection, output, stacks)
            exit_status[pid] = status
            for fd in (connection, output, stacks):
                os.close(fd)
            control.sendall(PID.pack(pid))


def _reap(exit_status: dict[int, int]) -> None:
    while exit_status:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        fd = exit_status.pop(pid)
        with contextlib.suppress(BrokenPipeError):  # the caller has let go of this rank
            os.write(fd, EXIT_CODE.pack(os.waitstatus_to_exitcode(status)))
        os.close(fd)


def _become_rank(rank: int, world_size: int, connection: int, output: int, stacks: int) -> NoReturn:
    code = 1
    try:
        die_with_parent()
        os.dup2(output, 1)
        os.dup2(output, 2)
        from distclip.testing.ranks import worker

        worker.main(rank, world_size, connection, stacks)
        code = 0
    except BaseException:  # there is nobody above to raise to
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # no atexit handlers: they are the zygote's, or wait for peers


def die_with_parent() -> None:
    """Let the kernel end this process with its parent, however that ends (Linux)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the call
        os._exit(1)
