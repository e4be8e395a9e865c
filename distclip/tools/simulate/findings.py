"""What is wrong within one launch: ranks that do not do the same, with the first step of it."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from distclip.engine import replicas
from distclip.layouts.differences import quoted_names
from distclip.layouts.piece import Box as PlanBox
from distclip.testing.ranks.stuck import names
from distclip.tools.simulate import stuck
from distclip.tools.simulate.records import Rank, ShardBox, Step, Sums
from distclip.tools.simulate.watch import Ending

NAMED_IN_FULL = 6
"""Names, or samples, that are told in full."""

_listed = functools.partial(quoted_names, most=NAMED_IN_FULL)


@dataclass
class Finding:
    """Something that is wrong.

    Attributes:
        kind: a word for programs.
        text: what, on which ranks, and the mend.
        step: the first step at which it shows; None: it is of the whole launch.
        ranks: those concerned.
        detail: tracebacks, stacks.
        fault: False: worth knowing, and no reason to fail.
    """

    kind: str
    text: str
    step: int | None = None
    ranks: tuple[int, ...] = ()
    detail: str = ""
    fault: bool = True


def find(ending: Ending, *, branches: bool = True) -> list[Finding]:
    """Everything that is wrong in a launch, a crash or a hang first, then by step."""
    ranks = ending.ranks
    looks: list[Callable[[Sequence[Rank]], Finding | None]] = [
        _alone, _modules, _operations, _missing_gradients, _drifted, _data, _steps, _unseen,
    ]  # fmt: skip
    found = [finding for look in looks if (finding := look(ranks)) is not None]
    for finding in found:
        if finding.kind in ("modules", "operations") and not branches:
            finding.fault = False
    found.sort(key=lambda f: math.inf if f.step is None else f.step)
    if ending.how != "ended":
        ended = {"failed": _failed, "hung": _hung, "not started": _not_started}[ending.how](ending)
        found = [ended, *(f for f in found if f.kind not in ("steps", "no steps"))]
    return found


# ---- how it ended --------------------------------------------------------------------------


def _failed(ending: Ending) -> Finding:
    ranks = ending.ranks
    raised = [rank for rank in ranks if rank.error]
    first = min(raised, key=lambda r: r.failed_at, default=None)
    left = [r for r in ranks if r.code == 0 and (first is None or r.ended_at < first.failed_at)]
    rest = [rank for rank in ranks if rank is not first and rank.number not in ending.died]
    detail = stuck.story(rest, ending.stacks) if rest else []
    if ending.died:
        who = ending.died
        died = [f"---- rank {rank} ----\n{_last(ending, rank)}" for rank in who]
        text = f"{names(who)} died without a Python exception (killed, out of memory, or a crash)"
        return Finding("died", text, ranks[who[0]].done, tuple(who), "\n".join(died + detail))
    if left and first is not None and len(left) < len(ranks):
        who = [rank.number for rank in left]
        text = (
            f"{names(who)} ended after {left[0].done} steps while the others went on: they failed "
            f"in step {first.done}, waiting for it ({first.error}). Give every rank the same "
            f"number of batches (a sampler that drops or pads the last ones, or Join)"
        )
        return Finding("stopped early", text, left[0].done, tuple(who), first.trace)
    if first is None:
        bad = [rank for rank in ranks if rank.code]
        if not bad:
            return Finding("launcher failed", "the launcher failed", None, (), ending.log[-3000:])
        who = [rank.number for rank in bad]
        text = f"{names(who)} ended with exit code {bad[0].code}"
        return Finding("exit", text, bad[0].done, tuple(who), _tail(bad[0].output))
    alike = [rank.number for rank in raised if rank.error == first.error]
    text = f"{names(alike)} raised {first.error}"
    parts = [f"---- rank {first.number} ----\n{first.trace.rstrip()}", *detail]
    return Finding("raised", text, first.done, tuple(alike), "\n".join(parts))


def _hung(ending: Ending) -> Finding:
    ranks = ending.ranks
    who, why = stuck.blamed(ranks, ending.stacks)
    story = stuck.story(ranks, ending.stacks)
    text = f"hung; {names(who)} {why}" if who else f"hung; {why}"
    stacks = [
        f"---- rank {rank} ----\n{stuck.without_machinery(stack)}"
        for rank, stack in ending.stacks.items()
    ]
    step = min(rank.done for rank in ranks)
    return Finding("hung", "\n".join([text, *story]), step, tuple(who), "\n".join(stacks))


def _not_started(ending: Ending) -> Finding:
    lacking = [rank.number for rank in ending.ranks if rank.pid is None]
    text = f"{names(lacking)} of {len(ending.ranks)} did not start"
    return Finding("not started", text, None, tuple(lacking), ending.log[-3000:])


def _last(ending: Ending, rank: int) -> str:
    stacks = stuck.without_machinery(ending.stacks.get(rank, ""))
    return (stacks + _tail(ending.ranks[rank].output)).rstrip()


def _tail(output: str) -> str:
    return "\n".join(output.splitlines()[-30:])


# ---- rank against rank -----------------------------------------------------------------------


def _together(ranks: Sequence[Rank], *, begun: bool = True) -> list[list[Step]]:
    """The steps that all ranks have, each as a list by rank."""
    kept = [[s for s in r.steps if s.begun or not begun] for r in ranks]
    return [list(steps) for steps in zip(*kept, strict=False)]


def _odd(values: Sequence[object]) -> tuple[list[int], int]:
    """Ranks whose value is not the usual one (of the lowest rank in a tie), and one that has it."""
    votes = Counter(map(repr, values))
    usual = next(v for v in map(repr, values) if votes[v] == max(votes.values()))
    odd = [rank for rank, value in enumerate(values) if repr(value) != usual]
    return odd, next(rank for rank, value in enumerate(values) if repr(value) == usual)


def _alone(ranks: Sequence[Rank]) -> Finding | None:
    for number, steps in enumerate(_together(ranks)):
        who = [rank for rank, step in enumerate(steps) if step.world != len(ranks)]
        if who:
            text = (
                f"{names(who)} took step {number} in a process group of {steps[who[0]].world}, "
                f"though {len(ranks)} ranks were launched: each trains alone. The script must call "
                f"torch.distributed.init_process_group, or leave it to Accelerate (layouts ddp, "
                f"fsdp1, fsdp2)"
            )
            return Finding("alone", text, number, tuple(who))
    return None


def _modules(ranks: Sequence[Rank]) -> Finding | None:
    for number, steps in enumerate(_together(ranks, begun=False)):
        if not all(step.losses or step.begun for step in steps):
            continue  # of a rank that hangs or failed
        odd, like = _odd([step.modules for step in steps])
        if odd:
            mine, theirs = Counter(steps[odd[0]].modules), Counter(steps[like].modules)
            parts = []
            if extra := list((mine - theirs).keys()):
                parts.append(f"ran {_listed(extra)}, which rank {like} did not")
            if lacking := list((theirs - mine).keys()):
                parts.append(f"did not run {_listed(lacking)}, which rank {like} did")
            what = " and ".join(parts) or "ran the same modules in another order"
            text = f"at step {number} {names(odd)} {what}: a branch that depends on the rank"
            return Finding("modules", text, number, tuple(odd))
    return None


def _operations(ranks: Sequence[Rank]) -> Finding | None:
    for number, steps in enumerate(_together(ranks, begun=False)):
        if not all(step.losses for step in steps):
            continue
        odd, like = _odd([sorted(step.operations.items()) for step in steps])
        if odd:
            mine, theirs = Counter(steps[odd[0]].operations), Counter(steps[like].operations)
            parts = [f"{count} more of {name}" for name, count in (mine - theirs).items()]
            parts += [f"{count} fewer of {name}" for name, count in (theirs - mine).items()]
            text = (
                f"at step {number} the loss of {names(odd)} was computed by other operations than "
                f"that of rank {like}: {', '.join(parts[:NAMED_IN_FULL])}. A branch that depends "
                f"on the rank?"
            )
            return Finding("operations", text, number, tuple(odd))
    return None


def _missing_gradients(ranks: Sequence[Rank]) -> Finding | None:
    for number, steps in enumerate(_together(ranks)):
        present: dict[str, dict[int, bool]] = {}
        for rank, step in enumerate(steps):
            for box, sums in step.pieces.items():
                if math.prod(box.extents):
                    there = present.setdefault(box.name, {})
                    there[rank] = there.get(rank, False) or sums.gradient is not None
        for name, there in present.items():
            lacking = [rank for rank, has in there.items() if not has]
            if 0 < len(lacking) < len(there):
                text = (
                    f"at step {number} {names(lacking)} has no gradient of {name!r}, which the "
                    f"others have: a branch that depends on the rank, or gradients that are not "
                    f"synchronised"
                )
                return Finding("missing gradient", text, number, tuple(lacking))
    return None


def _drifted(ranks: Sequence[Rank]) -> Finding | None:
    """Copies of one tensor that differ, in the words of the replica check."""
    for number, steps in enumerate(_together(ranks)):
        apart = _apart(steps)
        if apart:
            told = {rank: _copies(step, apart) for rank, step in enumerate(steps)}
            error = replicas.drift_error(apart, told)
            lines = str(error).splitlines()
            lines = [line for line in lines if "verify_replicas" not in line]
            head = f"at step {number} copies of the same tensor differ between ranks:"
            return Finding("drift", "\n".join([head, *lines[1:]]), number, error.ranks)
    return None


def _apart(steps: Sequence[Step]) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], None] = {}
    for box in dict.fromkeys(box for step in steps for box in step.pieces):
        held = [step.pieces[box] for step in steps if box in step.pieces]
        if math.prod(box.extents):
            for kind, values in _kinds(held).items():
                if len(set(values)) > 1:
                    found[box.name, kind] = None
    return list(found)


def _kinds(held: Sequence[Sums]) -> dict[str, list[int | None]]:
    gradient, weights = replicas.REPLICATED
    return {gradient: [s.gradient for s in held], weights: [s.weights for s in held]}


def _copies(
    step: Step, apart: Sequence[tuple[str, str]]
) -> list[tuple[str, str, PlanBox, int, float | None]]:
    gradient, weights = replicas.REPLICATED
    told: list[tuple[str, str, PlanBox, int, float | None]] = []
    for box, sums in step.pieces.items():
        where = PlanBox(box.offsets, box.extents)
        if (box.name, gradient) in apart:
            norm = None if sums.squares is None else math.sqrt(sums.squares)
            told.append((box.name, gradient, where, sums.gradient or 0, norm))
        if (box.name, weights) in apart:
            told.append((box.name, weights, where, sums.weights, math.sqrt(sums.weight_squares)))
    return told


def _data(ranks: Sequence[Rank]) -> Finding | None:
    """Samples that two ranks saw within one pass over the data."""
    together = _together(ranks)
    if len(ranks) < 2 or not together:
        return None
    if all(s.samples and len({tuple(x.samples) for x in t}) == 1 for t in together for s in t):
        text = (
            "all ranks saw the same samples at every step: the data are not divided between them, "
            "and more ranks only do the same work again"
        )
        return Finding("same data", text, 0, tuple(range(len(ranks))), fault=False)
    shared = _shared_samples(ranks, together)
    if not shared:
        return None
    number, one, before, other = shared[0]
    # One that orders its data alone has samples in common with several others.
    votes = Counter(rank for _, a, _, b in shared for rank in (a, b))
    most = max(votes.values())
    who = sorted(rank for rank, count in votes.items() if count == most)
    text = (
        f"at step {number} rank {one} saw a sample that rank {other} saw at step {before}, within "
        f"one pass over the data: {names(who)} {'orders' if len(who) == 1 else 'order'} (or "
        f"{'divides' if len(who) == 1 else 'divide'}) the data otherwise than the rest. Seed the "
        f"shuffling of all ranks alike, before each takes its part (DistributedSampler, and "
        f"Accelerate's prepare, do so)"
    )
    return Finding("data order", text, number, tuple(who))


def _shared_samples(
    ranks: Sequence[Rank], together: Sequence[Sequence[Step]]
) -> list[tuple[int, int, int, int]]:
    """Step and rank, and the step and rank before, of samples that two ranks saw in one pass."""
    seen: dict[tuple[int, str], tuple[int, int]] = {}  # pass and sample -> step, rank
    repeated = _repeated(ranks)
    shared = []
    for number, steps in enumerate(together):
        for rank, step in enumerate(steps):
            if _is_last_of_epoch(ranks[rank], number):
                continue  # samplers pad it
            for sample in step.samples:
                key = (step.epoch if step.epoch else -1 - number, sample)
                before, owner = seen.setdefault(key, (number, rank))
                if owner != rank and sample not in repeated:
                    shared.append((number, rank, before, owner))
    return shared


def _is_last_of_epoch(rank: Rank, number: int) -> bool:
    steps = rank.completed
    epoch = steps[number].epoch
    return epoch > 0 and (number + 1 >= len(steps) or steps[number + 1].epoch != epoch)


def _repeated(ranks: Sequence[Rank]) -> set[str]:
    """Samples that one rank saw twice in a pass, or in one step: the data themselves have them."""
    found: set[str] = set()
    for rank in ranks:
        seen: set[tuple[int, str]] = set()
        for number, step in enumerate(rank.completed):
            for sample in step.samples:
                key = (step.epoch if step.epoch else -1 - number, sample)
                found.update([sample] if key in seen else [])
                seen.add(key)
    return found


def _steps(ranks: Sequence[Rank]) -> Finding | None:
    counts = [rank.done for rank in ranks]
    if len(set(counts)) <= 1:
        if counts and counts[0]:
            return None
        text = (
            "no optimizer step was seen: the script trains nothing, or not with a torch optimizer"
        )
        return Finding("no steps", text, 0, tuple(range(len(ranks))))
    odd, like = _odd(counts)
    text = f"{names(odd)} took {counts[odd[0]]} steps, rank {like} {counts[like]}"
    return Finding("steps", text, min(counts), tuple(odd))


def _unseen(ranks: Sequence[Rank]) -> Finding | None:
    for rank in ranks:
        for number, step in enumerate(rank.steps):
            if step.unseen:
                text = (
                    f"gradients that cannot be read were left out of the comparison and the norm: "
                    f"{'; '.join(step.unseen[:NAMED_IN_FULL])}"
                )
                return Finding("unseen", text, number, (rank.number,), fault=False)
    return None


def whole_squares(
    steps: Sequence[Step], field: Literal["squares", "weight_squares"] = "squares"
) -> Mapping[str, float]:
    """Name -> sum of squares of its whole gradient, or of its weights.

    Each piece counts once, whoever holds copies.
    """
    whole: dict[ShardBox, float] = {}
    for step in steps:
        for box, sums in step.pieces.items():
            if (found := getattr(sums, field)) is not None:
                whole.setdefault(box, found)
    result: dict[str, float] = {}
    for box, found in whole.items():
        result[box.name] = result.get(box.name, 0.0) + found
    return result
