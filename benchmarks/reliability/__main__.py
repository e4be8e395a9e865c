"""Run a reliability campaign, or write the recorded ones into docs/reliability.md.

python -m benchmarks.reliability CAMPAIGN [--count N] [--seed N]
python -m benchmarks.reliability render
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
from pathlib import Path

from benchmarks.reliability.rows import load_all, record, save, table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"

CAMPAIGNS = ("properties", "fuzz", "checkpoints", "ranks")
"""Modules of this package with ``run(count, seed) -> list[Row]`` and their full ``COUNT``."""


def render(text: str) -> str:
    """The page with every recorded campaign's table between its markers."""
    for campaign, document in load_all().items():
        begin, end = f"<!-- {campaign}: begin -->", f"<!-- {campaign}: end -->"
        block = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        shown = f"{begin}\n{table(document)}\n{end}"
        text = block.sub(lambda _, shown=shown: shown, text)
    return text


def main() -> int:
    """Returns 1 where anything did not end as promised."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("what", choices=[*CAMPAIGNS, "render"])
    parser.add_argument("--count", type=int, help="cases; the full number by default")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.what == "render":
        PAGE.write_text(render(PAGE.read_text()))
        return 0
    module = importlib.import_module(f"benchmarks.reliability.{arguments.what}")
    count = module.COUNT if arguments.count is None else arguments.count
    start = time.monotonic()
    rows = module.run(count, arguments.seed)
    seconds = time.monotonic() - start
    document = record(arguments.what, rows, seed=arguments.seed, seconds=seconds)
    print(table(document))
    if count >= module.COUNT:
        print(f"saved as {save(document)}")
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
