"""How the package is built: its root, its rooms, and that a name is for one thing."""

import ast
from collections import Counter
from collections.abc import Iterable
from itertools import chain

from tests.helpers.sources import SOURCES, parsed

ROOT_MODULES = {
    "__init__.py", "__main__.py", "_version.py", "clipper.py", "errors.py", "functional.py",
    "options.py", "report.py",
}  # fmt: skip
"""What the public names of ``distclip`` are read from, and nothing else; at most 10."""

MOST_ROOMS = 24
"""The most folders with modules that the package may have, itself included."""

NAMESPACES = {"accelerate.py", "deepspeed.py", "lightning.py", "transformers.py"}
"""Public import names, ``distclip.lightning``, at the root since an import name is a place.

Only a file there is found alike by ``import distclip.lightning``, ``from distclip.lightning import
X``, ``runpy``, type checkers and editors: a finder in ``sys.meta_path`` or an entry of
``sys.modules`` is seen at run time only, and after ``import distclip``. None has code of its own:
each is the same few lines, which hand on the module of ``distclip/integrations``.
"""


def test_the_root_has_the_public_surface_only() -> None:
    found = {name for name in SOURCES if "/" not in name}
    assert found == ROOT_MODULES | NAMESPACES
    assert len(ROOT_MODULES) <= 10


def test_the_house_has_few_rooms() -> None:
    assert len({name.rpartition("/")[0] for name in SOURCES}) <= MOST_ROOMS


def test_a_framework_at_the_root_has_no_code_of_its_own() -> None:
    bodies = {
        "\n".join(map(ast.unparse, parsed(name).body[1:])).replace(name[:-3], "NAME")
        for name in NAMESPACES
    }
    assert len(bodies) == 1
    assert len(bodies.pop().splitlines()) <= 10


SHARED_NAMES = {
    "one operation, by torch, compiled loops and Triton": {
        "clamp_", "clamped_norms", "counts", "measures", "norm", "norms", "row_norms", "scale_",
        "scale_all_", "scale_units_", "segment_norms", "unit_norms", "zero_",
    },
    "one formula, in the library and in the oracle, which shares no code with it": {
        "adagc", "autoclip", "group_ema", "ladder", "norm_stabilizer", "running_max",
        "skip_spikes", "zclip",
    },
    "what a layout's module has, under this name": {
        "LAYOUT", "at_once", "describe", "describe_tensor", "is_reduced", "weights_at_once",
    },
    "what a framework's module has, under this name": {"ClipCallback", "attach", "enable"},
    "where a process starts": {"main"},
}  # fmt: skip
"""Names without an underscore that several modules define, and what makes each one thing."""

SHARED_IN_A_ROOM = {"_found", "_itself", "_logger", "_rewindable", "_shape"}
"""Private names that several files of a folder define, each with one meaning."""


def defined(tree: ast.Module) -> set[str]:
    """Names of the functions, classes and values of a module; type variables left out."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            made = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = {target.id for target in targets if isinstance(target, ast.Name)}
            found |= set() if made == "TypeVar" else named
    return {name for name in found if not name.startswith("__")}


def repeated(names: Iterable[set[str]]) -> set[str]:
    return {name for name, times in Counter(chain.from_iterable(names)).items() if times > 1}


def test_a_name_is_for_one_thing() -> None:
    """So that a search for a name finds it and nothing else."""
    modules = {name: defined(parsed(name)) for name in SOURCES}
    public = [{name for name in names if name[0] != "_"} for names in modules.values()]
    assert repeated(public) == set().union(*SHARED_NAMES.values())
    rooms: dict[str, list[set[str]]] = {}
    for name, names in modules.items():
        rooms.setdefault(name.rpartition("/")[0], []).append(names)
    private = set().union(*map(repeated, rooms.values()))
    assert {name for name in private if name[0] == "_"} == SHARED_IN_A_ROOM


def test_a_name_for_two_things_is_seen() -> None:
    one = 'T = TypeVar("T")\nA: int = 1\n__all__ = []\ndef f(): pass\nclass C:\n    D = 1\n'
    assert defined(ast.parse(one)) == {"A", "f", "C"}
    assert repeated([{"A", "f"}, {"f"}, {"B"}]) == {"f"}


CONSTRUCTORS = {"arange", "empty", "full", "ones", "scalar_tensor", "tensor", "zeros"}


def test_no_tensor_is_made_on_the_default_device() -> None:
    """Which may be any (torch.set_default_device): where a number is used is known."""
    found = [
        f"{name}:{call.lineno}"
        for name in SOURCES
        if not name.startswith(("testing/", "tools/"))
        for call in ast.walk(parsed(name))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        if ast.unparse(call.func.value) == "torch" and call.func.attr in CONSTRUCTORS
        if not any(keyword.arg == "device" for keyword in call.keywords)
    ]
    assert not found
