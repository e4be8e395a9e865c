"""A command in a process of its own, as a user starts it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

OF_LAUNCHES = ("ACCELERATE_", "FSDP_", "DISTCLIP_", "DS_", "TORCHELASTIC_")
OF_RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def environment(**more: str) -> dict[str, str]:
    """This checkout, one thread, and nothing of the surrounding run, which may be launched."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "DISTCLIP_COMPILED" or not (name.startswith(OF_LAUNCHES) or name in OF_RANKS)
    }
    kept["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run(
    *command: str, folder: Path | None = None, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """How a command ended, and what it said; ``more`` goes into its environment."""
    return subprocess.run(
        command, cwd=folder, env=environment(**more), capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


def python(
    *arguments: str, folder: Path | None = None, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """``run`` of this Python."""
    return run(sys.executable, *arguments, folder=folder, timeout=timeout, **more)


def well(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that ended well wrote to stdout."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def in_browser(address: str, *, budget: int = 3000) -> str:
    """A document after its scripts have run without an error, for so many ms of their time."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--virtual-time-budget={budget}", "--dump-dom", address]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    told = done.stderr.decode(errors="replace").splitlines()
    assert [line for line in told if "CONSOLE" in line and "favicon" not in line] == []
    return done.stdout.decode()
