"""pytest plugin: a test marked ``ranks`` runs on every rank of a gloo world.

    pytest_plugins = ["distclip.testing.plugin"]        # in conftest.py, or -p on the command line

    @pytest.mark.ranks(1, 2, 3, 4)
    def test_sum(world_size):
        one = torch.ones(())
        dist.all_reduce(one)
        assert one.item() == world_size

Once per listed world size, with ids ``[1rank]``, ``[2ranks]`` and so on. Fixtures are made in the
main process and their values pickled to the ranks, so `tmp_path` works and `capsys` does not. What
can only be made on a rank, a fixture makes there with ``distclip.testing.ranks.on_rank``; so do the
fixtures of this plugin:

* ``mesh``: a ``DeviceMesh`` over all ranks.
* ``fsdp2_model``: your model, sharded with ``fully_shard``; ``build_model`` is a fixture of yours
  that gives a function that builds it.
* ``zero_engine``: your model in a DeepSpeed engine; the stage is that of the fixture ``zero_stage``
  (3). Skips where DeepSpeed is not installed.

The limit for a hung test is the marker's ``timeout=``, else the ini option
``distclip_rank_timeout``.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from distclip.testing.ranks import shipping
from distclip.testing.ranks.failures import RankError
from distclip.testing.ranks.on_rank import make_fsdp2, make_mesh, make_zero, on_rank, resolved
from distclip.testing.ranks.pool import run_on_ranks

_MARKER = (
    "ranks(*world_sizes, timeout=None): run the test on every rank of a gloo world, once per "
    "world size; timeout: seconds until a rank that has not answered counts as hung"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the default limit."""
    parser.addini(
        "distclip_rank_timeout",
        "seconds until a rank that has not answered counts as hung (default: 60)",
        default="60",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", _MARKER)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for every world size of the marker."""
    marker = metafunc.definition.get_closest_marker("ranks")
    if marker is None:
        return
    sizes = marker.args
    if not sizes or not all(type(size) is int and size >= 1 for size in sizes):
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: ranks() takes world sizes, such as ranks(1, 2), "
            f"not {sizes!r}"
        )
    if unknown := set(marker.kwargs) - {"timeout"}:
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: ranks() does not take {sorted(unknown)}"
        )
    if "world_size" not in metafunc.fixturenames:
        metafunc.fixturenames.append("world_size")
    ids = [f"{size}rank{'s' if size > 1 else ''}" for size in sizes]
    metafunc.parametrize("world_size", sizes, ids=ids)


@pytest.fixture
def world_size(request: pytest.FixtureRequest) -> int:
    """The number of ranks that a test marked with `ranks` runs on."""
    pytest.fail(f"{request.node.nodeid}: world_size needs @pytest.mark.ranks(...)", pytrace=False)


@pytest.fixture
def mesh(request: pytest.FixtureRequest) -> Any:
    """A one-dimensional `DeviceMesh` over all ranks of a test marked with `ranks`."""
    _needs_ranks(request)
    return on_rank(make_mesh)


@pytest.fixture
def build_model(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    """Yours to define: gives a function, importable, that builds a model that is not sharded."""
    pytest.fail(
        f"{request.node.nodeid}: define a fixture build_model, which returns a function that "
        f"builds your model",
        pytrace=False,
    )


@pytest.fixture
def fsdp2_model(
    request: pytest.FixtureRequest, build_model: Callable[[], nn.Module], mesh: Any
) -> Any:
    """What `build_model` builds, seeded alike on all ranks, sharded with `fully_shard`."""
    _needs_ranks(request)
    return on_rank(make_fsdp2, build_model, mesh)


@pytest.fixture
def zero_stage() -> int:
    """The stage of `zero_engine`; define or parametrize your own to have another."""
    return 3


@pytest.fixture
def zero_engine(
    request: pytest.FixtureRequest, build_model: Callable[[], nn.Module], zero_stage: int
) -> Any:
    """What `build_model` builds, in a DeepSpeed engine with AdamW at `zero_stage`, in fp32."""
    _needs_ranks(request)
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    return on_rank(make_zero, build_model, zero_stage)


def _needs_ranks(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("ranks") is None:
        pytest.fail(
            f"{request.node.nodeid}: {request.fixturename} needs @pytest.mark.ranks(...)",
            pytrace=False,
        )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the body of a marked test on the ranks instead of here."""
    marker = pyfuncitem.get_closest_marker("ranks")
    if marker is None:
        return None
    function = pyfuncitem.obj
    if hasattr(function, "hypothesis"):
        pytest.fail(
            "@given cannot run on the ranks, each would draw its own examples: leave out the "
            "ranks marker and call distclip.testing.run_on_ranks in the test",
            pytrace=False,
        )
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    limit = marker.kwargs.get("timeout") or float(pyfuncitem.config.getini("distclip_rank_timeout"))
    world: Any = pyfuncitem.callspec.params["world_size"]
    try:
        run_on_ranks(functools.partial(_call, function), world, arguments, timeout=limit)
    except TypeError:  # something cannot be sent
        for name, value in arguments.items():
            try:
                shipping.dumps(value)
            except TypeError as error:
                text = f"fixture {name!r} {error}"
                raise pytest.fail.Exception(text, pytrace=False) from None
        raise
    except RankError as error:
        # The frames of this process say nothing that the message does not.
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    except pytest.skip.Exception as skip:
        skip._use_item_location = True  # let -rs show the test and not this file
        raise
    return True


def _call(function: Any, arguments: dict[str, Any]) -> None:
    values = resolved(arguments)
    try:
        result = function(**values)
    finally:
        for value in values.values():
            if isinstance(value, pytest.MonkeyPatch):  # nobody else undoes what it did here
                value.undo()
    if result is not None:
        raise TypeError(f"a test returns None, not {type(result).__name__}: did you mean assert?")
