"""``distclip run``: the script sees what it would see under ``python``."""

import functools
import json
import os
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.testing

from distclip import clipper
from distclip.cli import app as application
from distclip.cli import run as command
from distclip.errors import ConfigurationError
from distclip.integrations import hooks
from distclip.tools.check import StepCheck
from distclip.tools.launch import running
from distclip.tools.launch.script import Script
from tests.helpers.processes import ROOT, python

SHOW = """
import json, sys, os
print(json.dumps({
    "argv": sys.argv, "path0": sys.path[0], "file": __file__, "name": __name__,
    "main": sys.modules["__main__"].__dict__ is globals(), "flags": sys._getframe().f_code.co_flags,
    "config": os.environ.get("DISTCLIP_CONFIG"),
    "loaded": sorted({"accelerate", "deepspeed", "transformers", "lightning"} & set(sys.modules)),
}))
"""

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(name="python")
def python_there(tmp_path: Path) -> Python:
    (tmp_path / "policy.yaml").write_text("policy: measure\n")
    return functools.partial(python, folder=tmp_path)


DISTCLIP = ("-m", "distclip", "run", "--config", "policy.yaml")


def test_a_script_sees_what_it_sees_under_python(python: Python, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "show.py").write_text(SHOW)
    arguments = ("folder/show.py", "--config", "x.yaml", "-m", "--", "--cpu", "--help")
    plain = python(*arguments)
    ours = python(*DISTCLIP, *arguments)
    assert ours.returncode == 0, ours.stderr
    seen, expected = json.loads(ours.stdout), json.loads(plain.stdout)
    assert seen.pop("config") == str(tmp_path / "policy.yaml")
    assert expected.pop("config") is None
    assert seen == expected
    # It trained nothing, which a user must be told.
    assert "warning: run clipped nothing" in ours.stderr
    assert "attach(optimizer)" in ours.stderr


def test_a_module_sees_what_it_sees_under_python(python: Python, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "show.py").write_text(SHOW + "\nsys.exit(3)")
    arguments = ("-m", "package.show", "-m", "--lr=1")
    plain = python(*arguments, DISTCLIP_CONFIG=str(tmp_path / "policy.yaml"))
    # The configuration comes from the environment, and a launcher's rank is handed on.
    ours = python("-m", "distclip", "run", *arguments, DISTCLIP_CONFIG="policy.yaml")
    assert (ours.returncode, plain.returncode) == (3, 3), ours.stderr
    seen, expected = json.loads(ours.stdout), json.loads(plain.stdout)
    del seen["main"], expected["main"]  # runpy's module, whose globals are handed to the code
    assert seen == expected
    assert "warning" not in ours.stderr


def test_an_exception_shows_the_script_only(python: Python, tmp_path: Path) -> None:
    (tmp_path / "boom.py").write_text("def f():\n    raise ValueError('mine')\nf()\n")
    plain, ours = python("boom.py"), python(*DISTCLIP, "boom.py")
    assert (ours.returncode, ours.stderr) == (1, plain.stderr)


def test_a_faulty_configuration_is_told_before_the_script_starts(
    python: Python, tmp_path: Path
) -> None:
    (tmp_path / "show.py").write_text("print('started')")
    (tmp_path / "policy.yaml").write_text("policy: {name: agc, clip_factr: 1}")
    ours = python(*DISTCLIP, "show.py", RANK="3")
    assert (ours.returncode, ours.stdout) == (2, "")
    assert ours.stderr == (
        "distclip [rank 3]: policy.yaml: policy.clip_factr: unknown key (value 1), "
        "did you mean 'clip_factor'? agc takes clip_factor, eps, unit, unit_dims, norm_type\n"
    )


def test_an_integration_is_enabled_when_the_script_imports_its_framework(
    python: Python, tmp_path: Path
) -> None:
    fake = tmp_path / "fake" / "accelerate"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("")
    (fake / "accelerator.py").write_text(
        "class Accelerator:\n    def prepare(self): pass\n"
        "    prepare_model = prepare_optimizer = prepare\n"
    )
    (tmp_path / "train.py").write_text(
        textwrap.dedent(
            """
            import sys, types
            from distclip.integrations import hooks
            stand_in = types.ModuleType("distclip.integrations.accelerate")
            def enable(module, config):
                print(module.Accelerator.__name__, config.policy.name)
                hooks.mark_active("accelerate")
            stand_in.enable = enable
            sys.modules[stand_in.__name__] = stand_in
            import accelerate.accelerator
            """
        )
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path / "fake")])
    ours = python(*DISTCLIP, "train.py", PYTHONPATH=path)
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, "Accelerator measure\n", "")


# ---- in this process -------------------------------------------------------------------------

invoke = typer.testing.CliRunner().invoke


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a policy; nothing that ``run`` does to this process stays."""
    (tmp_path / "policy.yaml").write_text("policy: measure\n")
    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTCLIP_CONFIG", "")  # which takes back what `run` sets, too
    monkeypatch.setattr(hooks, "on_import", lambda module, callback: None)
    monkeypatch.setattr(running, "prepare_cpu", lambda cpu: None)
    monkeypatch.setattr(command, "pending", [])
    return tmp_path


@pytest.mark.usefixtures("quiet")
def test_without_a_configuration() -> None:
    result = invoke(application.app, ["run", "train.py"])
    assert isinstance(result.exception, ConfigurationError)
    assert "--config" in str(result.exception)
    assert "DISTCLIP_CONFIG" in str(result.exception)


@pytest.mark.usefixtures("quiet")
def test_a_script_that_is_not_there() -> None:
    result = invoke(application.app, ["run", "-c", "policy.yaml", "trian"])
    assert "no script 'trian' in " in str(result.exception)
    assert "for a module use -m" in str(result.exception)
    assert command.pending == []


@pytest.mark.usefixtures("quiet")
def test_an_option_that_is_not_ours_before_the_script() -> None:
    assert invoke(application.app, ["run", "--lr", "1", "train.py"]).exit_code == 2


@pytest.mark.parametrize("spelling", ["--local_rank=1", "--local-rank=1"])
def test_the_rank_of_a_launcher_goes_to_the_script(
    quiet: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    made: list[Script] = []

    class Recorded(Script):
        def check(self) -> None:
            made.append(self)

    monkeypatch.setattr(command, "Script", Recorded)
    result = invoke(application.app, [spelling, "run", "-c", "policy.yaml", "train.py", "--x"])
    assert result.exit_code == 0, result.output
    assert made[0].arguments == ["--local_rank=1", "--x"]
    assert os.environ["DISTCLIP_CONFIG"] == str(quiet / "policy.yaml")


@pytest.mark.usefixtures("quiet")
def test_a_check_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipper, "watchers", [])
    arguments = ["run", "-c", "policy.yaml", "--check", "--check-steps", "5", "train.py"]
    assert invoke(application.app, arguments).exit_code == 0
    (watching,) = clipper.watchers
    assert isinstance(watching, StepCheck)
    assert watching.steps == 5


def test_cpu_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    from distclip.tools.launch import accelerate_cpu

    def install(*, cpu: bool) -> bool:
        raise ModuleNotFoundError("No module named 'accelerate'")

    monkeypatch.setattr(accelerate_cpu, "become_cpu_rank", install)
    monkeypatch.setattr(running, "find_spec", lambda name: None)
    with pytest.raises(Exception, match=r"pip install 'distclip\[accelerate\]'"):
        running.prepare_cpu(True)
    monkeypatch.setattr(running, "find_spec", lambda name: name == "deepspeed")
    running.prepare_cpu(True)  # which has ranks of its own


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_main_rank_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(hooks, "activated", set())
    monkeypatch.setattr(clipper, "in_use", False)  # other tests clip in this process
    running.warn_if_idle()
    assert ("run clipped nothing" in capsys.readouterr().err) == (rank == "0")
    hooks.mark_active("accelerate")
    running.warn_if_idle()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize(
    ("source", "code"),
    [("", None), ("raise SystemExit", None), ("raise SystemExit(5)", 5), ("exit('no')", "no"),
     ("raise KeyboardInterrupt", 130), ("def", 1), ("1 / 0", 1), ("import nothing_there", 1)],
)  # fmt: skip
def test_exit_codes(tmp_path: Path, source: str, code: object) -> None:
    (tmp_path / "s.py").write_text(source)
    assert Script(str(tmp_path / "s.py"), []).run() == code


@pytest.mark.usefixtures("process")
def test_a_module_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert Script("nothing_there", [], module=True).run() == 1
    assert capsys.readouterr().err == "distclip run: No module named nothing_there\n"


@pytest.mark.usefixtures("process")
def test_a_folder_with_a_main(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "__main__.py").write_text("import beside, sys; print(beside.x, sys.argv[1:])")
    (tmp_path / "beside.py").write_text("x = 1")
    assert Script(str(tmp_path), ["a"]).run() is None
    assert capsys.readouterr().out == "1 ['a']\n"


def test_a_store_of_a_cpu_run_listens_on_the_loopback_interface(
    python: Python, tmp_path: Path
) -> None:
    (tmp_path / "policy.yaml").write_text("policy: {name: measure}\n")
    (tmp_path / "store.py").write_text(
        "import pathlib, torch.distributed as dist\n"
        "store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "port = f':{store.port:04X}'\n"
        "for family in ('tcp', 'tcp6'):\n"
        "    for line in pathlib.Path(f'/proc/net/{family}').read_text().splitlines()[1:]:\n"
        "        if line.split()[1].endswith(port) and line.split()[3] == '0A':\n"
        "            print('LISTENS', line.split()[1].partition(':')[0])\n"
    )
    done = python("-m", "distclip", "run", "--cpu", "--config", "policy.yaml", "store.py")
    assert done.stdout.splitlines() == ["LISTENS 0100007F"], done.stderr


def test_a_policy_beside_the_script_is_found(python: Python, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.py").write_text(
        "from distclip import policies\n\n"
        "@policies.register\n"
        "class Mine(policies.Measure):\n"
        "    name = 'mine'\n"
    )
    (tmp_path / "train" / "train.py").write_text(
        "import os, sys, distclip, torch\n"
        "model = torch.nn.Linear(2, 2)\n"
        "clipper = distclip.from_config(os.environ['DISTCLIP_CONFIG'], model)\n"
        "print(type(clipper.policy).__name__, sys.argv[1:])\n"
    )
    (tmp_path / "policy.yaml").write_text("imports: [mine]\npolicy: mine\n")
    result = python(*DISTCLIP, "train/train.py", "--lr", "1")
    assert result.stdout == "Mine ['--lr', '1']\n", result.stderr
    (tmp_path / "policy.yaml").write_text("imports: [mien]\npolicy: mine\n")
    result = python(*DISTCLIP, "train/train.py")
    assert result.returncode == 2
    assert "imports[0]: no module named 'mien'" in result.stderr
