"""The example project of docs/ci.md, run as it stands, and the fixtures that it shows."""

import importlib.util
import shutil
from pathlib import Path

import hypothesis  # noqa: F401  each inner run would import it anew, its plugin needs it
import pytest

EXAMPLE = Path(__file__).parents[2] / "docs" / "example"


def test_the_example_project_runs(pytester: pytest.Pytester) -> None:
    for file in EXAMPLE.glob("*.py"):
        shutil.copy(file, pytester.path)
    result = pytester.runpytest_inprocess("-q", "-rs", "-Werror")
    there = importlib.util.find_spec("deepspeed") is not None
    result.assert_outcomes(passed=3 + there, skipped=not there)


def test_the_page_shows_the_example() -> None:
    page = (EXAMPLE.parent / "ci.md").read_text()
    text = (EXAMPLE / "conftest.py").read_text()
    body = text[text.index("import pytest") :]
    assert body in page


def test_fixtures_made_on_the_rank(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["distclip.testing.plugin"]')
    pytester.makepyfile(
        """
        import pytest, torch
        import torch.distributed as dist
        from torch.distributed.tensor import DTensor
        from distclip.testing import on_rank

        def build():
            return torch.nn.Linear(5, 3)

        @pytest.fixture
        def build_model():
            return build

        @pytest.fixture
        def pair(mesh):
            return on_rank(lambda mesh, number: (mesh, number, dist.get_rank()), mesh, 7)

        @pytest.mark.ranks(2)
        def test_all(mesh, pair, fsdp2_model, world_size):
            assert pair[0] is mesh and pair[1:] == (7, dist.get_rank())
            assert mesh.size() == world_size and mesh.mesh_dim_names == ("shard",)
            assert isinstance(fsdp2_model.weight, DTensor)
            torch.manual_seed(0)
            assert torch.equal(fsdp2_model.weight.full_tensor(), build().weight)

        def test_no_ranks(mesh):
            pass

        class TestWithout:
            @pytest.fixture
            def build_model(self, request):
                from distclip.testing import plugin
                return request.getfixturevalue("world_size")

            def test_no_marker(self, fsdp2_model):
                pass
        """
    )
    result = pytester.runpytest_inprocess("-q")
    result.assert_outcomes(passed=1, errors=2)
    result.stdout.fnmatch_lines(["*test_no_ranks: mesh needs @pytest.mark.ranks(...)*"])


def test_without_a_model(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["distclip.testing.plugin"]')
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.ranks(1)
        def test_it(fsdp2_model):
            pass
        """
    )
    result = pytester.runpytest_inprocess("-q")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*define a fixture build_model*"])
