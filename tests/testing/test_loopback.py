"""Nothing that distclip starts listens on a network interface that others can reach."""

import os
import pathlib

import torch.distributed as dist

from distclip.testing import run_on_ranks
from tests.helpers.processes import python, well

LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
"""127.0.0.1, ::1 and ::ffff:127.0.0.1, as /proc/net/tcp and tcp6 write them."""


def listeners(pid: int | str = "self") -> list[str]:
    """Addresses that a process listens on."""
    sockets = {}
    for family in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                sockets[f"socket:[{fields[9]}]"] = fields[1].partition(":")[0]
    found = []
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target in sockets:
            found.append(sockets[target])
    return found


def open_stores():
    mine = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)]
    shared = [dist.TCPStore("127.0.0.1", mine[0].port + 0, is_master=False, wait_for_workers=False)]
    shared[0].set("key", "value")
    assert mine[0].get("key") == b"value"
    return listeners()


def test_ranks_of_the_pool_and_the_stores_that_a_test_opens_there():
    for addresses in run_on_ranks(open_stores, 2):
        assert addresses
        assert set(addresses) <= set(LOOPBACK)


RANK = """
import os, pathlib, sys
import torch.distributed as dist
from distclip.tools.launch.leaving import let_gloo_finish
sys.path.insert(0, {tests!r})
from test_loopback import listeners
dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == 0:
    print("FOUND", *listeners(), *listeners(os.getppid()))
dist.barrier()
dist.destroy_process_group()
let_gloo_finish()
"""


def test_a_launcher_run_through_the_module(tmp_path):
    """The store that the ranks meet in is the launcher's: ranks inherit nothing from it."""
    (tmp_path / "script.py").write_text(RANK.format(tests=os.path.dirname(__file__)))
    command = (
        *("-m", "distclip.testing.ranks.loopback", "torch.distributed.run"),
        *("--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", "0"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        "script.py",
    )
    told = well(python(*command, folder=tmp_path, timeout=60, GLOO_SOCKET_IFNAME="lo"))
    addresses = told.partition("FOUND ")[2].split("\n")[0].split()
    assert len(addresses) >= 2, told
    assert set(addresses) <= set(LOOPBACK)
