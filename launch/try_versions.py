"""Runs distclip's tests with other versions of Python, torch and the frameworks.

For each row: a fresh virtual environment, distclip's wheel with the row's versions, one clip with
the installed wheel, a part of the tests from this checkout. The environment is then removed (a CUDA
build of torch takes 5 GB), and the row's line in ``docs/versions.md`` is replaced.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
PACKAGES = ("torch", "accelerate", "transformers", "deepspeed", "lightning")
TOOLS = ("pytest>=8", "hypothesis>=6.100", "jsonschema>=4", "matplotlib>=3.8")


@dataclass(frozen=True)
class Row:
    """One combination of versions.

    Attributes:
        name: of the row in the table.
        python: such as ``"3.10"``; found on the PATH, in pyenv, or by uv.
        pins: package -> version; ``""`` for the newest. Packages that are absent are not installed.
    """

    name: str
    python: str
    pins: dict[str, str]


def _row(name: str, python: str, *versions: str) -> Row:
    return Row(name, python, dict(zip(PACKAGES, versions, strict=True)))


ROWS = (
    _row("oldest", "3.10", "2.9.1", "1.10.1", "4.57.6", "0.16.9", "2.5.0.post0"),
    _row("torch-2.10", "3.11", "2.10.0", "1.11.0", "5.0.0", "0.18.0", "2.5.6"),
    _row("torch-2.11", "3.12", "2.11.0", "1.12.0", "5.10.4", "0.19.0", "2.6.0"),
    _row("torch-2.12", "3.13", "2.12.1", "1.14.0", "5.16.1", "0.19.0", "2.6.4"),
    _row("constraints", "3.11", "2.13.0", "1.15.0", "5.23.0", "0.19.8", "2.6.6"),
    _row("torch-2.14", "3.11", "2.14.1", "1.15.0", "5.24.0", "0.19.8", "2.6.6"),
    _row("torch-2.15", "3.13", "2.15.0", "1.15.0", "5.24.0", "0.19.8", "2.6.6"),
    _row("newest", "3.14", "", "", "", "", ""),
)

PARTS = {
    "quick": {
        "core": ["tests/common/test_tested.py", "tests/test_public_api.py",
                 "tests/test_first_import.py", "tests/application/test_fold.py"],
        "kernels": ["tests/kernels/test_precision.py"],
        "layouts": ["tests/layouts/test_experts.py", "-k", "2ranks or 3ranks"],
        "functional": ["tests/functional", "-k", "2ranks"],
        "accelerate": ["tests/integrations/test_accelerate.py", "-k", "2ranks"],
        "transformers": ["tests/integrations/test_trainer.py", "-k", "oracle"],
        "deepspeed": ["tests/integrations/test_deepspeed.py", "-k", "2ranks"],
        "lightning": ["tests/integrations/test_lightning.py",
                      "tests/integrations/test_lightning_fabric.py", "-k", "oracle and not 4ranks"],
    },
    "all": {
        "core": ["tests/common/test_tested.py", "tests/test_public_api.py",
                 "tests/test_first_import.py", "tests/engine", "tests/policies",
                 "tests/application", "tests/statistics", "tests/optim"],
        "kernels": ["tests/kernels"],
        "layouts": ["tests/layouts"],
        "functional": ["tests/functional"],
        "accelerate": ["tests/integrations", "-k", "accelerate"],
        "transformers": ["tests/integrations", "-k", "trainer"],
        "deepspeed": ["tests/integrations", "-k", "deepspeed"],
        "lightning": ["tests/integrations", "-k", "lightning"],
    },
}  # fmt: skip
"""Size -> part -> arguments of pytest. Parts named after a package need it in the row."""

ONE_CLIP = """
import torch
import distclip
layer = torch.nn.Linear(3, 2)
layer(torch.ones(4, 3)).sum().backward()
clipper = distclip.GradClipper(layer, distclip.policies.global_norm(0.5))
before = clipper.clip_().total_norm.item()
after = distclip.clip_grad_norm_(layer.parameters(), 1.0).item()
assert before > 0.5 and abs(after - 0.5) < 1e-5, (before, after)
print(distclip.__file__)
"""


class StepError(Exception):
    """A step of a row that went wrong, with the last lines of its output."""


def main() -> int:
    """Run the rows, and write the table after each."""
    options = _arguments()
    rows = [row for row in ROWS if not options.rows or row.name in options.rows]
    if options.list:
        for row in rows:
            print(row.name)
        return 0
    parts = PARTS[options.part]
    wrong = 0
    for row in rows:
        print(f"== {row.name}: {_wanted(row)}", flush=True)
        cells, good = _try(row, parts, options)
        wrong += not good
        line = _line([row.name, *cells, f"{options.part}, {datetime.date.today()}"])
        print(line, flush=True)
        options.page.write_text(_page({**_lines_of(options.page), row.name: line}))
    return int(wrong > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("try_versions.sh", description=__doc__.split("\n\n")[0])
    names = [row.name for row in ROWS]
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"of {', '.join(names)}; default: all"
    )
    parser.add_argument("--part", choices=PARTS, default="all", help="how much of the tests")
    parser.add_argument("--keep", type=Path, help="make environments there, and keep them")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--page", type=Path, default=PAGE, help="the file to write")
    options = parser.parse_args()
    unknown = set(options.rows) - set(names)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return options


def _wanted(row: Row) -> str:
    pins = [f"{name} {version or 'newest'}" for name, version in row.pins.items()]
    return ", ".join([f"Python {row.python}", *pins])


# ---- one row -----------------------------------------------------------------------------------


def _try(
    row: Row, parts: dict[str, list[str]], options: argparse.Namespace
) -> tuple[list[str], bool]:
    """The cells of a row: versions, wheel, parts; and whether all is well."""
    begin = time.monotonic()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="distclip-versions-"))
    home = folder / row.name
    try:
        try:
            python, versions = _environment(row, home)
        except StepError as error:
            print(error, flush=True)
            pins = [row.pins.get(name, "") or "newest" for name in PACKAGES]
            return [row.python, *pins, "not installed", *["-"] * len(parts)], False
        cells, good = [*versions, "ok"], True
        for part, arguments in parts.items():
            if part in PACKAGES and part not in row.pins:
                cells.append("-")
                continue
            result, passed = _tests(python, arguments, home / f"{part}.xml")
            print(f"   {part}: {result}", flush=True)
            cells.append(result)
            good &= passed
        print(f"   {time.monotonic() - begin:.0f} s", flush=True)
        return cells, good
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _environment(row: Row, home: Path) -> tuple[Path, list[str]]:
    """The row's Python, with the wheel in it; and the versions of Python and packages."""
    python = home / "bin" / "python"
    if not python.exists():
        _say([_interpreter(row.python), "-m", "venv", str(home)])
        _say([str(python), "-m", "pip", "install", "--quiet", "--upgrade", "pip"])
        wheels = home / "wheels"
        pip = [str(python), "-m", "pip"]
        _say([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)])
        (wheel,) = wheels.glob("distclip-*.whl")
        pins = [f"{name}=={pin}" if pin else name for name, pin in row.pins.items()]
        _say([*pip, "install", "--quiet", str(wheel), *pins, *TOOLS])
    _say([str(python), "-c", ONE_CLIP], cwd=home)
    listed = _say([str(python), "-m", "pip", "list", "--format", "freeze"])
    found = dict(re.findall(r"^([\w-]+)==(\S+)$", listed, re.MULTILINE))
    version = _say([str(python), "-c", "import platform; print(platform.python_version())"])
    return python, [version.strip(), *(found.get(name, "-") for name in PACKAGES)]


def _interpreter(version: str) -> str:
    """A Python of this version: the PATH's, pyenv's, or one that uv has or fetches."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = sorted(pyenv.glob(f"{version}.*/bin/python"))
    if found:
        return str(found[-1])
    if shutil.which(f"python{version}"):
        return _say([f"python{version}", "-c", "import sys; print(sys.executable)"]).strip()
    if shutil.which("uv"):
        _say(["uv", "python", "install", version])
        return _say(["uv", "python", "find", version]).strip()
    raise StepError(f"there is no Python {version}: not on the PATH, nor known to pyenv or uv")


def _tests(python: Path, arguments: Sequence[str], report: Path) -> tuple[str, bool]:
    """What pytest counted, and whether nothing failed."""
    command = [str(python), "-m", "pytest", "-q", f"--junit-xml={report}", *arguments]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    # Warnings of other versions say nothing of distclip: they are not errors here.
    command += ["-W", "default", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    if not report.exists():
        print(ended.stdout[-4000:], flush=True)
        return "did not start", False
    suite = next(ElementTree.parse(report).iter("testsuite")).attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    skipped = int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    if failed:
        print(
            "\n".join(re.findall(r"^(?:FAILED|ERROR) .*", ended.stdout, re.MULTILINE)), flush=True
        )
    words = [f"{passed} passed", f"**{failed} failed**" * (failed > 0)]
    words.append(f"{skipped} skipped" * (skipped > 0))
    return ", ".join(filter(None, words)), failed == 0 and passed > 0


def _say(command: Sequence[str], cwd: Path | None = None) -> str:
    """The output of a command.

    Raises:
        StepError: it ended with another exit code than 0.
    """
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise StepError(f"{' '.join(command[:6])} ...\n{ended.stdout[-500:]}{ended.stderr[-2000:]}")
    return ended.stdout


# ---- the page ----------------------------------------------------------------------------------

HEAD = """# Versions

Which versions of Python, torch and the frameworks distclip's tests were run with. The table is the
output of `bash launch/try_versions.sh [ROW ...]`, which makes an environment for each row, installs
distclip's wheel in it, clips once with the installed wheel, and runs a part of the tests. The
nightly workflow runs it.

distclip's requirements have no upper limits. A version newer than all of these is logged once, when
distclip is first used (`distclip doctor` shows it too). One older than all of these is refused, by
name. A row of the script that is not in the table has not been run yet.

Not in the table: DeepSpeed 0.18.9 with torch 2.11, whose ZeRO stages 1 and 2 cannot step on CPU
ranks (`Output 0 of SplitBackward0 is a view and is being modified inplace`), with distclip or
without it.

"""


def _columns() -> list[str]:
    return ["row", "Python", *PACKAGES, "wheel", *(f"{part} tests" for part in PARTS["all"]), "run"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _lines_of(page: Path) -> dict[str, str]:
    """The table's lines as they are, by the name of their row."""
    text = page.read_text() if page.exists() else ""
    names = {row.name for row in ROWS}
    found = {line.split("|")[1].strip(): line for line in text.splitlines() if line[:2] == "| "}
    return {name: line for name, line in found.items() if name in names}


def _page(lines: dict[str, str]) -> str:
    table = [_line(_columns()), "|" + "---|" * len(_columns())]
    table += [lines[row.name] for row in ROWS if row.name in lines]
    machine = f"{platform.system()} {platform.machine()}, gloo ranks on CPU"
    sizes = "Tests: `quick` and `all` are the lists in `launch/try_versions.py`"
    return f"{HEAD}{chr(10).join(table)}\n\n{sizes}; {machine}.\n"


if __name__ == "__main__":
    sys.exit(main())
