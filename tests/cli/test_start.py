"""What the command line imports: help, configurations and recorded runs are shown without torch."""

import json
from pathlib import Path

from distclip.cli.app import app
from tests.helpers.processes import ROOT, python, well

HEAVY = ["torch", "transformers", "accelerate", "deepspeed", "matplotlib"]

COMMANDS = [
    ["--help"],
    ["--version"],
    *([command.name, "--help"] for command in app.registered_commands),
    *([group.name, "--help"] for group in app.registered_groups),
    ["config", "schema"],
    ["config", "check", "configs/policies/by_name.yaml"],
    ["config", "check", "configs/policies/zclip.yaml"],
    ["config", "check", "configs/deepspeed/zero2.json"],
    ["config", "check", "OWN"],
    ["report", "RUN"],
    ["suggest", "RUN"],
]

PROGRAM = """
import json, sys
import distclip.cli.app as application

found = []
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    code = 0
    try:
        application.main()
    except SystemExit as error:
        code = error.code
    found.append([code, [name for name in {heavy} if name in sys.modules]])
print(json.dumps(found))
"""


def heavy_modules(commands: list[list[str]]) -> list[tuple[int, list[str]]]:
    """Exit code of each command, and which heavy modules one process has imported by then."""
    program = PROGRAM.replace("{heavy}", repr(HEAVY))
    told = well(python("-c", program, json.dumps(commands), folder=ROOT))
    return [(code or 0, heavy) for code, heavy in json.loads(told.splitlines()[-1])]


def test_no_help_text_and_no_check_of_a_configuration_imports_torch(tmp_path: Path) -> None:
    own, run = tmp_path / "own.yaml", tmp_path / "run.jsonl"
    own.write_text("imports: [torch]\npolicy: my_own\n")
    run.write_text(
        "".join(json.dumps({"step": n, "total_norm": 1.0 + n, "coefficient": 1.0}) + "\n"
                for n in range(3))
    )  # fmt: skip
    files = {"OWN": str(own), "RUN": str(run)}
    commands = [[files.get(word, word) for word in command] for command in COMMANDS]
    for command, (code, heavy) in zip(commands, heavy_modules(commands), strict=True):
        assert (code, heavy) == (0, []), command


def test_a_command_that_imports_torch_is_seen(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("imports: [torch]\npolicy: measure\n")
    ((code, heavy),) = heavy_modules([["config", "check", "--run-imports", str(own)]])
    assert (code, heavy) == (0, ["torch"])
