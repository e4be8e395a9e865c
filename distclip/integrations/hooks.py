"""Post-import hooks: act on a framework when the user's program imports it, and only then.

``distclip run`` needs a way into a script that knows nothing of distclip. :func:`on_import` calls a
function right after a module's code has run; :func:`install` registers the integrations that way.
Nothing is imported that the program does not import itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from distclip.common import tested
from distclip.errors import DistclipError

if TYPE_CHECKING:
    from distclip.config import Config

__all__ = ["INTEGRATIONS", "Hook", "activated", "install", "mark_active", "on_import"]

Callback = Callable[[ModuleType], object]

INTEGRATIONS = {
    "accelerate": ("accelerate.accelerator",),
    "deepspeed": ("deepspeed.runtime.engine",),
    "transformers": ("transformers.trainer",),
    "lightning": (
        "lightning.pytorch.trainer.trainer",
        "pytorch_lightning.trainer.trainer",
        "lightning.fabric.fabric",
        "lightning_fabric.fabric",
    ),
    "torch_scripts": ("torch.optim.optimizer",),
}
"""Integration -> modules upon whose import ``distclip.integrations.<name>.enable`` is called."""

activated: set[str] = set()
"""The integrations that have attached to a model or an optimizer in this process."""


def mark_active(name: str) -> None:
    """Say that an integration really clips now; without any ``distclip run`` warns at the end."""
    activated.add(name)


def install(config: Config | None) -> None:
    """Enable every integration, with ``config``, once its framework is imported."""
    for name, modules in INTEGRATIONS.items():
        for module in modules:
            on_import(module, functools.partial(_enable, name, config))


def _enable(name: str, config: Config | None, module: ModuleType) -> None:
    tested.check_version(name)
    # Imported here, so that no integration is loaded whose framework the program does not use.
    importlib.import_module(f"distclip.integrations.{name}").enable(module, config)


def on_import(module: str, callback: Callback) -> Hook:
    """Call ``callback(module)`` right after the code of a module has run.

    At once if the module is there already; again after ``importlib.reload``, which undoes whatever
    the callback did to the module. Several callbacks run in the order of registration.

    Args:
        module: its full name.
        callback: if it raises, so does the ``import`` in the user's program, with a
            ``DistclipError`` that names the module.

    Returns:
        A handle; ``remove()`` undoes the registration, not what the callback did.
    """
    hook = Hook(module, callback)
    with _lock:
        _hooks.setdefault(module, []).append(hook)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
    present = sys.modules.get(module)
    if present is not None:
        if getattr(getattr(present, "__spec__", None), "_initializing", False):
            # Another thread is in the middle of it: this waits for the module's import lock.
            present = importlib.import_module(module)
        hook.fire(present, again=False)
    return hook


class Hook:
    """A registered callback."""

    def __init__(self, module: str, callback: Callback) -> None:
        self.module = module
        self._callback = callback
        self._seen: ModuleType | None = None
        self._firing = threading.RLock()

    def fire(self, module: ModuleType, *, again: bool) -> None:
        """Run the callback; a second time on the same module only if its code ran ``again``."""
        with self._firing:
            if module is self._seen and not again:
                return
            self._seen = module
            try:
                self._callback(module)
            except DistclipError:
                raise
            except Exception as error:
                raise DistclipError(
                    f"distclip could not be enabled for {self.module} after its import: "
                    f"{type(error).__name__}: {error}. Its version may be one that distclip does "
                    f"not support; without `distclip run` the program is not touched."
                ) from error

    def remove(self) -> None:
        """Forget the callback; a second call does nothing."""
        with _lock:
            hooks = _hooks.get(self.module, [])
            if self in hooks:
                hooks.remove(self)
            if not hooks:
                _hooks.pop(self.module, None)
            if not _hooks and _finder in sys.meta_path:
                sys.meta_path.remove(_finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it asks the others, and wraps the loader of the modules waited for."""

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        asking: set[str] = self._asking.__dict__.setdefault("names", set())
        if fullname not in _hooks or fullname in asking:
            return None
        asking.add(fullname)  # another wrapping finder may come back to us with the same question
        try:
            spec = _ask_others(fullname, path, target)
        finally:
            asking.discard(fullname)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)
        return spec


def _ask_others(
    fullname: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    for finder in list(sys.meta_path):
        if finder is not _finder and hasattr(finder, "find_spec"):
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
    return None


class _Loader(importlib.abc.Loader):
    """Stands in for the real loader until the module's code runs, then steps aside.

    The module is left with its own loader: ``__loader__``, ``inspect.getsource``, ``pkgutil`` and
    ``importlib.resources`` see what they would without us. Who looks at the spec before that
    (``importlib.util.find_spec``) reaches all attributes of the real loader through this one.
    """

    def __init__(self, loader: Any) -> None:
        self._distclip_loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_distclip_loader":  # absent while a copy or an unpickled object is made
            raise AttributeError(name)
        return getattr(self._distclip_loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._distclip_loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._distclip_loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._distclip_loader
        self._distclip_loader.exec_module(module)
        with _lock:
            hooks = list(_hooks.get(module.__name__, ()))
        for hook in hooks:
            hook.fire(module, again=True)


_lock = threading.RLock()
_hooks: dict[str, list[Hook]] = {}
_finder = _Finder()
