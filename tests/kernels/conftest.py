"""What the tests of kernels share."""

from collections.abc import Iterator

import pytest
import torch

from distclip.kernels.host import compiler
from distclip.kernels.host import threads as host_threads


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the loops and on the way without them, which must agree."""
    if not request.param:
        monkeypatch.setattr(compiler, "compiled_kinds", frozenset)
    elif not compiler.compiled_kinds():
        pytest.skip("the compiled loops are switched off")
    return bool(request.param)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test sets, the next one finds what was there. A quarter million is worthwhile."""
    monkeypatch.setattr(host_threads, "WORTHWHILE", 1 << 18)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
