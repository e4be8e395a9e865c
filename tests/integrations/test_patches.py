"""A method is replaced on an object, a class or a module, and put back."""

import types
from typing import Any

from distclip.integrations.patches import replace


class Engine:
    """Stands for a framework's class."""

    def step(self, size: int) -> int:
        """Its own docstring."""
        return size


def doubled(original: Any, *args: Any) -> Any:
    return 2 * original(*args)


def test_on_an_object_its_class_and_a_module() -> None:
    engine, other = Engine(), Engine()
    restore = replace(engine, "step", doubled)
    assert (engine.step(3), other.step(3)) == (6, 3)
    assert engine.step.__doc__ == "Its own docstring."
    restore()
    assert (engine.step(3), vars(engine)) == (3, {})

    own = type("Own", (Engine,), {})
    engine = own()
    restore = replace(own, "step", lambda original, self, size: original(self, size) + 1)
    assert engine.step(3) == 4
    restore()
    assert (engine.step(3), "step" in vars(own)) == (3, False)

    module = types.ModuleType("functions")
    module.step = before = lambda size: size  # type: ignore[attr-defined]
    restore = replace(module, "step", doubled)
    assert module.step(3) == 6
    restore()
    assert module.step is before


def test_what_stood_on_the_object_itself_is_put_back() -> None:
    engine = Engine()
    engine.step = lambda size: -size  # type: ignore[method-assign]
    restore = replace(engine, "step", doubled)
    assert engine.step(3) == -6
    restore()
    assert engine.step(3) == -3


def test_only_when_asked() -> None:
    engine, on = Engine(), [False]
    replace(engine, "step", doubled, lambda: on[0])
    assert engine.step(3) == 3
    on[0] = True
    assert engine.step(3) == 6


def test_another_librarys_replacement_stays() -> None:
    engine = Engine()
    restore = replace(engine, "step", doubled)
    inner = engine.step
    engine.step = lambda size: inner(size) + 1  # type: ignore[method-assign]
    assert engine.step(3) == 7
    restore()
    assert engine.step(3) == 4  # theirs, around the original
