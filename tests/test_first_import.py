"""What importing distclip imports, and its lazy names."""

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

import distclip
import distclip.optim
import distclip.testing
from distclip.common import namespaces
from tests.helpers.processes import python, well

FRAMEWORKS = (
    "accelerate", "deepspeed", "transformers", "lightning", "pytorch_lightning", "matplotlib",
    "pytest", "hypothesis", "typer", "rich",
)  # fmt: skip


def test_importing_distclip_imports_no_framework() -> None:
    program = f"""
import json, sys
import distclip
from distclip import policies, testing
policies.chain(policies.agc(), policies.global_norm(1.0))
early = sorted({{*{FRAMEWORKS!r}, "distclip.optim", "torch._dynamo"}} & set(sys.modules))
assert distclip.optim.LaProp
lazy = False
try:
    lazy = distclip.accelerate is sys.modules["distclip.integrations.accelerate"]
except ModuleNotFoundError as error:
    lazy = error.name
print(json.dumps([early, lazy, "accelerate" in sys.modules]))
"""
    told = in_a_new_process(program)
    installed = importlib.util.find_spec("accelerate") is not None
    expected = [[], True, True] if installed else [[], "accelerate", False]
    assert json.loads(told) == expected


@pytest.mark.parametrize("module", [distclip, distclip.testing], ids=lambda m: m.__name__)
def test_type_checkers_see_every_lazy_name(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {name: f"{home}.{name}" for name, home in module._NAMES.items()}
    if module is distclip:
        lazy |= {name: f"distclip.{name}" for name in (*namespaces.FRAMEWORKS, "optim")}
    assert seen == lazy


@pytest.mark.parametrize("name", namespaces.FRAMEWORKS)
def test_a_module_of_a_framework_is_imported_by_its_public_name(name: str) -> None:
    """However it is written, it is one module, which is imported then and not before."""
    pytest.importorskip(name)
    told = in_a_new_process(
        f"""
        import sys
        import distclip
        assert "distclip.integrations.{name}" not in sys.modules
        import distclip.{name}
        import distclip.{name} as once
        from distclip import {name} as twice
        from distclip.integrations import {name} as home
        assert once is twice is home is distclip.{name}
        from distclip.{name} import *
        print(once.__name__)
        """.replace("\n        ", "\n")
    )
    assert told.split() == [f"distclip.integrations.{name}"]


def in_a_new_process(program: str) -> str:
    return well(python("-c", program))


def test_help_needs_no_framework() -> None:
    program = """
import pydoc, sys
sys.modules["accelerate"] = None
import distclip
assert {"accelerate", "transformers"}.isdisjoint(dir(distclip)) and "optim" in dir(distclip)
assert "class GradClipper" in pydoc.render_doc(distclip, renderer=pydoc.plaintext)
try:
    distclip.accelerate
except ImportError as error:
    assert "pip install 'distclip[accelerate]'" in str(error)
else:
    raise AssertionError
"""
    in_a_new_process(program)


def test_lazy_names_are_real_ones() -> None:
    """Of threads at once, by a star import, for pickle, for help, and modules as attributes."""
    program = """
import pickle, pydoc, sys, threading
import distclip
assert "torch" not in sys.modules
barrier, found = threading.Barrier(8), []
def first_use():
    barrier.wait()
    found.append((distclip.GradClipper, distclip.clip_grad_norm_, distclip.from_config))
threads = [threading.Thread(target=first_use) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 8 and len(set(found)) == 1
from distclip import *
assert clip_grad_norm_ is distclip.clip_grad_norm_ is found[0][1]
assert pickle.loads(pickle.dumps(ClipReport)) is distclip.ClipReport
assert pickle.loads(pickle.dumps(policies.agc(0.1))) == policies.agc(0.1)
assert distclip.config.load({"policy": "measure"}).policy == policies.measure()
text = pydoc.render_doc(distclip, renderer=pydoc.plaintext)
assert "class GradClipper" in text and "clip_grad_agc_(" in text
assert not hasattr(distclip, "nothing") and not hasattr(distclip, "__wrapped__")
"""
    in_a_new_process(program)


def test_any_module_can_be_the_first() -> None:
    """Each in a fork of one process that has torch already, which takes seconds to import."""
    program = """
import importlib, os, torch.distributed.fsdp, torch.distributed.tensor
for name in ("clipper", "config", "engine.passes", "functional", "layouts.plan", "monitor",
             "policies", "statistics.units", "report", "optim", "testing.oracle"):
    child = os.fork()
    if not child:
        importlib.import_module("distclip." + name)
        import distclip
        distclip.GradClipper, distclip.clip_grad_norm_, distclip.ClipReport
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""
    in_a_new_process(program)


def test_policies_are_built_without_torch_and_decide_with_it() -> None:
    program = """
import sys
from distclip import policies
policy = policies.zclip()
assert policy.needs.gradient_norms == {2.0} and "torch" not in sys.modules
state = policy.init([policies.ParameterInfo("w", (3,))])
import torch
ones = torch.ones(1, dtype=torch.float64)
statistics = policies.Statistics([policies.ParameterInfo("w", (3,))], {2.0: 4.0 * ones})
(scale,), state = policy.update(statistics, state)
assert abs(scale.coefficients.item() - 0.25) < 1e-6 and state["seen"].item() == 1
"""
    in_a_new_process(program)
