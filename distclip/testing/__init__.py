"""For tests of gradient clipping, ours and yours: gloo ranks in milliseconds, and an oracle.

`run_on_ranks` runs a function on every rank of a small world. `expected` says in float64 what a
policy must do to whole gradients, and `assert_rounded` compares a tensor with it. `check_policy` is
the contract that a policy of your own has to keep. The pytest plugin is `distclip.testing.plugin`.
"""

from distclip.testing.contract import check_policy
from distclip.testing.oracle import Expected, expected
from distclip.testing.ranks.failures import Outcome, RankError
from distclip.testing.ranks.forkserver import PoolError
from distclip.testing.ranks.on_rank import on_rank
from distclip.testing.ranks.pool import RankPool, run_on_ranks
from distclip.testing.rounding import assert_rounded

__all__ = [
    "Expected",
    "Outcome",
    "PoolError",
    "RankError",
    "RankPool",
    "assert_rounded",
    "check_policy",
    "expected",
    "on_rank",
    "run_on_ranks",
]
