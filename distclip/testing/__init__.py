"""For tests of gradient clipping, ours and yours: gloo ranks in milliseconds, and an oracle.

`run_on_ranks` runs a function on every rank of a small world. `expected` says in float64 what a
policy must do to whole gradients, and `assert_rounded` compares a tensor with it. `check_policy` is
the contract that a policy of your own has to keep. The pytest plugin is `distclip.testing.plugin`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distclip.testing.contract import check_policy as check_policy
    from distclip.testing.oracle import Expected as Expected
    from distclip.testing.oracle import expected as expected
    from distclip.testing.ranks.failures import Outcome as Outcome
    from distclip.testing.ranks.failures import RankError as RankError
    from distclip.testing.ranks.forkserver import PoolError as PoolError
    from distclip.testing.ranks.on_rank import on_rank as on_rank
    from distclip.testing.ranks.pool import RankPool as RankPool
    from distclip.testing.ranks.pool import run_on_ranks as run_on_ranks
    from distclip.testing.rounding import assert_rounded as assert_rounded

_NAMES = {
    "Expected": "distclip.testing.oracle",
    "Outcome": "distclip.testing.ranks.failures",
    "PoolError": "distclip.testing.ranks.forkserver",
    "RankError": "distclip.testing.ranks.failures",
    "RankPool": "distclip.testing.ranks.pool",
    "assert_rounded": "distclip.testing.rounding",
    "check_policy": "distclip.testing.contract",
    "expected": "distclip.testing.oracle",
    "on_rank": "distclip.testing.ranks.on_rank",
    "run_on_ranks": "distclip.testing.ranks.pool",
}
"""Public name -> the module that is imported when the name is first used: most need torch."""

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
