"""The images say what pyproject.toml and launch/constraints.txt say, and can be built from here.

No Docker engine runs these: what was and was not run is in docker/README.md.
"""

import fnmatch
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
IMAGES = sorted(DOCKER.glob("*.Dockerfile"))
NAMES = [path.name for path in IMAGES]


def instructions(text: str) -> list[tuple[str, str]]:
    """Instruction and argument, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def last_stage(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    first = max(number for number, (word, _) in enumerate(found) if word == "FROM")
    return found[first:]


def pinned() -> dict[str, str]:
    text = (ROOT / "launch" / "constraints.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def sent_to_the_engine(path: str) -> bool:
    """What .dockerignore lets through, for patterns of the kinds that are in it."""
    inside = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parents = [path, *(str(parent) for parent in Path(path).parents)]
        if any(fnmatch.fnmatch(each, pattern.removeprefix("**/")) for each in parents):
            inside = line.startswith("!")
    return inside


def problems(text: str) -> list[str]:
    """What is out of step in a Dockerfile."""
    found, wrong = instructions(text), []
    versions = pinned()
    for word, rest in found:
        if word == "RUN":
            for command in (c for c in rest.split("&&") if "pip install" in c):
                if "--constraint launch/constraints.txt" not in command:
                    wrong.append(f"installs without the constraints: {command}")
                for name, version in re.findall(r"([\w-]+)==(\S+)", command):
                    if versions.get(name) != version.removesuffix("+cpu"):
                        wrong.append(f"{name}=={version} for {versions.get(name)}")
                for extra in re.findall(r"\.\[([\w,]+)\]", command):
                    for each in extra.split(","):
                        if not re.search(rf"^{each} = \[", pyproject(), re.MULTILINE):
                            wrong.append(f"no extra {each}")
        if word == "ARG" and rest.startswith("PYTHON="):
            minor = tuple(map(int, rest.removeprefix("PYTHON=").split(".")))
            least = re.search(r'requires-python = ">=(\d+)\.(\d+)"', pyproject())
            if len(minor) != 3 or least is None or minor < tuple(map(int, least.groups())):
                wrong.append(f"Python {rest} is not pinned, or too old")
        if word == "COPY" and "--from" not in rest:
            *sources, _ = [part for part in shlex.split(rest) if not part.startswith("--")]
            for source in sources:
                if not (ROOT / source).exists() or not sent_to_the_engine(source):
                    wrong.append(f"{source} is not there, or not sent")
    users = [rest for word, rest in last_stage(found) if word == "USER"]
    if not users or not users[-1].isdigit() or int(users[-1]) == 0:
        wrong.append("runs as root")
    if "HEALTHCHECK" not in [word for word, _ in last_stage(found)]:
        wrong.append("no health check")
    return wrong


@pytest.mark.parametrize("image", IMAGES, ids=NAMES)
def test_an_image_is_in_step(image: Path) -> None:
    assert problems(image.read_text(encoding="utf-8")) == []


BREAKS = {
    "torch==2.13.0+cpu": "torch==2.12.0+cpu",
    "--constraint launch/constraints.txt ": "",
    "ARG PYTHON=3.12.12": "ARG PYTHON=3.12",
    "COPY distclip distclip": "COPY tests tests",
    "COPY configs": "COPY config",
    "USER 1000": "USER root",
    "HEALTHCHECK": "LABEL",
    ".[": ".[no",
}


@pytest.mark.parametrize("right", BREAKS)
def test_an_image_that_is_out_of_step_is_seen(right: str) -> None:
    text = (DOCKER / "cpu.Dockerfile").read_text(encoding="utf-8")
    if right == "COPY configs":
        text = text.replace("COPY --chown=distclip:distclip configs", "COPY configs")
    assert right in text
    assert problems(text.replace(right, BREAKS[right]))


def test_the_cpu_image_cannot_get_cuda() -> None:
    """torch==2.13.0 is the CUDA build on PyPI: pip takes it where the other index is away."""
    text = (DOCKER / "cpu.Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"torch==\S+$", text, re.MULTILINE) == [f"torch=={pinned()['torch']}+cpu"]


def test_only_what_is_copied_is_sent() -> None:
    for path in (".git", ".venv/bin/python", "tests/conftest.py", "distclip/__pycache__/x.pyc"):
        assert not sent_to_the_engine(path), path
    for path in ("distclip/cli/app.py", "launch/constraints.txt", "pyproject.toml"):
        assert sent_to_the_engine(path), path


def test_the_health_check_of_the_cpu_image_runs() -> None:
    text = (DOCKER / "cpu.Dockerfile").read_text(encoding="utf-8")
    (check,) = [rest for word, rest in instructions(text) if word == "HEALTHCHECK"]
    _, *command = yaml.safe_load(check[check.index("CMD") + 4 :])
    done = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def test_the_compose_file_points_at_what_is_there() -> None:
    services = compose()["services"]
    for name, service in services.items():
        build = service["build"]
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() in IMAGES
        assert service["hostname"] == name
        assert (DOCKER / service["command"][-1]).exists()
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
    options = dict(part[2:].split("=") for part in services["node0"]["command"] if part[0] == "-")
    assert int(options["nnodes"]) == len(services)
    assert options["rdzv-endpoint"].split(":")[0] in services


def test_the_two_nodes_agree() -> None:
    """The commands of both services, on this machine: two agents, each with its own ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for service in compose()["services"].values():
        program, *words = service["command"]
        words = [re.sub(r"=node0:\d+$", f"=127.0.0.1:{port}", word) for word in words]
        words = [re.sub(r"^--nproc-per-node=.*", "--nproc-per-node=1", word) for word in words]
        assert program == "torchrun"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        agents.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words],
                cwd=DOCKER,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    assert "2 ranks on 1 host(s) agree" in "".join(said)
