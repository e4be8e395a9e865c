"""Post-import hooks: at the right moment, and without a trace on the module."""

import importlib
import importlib.resources
import importlib.util
import inspect
import pkgutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from distclip.errors import ConfigurationError, DistclipError
from distclip.integrations import hooks


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package ``hooked_pkg`` with a module ``inner``; all hooks are taken away afterwards."""
    folder = tmp_path / "hooked_pkg"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "data.txt").write_text("data")
    (folder / "inner.py").write_text(
        "value = 1\nloader_seen = type(__loader__).__name__\ndef function(): return value\n"
    )
    (folder / "broken.py").write_text("raise RuntimeError('broken')\n")
    (folder / "slow.py").write_text("import time\ntime.sleep(0.3)\nvalue = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for hook in [hook for registered in hooks._hooks.values() for hook in registered]:
        hook.remove()
    assert hooks._finder not in sys.meta_path
    for name in [name for name in sys.modules if name.startswith("hooked_pkg")]:
        del sys.modules[name]


def unexpected(module: ModuleType) -> None:
    pytest.fail(f"called for {module.__name__}")


def test_runs_once_after_the_code_of_the_module() -> None:
    seen: list[int] = []
    hooks.on_import("hooked_pkg.inner", lambda module: seen.append(module.value))
    assert seen == []
    assert "hooked_pkg" not in sys.modules
    importlib.import_module("hooked_pkg.inner")
    importlib.import_module("hooked_pkg.inner")
    assert seen == [1]


def test_runs_at_once_on_a_module_that_is_there() -> None:
    importlib.import_module("hooked_pkg.inner")
    seen: list[ModuleType] = []
    hooks.on_import("hooked_pkg.inner", seen.append)
    assert seen == [sys.modules["hooked_pkg.inner"]]


def test_never_runs_twice_for_the_same_run_of_the_code() -> None:
    # A module that is registered for while another thread imports it may be met from both sides.
    seen: list[ModuleType] = []
    hook = hooks.on_import("hooked_pkg.inner", seen.append)
    module = importlib.import_module("hooked_pkg.inner")
    hook.fire(module, again=False)
    assert seen == [module]


def test_runs_in_the_order_of_registration() -> None:
    seen: list[str] = []
    hooks.on_import("hooked_pkg.inner", lambda _: seen.append("first"))
    hooks.on_import("hooked_pkg.inner", lambda _: seen.append("second"))
    importlib.import_module("hooked_pkg.inner")
    assert seen == ["first", "second"]


def test_runs_again_after_a_reload() -> None:
    def patch(module: Any) -> None:
        module.value += 1

    hooks.on_import("hooked_pkg.inner", patch)
    module: Any = importlib.import_module("hooked_pkg.inner")
    assert importlib.reload(module).value == 2


def test_removed_hooks_do_not_run() -> None:
    hook = hooks.on_import("hooked_pkg.inner", unexpected)
    hook.remove()
    hook.remove()
    importlib.import_module("hooked_pkg.inner")


def test_the_module_keeps_its_own_loader() -> None:
    hooks.on_import("hooked_pkg", lambda _: None)
    hooks.on_import("hooked_pkg.inner", lambda _: None)
    module: Any = importlib.import_module("hooked_pkg.inner")
    assert module.loader_seen == "SourceFileLoader"
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert inspect.getsource(module.function) == "def function(): return value\n"
    assert pkgutil.get_data("hooked_pkg", "data.txt") == b"data"
    assert (importlib.resources.files("hooked_pkg") / "data.txt").read_text() == "data"


def test_the_spec_of_a_module_not_yet_imported_shows_the_real_loader() -> None:
    hooks.on_import("hooked_pkg.inner", unexpected)
    spec = importlib.util.find_spec("hooked_pkg.inner")
    assert spec is not None
    loader: Any = spec.loader
    assert loader.is_package("hooked_pkg.inner") is False
    assert b"value = 1" in loader.get_data(spec.origin)
    assert loader.get_resource_reader("hooked_pkg.inner") is not None
    assert not hasattr(loader, "nothing_like_this")


def test_a_module_that_does_not_exist() -> None:
    hooks.on_import("hooked_pkg.absent", unexpected)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hooked_pkg.absent")


def test_a_module_that_fails_shows_its_own_error() -> None:
    hooks.on_import("hooked_pkg.broken", unexpected)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        importlib.import_module("hooked_pkg.broken")


def test_a_failing_callback_names_the_module() -> None:
    def fail(module: ModuleType) -> None:
        raise AttributeError("no Accelerator")

    hooks.on_import("hooked_pkg.inner", fail)
    with pytest.raises(
        DistclipError, match=r"be enabled for hooked_pkg\.inner .*: no Accelerator"
    ) as e:
        importlib.import_module("hooked_pkg.inner")
    assert isinstance(e.value.__cause__, AttributeError)
    assert "hooked_pkg.inner" not in sys.modules


def test_an_error_of_our_own_passes_as_it_is() -> None:
    def fail(module: ModuleType) -> None:
        raise ConfigurationError("as it is")

    hooks.on_import("hooked_pkg.inner", fail)
    with pytest.raises(ConfigurationError, match=r"^as it is$"):
        importlib.import_module("hooked_pkg.inner")


def test_another_finder_that_asks_everybody() -> None:
    class Asking:
        """Like the finders of other tools: delegates to ``importlib.util.find_spec``."""

        busy = False

        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if self.busy or name != "hooked_pkg.inner":
                return None
            self.busy = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.busy = False

    seen: list[ModuleType] = []
    hooks.on_import("hooked_pkg.inner", seen.append)
    for position in (0, 1):
        finder: Any = Asking()
        sys.meta_path.insert(position, finder)
        try:
            importlib.import_module("hooked_pkg.inner")
        finally:
            sys.meta_path.remove(finder)
        assert seen == [sys.modules.pop("hooked_pkg.inner")]
        seen.clear()


def test_threads_that_import_at_the_same_time() -> None:
    seen: list[int] = []
    hooks.on_import("hooked_pkg.slow", lambda module: seen.append(module.value))
    threads = [
        threading.Thread(target=importlib.import_module, args=("hooked_pkg.slow",))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1]


def test_registration_while_another_thread_imports() -> None:
    importlib.import_module("hooked_pkg")
    thread = threading.Thread(target=importlib.import_module, args=("hooked_pkg.slow",))
    thread.start()
    while "hooked_pkg.slow" not in sys.modules:
        pass
    seen: list[int] = []
    hooks.on_import("hooked_pkg.slow", lambda module: seen.append(module.value))
    assert seen == [1]
    thread.join()
    assert seen == [1]


def test_install_enables_an_integration_with_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[ModuleType, object]] = []
    integration: Any = SimpleNamespace(enable=lambda module, config: calls.append((module, config)))
    monkeypatch.setitem(sys.modules, "distclip.integrations.fake", integration)
    monkeypatch.setattr(hooks, "INTEGRATIONS", {"fake": ("hooked_pkg.inner",)})
    config: Any = object()
    hooks.install(config)
    assert calls == []
    assert [(importlib.import_module("hooked_pkg.inner"), config)] == calls


def test_mark_active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "activated", set())
    hooks.mark_active("accelerate")
    assert hooks.activated == {"accelerate"}
