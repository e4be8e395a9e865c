"""What the tests of kernels share."""

from __future__ import annotations

import pytest

from distclip.kernels.host import compiler


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the loops and on the way without them, which must agree."""
    if not request.param:
        monkeypatch.setattr(compiler, "compiled_kinds", frozenset)
    elif not compiler.compiled_kinds():
        pytest.skip("the compiled loops are switched off")
    return bool(request.param)
