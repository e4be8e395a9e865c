"""The engine's page names functions, classes and files that exist, and the steps in their order."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from distclip import GradClipper, policies
from distclip.engine import ledger, session, walk
from distclip.kernels import changing
from tests.sharded import mesh_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "distclip/engine/README.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`]+)`", PAGE)
NOT_OURS = {
    'on_nonfinite="error"',
    "fully_shard",
    "clipper.clip_()",
    "min(1, max_norm / (norm + 1e-6))",
}
STEPS = re.findall(r"^\d\. `([\w.]+)` in", PAGE, re.MULTILINE)
ROOMS = {"layouts", "statistics", "policies", "kernels"}


def definitions(path: Path) -> set[str]:
    """Functions, classes, methods as ``Class.method``, and names of the module."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            found |= {f"{node.name}.{method}" for method in methods} | set(methods)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


EVERYWHERE = set[str]().union(*map(definitions, (ROOT / "distclip").rglob("*.py")))


@pytest.mark.parametrize("quoted", sorted({*QUOTED} - NOT_OURS))
def test_what_the_page_names_exists(quoted: str) -> None:
    if quoted in ROOMS:
        assert (ROOT / "distclip" / quoted / "__init__.py").exists()
    elif "/" in quoted:
        assert (ROOT / quoted).is_file()
    else:
        assert quoted in EVERYWHERE


@pytest.mark.parametrize(("name", "path"), re.findall(r"`([\w.]+)` in\s+`([\w/.]+)`", PAGE))
def test_a_function_is_in_the_file_that_the_page_says(name: str, path: str) -> None:
    assert name in definitions(ROOT / path)


@pytest.mark.ranks(2)
def test_a_step_calls_the_six_functions_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def note(owner: Any, attribute: str, name: str) -> None:
        function = getattr(owner, attribute)

        def noting(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, noting)

    note(GradClipper, "clip_", "GradClipper.clip_")
    note(session, "walk", "walk")
    note(walk, "measure_locally", "measure_locally")
    note(walk, "reduce", "reduce")
    note(ledger.Ledger, "run", "Ledger.run")
    note(changing, "scale_", "scale_")
    model = nn.Linear(4, 3)
    fully_shard(model, mesh=mesh_of((dist.get_world_size(),), ("dp",)))
    model(torch.ones(2, 4)).square().sum().backward()
    clipper = GradClipper(model, policies.global_norm(1e-3))
    clipper.clip_()
    assert called == STEPS
