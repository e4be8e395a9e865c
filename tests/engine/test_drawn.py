"""Some of the drawn cases of ``benchmarks.reliability.properties``, which runs 20,000 of them."""

from collections import Counter
from typing import Any

import pytest

from benchmarks.reliability import drawing, properties

CASES = 80


def test_drawn_cases_are_as_the_oracle_says() -> None:
    failures = properties.failures(5, CASES)
    shown = {number: (why, drawing.draw(5, number)) for number, why in failures.items()}
    assert not shown


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle that is off by 1e-5 is found out, one that forgets a NaN too."""
    expected = properties.expected

    def off(policy: Any, gradients: Any, *args: Any, **kwargs: Any) -> Any:
        slightly = {n: None if g is None else g * (1 + 1e-5) for n, g in gradients.items()}
        return expected(policy, slightly, *args, **kwargs)

    monkeypatch.setattr(properties, "expected", off)
    found = [number for number in range(40) if properties.check(5, number) is not None]
    assert len(found) > 10


def test_the_draws_reach_the_extremes() -> None:
    seen: Counter[str] = Counter()
    for number in range(properties.BATCH * 4):
        case = drawing.draw(1, number)
        seen.update([case.group, case.mode])
        for parameter in case.parameters:
            seen.update([parameter.dtype, parameter.fill, str(parameter.shape)])
            seen[f"placed {parameter.placement}"] += 1
            seen[f"{parameter.dtype} 1e{parameter.exponent}"] += 1
        text = str(case.policy)
        seen.update(name for name in (*drawing.SCALING, *drawing.MEMORY) if name in text)
        seen.update(f"p={order}" for order in drawing.ORDERS if f"'norm_type': {order}" in text)
    groups = [f"{kind}|{dtype}" for kind in properties.NAMES for dtype in drawing.KINDS]
    want = [*groups, *drawing.MODES, *drawing.DTYPES, *drawing.SCALING, *drawing.MEMORY]
    want += [str(shape) for shape in drawing.SHAPES]
    want += [f"p={order}" for order in drawing.ORDERS]
    want += [f"{dtype} 1e{e}" for dtype, es in drawing.EXPONENTS.items() for e in es]
    want += ["zeros", "mixed", "nan", "inf", "placed None", "placed -1", "placed 0", "placed 1"]
    groups_of_value = {"value|complex"}  # complex numbers have no order to clamp by
    assert not {each for each in want if not seen[each]} - groups_of_value


@pytest.mark.ranks(2)
def test_a_middle_pass_of_whole_units_is_reduced_for_the_report() -> None:
    """The smallest coefficient of a pass that only decides per unit differed between ranks."""
    assert properties.check(1, 4715) is None
