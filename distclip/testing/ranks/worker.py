"""What a rank runs: join the process group, then answer one call after the other."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import pickle
import random
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from distclip.testing.ranks.failures import ResultKind
from distclip.testing.ranks.health import GroupState, group_state
from distclip.testing.ranks.stuck import STACK_SIGNAL

SEED = 0
CONNECT_LIMIT = datetime.timedelta(seconds=60)
# Hangs are the caller's to notice, who has the stacks of every rank to show for it.
COLLECTIVE_LIMIT = datetime.timedelta(minutes=30)

in_rank = False  # True in the process of a rank


_KIT = os.path.dirname(os.path.dirname(__file__)) + os.sep
_OUTCOMES: dict[str, ResultKind] = {
    "Skipped": "skipped",
    "SkipTest": "skipped",
    "XFailed": "xfailed",
}


class CallRequest(NamedTuple):
    """One call, and the surroundings it is made in."""

    environment: dict[str, str]
    directory: str
    path: list[str]
    call: bytes  # pickled (function, args, kwargs)


class Reply(NamedTuple):
    """What a rank sends back for a call."""

    kind: ResultKind
    value: bytes = b""  # pickled result
    error: str = ""  # one line
    trace: str = ""
    groups: GroupState | None = None


def main(rank: int, world_size: int, connection_fd: int, stacks_fd: int) -> None:
    """Serve calls until the caller hangs up."""
    global in_rank
    in_rank = True
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(stacks_fd)
    faulthandler.register(STACK_SIGNAL, stacks_fd, all_threads=True)
    connection = Connection(connection_fd)
    ours = _join(rank, world_size, connection)
    default_group = dist.group.WORLD
    while True:
        try:
            request = CallRequest(*pickle.loads(connection.recv_bytes()))
        except EOFError:
            return
        _prepare(request, ours)
        reply = _answer(request.call)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(pickle.dumps(reply._replace(groups=group_state(default_group))))


def _join(rank: int, world_size: int, connection: Connection) -> Mapping[str, str]:
    """Connect to the peers over loopback; returns this rank's environment variables."""
    torch.set_num_threads(1)
    from distclip.testing.ranks import loopback

    if name := loopback.interface_name():
        os.environ["GLOO_SOCKET_IFNAME"] = name
    loopback.listen_on_loopback()
    # Rank 0 binds a free port and only then tells it: nobody can take it in between.
    port = 0 if rank == 0 else int.from_bytes(connection.recv_bytes(), "big")
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, timeout=CONNECT_LIMIT
    )
    connection.send_bytes(store.port.to_bytes(4, "big"))
    ours = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "OMP_NUM_THREADS": "1",
    }
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_LIMIT
    )
    dist.barrier()
    connection.send_bytes(b"joined")
    return ours


def _prepare(request: CallRequest, ours: Mapping[str, str]) -> None:
    """Make every call start from the same state, in the caller's surroundings."""
    gloo = {k: v for k, v in os.environ.items() if k == "GLOO_SOCKET_IFNAME"}
    environment = request.environment | gloo | dict(ours)
    if environment != dict(os.environ):
        os.environ.clear()
        os.environ.update(environment)
    with contextlib.suppress(FileNotFoundError):  # the caller's directory is gone too
        os.chdir(request.directory)
    sys.path[:] = request.path
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)
    torch.set_default_dtype(torch.float32)
    if hasattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context"):
        torch.set_default_device(None)
        del torch._GLOBAL_DEVICE_CONTEXT.device_context  # at None, 2.9's get_default_device fails
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)


def _answer(call: bytes) -> Reply:
    try:
        function, args, kwargs = pickle.loads(call)
        result = function(*args, **kwargs)
    except BaseException as error:  # SystemExit and pytest's outcomes too: the rank lives on
        return _failure(error)
    try:
        return Reply("returned", pickle.dumps(result))
    except Exception as error:
        line = f"the result, a {type(result).__name__}, cannot be sent back: {error}"
        return Reply("raised", error=line, trace=line + "\n")


def _failure(error: BaseException) -> Reply:
    # By name: pytest need not be there.
    kind = _OUTCOMES.get(type(error).__name__, "raised")
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_KIT):
        frames = frames.tb_next  # above the function there is only the harness
    trace = "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))
    text = str(error) if kind != "raised" else _one_line(error)
    return Reply(kind, error=text, trace=trace)


def _one_line(error: BaseException) -> str:
    first, _, rest = str(error).strip().partition("\n")
    text = f": {first}{' ...' if rest else ''}" if first else ""
    return type(error).__name__ + text
