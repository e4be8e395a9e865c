"""The caller's end of the zygote: start it, ask it for ranks, let go of it at exit."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import IO

from distclip.testing.ranks import zygote

PRELOAD = (
    "numpy",
    "torch",
    "torch._dynamo",  # every optimizer and FSDP2 import it on first use
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "distclip.testing.ranks.worker",
)
FOLLOWED = {
    "pytest": "pytest",
    "accelerate": "accelerate",
    "transformers.trainer": "transformers.trainer",
    "lightning": "lightning.pytorch",
    "deepspeed": "deepspeed.runtime.zero.muon.muon_optimizer",  # of every engine; brings Inductor
}
"""What the ranks get ready-made where their caller has imported it, and by which module."""
START_LIMIT = 180.0  # seconds; importing torch from a cold disk is slow

_BOOT = """
import sys
sys.path[:] = {path!r}
from distclip.testing.ranks import zygote
zygote.main({fd}, {preload!r}, {followed!r})
"""


class PoolError(RuntimeError):
    """The machinery failed, not the function: no ranks could be started."""


@dataclass(slots=True)
class RankProcess:
    """One forked rank as its caller sees it."""

    pid: int
    connection: Connection
    status: int  # readable once the process has ended
    output: IO[bytes]  # its stdout and stderr
    stacks: IO[bytes]  # where faulthandler writes
    exit_code: int | None = None

    def wait(self, timeout: float) -> int | None:
        """The exit code (negative for a signal), or None while it lives on."""
        if self.exit_code is None and select.select([self.status], [], [], timeout)[0]:
            data = os.read(self.status, zygote.EXIT_CODE.size)
            # Empty: the zygote itself was killed, and the kernel ended its children.
            self.exit_code = zygote.EXIT_CODE.unpack(data)[0] if data else -signal.SIGKILL
        return self.exit_code

    def kill(self) -> None:
        """End the process and release everything held for it."""
        if self.wait(0) is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait(10.0)
        self.connection.close()
        os.close(self.status)
        self.output.close()
        self.stacks.close()


class ForkServer:
    """A running zygote. Ranks end with it, and it ends with this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._control, theirs = socket.socketpair()
        followed = [module for name, module in FOLLOWED.items() if name in sys.modules]
        boot = _BOOT.format(path=sys.path, fd=theirs.fileno(), preload=PRELOAD, followed=followed)
        # One thread each: several ranks share few cores, and a pool of threads is not forkable.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", boot],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=[theirs.fileno()],
                env=os.environ | threads,
                start_new_session=True,  # Ctrl-C is for the caller, who ends the ranks in order
            )
        self._control.settimeout(START_LIMIT)
        if self._receive(len(zygote.READY)) != zygote.READY:
            log = self.log()
            self.close()
            raise PoolError(f"the process that ranks are forked from did not start:\n{log}")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        """What the zygote wrote to its stdout and stderr."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def fork(self, rank: int, world_size: int) -> RankProcess:
        """Start a rank. It connects to its peers once it is told where they are."""
        ours, theirs = multiprocessing.Pipe()
        status, status_write = os.pipe()
        # Appending: the caller truncates between calls, and the rank goes on from the start.
        output = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115
        stacks = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115
        with self._lock:
            try:
                socket.send_fds(
                    self._control,
                    [zygote.REQUEST.pack(rank, world_size)],
                    [theirs.fileno(), status_write, output.fileno(), stacks.fileno()],
                )
                pid = self._receive(zygote.PID.size)
            except OSError:
                pid = b""
            finally:
                theirs.close()
                os.close(status_write)
        if not pid:
            ours.close()
            os.close(status)
            raise PoolError(f"the process that ranks are forked from is gone:\n{self.log()}")
        return RankProcess(zygote.PID.unpack(pid)[0], ours, status, output, stacks)

    def close(self) -> None:
        """End the zygote, and with it every rank."""
        self._control.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _receive(self, size: int) -> bytes:
        data = b""
        with contextlib.suppress(OSError):
            while len(data) < size and (chunk := self._control.recv(size - len(data))):
                data += chunk
        return data


_lock = threading.Lock()
_server: ForkServer | None = None
_inherited_servers: list[ForkServer] = []  # in a fork of this process: what belongs to the parent


def get() -> ForkServer:
    """This process's zygote, started on first use and again should it have died."""
    global _server
    with _lock:
        if _server is not None and not _server.alive:
            _server.close()
            _server = None
        if _server is None:
            _server = ForkServer()
        return _server


@atexit.register
def _close() -> None:
    if _server is not None:
        _server.close()


def _forget() -> None:
    # A fork of the caller inherits the socket, but the zygote is not its own. Held open, the socket
    # would keep the zygote from noticing the parent's end.
    global _server, _lock
    if _server is not None:
        _server._control.close()
        _inherited_servers.append(_server)
    _server, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
