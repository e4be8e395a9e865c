"""Do the layouts agree? Losses, norms and coefficients, step by step, against the reference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distclip.testing.ranks.stuck import names
from distclip.tools.simulate.findings import Finding, whole_squares
from distclip.tools.simulate.records import Rank, Step

QUANTITIES = ("loss", "norm", "coefficient")


@dataclass(frozen=True)
class StepRow:
    """One step of one layout; NaN: not known.

    Attributes:
        loss: what was differentiated, summed over a step's micro-batches, mean over the ranks.
        norm: of all gradients before clipping by distclip (without it: as they are stepped with).
        coefficient: the smallest that was applied.
    """

    loss: float
    norm: float
    coefficient: float


def step_rows(ranks: Sequence[Rank]) -> list[StepRow]:
    """The steps that all ranks have begun."""
    return [_row(steps) for steps in zip(*(rank.completed for rank in ranks), strict=False)]


def _row(steps: Sequence[Step]) -> StepRow:
    losses = [sum(step.losses) for step in steps if step.losses]
    loss = sum(losses) / len(losses) if losses else math.nan
    clips = steps[0].clips
    coefficient = min((clip["coefficient"] for clip in clips), default=math.nan)
    if clips:
        norm = math.sqrt(sum(clip["total_norm"] ** 2 for clip in clips))
    elif steps[0].norm is not None:
        norm = steps[0].norm
    else:
        squares = whole_squares(steps)
        norm = math.sqrt(sum(squares.values())) if squares else math.nan
    return StepRow(loss, norm, coefficient)


def agree(one: float, other: float, tolerance: float) -> bool:
    """Whether two numbers are the same but for rounding; NaN is known to be nothing."""
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) == math.isnan(other)
    return one == other or abs(one - other) <= tolerance * max(abs(one), abs(other))


def compare_layouts(
    reference: tuple[str, Sequence[Rank]], other: tuple[str, Sequence[Rank]], tolerance: float
) -> Finding | None:
    """The first step at which a layout is not as the reference, and why, as far as can be told."""
    (name, ranks), (layout, others) = reference, other
    mine, theirs = step_rows(ranks), step_rows(others)
    for number, (want, have) in enumerate(zip(mine, theirs, strict=False)):
        apart = [
            f"{quantity} {getattr(have, quantity):.7g} and not {getattr(want, quantity):.7g}"
            for quantity in QUANTITIES
            if not agree(getattr(want, quantity), getattr(have, quantity), tolerance)
        ]
        if apart:
            text = f"differs from {name} from step {number} on: {', '.join(apart)}"
            here = [rank.completed[number] for rank in ranks]
            there = [rank.completed[number] for rank in others]
            why, who = _why(number, name, here, layout, there)
            return Finding("disagrees", "\n".join([text, *why]), number, tuple(who))
    if len(mine) != len(theirs):
        text = f"took {len(theirs)} steps, {name} {len(mine)}"
        hint = _sizes(name, ranks, layout, others)
        return Finding("disagrees", "\n".join([text, *hint]), min(len(mine), len(theirs)))
    return None


def _sizes(name: str, ranks: Sequence[Rank], layout: str, others: Sequence[Rank]) -> list[str]:
    first = [rank.completed[0] for rank in ranks if rank.completed]
    second = [rank.completed[0] for rank in others if rank.completed]
    return _amounts(name, first, layout, second)


def _why(
    number: int, name: str, here: Sequence[Step], layout: str, there: Sequence[Step]
) -> tuple[list[str], list[int]]:
    found = _amounts(name, here, layout, there)
    if found:
        return found, []
    found, who = _other_data(name, here, layout, there)
    if found:
        return found, who
    if number == 0 and (found := _weights(name, here, layout, there)):
        return found, []
    looks = (_own_clipping, _uneven, _gradients)
    return next((found for look in looks if (found := look(name, here, layout, there))), []), []


def _own_clipping(name: str, here: Sequence[Step], layout: str, there: Sequence[Step]) -> list[str]:
    engines = [step.norm is not None for step in (here[0], there[0])]
    if engines[0] == engines[1] or here[0].clips or there[0].clips:
        return []
    return [
        f"under DeepSpeed ({layout if engines[1] else name}) a script's own clipping of gradients "
        f"does nothing, and DeepSpeed's is switched off here: give a policy with --config"
    ]


def _uneven(name: str, here: Sequence[Step], layout: str, there: Sequence[Step]) -> list[str]:
    sizes = {size for step in there for size in step.sizes}
    if len(sizes) < 2 or len({size for step in here for size in step.sizes}) > 1:
        return []
    return [
        f"the micro-batches of {layout} have {' and '.join(map(str, sorted(sizes)))} samples: a "
        f"mean of their means is not the mean over the samples"
    ]


def _amounts(name: str, here: Sequence[Step], layout: str, there: Sequence[Step]) -> list[str]:
    mine = sum(len(step.samples) for step in here)
    theirs = sum(len(step.samples) for step in there)
    if mine == theirs or not mine or not theirs:
        return []
    return [
        f"a step of {layout} saw {theirs} samples on {len(there)} rank(s), one of {name} {mine}: "
        f"the script's batch is per process; divide it by the number of processes (Accelerate: "
        f"DataLoaderConfiguration(split_batches=True)), or compare layouts with as many ranks"
    ]


def _other_data(
    name: str, here: Sequence[Step], layout: str, there: Sequence[Step]
) -> tuple[list[str], list[int]]:
    known = {sample for step in here for sample in step.samples}
    mine = Counter(sample for step in here for sample in step.samples)
    theirs = Counter(sample for step in there for sample in step.samples)
    if not known or mine == theirs:
        return [], []
    strangers = [
        rank for rank, step in enumerate(there) if step.samples and known.isdisjoint(step.samples)
    ]
    some = [rank for rank, step in enumerate(there) if any(s not in known for s in step.samples)]
    who = strangers if strangers and len(strangers) < len(there) else some
    if who and len(who) < len(there):
        text = (
            f"{names(who)} of {layout} saw samples in this step that {name} did not: its data are "
            f"in another order than those of the other ranks. Seed the shuffling of all ranks alike"
        )
        return [text], who
    common = sum((mine & theirs).values())
    return [
        f"{layout} saw other samples in this step than {name} ({common} of {sum(mine.values())} "
        f"are the same): the order of the data depends on the number of ranks"
    ], []


def _weights(name: str, here: Sequence[Step], layout: str, there: Sequence[Step]) -> list[str]:
    mine, theirs = (whole_squares(steps, "weight_squares") for steps in (here, there))
    for key in mine:
        if key in theirs and not agree(mine[key], theirs[key], 1e-6):
            return [
                f"the weights differ before the first step: {key!r} has norm "
                f"{math.sqrt(theirs[key]):.7g} and not {math.sqrt(mine[key]):.7g}. Seed before the "
                f"model is built, on all ranks alike"
            ]
    return []


def _gradients(name: str, here: Sequence[Step], layout: str, there: Sequence[Step]) -> list[str]:
    mine, theirs = whole_squares(here), whole_squares(there)
    if not mine or not theirs:
        return []
    if lacking := [key for key in mine if key not in theirs and mine[key]]:
        return [f"{layout} has no gradient of {', '.join(map(repr, lacking[:6]))}"]
    ratios = _ratios(mine, theirs)
    if not ratios:
        return []
    middle = sorted(ratios.values())[len(ratios) // 2]
    if all(agree(ratio, middle, 1e-3) for ratio in ratios.values()) and not agree(middle, 1, 1e-2):
        return [
            f"every gradient has {middle:.4g} times the norm that it has in {name}: are gradients "
            f"(or losses) summed over the ranks where they should be averaged, or the reverse?"
        ]
    worst = max(ratios, key=lambda key: abs(math.log(ratios[key])))
    if agree(ratios[worst], 1, 1e-5):
        return []
    return [
        f"the gradient that differs most is {worst!r}: its norm is {ratios[worst]:.7g} times that "
        f"in {name}"
    ]


def _ratios(mine: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    return {
        key: math.sqrt(theirs[key] / value)
        for key, value in mine.items()
        if value > 0 and theirs.get(key, 0.0) > 0
    }
