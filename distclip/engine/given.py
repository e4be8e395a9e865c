"""Parameters as a caller gives them to a function without memory, and whether they have changed."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import GeneratorType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distclip.application.notices import warn
from distclip.engine.program import Program
from distclip.errors import ConfigurationError
from distclip.layouts import declared, fsdp2, tensors
from distclip.layouts import names as naming
from distclip.layouts.detect import LAYOUTS
from distclip.layouts.fetching import Fetched
from distclip.layouts.names import Named, Target
from distclip.statistics import collectives


class Given(NamedTuple):
    """Parameters as a caller gave them, and their names; None: their positions.

    Names are not clean yet, and a parameter may come twice: what has been here before needs no
    closer look (:meth:`checked`).
    """

    parameters: Sequence[Tensor]
    names: tuple[str, ...] | None = None

    @classmethod
    def listed(cls, parameters: Tensor | Iterable[Tensor]) -> Given:
        """Build from what torch's functions take.

        Raises:
            ConfigurationError: a module, parameter groups, or something else.
        """
        if type(parameters) not in _USUAL:
            if isinstance(parameters, (nn.ParameterList, nn.ParameterDict)):
                parameters = parameters.parameters()
            if isinstance(parameters, nn.Module):
                raise ConfigurationError(
                    "expected parameters, got a module; pass module.parameters(), or use a "
                    "GradClipper"
                )
            named = isinstance(parameters, Mapping) or not isinstance(parameters, Iterable)
            is_set = isinstance(parameters, (set, frozenset))
            if named or (is_set and collectives.default_group(None) is not None):
                return cls.of(naming.named_parameters(parameters))
        found = as_tensors(parameters)
        kinds = set(map(type, found))
        if all(issubclass(kind, Tensor) for kind in kinds):
            return cls(found)
        if any(issubclass(kind, dict) for kind in kinds):
            raise ConfigurationError(
                "expected parameters, got optimizer parameter groups; pass "
                '[p for group in optimizer.param_groups for p in group["params"]]'
            )
        return cls.of(naming.named_parameters(found))

    @classmethod
    def named(cls, target: Target) -> Given:
        """Build from a module, or (name, parameter) pairs.

        Raises:
            ConfigurationError: something else, or two different parameters of one name.
        """
        pairs: Any = target
        if isinstance(target, nn.Module):
            pairs = list(target.named_parameters())
        elif isinstance(target, Iterable) and not isinstance(target, Mapping):
            pairs = target = as_tensors(target)  # type: ignore[arg-type]
        if _are_pairs(pairs):
            names, parameters = zip(*pairs, strict=True)
            if set(map(type, names)) == {str}:
                return cls(parameters, names)
        return cls.of(naming.named_parameters(target))

    @classmethod
    def of(cls, named: Named) -> Given:
        """Build from (name, parameter) pairs."""
        return cls([p for _, p in named], tuple(name for name, _ in named))

    def checked(self) -> Named:
        """The (clean name, parameter) pairs, each parameter once.

        Raises:
            ConfigurationError: a name or a parameter that is none, or a name that two have.
        """
        if self.names is not None:
            return naming.named_parameters(list(zip(self.names, self.parameters, strict=True)))
        positions: dict[int, tuple[str, Tensor]] = {}
        for position, parameter in enumerate(self.parameters):
            positions.setdefault(id(parameter), (str(position), parameter))
        return naming.meant(list(positions.values()))


def _are_pairs(items: Any) -> bool:
    pairs = isinstance(items, list) and set(map(type, items)) == {tuple}
    return pairs and set(map(len, items)) == {2}


def as_tensors(given: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """One tensor, or all that an iterable gives; warns of an iterator that is used up."""
    if isinstance(given, Tensor):
        return [given]
    used = naming.used_up(given)
    found = list(given)
    if used or naming.is_empty_iterator(given, found):
        warn(
            f"the given {type(given).__name__} {used or 'gives nothing'}: an optimizer, or an "
            f"earlier call, may have used it up. What it no longer gives is neither measured nor "
            f"clipped; call with model.parameters() anew, or with a list"
        )
    return found


class Fingerprint:
    """What a session knows of its parameters: ``model.half()`` keeps the objects and changes them.

    Compared at every call, so without a Python loop. An ``id`` may have been given to another
    tensor since: where more than the facts that are compared may matter, so does whether they are
    the same objects.
    """

    def __init__(self, parameters: Sequence[Tensor], meant: Sequence[Tensor]) -> None:
        self._same = _are_same(parameters, meant)
        identified = not self._same or fsdp2.is_in_use() or any(map(_attributes, parameters))
        self._references = _references(parameters) if identified else None
        self._meant = None if self._same else _references(meant)
        self._kinds = list(map(type, parameters))
        self._stepped = _stepped_in_backward(meant)
        self._facts = _facts_of(meant)
        self._sharding = self._shardings(meant)

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the fingerprint may be that of these tensors; exact if it has references."""
        if self._references is None:
            return not fsdp2.is_in_use() and self._kinds == list(map(type, parameters))
        return _are_referred_to(self._references, parameters)

    def meant(self, parameters: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """The parameters that have the gradients; None if those are others than before.

        FSDP2 never makes a gathered parameter of one that was none.
        """
        if self._meant is None:
            return parameters
        unique = {id(each): each for each in fsdp2.sharded(parameters)}
        found = list(unique.values())
        return found if _are_referred_to(self._meant, found) else None

    def gradients(self, program: Program, parameters: Sequence[Tensor]) -> Fetched | None:
        """The gradients, where they tell that nothing has changed: as one is, its parameter is.

        Where there are other ranks, all have to see alike whether to compile anew: not so here.
        """
        plan = program.plan
        alone = plan.group is None and not declared.any_declared()
        if not self._same or program.has_units or not alone:
            return None
        return None if any(map(_attributes, parameters)) else program.scratch.find(plan)

    def fits(self, meant: Sequence[Tensor]) -> bool:
        """Whether the parameters are unchanged."""
        same = self._stepped == _stepped_in_backward(meant)
        same = same and self._facts == _facts_of(meant)
        return same and self._sharding == self._shardings(meant)

    @staticmethod
    def _shardings(parameters: Sequence[Tensor]) -> list[object]:
        """What changes with how the parameters are spread over ranks."""
        shardings = tensors.shardings_of(parameters)
        if all(map(tensors.is_sharded, parameters)):
            return shardings
        if not declared.any_declared() and not any(map(_attributes, parameters)):
            return shardings  # nothing is said of any of them
        asks = [each.fingerprint for each in LAYOUTS if each.fingerprint is not None]
        return [shardings, *(list(map(ask, parameters)) for ask in asks)]


def _references(parameters: Sequence[Tensor]) -> list[weakref.ref[Tensor]]:
    return list(map(weakref.ref, tensors.owned(parameters)))


def _are_referred_to(references: Sequence[Any], parameters: Sequence[Tensor]) -> bool:
    return _are_same([alive() for alive in references], tensors.owned(parameters))


def _are_same(some: Sequence[Tensor | None], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


_USUAL = frozenset((list, tuple, GeneratorType))
_FACTS = tuple(map(operator.attrgetter, ("requires_grad", "dtype", "device")))
_attributes = operator.attrgetter("__dict__")


def _facts_of(parameters: Sequence[Tensor]) -> list[list[object]]:
    """What a conversion changes, such as ``model.half()``."""
    with torch._C.DisableTorchFunctionSubclass():  # nothing to look up for a DTensor
        return [list(map(fact, parameters)) for fact in _FACTS]


def _stepped_in_backward(parameters: Sequence[Tensor]) -> list[bool]:
    if not any(map(_attributes, parameters)):
        return [False] * len(parameters)
    return list(map(hasattr, parameters, itertools.repeat("_in_backward_optimizers")))
