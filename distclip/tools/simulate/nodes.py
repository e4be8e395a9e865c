"""Start the launchers of several nodes, each in a network namespace of its own if that is possible.

A node's namespace has one interface, ``node``, on a bridge to the others, and no way out. Made
without privileges, in a user namespace, with util-linux and iproute2; where the system does not
allow it the nodes share the loopback interface.

Run as a file within ``unshare --user --map-root-user --net``; imports nothing but the standard
library.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

INTERFACE, BRIDGE, NETWORK = "node", "bridge", "10.231.7"
PROGRAMS = ("unshare", "nsenter", "ip", "sh")
CONTAINER = ("unshare", "--user", "--map-root-user", "--net")
WAIT_FOR_GO = 'read go; exec "$@"'


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    probe = f"ip link add {BRIDGE} type bridge && ip link add probe0 type veth peer name probe1"
    try:
        tried = subprocess.run(
            [*CONTAINER, "sh", "-c", f"{probe} && unshare --net true"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if tried.returncode == 0 else (tried.stderr.strip() or "refused by the system")


def with_addresses(command: Sequence[str], node: int | None) -> list[str]:
    """A command with this node's addresses; None: on the loopback interface."""
    values = {
        "{address}": "127.0.0.1" if node is None else address(node),
        "{head}": "127.0.0.1" if node is None else address(0),
    }
    result = []
    for word in command:
        for mark, value in values.items():
            word = word.replace(mark, value)
        result.append(word)
    return result


def address(node: int) -> str:
    """The address of a node in its network namespace."""
    return f"{NETWORK}.{node + 1}"


def enclosed(commands: Sequence[Sequence[str]], logs: Sequence[str]) -> list[str]:
    """The command that starts all of these, each in its namespace, and waits for them."""
    pairs = enumerate(zip(commands, logs, strict=True))
    nodes = [[with_addresses(command, node), log] for node, (command, log) in pairs]
    return [*CONTAINER, sys.executable, os.path.abspath(__file__), json.dumps(nodes)]


def main(nodes: Sequence[tuple[list[str], str]]) -> int:
    """Make the network, start the nodes, wait; the first exit code that is not 0."""
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("link", "set", BRIDGE, "up")
    processes = []
    for node, (command, log) in enumerate(nodes):
        with open(log, "ab") as file:
            process = subprocess.Popen(
                ["unshare", "--net", "sh", "-c", WAIT_FOR_GO, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
            )
        processes.append(process)
        _connect(node, process.pid)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
    codes = [process.wait() for process in processes]
    return next((code for code in codes if code), 0)


def _connect(node: int, pid: int) -> None:
    outer = f"outer{node}"
    _wait_for_namespace(pid)
    _ip("link", "add", outer, "type", "veth", "peer", "name", INTERFACE, "netns", str(pid))
    _ip("link", "set", outer, "master", BRIDGE)
    _ip("link", "set", outer, "up")
    inside = ["nsenter", "--target", str(pid), "--net"]
    for words in (
        ["addr", "add", f"{address(node)}/24", "dev", INTERFACE],
        ["link", "set", INTERFACE, "up"],
        ["link", "set", "lo", "up"],
    ):
        _ip(*words, before=inside)


def _wait_for_namespace(pid: int) -> None:
    ours = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{pid}/ns/net") == ours:
        time.sleep(0.01)


def _ip(*words: str, before: Sequence[str] = ()) -> None:
    subprocess.run([*before, "ip", *words], check=True)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
