"""Foreign input: whatever a file, a name or a command line holds, it is refused by name or read."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import fuzz, fuzz_guards
from distclip import config, policies
from distclip.common import foreign
from distclip.errors import ConfigurationError, DistclipError
from distclip.monitor import plots, reading, suggesting, summary, table
from tests.helpers.command import command

FIELDS = {"clipped_norm": 1.0, "coefficient": 1.0, "threshold": 1.0, "clipped_fraction": 0.0}


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """A module `canary` beside everything, and whether it was run."""
    (tmp_path / "canary.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n"
        "from dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from distclip import policies\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda: (tmp_path / "canary.ran").exists()
    sys.modules.pop("canary", None)


@pytest.mark.parametrize("kind", list(fuzz.KINDS))
def test_fuzzed(kind: str) -> None:
    _, _, share = fuzz.KINDS[kind]
    with fuzz_guards.folder() as here:
        fuzzer = fuzz.KINDS[kind][0](here)
        ends = [fuzz.attempt(kind, fuzzer, here, number) for number in range(4 * share)]
    assert [end for end in ends if end.startswith("FAILED")] == []


def test_the_fuzzer_sees_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(sabotage: Callable[[fuzz_guards.Folder], object]) -> str:
        def fuzzer(rng: object) -> str:
            sabotage(here)
            return "accepted"

        return fuzz.attempt("sabotage", fuzzer, here, 0)

    monkeypatch.setattr(fuzz_guards, "LIMIT", 0.05)
    with fuzz_guards.folder() as here:
        assert ends(lambda here: None) == "accepted"
        assert "wrote 'left'" in ends(lambda here: (here.path / "left").touch())
        assert "SIGPROF" in ends(lambda here: [None for _ in iter(int, 1)])
        assert "ZeroDivisionError" in ends(lambda here: 1 / 0)

        def examined_too_much(source: object, name: str) -> object:
            __import__(fuzz_guards.CANARY)
            raise ConfigurationError("no")

        monkeypatch.setattr(config, "examine", examined_too_much)
        assert "code was run" in ends(lambda here: fuzz._held_to({}, here))


READERS: list[Callable[[Any], object]] = [config.load, reading.read_run]


@pytest.mark.parametrize("read", READERS)
def test_paths_that_are_no_files(tmp_path: Path, read: Callable[[Any], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, told in (
        (tmp_path, "it is a folder"),
        (tmp_path / "pipe", "it is a pipe"),
        ("/dev/zero", "it is a device"),
        ("nul\0", "null"),
        ("x" * 5000, "too long"),
        ("nowhere", "(?i)no such"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            read(path)
    for words in (["config", "check"], ["report"], ["suggest"], ["run"], ["bench", "--from"]):
        code, _, err = command(*words, str(tmp_path / "pipe"))
        assert (code, "Traceback" in err) == (2, False)


@pytest.mark.parametrize("source", [3, None, b"p.yaml", ["policy"]])
def test_a_source_that_is_none(source: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected the path of a YAML or JSON file, or a"):
        config.load(source)


def test_a_mapping_in_a_circle_and_one_that_cannot_be_shown() -> None:
    circle: dict[Any, Any] = {"policy": "agc"}
    circle["log"] = circle["by_name"] = circle
    with pytest.raises(ConfigurationError):
        config.load(circle)

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    for value in (Broken(), 10**5000):
        with pytest.raises(ConfigurationError, match=f"<{type(value).__name__}"):
            config.load({"policy": value})
        for given in (value, [value], {"agc": value}, {"max_norm": value}, {"agc": {value: value}}):
            for key in (
                "policy",
                "by_name",
                "by_part",
                "log",
                "ratios",
                "norms",
                "imports",
                "max_norm",
            ):
                with pytest.raises(ConfigurationError):
                    config.load({key: given})
        with pytest.raises(ConfigurationError, match="unknown key"):
            config.load({"policy": "agc", value: 1})
    with pytest.raises(ConfigurationError, match=r"policy\.max_norm: "):
        config.load({"policy": {"name": "global_norm", "max_norm": 10**400}})


@pytest.mark.parametrize(
    "fault",
    [
        {"polcy": 1},
        {"policy": {"name": "agc", "clip_factor": -1}},
        {"policy": ["of_canary", {"name": "agc", "eps": 0}]},
        {"on_nonfinite": "explode"},
        {"log": {"jsonl": 3}},
        {"imports": ["canary", "not a name"]},
        {"imports": ["canary"], "gradient_clip_norm": 1.0},
    ],
)
def test_nothing_is_imported_for_a_file_with_a_fault(
    fault: dict[str, Any], canary: Callable[[], bool]
) -> None:
    from distclip.integrations.deepspeed_json import configured

    document = {"policy": "measure", "imports": ["canary"], **fault}
    for read in (config.load, config.examine, lambda section: configured({"distclip": section})):
        with pytest.raises(ConfigurationError):
            read(document)
    assert not canary()
    assert config.load({"policy": "measure", "imports": ["canary"]}).policy == policies.measure()
    assert canary()


def test_check_runs_nothing_unless_asked(canary: Callable[[], bool]) -> None:
    own = {"policy": {"name": "of_canary", "size": 2.0}, "imports": ["canary"]}
    for name, document in (("p.json", own), ("ds.json", {"train_batch_size": 1, "distclip": own})):
        Path(name).write_text(json.dumps(document))
        code, out, _ = command("config", "check", name)
        assert code == 0
        told = "'of_canary' can be known only to the module canary under imports, which was not run"
        assert told in out
        assert not canary()
    Path("p.json").write_text(json.dumps({**own, "policy": "measure"}))
    code, out, _ = command("config", "check", "p.json")
    assert (code, "imports: canary (not run; see --run-imports)" in out) == (0, True)
    assert not canary()
    code, out, _ = command("config", "check", "--run-imports", "p.json")
    assert (code, canary()) == (0, True)
    Path("p.json").write_text(json.dumps(own))
    code, _, err = command("config", "check", "--run-imports", "p.json")
    assert code == 2
    assert "no policy is called 'of_canary'" in err


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise SystemExit(3)", "canary could not be imported: SystemExit: 3"),
        ("class Odd(BaseException): pass\nraise Odd('a\\nb')", r"Odd: a\nb"),
        ("raise ValueError('\\x1b[31m')", r"ValueError: \x1b[31m"),
        ("import", "SyntaxError: invalid syntax"),
        ("class E(Exception):\n  def __str__(self): 1 / 0\nraise E", "(its message cannot be"),
    ],
)  # fmt: skip
def test_whatever_an_imported_module_raises(
    canary: Callable[[], bool], code: str, told: str
) -> None:
    Path("canary.py").write_text(code)
    with pytest.raises(ConfigurationError) as caught:
        config.load({"policy": "measure", "imports": ["canary"]})
    assert "imports[0]: canary" in str(caught.value)
    assert told in str(caught.value)


NAMES = [
    "a\nimports: [canary]\nb.jsonl",
    "a\rimports: [canary]",
    "a\u2028imports: [canary]\u2028",
    "a\x85imports: [canary]",
    "\x1b[2J[red]a[bold.jsonl",
    "a\udcff.jsonl",
    "$\\frac$.jsonl",
    "a\u202e.jsonl",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_and_does_nothing(name: str, canary: Callable[[], bool]) -> None:
    lines = [json.dumps({"step": n, "total_norm": 1.0 + n, **FIELDS}) for n in range(120)]
    Path(name).write_text("\n".join(lines))
    outputs = [command("report", name), command("suggest", name), command("config", "check", name)]
    outputs.append(command("report", name, "--out", "x.none"))
    for _, out, err in outputs:
        assert all(c.isprintable() or c == "\n" for c in out + err), ascii(out + err)
    assert outputs[1][0] == 0
    written = Path("policy.yaml")
    written.write_text(outputs[1][1], encoding="utf-8")
    assert isinstance(config.load(written).policy, policies.GlobalNorm)
    assert not canary()
    run = reading.read_run(name)
    with open(os.devnull, "w") as nowhere:
        table.show_runs(summary.summaries([run]), nowhere, terminal=True)
    pytest.importorskip("matplotlib")
    plots.draw([run]).canvas.draw()


def test_clean() -> None:
    assert foreign.in_one_line("é 1") == "é 1"
    assert foreign.in_one_line("\x1b\n\u2028\udc80\x85") == r"\x1b\n\u2028\udc80\x85"
    assert foreign.in_one_line("x" * 100, 10) == "xxxxx...xxxxx"
    assert foreign.clean_lines("a\n\tb") == "a\n" + r"\tb"


@pytest.mark.parametrize(
    "words",
    [
        ["--\x1b[31m"], ["\x1b[31m"], ["config", "check", "a", "\udc80"], ["report", "\x1b"],
        ["suggest", "x", "--from", "\x1b"], ["run", "-c", "\x1b", "\x1b"], ["simulate", "\x1b"],
        ["verify", "--layouts", "\x1b"], ["verify", "--ranks", "9" * 5000],
        ["verify", "--ranks", ""], ["bench", "\x1b"], ["bench", "--from", "nowhere"],
        ["doctor", "--ranks", "x\x1b"], ["verify", "--model", ":", "--batch", ":"],
    ],
    ids=range(14),
)  # fmt: skip
def test_odd_command_lines(words: list[str]) -> None:
    code, out, err = command(*words)
    assert code == 2
    assert err
    assert all(c.isprintable() or c == "\n" for c in out + err), ascii(out + err)


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "r.jsonl").write_text(json.dumps({"step": 1, "total_norm": 1.0, **FIELDS}))
    code, _, err = command("report", str(tmp_path / "r.jsonl"), "--out", "/dev/full/x.png")
    assert code == 2
    assert "the picture cannot be written" in err


def test_of_a_log_what_can_be_read_is_read(tmp_path: Path) -> None:
    good = json.dumps({"step": 1, "total_norm": 2.0, **FIELDS})
    foreign = [
        b'{"step": 2, "tot', b"\xff\xfe\x00", b"[" * 5000, b'{"step": ' + b"9" * 5000 + b"}", b"3",
        b"null", b'{"step": 1e400, "total_norm": 1}', b'{"step": true, "total_norm": 1}',
        b'{"step": [], "total_norm": 1}',
        b'{"step": 1' + b"0" * 400 + b', "total_norm": 1}', b"", b"\x00", "é".encode("utf-16"),
    ]  # fmt: skip
    odd = b'{"step": 3, "total_norm": -1.0, "clipped_norm": "x", "threshold": {}, "loss": 1e999}'
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\n".join([*foreign[:6], good.encode(), *foreign[6:], odd, b'{"cut']))
    run = reading.read_run(path)
    assert list(run.steps) == [1.0, 3.0]
    assert list(run.total_norm)[:1] == [2.0]
    summary.summaries([run])[0].advice()
    assert suggesting.Suggestion.of_norms([run]).threshold == 2.0


def test_a_line_without_an_end_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "LINE", 100)
    path = tmp_path / "r"
    path.write_bytes(b"a\n" + b"x" * 1000 + b"\nb\n" + b"y" * 99 + b"\nc")
    assert list(foreign.read_lines(path)) == [b"a\n", b"b\n", b"y" * 99 + b"\n", b"c"]


def test_a_refused_deepspeed_json_is_a_distclip_error(tmp_path: Path) -> None:
    from distclip.integrations.deepspeed_json import configured

    deep: Any = {}
    for _ in range(3000):
        deep = {"x": deep}
    for document in (
        {"distclip": deep}, {"gradient_clipping": 10**400}, {"gradient_clipping": float("nan")},
        {"distclip": {"policy": "auto"}}, {"gradient_clipping": "\x1b"}, {"x\x1b": {"distclip": 1}},
    ):  # fmt: skip
        with pytest.raises(DistclipError) as caught:
            configured(document)
        assert "\x1b" not in str(caught.value)
