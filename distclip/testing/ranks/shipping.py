"""How a function travels to the ranks: by reference where it has a name, by value where not.

A plain pickle names a function by its module, and the receiver must be able to import that
module. Test modules often cannot be imported: pytest loads them from a path. So a function or a
class is sent as (module name, module file, qualified name), and the rank loads that very file. A
local function or a lambda has no name to look up; its code object is sent, with its defaults and
the values it closes over. Both ends run the same interpreter, so ``marshal`` is safe. What a
notebook or a prompt defines lies in no file; cloudpickle sends it by value.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import io
import marshal
import os
import pickle
import sys
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from distclip.testing.ranks import rewriting

# Installed alike on both ends and importable by name: an ordinary pickle does.
_EVERYWHERE = frozenset({"distclip", "numpy", "torch"}) | sys.stdlib_module_names

# What load_module() executed in this process: module name -> (file, its modification time).
_loaded: dict[str, tuple[str, int]] = {}


def dumps(value: object) -> bytes:
    """Pickle a call for the ranks.

    Raises:
        TypeError: something in it cannot be sent; the message says what.
    """
    buffer = io.BytesIO()
    try:
        _Shipper(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception as error:  # anything at all can come out of a foreign __reduce__
        raise TypeError(f"cannot be sent to the ranks: {error}") from error
    return buffer.getvalue()


class _Shipper(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType):
            return _reduce_function(obj)
        if isinstance(obj, type):
            return _reduce_class(obj)
        if isinstance(obj, ModuleType):
            reference = _reference(obj)
            if reference:
                return load_module, reference
            return importlib.import_module, (obj.__name__,)
        return NotImplemented


def _reduce_function(function: FunctionType) -> Any:
    if _is_everywhere(function.__module__) and _finds(function):
        return NotImplemented
    if _in_no_file(function.__globals__.get("__name__")):
        return _by_value(function)
    if _finds(function):
        reference = _reference(sys.modules[function.__module__])
        return (load_attribute, (reference, function.__qualname__)) if reference else NotImplemented
    # The globals decide what the code sees; functools.wraps may have overwritten __module__.
    home = sys.modules.get(function.__globals__.get("__name__", ""))
    reference = _reference(home) if home else None
    if reference is None:
        raise pickle.PicklingError(
            f"{function.__qualname__} was not defined in a file, so no rank can load its module; "
            "put it into one"
        )
    cells = function.__closure__ or ()
    state = (
        function.__defaults__,
        function.__kwdefaults__,
        function.__dict__,
        [_cell_contents(cell) for cell in cells],
    )
    code = marshal.dumps(function.__code__)
    arguments = (reference, code, function.__name__, function.__qualname__, len(cells))
    # The state comes apart from the making, so that a function may close over itself.
    return make_function, arguments, state, None, None, set_function_state


def _reduce_class(cls: type) -> Any:
    if _in_no_file(cls.__module__):
        return _by_value(cls)
    if _is_everywhere(cls.__module__) or not _finds(cls):
        return NotImplemented  # local classes: pickle's own error says it well
    reference = _reference(sys.modules[cls.__module__])
    return (load_attribute, (reference, cls.__qualname__)) if reference else NotImplemented


def _in_no_file(module: str | None) -> bool:
    """Whether that is the main module of a notebook, a prompt or standard input."""
    return module == "__main__" and _reference(sys.modules[module]) is None


def _by_value(obj: Any) -> Any:
    try:
        import cloudpickle
    except ImportError:
        raise pickle.PicklingError(
            f"{obj.__qualname__} is defined in no file, so it has to be sent by value, which needs "
            "another package; pip install cloudpickle, or put it into a file"
        ) from None
    return cloudpickle.loads, (cloudpickle.dumps(obj),)


def _is_everywhere(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _EVERYWHERE


def _finds(obj: Any) -> bool:
    """Whether the object's module holds this very object under its qualified name."""
    found: Any = sys.modules.get(obj.__module__)
    for part in obj.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is obj


def _cell_contents(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # assigned only later, or never
        return ()


def _reference(module: ModuleType) -> tuple[str, str, int, bool] | None:
    """What `load_module` takes, or None for a module without a source file."""
    file = getattr(module, "__file__", None)
    if not file or not file.endswith(".py"):
        return None
    try:
        modified = os.stat(file).st_mtime_ns
    except OSError:
        return None
    rewritten = type(getattr(module, "__loader__", None)).__module__ == "_pytest.assertion.rewrite"
    return module.__name__, os.path.realpath(file), modified, rewritten


# ---- the receiving end ----


def load_attribute(reference: tuple[str, str, int, bool], qualname: str) -> Any:
    """The function or class of that qualified name, its module loaded first if need be."""
    found: Any = load_module(*reference)
    for part in qualname.split("."):
        if not hasattr(found, part):
            raise AttributeError(
                f"{reference[1]} does not define {qualname} when a rank imports it; "
                'was it defined under `if __name__ == "__main__":`?'
            )
        found = getattr(found, part)
    return found


def make_function(
    reference: tuple[str, str, int, bool], code: bytes, name: str, qualname: str, cells: int
) -> FunctionType:
    """A local function from its code; its state follows through `set_function_state`."""
    unmarshalled = marshal.loads(code)
    assert isinstance(unmarshalled, CodeType)
    closure = tuple(CellType() for _ in range(cells))
    function = FunctionType(unmarshalled, vars(load_module(*reference)), name, None, closure)
    function.__qualname__ = qualname
    return function


def set_function_state(function: FunctionType, state: tuple[Any, Any, Any, list[Any]]) -> None:
    """Fill in defaults, attributes and closure."""
    function.__defaults__, function.__kwdefaults__, attributes, contents = state
    function.__dict__.update(attributes)
    for cell, content in zip(function.__closure__ or (), contents, strict=True):
        if content:
            (cell.cell_contents,) = content


def load_module(name: str, file: str, modified: int, rewritten: bool) -> ModuleType:
    """The module of that name from that file, loaded again if the file has changed since.

    Args:
        name: the name the caller knows the module by.
        file: its source, absolute.
        modified: the source's modification time when the caller asked, in ns.
        rewritten: whether pytest rewrote the module's asserts in the calling process.
    """
    if name == "__main__":
        # Not under its own name: `if __name__ == "__main__":` must not run on the ranks.
        name = "__mp_main__"
    present = sys.modules.get(name)
    if (
        present is not None
        and _same_file(getattr(present, "__file__", None), file)
        and _loaded.get(name, (file, modified)) == (file, modified)
    ):
        return present
    spec = _find_spec(name, file)
    if rewritten and (loader := rewriting.loader()):
        spec.loader = loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if rewritten:
        rewriting.provide_names(module)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    _loaded[name] = (file, modified)
    if name == "__mp_main__":
        sys.modules["__main__"] = module  # instances of its classes are pickled under this name
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def _find_spec(name: str, file: str) -> importlib.machinery.ModuleSpec:
    try:
        spec = importlib.util.find_spec(name) if name not in sys.modules else None
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is not None and _same_file(spec.origin, file):
        return spec
    directory = os.path.dirname(file)
    is_package = os.path.basename(file) == "__init__.py"
    _provide_parents(name, os.path.dirname(directory) if is_package else directory)
    search = [directory] if is_package else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=search)
    assert spec is not None  # a .py file always has a loader
    return spec


def _provide_parents(name: str, directory: str) -> None:
    """Make `from .helpers import x` work where pytest named a module after its place on disk."""
    parent = name.rpartition(".")[0]
    if not parent:
        return
    _provide_parents(parent, os.path.dirname(directory))
    if parent in sys.modules:
        return
    try:
        importlib.import_module(parent)
    except ImportError:
        initial = os.path.join(directory, "__init__.py")
        if os.path.exists(initial):
            load_module(parent, initial, os.stat(initial).st_mtime_ns, False)
        else:
            module = ModuleType(parent)
            module.__path__ = [directory]
            sys.modules[parent] = module


def _same_file(one: str | None, other: str) -> bool:
    return one is not None and os.path.realpath(one) == other
