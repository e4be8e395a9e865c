"""When a pool may be used again."""

import pytest

from distclip.testing.ranks.health import MOST_GROUPS, GroupState, reusable

BOTH, FIRST = (0, 1), (0,)


def state(created=2, alive=True, **groups):
    return GroupState(alive, created, {name.removeprefix("g"): g for name, g in groups.items()})


def test_agreeing_ranks_are_fine():
    assert reusable([state(g0=(BOTH, 4), g1=(FIRST, 2)), state(g0=(BOTH, 4))])
    assert reusable([state(1, g0=(FIRST, 9))])


@pytest.mark.parametrize(
    "states",
    [
        [state(1, g0=(BOTH, 4)), state(1, g0=(BOTH, 5))],
        [state(2, g0=(BOTH, 4), g1=(BOTH, 1)), state(2, g0=(BOTH, 4))],
        [state(1, g0=(BOTH, 4)), state(1, alive=False)],
        [state(2, g0=(BOTH, 4)), state(2, g0=(BOTH, 4))],
        [state(1, g0=(BOTH, 4)), state(2, g0=(BOTH, 4), g1=((1,), 0))],
        [state(1, **{f"g{n}": (FIRST, 1) for n in range(MOST_GROUPS + 1)})],
    ],
    ids=["half done", "member missing", "destroyed", "subgroup gone", "uneven", "too many"],
)
def test_anything_else_is_not(states):
    assert not reusable(states)
