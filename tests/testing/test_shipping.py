"""Sending functions by file, here within one process."""

import os
import pickle
import sys
from pathlib import Path

import pytest

from distclip.testing.ranks import shipping


def module_level(value):
    return value + 1


def there_and_back(value):
    return pickle.loads(shipping.dumps(value))


def test_named_things_stay_what_they_are():
    assert there_and_back(module_level) is module_level
    assert there_and_back(Path) is Path
    assert there_and_back({"f": [module_level, os]}) == {"f": [module_level, os]}


def test_a_local_function_keeps_defaults_closure_and_globals():
    offset = [10]

    def local(value, /, more=1, *, factor=2):
        return module_level(value) * factor + more + offset[0]

    local.tag = "kept"
    copy = there_and_back(local)
    assert copy is not local
    assert (copy(1), copy(1, 0, factor=3), copy.tag) == (15, 16, "kept")
    assert copy.__qualname__ == local.__qualname__


def test_a_decorated_function_is_found_where_its_code_lives():
    wrapped = decorated.__wrapped__
    assert there_and_back(decorated)(1) == 4
    assert there_and_back(wrapped)(1) == 2


def _doubling(function):
    import functools

    @functools.wraps(function)
    def wrapper(value):
        return 2 * function(value)

    return wrapper


@_doubling
def decorated(value):
    return value + 1


def test_code_without_a_file_is_refused():
    namespace = {"__name__": "typed_in"}
    exec("def f(): return 1", namespace)
    with pytest.raises(TypeError, match="f was not defined in a file"):
        shipping.dumps(namespace["f"])


def test_a_module_is_loaded_from_its_file_and_again_when_that_changes(tmp_path):
    (tmp_path / "shipped_pkg").mkdir()
    (tmp_path / "shipped_pkg" / "helper.py").write_text("value = 7")
    file = tmp_path / "shipped_pkg" / "shipped_mod.py"

    def load():
        status = os.stat(file)
        return shipping.load_module(
            "shipped_pkg.shipped_mod", os.path.realpath(file), status.st_mtime_ns, False
        )

    try:
        file.write_text("from .helper import value\nnumber = 1")
        first = load()
        assert (first.number, first.value) == (1, 7)
        assert load() is first
        file.write_text("number = 22")
        os.utime(file, ns=(1, 1))
        assert load().number == 22
        file.write_text("raise ValueError('broken')")
        os.utime(file, ns=(2, 2))
        with pytest.raises(ValueError, match="broken"):
            load()
        assert "shipped_pkg.shipped_mod" not in sys.modules
    finally:
        for name in [name for name in sys.modules if name.startswith("shipped_")]:
            del sys.modules[name]


def test_a_name_that_only_the_main_script_defines_is_explained():
    reference = (__name__, os.path.realpath(__file__), os.stat(__file__).st_mtime_ns, False)
    with pytest.raises(AttributeError, match="does not define gone when a rank imports it"):
        shipping.load_attribute(reference, "gone")
