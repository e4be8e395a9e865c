"""What ``distclip doctor`` looks at: versions, the machine, layouts, and whether ranks are real."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from distclip._version import __version__
from distclip.common import tested
from distclip.errors import DistclipError

Verdict = Literal["good", "note", "wrong"]

CHECKED_PACKAGES = (
    "torch", "numpy", "pydantic", "accelerate", "deepspeed", "transformers", "lightning",
)  # fmt: skip
NEEDED = ("torch", "numpy", "pydantic")
LAUNCH_LIMIT = 120.0


@dataclass(frozen=True)
class Line:
    """One finding of the doctor.

    Attributes:
        topic: ``"versions"``, ``"layouts"``, ``"ranks"``, ``"machine"`` or ``"launch"``.
        what: the thing.
        state: ``"wrong"`` makes the exit code 1.
        text: what was found, and the mend.
    """

    topic: str
    what: str
    state: Verdict
    text: str


def examine_system(launch_config: Path | None, ranks: int) -> list[Line]:
    """Everything that can be looked at from here.

    Args:
        launch_config: YAML of ``accelerate launch``; None for the default one.
        ranks: gloo ranks to start for the self-check. Neither is used inside a launch.
    """
    lines = [*versions(), *check_devices(), *layouts()]
    if "RANK" in os.environ:
        return [*lines, *check_launch()]
    return [*lines, *launch_file(launch_config), *self_check(ranks)]


def findings_as_json(lines: list[Line]) -> str:
    """The findings as JSON."""
    document = {
        "distclip": __version__,
        "sound": all(line.state != "wrong" for line in lines),
        "lines": [asdict(line) for line in lines],
    }
    return json.dumps(document, indent=1) + "\n"


# ---- versions ----------------------------------------------------------------------------------


def versions() -> list[Line]:
    """Versions of Python and of packages, beside what is needed, and what was tested."""
    needed = ranges()
    python = platform.python_version()
    inside = version_within(python, needed["python"])
    lines = [
        Line("versions", "distclip", "good", __version__),
        Line("versions", "python", "good" if inside else "wrong",
             f"{python}, needs {needed['python'] or 'nothing that is known'}"),
    ]  # fmt: skip
    return lines + [_package(name, needed.get(name, "")) for name in CHECKED_PACKAGES]


def _package(name: str, needed: str) -> Line:
    range_ = tested.TESTED.get(name)
    shown = f"tested with {range_.oldest} to {range_.newest}" if range_ else f"needs {needed}"
    known = bool(range_ or needed)
    found = tested.installed(name)
    if not found:
        state: Verdict = "wrong" if name in NEEDED else "note"
        return Line("versions", name, state, f"not installed{f'; {shown}' if known else ''}")
    if not known:
        return Line("versions", name, "note", f"{found}; no range of tested versions")
    place = tested.place(name, found) if range_ else -int(not version_within(found, needed))
    state = "wrong" if place < 0 else "note" if place else "good"
    return Line("versions", name, state, f"{found}, {shown}")


def ranges() -> dict[str, str]:
    """Package -> the range that distclip requires."""
    try:
        found = {"python": metadata.metadata("distclip")["Requires-Python"] or ""}
        requirements = [Requirement(each) for each in metadata.requires("distclip") or []]
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return {"python": ""}
    for each in requirements:
        if not each.extras:
            found.setdefault(each.name.lower(), str(each.specifier))
    return found


def version_within(version: str, wanted: str) -> bool:
    """Whether a version is in a range such as ``>=2.13``, pre-releases too."""
    try:
        return SpecifierSet(wanted).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


# ---- what there is here ------------------------------------------------------------------------


def check_devices() -> list[Line]:
    """Devices and backends."""
    from distclip.tools.simulate import nodes

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backends = [
        name
        for name, there in (
            ("gloo", dist.is_available() and dist.is_gloo_available()),
            ("nccl", dist.is_available() and dist.is_nccl_available()),
            ("mpi", dist.is_available() and dist.is_mpi_available()),
        )
        if there
    ]
    reason = nodes.why_not()
    return [
        Line("machine", "devices", "good", f"{count} CUDA, {os.cpu_count()} CPU cores"),
        Line("machine", "backends", "good" if "gloo" in backends else "wrong",
             ", ".join(backends) or "torch.distributed has none"),
        Line("machine", "network namespaces", "note" if reason else "good",
             f"none, `simulate --nodes` shares the loopback: {reason}" if reason
             else "can be made, for `simulate --nodes`"),
    ]  # fmt: skip


def layouts() -> list[Line]:
    """Which engines and layouts there are to clip under, and to simulate."""
    from distclip.tools.simulate.layouts import SIMULATED_LAYOUTS, check_layout

    plain = "DDP, FSDP1, FSDP2, HSDP, tensor parallelism of torch"
    lines = [Line("layouts", "torch", "good", plain)]
    for name in SIMULATED_LAYOUTS:
        try:
            check_layout(name)
        except DistclipError as error:
            lines.append(Line("layouts", name, "note", str(error).removeprefix("simulate: ")))
        else:
            lines.append(Line("layouts", name, "good", SIMULATED_LAYOUTS[name]))
    launchers = [name for name in ("torchrun", "accelerate", "deepspeed") if shutil.which(name)]
    lines.append(Line("layouts", "launchers", "good", ", ".join(launchers) or "none on the PATH"))
    return lines


def launch_file(path: Path | None) -> list[Line]:
    """Traps in a YAML of ``accelerate launch``, or in the default one."""
    try:
        from distclip.tools.launch import accelerate_cpu_asked

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        faults = accelerate_cpu_asked.faults_of_config(
            None if path is None else str(path), devices=count
        )
    except ImportError:
        return []
    except DistclipError as error:
        return [Line("launch", "accelerate", "wrong", str(error))]
    if path is not None and not path.is_file():
        return [Line("launch", "accelerate", "wrong", f"{path}: no such file")]
    shown = "the default configuration" if path is None else str(path)
    lines = [Line("launch", "accelerate", "wrong", fault) for fault in faults]
    return lines or [Line("launch", "accelerate", "good", f"no trap in {shown}")]


# ---- are ranks real ----------------------------------------------------------------------------


def self_check(ranks: int) -> list[Line]:
    """A few policies under FSDP2 on ranks of this machine, against the float64 reference."""
    if ranks < 2:
        return []
    from distclip.testing import PoolError, RankError, run_on_ranks
    from distclip.tools.verify.cells import run_group

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    labels = ["global", "agc", "chain agc, global"]
    what = f"{ranks} gloo ranks of this machine"
    try:
        sums = run_on_ranks(_sum_of_ones, ranks, timeout=LAUNCH_LIMIT)
        if sums != [ranks] * ranks:
            return [Line("ranks", what, "wrong", f"a sum over {ranks} ranks gave {sums}")]
        found = run_on_ranks(run_group, ranks, "fsdp2", "float32", labels, timeout=LAUNCH_LIMIT)
    except (RankError, PoolError) as error:
        return [Line("ranks", what, "wrong", str(error))]
    faults = [cell.detail for cells in found for cell in cells if cell.status == "failed"]
    if faults:
        return [Line("ranks", what, "wrong", f"clipping is off: {faults[0]}")]
    text = f"really distributed; {', '.join(labels)} under FSDP2 as the float64 reference"
    return [Line("ranks", what, "good", text)]


def _sum_of_ones(device: torch.device | int | str = "cpu") -> int:
    one = torch.ones((), dtype=torch.int64, device=device)
    dist.all_reduce(one)
    return int(one)


def check_launch() -> list[Line]:
    """Inside a launch: are these ranks one world?"""
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    by = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else "torchrun"
    try:
        text = f"{wanted} ranks"
        if by == "accelerate launch":
            from distclip.tools.launch import accelerate_cpu

            text = accelerate_cpu.examine_launch()
        elif not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if wanted > 1:
            text += _summed(wanted)
    except DistclipError as error:
        return [Line("launch", by, "wrong", str(error))]
    finally:
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
    return [Line("launch", by, "good", f"{text}; really distributed")]


def _summed(wanted: int) -> str:
    total = _sum_of_ones(torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu")
    if total != wanted:
        raise DistclipError(f"{wanted} ranks were launched, but a sum over them gave {total}")
    return f", their sum is {total}"
