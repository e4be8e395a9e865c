"""Stores that only this machine can reach.

torch's ``TCPStore`` listens on every network interface, whatever address it is given, and asks
nobody who connects for a password. :func:`listen_on_loopback` makes the stores of this process that
are given a loopback address listen on that address only.
``python -m distclip.testing.ranks.loopback MODULE ARGS``
runs a launcher so, such as ``torch.distributed.run`` or ``accelerate.commands.launch``: its own
store is the one that its ranks meet in.
"""

from __future__ import annotations

import contextlib
import functools
import runpy
import socket
import sys
from typing import Any

HOSTS = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1"}
"""Host names that mean this machine -> the address to listen on."""


def interface_name() -> str:
    """Name of the loopback interface; empty where it is not known.

    Without a name gloo resolves the host's name, which need not lead anywhere.
    """
    found = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    return found.pop() if found else ""


def listening(port: int = 0) -> socket.socket:
    """A socket that listens on the loopback interface; port 0: a free one.

    Raises:
        OSError: the port is taken.
    """
    server = socket.socket()
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((HOSTS["localhost"], port))
        server.listen(1024)
    except OSError:
        server.close()
        raise
    return server


def listen_on_loopback() -> None:
    """From now on stores of this process that are given a loopback address listen only there."""
    import torch.distributed

    store: Any = torch.distributed.TCPStore  # type: ignore[attr-defined]
    init = store.__init__
    if hasattr(init, "__wrapped__"):
        return

    @functools.wraps(init)
    def on_loopback(self: Any, *args: Any, **kwargs: Any) -> None:
        names = ("host_name", "port", "world_size", "is_master")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        host = given.get("host_name")
        if host not in HOSTS or not given.get("is_master") or given.get("master_listen_fd"):
            init(self, *args, **kwargs)
            return
        server = None
        # Taken: by a store of this process that another one may share, or torch says by whom.
        with contextlib.suppress(OSError):
            server = listening(given["port"])
        if server is None:
            init(self, *args, **kwargs)
            return
        port = server.getsockname()[1]
        kwargs = {**kwargs, "master_listen_fd": server.detach()}  # the store closes it
        if len(args) > 1:
            args = (args[0], port, *args[2:])
        else:
            kwargs["port"] = port
        init(self, *args, **kwargs)

    store.__init__ = on_loopback


def main() -> None:
    """Run the module that the command line names, as ``python -m`` does."""
    listen_on_loopback()
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
