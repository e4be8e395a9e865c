"""Foreign input: configurations, DeepSpeed JSON, logs, states, command lines.

What is promised of each input: a DistclipError or a result, within a second of CPU time; for the
command line an exit code and a message. No file but the named output is written, nothing is run
that was not asked for, and what was to be changed stays as it was where the input is refused.
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from benchmarks.reliability import hostile
from benchmarks.reliability.fuzz_guards import (
    BrokenPromiseError,
    Folder,
    Fuzzer,
    Outcome,
    TooLongError,
    folder,
    limit,
    printable,
    refused,
)
from benchmarks.reliability.fuzz_states import states
from benchmarks.reliability.hostile import CANARY
from benchmarks.reliability.rows import Row
from distclip import config, policies
from distclip.__main__ import main
from distclip.config.files import read_configuration
from distclip.errors import DistclipError
from distclip.integrations.deepspeed_json import configured, examined
from distclip.monitor import reading, summary, table
from distclip.policies.registry import registered

COUNT = 50_000

ROOT = Path(__file__).resolve().parents[2]


# ---- configurations ----------------------------------------------------------------------------

VALID: list[Any] = [
    *(dict(read_configuration(path)) for path in sorted(ROOT.glob("configs/policies/*.yaml"))),
    {"policy": {"name": "agc", "unit_dims": {"*.experts.*": [0, 1]}}, "imports": [CANARY]},
    {"policy": ["agc", {"name": "value", "clip_value": 1.0}], "on_nonfinite": "skip",
     "by_name": {"*.bias": None, "head.*": {"name": "global_norm", "max_norm": "inf"}},
     "log": {"jsonl": "r.jsonl", "every": 10, "per_parameter": True}, "verify_replicas": 3},
    {"policy": {"name": "of_an_import", "size": 3}, "imports": [CANARY], "norms": False},
    {"gradient_clip_norm": 5.0, "lr": 0.1},
]  # fmt: skip
ENGINE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2},
    "bf16": {"enabled": True}
}  # fmt: skip


def _held_to(source: Any, here: Folder, name: str = "configuration") -> Outcome:
    """Read it without and with its imports."""
    try:
        examined = config.examine(source, name=name)
    except DistclipError as error:
        refused(error)
        examined = None
    if here.runs:
        raise BrokenPromiseError("code was run by an examination")
    try:
        config.load(source, name=name)
    except DistclipError as error:
        if examined is None and here.runs:
            raise BrokenPromiseError("code was run for a file with faults") from None
        return refused(error)
    if examined is None:
        raise BrokenPromiseError("loaded what the examination refused")
    return "accepted"


def text(here: Folder, kind: str) -> Fuzzer:
    names = tuple(registered())
    write = hostile.as_yaml if kind == "yaml" else hostile.as_json
    files = ("in.yaml", "in.yml", "in.conf") if kind == "yaml" else ("in.json", "in.conf")

    def one(rng: Random) -> Outcome:
        how = rng.randrange(8)
        if how < 3:
            content = hostile.mutated(rng, write(rng.choice(VALID)))
        elif how < 5:
            content = write(hostile.bent(rng, rng.choice(VALID), strange=kind == "yaml"))
        elif how < 7:
            content = write(hostile.grown(rng, names))
        else:
            content = hostile.noise(rng)
        return _held_to(here.file(rng, files, content), here)

    return one


def mapping(here: Folder) -> Fuzzer:
    names = tuple(registered())

    def one(rng: Random) -> Outcome:
        tree = hostile.bent(rng, rng.choice((*VALID, hostile.grown(rng, names))), strange=True)
        if rng.random() < 0.1 and isinstance(tree, dict):
            tree[rng.choice(("policy", "by_name", "log"))] = tree  # a circle
        return _held_to(tree, here)

    return one


def deepspeed(here: Folder) -> Fuzzer:
    names = tuple(registered())

    def one(rng: Random) -> Outcome:
        document: dict[str, Any] = {**ENGINE, "distclip": rng.choice(VALID[:-1])}
        if rng.random() < 0.4:
            document["distclip"] = hostile.grown(rng, names)
        if rng.random() < 0.3:
            document["gradient_clipping"] = rng.choice(hostile.VALUES)
        if rng.random() < 0.6:
            document = hostile.bent(rng, document)
        if not isinstance(document, dict):
            return "refused"
        if rng.random() < 0.5:
            content = hostile.as_json(document)
            content = hostile.mutated(rng, content) if rng.random() < 0.5 else content
            path = here.file(rng, ("in.json",), content)
            return _command(["config", "check", str(path)], here, runs_nothing=True)
        try:
            examined(document)
        except DistclipError as error:
            refused(error)
            sound = False
        else:
            sound = True
        if here.runs:
            raise BrokenPromiseError("code was run by an examination")
        try:
            configured(document)
        except DistclipError as error:
            if here.runs and not sound:
                raise BrokenPromiseError("code was run for a file with faults") from None
            return refused(error)
        return "accepted"

    return one


# ---- logs --------------------------------------------------------------------------------------


def _log(rng: Random) -> bytes:
    lines = []
    for step in range(rng.choice((0, 1, 5, 40))):
        record: Any = {
            "step": step, "total_norm": rng.random() * 3, "clipped_norm": 1.0, "coefficient": 0.5,
            "threshold": 1.0, "clipped_fraction": 1.0, "skipped": False, "nonfinite": [],
            "loss": 2.0,
            "parameters": {"w": {"norm": 1.0}},
        }  # fmt: skip
        if rng.random() < 0.3:
            record = hostile.bent(rng, record)
        line = hostile.as_json(record)
        lines.append(hostile.mutated(rng, line) if rng.random() < 0.2 else line)
    content = rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b"")).join(lines)
    return hostile.mutated(rng, content) if rng.random() < 0.4 else content


NAMES = ("in.jsonl", "in\nimports: [distclip_fuzz_canary].jsonl", "in [red]x.jsonl",
"in$\\x$.jsonl",
         "in\x1b[2J.jsonl", "in #.jsonl", "in\u2028imports: [distclip_fuzz_canary]",
         "in\udc80.jsonl",
         "in\u202e.jsonl", "in[bold.jsonl")  # fmt: skip


def logs(here: Folder) -> Fuzzer:
    def one(rng: Random) -> Outcome:
        content = hostile.noise(rng) if rng.random() < 0.1 else _log(rng)
        path = here.file(rng, NAMES, content)
        how = rng.randrange(4)
        if how == 0:
            return _command(["report", str(path)], here, runs_nothing=True)
        if how == 1:
            return _suggested(path, here)
        try:
            run = reading.read_run(path)
            reading.read_loss(path, run.group)
            screen = io.StringIO()
            table.show_runs(summary.summaries([run]), screen, terminal=how == 2)
            printable(_without_styles(screen.getvalue()), "the table")
        except DistclipError as error:
            return refused(error)
        return "accepted"

    return one


def _without_styles(text: str) -> str:
    """Rich's own escapes are no fault of the file's."""
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _suggested(path: Path, here: Folder) -> Outcome:
    screen = io.StringIO()
    outcome = _command(["suggest", str(path)], here, runs_nothing=True, screen=screen)
    if outcome == "accepted":
        written = here.path / "in_suggested.yaml"
        written.write_text(screen.getvalue(), encoding="utf-8")
        loaded = config.load(written)
        if here.runs or not isinstance(loaded.policy, policies.GlobalNorm):
            raise BrokenPromiseError("suggest wrote something else than its policy")
    return outcome


# ---- the command line --------------------------------------------------------------------------

WORDS = ("", "-", "--", "-x", "--no-such", "--help=1", "\x1b[31m", "[red]", "\n", "\udc80", "é",
"9" * 5000, "-1", "0",
         "nan", "inf", "1e999", "x" * 10_000, "nowhere/at/all", "/dev/full/x", "/", ".",
         "@in.yaml", "$HOME", "%s%n",
         "in.yaml", "in.jsonl", "in.pipe")  # fmt: skip
COMMANDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("config", "check"), ()), (("config", "check", "--run-imports"), ()), (("report",),
    ("--loss", "--out", "-o")),
    (("suggest",), ("--percentile", "--from")), (("config",), ()), ((), ()),
    (("run", "nowhere.py"), ()), (("run", "--config"), ()), (("run", "-c", "in.yaml",
    "nowhere.py"), ()),
    (("simulate", "nowhere.py"), ()), (("simulate", "--layout", "none", "in.yaml"), ("--config",
    "--json")),
    (("simulate", "--tolerance", "x"), ("--ranks", "--steps")), (("verify", "--layouts",
    "none"), ("--ranks", "--json")),
    (("verify", "--ranks", "0"), ("--dtypes",)), (("verify", "--model", "x"), ()), (("bench",
    "none"), ("--ranks", "--from")),
    (("bench", "--from", "in.json"), ("--picture",)), (("doctor", "--ranks", "0"), ("--json",)),
    (("none",), ("--config",)),
)  # fmt: skip
"""The commands, so that none of them starts anything long, and options that take a value."""


def _command(
    arguments: list[str], here: Folder, *, runs_nothing: bool, screen: io.StringIO | None = None
) -> Outcome:
    """One command line in this process."""
    out, err = screen or io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", ["distclip", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
    for text in (out.getvalue(), err.getvalue()):
        printable(text, "the output")
        text.encode()  # no lone surrogates
    if here.runs and runs_nothing:
        raise BrokenPromiseError("code was run by a command that promises to run none")
    if code not in (None, 0) and (code not in (1, 2) or not (err.getvalue() or out.getvalue())):
        raise BrokenPromiseError(f"exit code {code!r}, and {err.getvalue()!r}")
    return "refused" if code else "accepted"


def command_line(here: Folder) -> Fuzzer:
    def one(rng: Random) -> Outcome:
        here.file(rng, ("in.yaml",), hostile.mutated(rng, hostile.as_yaml(rng.choice(VALID))))
        here.file(rng, ("in.jsonl",), _log(rng))
        here.file(rng, ("in.json",), hostile.mutated(rng, hostile.as_json({"rounds": 1})))
        os.mkfifo(here.path / "in.pipe")
        command, options = rng.choice(COMMANDS)
        words = list(command)
        for _ in range(rng.randint(0, 3)):
            words += [rng.choice(options)] if options and rng.random() < 0.5 else []
            words.append(rng.choice(WORDS))
        word = hostile.mutated(rng, b"in.yaml") if rng.random() < 0.2 else b""
        words += [os.fsdecode(word.replace(b"\x00", b""))] if word else []
        return _command(
            words, here, runs_nothing="--run-imports" not in words and "run" not in words
        )

    return one


# ---- the campaign ------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[Folder], Fuzzer], str, int]] = {
    "configurations, YAML": (
        lambda here: text(here, "yaml"),
        "valid ones mutated as text and as trees; by a grammar; random bytes",
        24,
    ),
    "configurations, JSON": (lambda here: text(here, "json"), "the same", 16),
    "configurations, mappings": (mapping, "trees with strange keys, values and circles", 16),
    "DeepSpeed JSON": (
        deepspeed,
        "sections and keys mutated; read by the integration and by `config check`",
        12,
    ),
    "logs": (
        logs,
        "torn, mixed and foreign lines, odd file names; `report`, `suggest`, the readers",
        12,
    ),
    "states": (
        states,
        "`load_state_dict` of mutated state dicts, many signed anew; seven policies",
        12,
    ),
    "command lines": (command_line, "every command with odd words, options and files", 8),
}
"""Kind -> its fuzzer, how inputs are made, and its share of all inputs in percent."""


def attempt(kind: str, fuzzer: Fuzzer, here: Folder, seed: int) -> Outcome:
    """Feed one input, made from the seed, and say how it ended: accepted, refused or FAILED."""
    try:
        with limit():
            outcome = fuzzer(Random(f"{kind} {seed}"))
        here.sweep("x", "é")
    except (Exception, TooLongError) as error:  # a DistclipError that no fuzzer expected, too
        with contextlib.suppress(BrokenPromiseError):
            here.sweep()
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "distclip/" in f.filename]
        where = ours[-1] if ours else frames[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return f"FAILED {type(error).__name__} at {place}: {str(error)[:160]!r}"
    return outcome


def run(count: int, seed: int, failures: Callable[[str], None] = print) -> list[Row]:
    """Feed about ``count`` inputs."""
    rows = []
    with folder() as here:
        for kind, (make, how, share) in KINDS.items():
            fuzzer, times = make(here), max(1, count * share // 100)
            outcomes: collections.Counter[str] = collections.Counter()
            for number in range(times):
                outcome = attempt(kind, fuzzer, here, seed * 1_000_003 + number)
                if outcome.startswith("FAILED"):
                    failures(f"{kind}, input {number}: {outcome}")
                outcomes[outcome.partition(" ")[0]] += 1
            told = f"{outcomes['refused']:,} refused, {outcomes['accepted']:,} accepted"
            rows.append(Row(kind, how, times, told, outcomes["FAILED"]))
    return rows
