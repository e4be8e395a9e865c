"""Behind ``distclip verify``: what was asked for, and its run on gloo ranks of this machine."""

from __future__ import annotations

import fnmatch
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from distclip.errors import ConfigurationError
from distclip.testing import RankError, run_on_ranks
from distclip.testing.cases import DTYPES, MATRIX_LAYOUTS, POLICIES
from distclip.tools.verify import cells, model
from distclip.tools.verify.cells import Cell, Found
from distclip.tools.verify.reports import Matrix

RANKS = (2, 3, 4)

QUICK = ("global", "value", "block rms", "agc", "dreamer", "chain agc, global", "by name")
"""Policies of a quick run: one of each kind."""

LAYOUT_LIMIT = 120.0
"""Seconds until one layout with one dtype counts as hung; a single policy gets a quarter."""

Runner = Callable[[Sequence[str]], list[Found]]


@dataclass(frozen=True)
class Selection:
    """The part of the matrix that was asked for.

    Attributes:
        layouts: of the built-in model, or of the user's.
        policies: keys of ``POLICIES``.
        dtypes: some of ``DTYPES``.
        ranks: numbers of gloo ranks.
        model: ``module:function`` of the user's model; None for the built-in one.
        batch: ``module:function`` of a batch for it.
        left_out: what else there is, a line each.
    """

    layouts: Sequence[str]
    policies: Sequence[str]
    dtypes: Sequence[str]
    ranks: Sequence[int]
    model: str | None = None
    batch: str | None = None
    left_out: list[str] = field(default_factory=list)

    @property
    def groups(self) -> Iterator[tuple[int, str, str]]:
        """Ranks, layout and dtype of what runs in one call on the ranks."""
        for world in self.ranks:
            for layout in self.layouts:
                for dtype in self.dtypes:
                    yield world, layout, dtype

    def runner(self, layout: str, dtype: str) -> Runner:
        """The function that runs policies on every rank."""
        if self.model is None or self.batch is None:
            seed = DTYPES.index(dtype)
            return functools.partial(cells.run_group, layout, dtype, seed=seed)
        return functools.partial(
            model.run_group_on_model, layout, dtype, model=self.model, batch=self.batch
        )


def select(
    *,
    layouts: str | None = None,
    policies: str | None = None,
    dtypes: str | None = None,
    ranks: str | None = None,
    quick: bool = False,
    user_model: str | None = None,
    batch: str | None = None,
) -> Selection:
    """What the options of the command line ask for; lists are comma-separated.

    Raises:
        ConfigurationError: a name that there is not; a model without a batch.
    """
    if (user_model is None) != (batch is None):
        raise ConfigurationError("verify: --model and --batch go together")
    built_in = user_model is None
    known = MATRIX_LAYOUTS if built_in else model.WRAPPINGS
    kinds = DTYPES if built_in else DTYPES[:2] if dtypes is None else DTYPES[:3]
    some = QUICK if quick or not built_in else None
    chosen = {
        "layouts": _chosen("--layouts", layouts, list(known)),
        "policies": _chosen("--policies", policies, list(POLICIES), some),
        "dtypes": _chosen("--dtypes", dtypes, list(kinds), kinds[:2] if quick else None),
    }
    counts = _ranks(ranks, (2,) if quick else RANKS if built_in else (2, 4))
    everything = {"layouts": known, "policies": POLICIES, "dtypes": kinds}
    left_out = [
        f"{what} not asked for: {', '.join(rest)}"
        for what, names in chosen.items()
        if (rest := [name for name in everything[what] if name not in names])
    ]
    if user_model is not None and batch is not None:
        sys.path[:0] = [] if "" in sys.path or os.getcwd() in sys.path else [os.getcwd()]
        model.load_target(user_model, "--model")
        model.load_target(batch, "--batch")
    return Selection(**chosen, ranks=counts, model=user_model, batch=batch, left_out=left_out)


def run_matrix(selection: Selection, tell: Callable[[str, int], None]) -> Matrix:
    """Run everything that was selected.

    Args:
        selection: what to run.
        tell: called before each group of cells, with its description, and after it; gets how many
            cells have been run since.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    title = "The built-in model" if selection.model is None else selection.model
    matrix = Matrix(title, left_out=selection.left_out)
    start = time.perf_counter()
    labels = selection.policies
    for world, layout, dtype in selection.groups:
        description = f"{layout}, {dtype}, {world} ranks"
        tell(description, 0)
        call = selection.runner(layout, dtype)
        for label, found in zip(labels, _group(call, world, labels), strict=True):
            matrix.results[Cell(layout, label, dtype, world)] = found
        tell(description, len(labels))
    matrix.seconds = time.perf_counter() - start
    return matrix


def _group(call: Runner, world: int, labels: Sequence[str]) -> list[Found]:
    """The cells of one layout and dtype; one by one where a rank fell out of step."""
    try:
        return cells.merged_results(run_on_ranks(call, world, labels, timeout=LAYOUT_LIMIT))
    except RankError as error:
        if len(labels) == 1:
            return [Found("failed", str(error))]
    results = []
    for label in labels:
        try:
            found = run_on_ranks(call, world, [label], timeout=LAYOUT_LIMIT / 4)
            results += cells.merged_results(found)
        except RankError as error:
            results.append(Found("failed", str(error)))
    return results


def _chosen(
    option: str, text: str | None, known: list[str], default: Sequence[str] | None = None
) -> list[str]:
    if text is None:
        return list(default or known)
    # Some names of policies have a comma in them.
    asked, rest = [], text.strip()
    while rest:
        fits = [name for name in known if rest == name or rest.startswith(f"{name},")]
        whole = max(fits, key=len, default="")
        part = whole or rest.split(",")[0]
        asked.append(part.strip())
        rest = rest[len(part) :].lstrip(", ")
    found: list[str] = []
    for part in asked:
        matches = [name for name in known if fnmatch.fnmatchcase(name, part)]
        if not matches:
            raise ConfigurationError(f"verify: {option} {part!r}; there are {', '.join(known)}")
        found += [name for name in matches if name not in found]
    return found


def _ranks(text: str | None, default: tuple[int, ...]) -> list[int]:
    if text is None:
        return list(default)
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1 or max(counts) > 64:
        raise ConfigurationError(f"verify: --ranks {text!r}; give numbers from 1 to 64, as 2,3,4")
    return list(dict.fromkeys(counts))
