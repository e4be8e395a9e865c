"""Who may import what: the contracts of import-linter, and what it cannot say.

The linter takes an external package as a whole, so that a part of torch, and which file may import
which framework, is read off the source here.
"""

import ast
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.sources import PACKAGE, SOURCES, WRITTEN, parsed

IMPORTERS: dict[str, set[str]] = {
    "accelerate": {
        "tools/bench/peers.py", "integrations/accelerate.py", "tools/launch/accelerate_cpu.py",
        "tools/launch/accelerate_cpu_asked.py", "integrations/accelerate_prepared.py",
    },
    "deepspeed": {"tools/bench/zero.py", "integrations/deepspeed.py", "testing/ranks/on_rank.py"},
    "lightning": set(),
    "pytorch_lightning": set(),
    "transformers": {"integrations/transformers.py"},
    "tensorboard": set(),  # through torch.utils.tensorboard
    "mlflow": {"monitor/trackers.py"},
    "trackio": {"monitor/trackers.py"},
    "wandb": {"monitor/trackers.py"},
    "triton": {"kernels/device/_triton.py", "kernels/device/multi_tensor.py"},
    "llvmlite": {
        "kernels/host/building.py", "kernels/host/changes.py", "kernels/host/compiler.py",
        "kernels/host/counting.py", "kernels/host/formats.py", "kernels/host/loops.py",
    },
    "matplotlib": {"monitor/notebook.py", "monitor/plots.py"},
    "psutil": {"tools/launch/accelerate_cpu_asked.py"},
    "pydantic": {"config/document.py", "config/log.py", "config/policies.py", "config/problems.py"},
    "pydantic_core": {"config/problems.py"},
    "yaml": {"config/files.py", "tools/simulate/layouts.py"},
    "typer": {
        f"cli/{name}.py"
        for name in ("app", "bench", "config", "doctor", "kinds", "report", "run", "simulate",
                     "suggest", "verify", "watch")
    },
    "rich": {
        "cli/bench.py", "cli/doctor.py", "cli/simulate.py", "tools/simulate/shown.py",
        "cli/verify.py", "tools/verify/reports.py", "cli/watch.py", "monitor/table.py",
        "monitor/watching.py",
    },
    "hypothesis": set(),
    "pytest": {"testing/plugin.py", "testing/ranks/pool.py"},
    "_pytest": {"testing/ranks/rewriting.py"},
}  # fmt: skip
"""Exactly the files that import each of these, at the top, in a function or for typing only."""

HARMLESS = {
    "ProcessGroup", "fsdp", "get_process_group_ranks", "get_rank", "get_world_size", "group",
    "is_available", "is_initialized", "tensor", "_composable_state",
}  # fmt: skip
"""What of ``torch.distributed`` talks to no other rank."""

ALLOWED_TO_TALK = (
    "statistics/collectives.py", "statistics/waiting.py", "testing/", "tools/bench/models.py",
    "tools/bench/ways.py", "tools/bench/peers.py", "tools/bench/timing.py", "tools/check.py",
    "tools/doctor.py", "tools/verify/", "layouts/gathering.py",
)  # fmt: skip
"""The one file that issues collectives, the one that waits for them and notes so in the store, and
what is no part of a training run."""

MOVING = {"redistribute", "full_tensor", "distribute_tensor", "distribute_module"}
"""Methods of a DTensor, and functions beside it, that are collectives."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of all that is imported anywhere in a file: ``torch.distributed.ProcessGroup``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used in this project"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def imported_packages(name: str) -> set[str]:
    return {full.split(".")[0] for full in imported(parsed(name))}


def used_of_distributed(tree: ast.AST) -> Iterator[str]:
    """What a file takes from ``torch.distributed``, imported by name or as an attribute."""
    prefix = "torch.distributed."
    modules = {"torch.distributed"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname for a in node.names if a.name == "torch.distributed" and a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            modules |= {a.asname or a.name for a in node.names if a.name == "distributed"}
    yield from (name[len(prefix) :].split(".")[0] for name in imported(tree) if prefix in name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            yield node.attr


def talks(tree: ast.AST) -> list[str]:
    """What a file does that reaches other ranks."""
    found = [name for name in used_of_distributed(tree) if name not in HARMLESS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).split(".")[-1]
            found += [called] if called in MOVING else []
    return found


def test_contracts_hold() -> None:
    linter = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("import-linter is not installed")
    # Without its cache: that has been seen to show the imports of an earlier version of a file.
    result = subprocess.run(
        [linter, "--no-cache"], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


MATHEMATICS = ("distclip.policies", "distclip.errors", "distclip.kernels.powers")
"""What a policy may import: no rank and no layout is in there."""


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("policies/")])
def test_policies_know_no_ranks(name: str) -> None:
    tree = parsed(name)
    assert not list(used_of_distributed(tree))
    assert not [full for full in imported(tree) if full.startswith("torch.distributed")]
    own = {full for full in imported(tree) if full.startswith("distclip")}
    foreign = {n for n in own if not n.startswith(MATHEMATICS)}
    assert not foreign


@pytest.mark.parametrize("framework", IMPORTERS)
def test_a_framework_is_imported_by_its_own_files_only(framework: str) -> None:
    importers = {name for name in SOURCES if framework in imported_packages(name)}
    assert importers == IMPORTERS[framework]


LONG_FILES = {
    "distclip/clipper.py": "the docstrings of the public class, which are its reference",
}
"""Files of more than 400 lines, each with the reason. One that is shorter again has to leave."""


def long_functions(source: str) -> list[str]:
    """Functions of over 60 lines without docstring, and without a comment ``# Long: reason``."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            text = lines[node.lineno - 1 : node.end_lineno]
            prose = len((ast.get_docstring(node, clean=False) or "").splitlines())
            size = len(text) - prose
            if (size > 60) != any(line.strip().startswith("# Long: ") for line in text):
                found.append(f"{node.name}, {size} lines")
    return found


def prose_lines(source: str) -> int:
    """Lines of all docstrings, those of attributes too."""
    return sum(
        (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def test_the_public_class_is_long_by_its_docstrings() -> None:
    text = WRITTEN["distclip/clipper.py"]
    assert text.count("\n") - prose_lines(text) <= 400


def test_no_file_is_long_without_a_reason() -> None:
    assert {name for name, text in WRITTEN.items() if text.count("\n") > 400} == set(LONG_FILES)


def test_no_function_is_long_without_a_reason() -> None:
    """And none gives the reason that is short."""
    found = {name: long for name, text in WRITTEN.items() if (long := long_functions(text))}
    assert not found


def test_a_long_function_is_seen() -> None:
    long = "def f():\n" + "    x = 1\n" * 61
    assert long_functions(long) == ["f, 62 lines"]
    assert not long_functions(long.replace("    x = 1", "    # Long: a table.", 1) + "    x = 1\n")
    assert not long_functions('def f():\n    """A."""\n' + "    x = 1\n" * 59)
    assert long_functions("def f():\n    # Long: no longer.\n    x = 1\n")
    assert prose_lines('class A:\n    """One\n\n    two."""\n    x = 1\n    """Three."""\n') == 4


SHARDING = ("torch.distributed.tensor", "torch.distributed.fsdp")

SHARD_BY_THEMSELVES = {
    "statistics/unreduced.py": "gradients that FSDP2 has not reduced, which no layout describes",
    "tools/bench/fold.py": "shards the model that it times",
    "tools/bench/models.py": "shards the models that are timed",
    "tools/bench/peers.py": "what torchtitan does, which is written for DTensors",
    "tools/launch/accelerate_cpu.py": "whether Accelerate has wrapped a model in FSDP1",
    "tools/verify/model.py": "shards a model, and gathers it without distclip's help",
}
"""Other files than those of ``layouts`` and ``testing`` that know a kind of sharding, and why."""


def test_a_kind_of_sharding_is_known_to_layouts_only() -> None:
    found = {
        name
        for name in SOURCES
        if not name.startswith(("layouts/", "testing/"))
        and any(full.startswith(SHARDING) for full in imported(parsed(name)))
    }
    assert found == set(SHARD_BY_THEMSELVES)


def test_the_command_line_is_imported_by_its_own_tests_only() -> None:
    """What a command does lies in ``tools``; others start it as a shell does."""
    found = {
        name
        for name, text in WRITTEN.items()
        if not name.startswith(("distclip/cli/", "tests/cli/"))
        and any(f"{full}.".startswith("distclip.cli.") for full in imported(ast.parse(text)))
    }
    assert found == {"distclip/__main__.py"}


def test_one_file_issues_the_collectives() -> None:
    found = {
        name: what
        for name in SOURCES
        if not name.startswith(ALLOWED_TO_TALK) and (what := talks(parsed(name)))
    }
    # Three exceptions. Autograd left a gradient in other placements than its parameter (Partial
    # under tensor parallelism), which only the DTensor itself can put right; the type of a tensor
    # that an asynchronous collective has not brought yet; and which mesh another one is a slice of,
    # on torch 2.9.
    assert found == {
        "layouts/dtensor_gradients.py": ["redistribute"],
        "layouts/fsdp1.py": ["device_mesh"],
        "layouts/plain.py": ["_functional_collectives"],
    }


def test_the_testing_kit_stands_alone() -> None:
    for name in SOURCES:
        if name.startswith("testing/"):
            own = {full for full in imported(parsed(name)) if full.split(".")[0] == "distclip"}
            assert {full for full in own if not full.startswith("distclip.testing")} == set(), name


def package_of(name: str) -> str:
    """The package that a file is in: ``distclip.layouts`` for ``layouts/plain.py``."""
    return ".".join(("distclip", *name.split("/")[:-1]))


def others_privates(name: str, tree: ast.AST) -> list[str]:
    """What a file takes from another package although its name has a leading underscore.

    A name belongs to the package of the file that defines it, and to the packages inside of that.
    """
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or a.name: a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    used = [*imported(tree)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (full := modules.get(ast.unparse(node.value))):
            used.append(f"{full}.{node.attr}")
    here = package_of(name)
    found = []
    for full in used:
        parts = full.split(".")
        private = [i for i, part in enumerate(parts) if part[0] == "_" and part[-2:] != "__"]
        if parts[0] != "distclip" or not private:
            continue
        holder = parts[: private[0]]
        if "/".join(holder[1:]) + ".py" in SOURCES:
            holder.pop()
        if not f"{here}.".startswith(".".join(holder) + "."):
            found.append(full)
    return found


def test_an_underscore_means_not_outside_this_package() -> None:
    found = {name: others_privates(name, parsed(name)) for name in SOURCES}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from distclip.policies._agc import AGC",
        "from distclip.policies import _agc",
        "import distclip.policies._agc",
        "from distclip.layouts.plain import _fetch",
        "def f():\n    from distclip.layouts import plain as p\n    p._fetch()",
        "import distclip.layouts.plain\ndistclip.layouts.plain._fetch",
    ],
)
def test_another_packages_underscore_is_seen(source: str) -> None:
    tree = ast.parse(source)
    assert others_privates("engine/walk.py", tree)
    assert others_privates("clipper.py", tree)
    at_home = "policies/agc.py" if "policies" in source else "layouts/detect.py"
    assert others_privates(at_home, tree) == []


BREACHES: dict[str, tuple[Callable[[ast.AST], object], str]] = {
    "import as": (talks, "import torch.distributed as dist\ndist.all_reduce(x)"),
    "from torch": (talks, "from torch import distributed as d\nd.barrier()"),
    "by name": (talks, "from torch.distributed import broadcast"),
    "in full": (talks, "import torch\ntorch.distributed.all_gather(a, b)"),
    "submodule": (talks, "from torch.distributed._functional_collectives import all_reduce"),
    "in a function": (talks, "def f():\n    import torch.distributed as dist\n    dist.send(x, 0)"),
    "method": (talks, "parameter.grad.full_tensor()"),
    "function": (
        talks,
        "from torch.distributed.tensor import distribute_tensor\ndistribute_tensor(x, mesh)",
    ),
    "framework": (lambda tree: list(imported(tree)), "def f():\n    import accelerate.state"),
}


@pytest.mark.parametrize("kind", BREACHES)
def test_a_breach_is_seen(kind: str) -> None:
    look, source = BREACHES[kind]
    assert look(ast.parse(source))


def test_what_is_harmless_is_let_through() -> None:
    source = (
        "import torch.distributed as dist\nfrom torch.distributed.tensor import DTensor\n"
        "from distclip.statistics import collectives\n"
        "dist.get_rank()\ncollectives.gather(1, group)\nnumbers.scatter_(0, where, values)"
    )
    assert talks(ast.parse(source)) == []
