"""From what the user hands over to named parameters: clean names, each parameter once."""

from __future__ import annotations

import inspect
import itertools
import operator
import weakref
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from distclip.errors import ConfigurationError, UnsupportedGradientError
from distclip.layouts import fsdp2

WRAPPERS = (
    "_fsdp_wrapped_module",
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_original_module",
)
"""Path parts that FSDP1, torch.compile, activation checkpointing and Fabric put into names."""

FRONTS = (("module",), ("base_model", "model"))
"""What DDP (AveragedModel, DeepSpeed) and PEFT put in front of all names, and nowhere else."""

Target: TypeAlias = (
    nn.Module
    | Sequence[nn.Module]
    | Tensor
    | Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | Mapping[str, Tensor]
)
"""A module, modules (pipeline stages, model parts), parameters, or (name, parameter) pairs."""

Named: TypeAlias = list[tuple[str, Tensor]]


class Excerpt(list[tuple[str, Tensor]]):
    """(name, parameter) pairs that were taken out of modules.

    Args:
        pairs: the pairs, under their names in ``modules``.
        modules: the outermost modules; the kind of a parameter is read off the class of its own
            module in there. They are not kept alive.
    """

    def __init__(self, pairs: Iterable[tuple[str, Tensor]], modules: Iterable[nn.Module]) -> None:
        super().__init__(pairs)
        self.sources = tuple(map(weakref.ref, modules))


def without_wrappers(name: str) -> str:
    """``name`` without the path parts that wrappers add.

    A parametrised ``weight`` (``torch.nn.utils.parametrize``) is called ``weight``, not
    ``parametrizations.weight.original``; where it is made of several, ``weight.original0`` and so
    on.
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    if "parametrizations" in parts[:-2]:
        parts.remove("parametrizations")
        parts = parts[:-1] if parts[-1] == "original" else parts
    while front := next((f for f in FRONTS if tuple(parts[: len(f)]) == f), None):
        if len(parts) == len(front):  # then it is a parameter's own name
            break
        parts = parts[len(front) :]
    return ".".join(parts)


def named_parameters(target: Target) -> Named:
    """``(clean name, parameter)`` pairs; a tied or repeated parameter once, by its first name.

    For a parameter that FSDP2 has gathered, the sharded one that it was gathered from: that has the
    gradient, and is what an optimizer steps. Parameters that come without names are called by their
    position: ``"0"``, ``"1"``.

    Raises:
        ConfigurationError: the target is none of the accepted kinds, or two different parameters
            have one name.
    """
    pairs = [(without_wrappers(name), parameter) for name, parameter in meant(_pairs(target))]
    refuse_repeated(pairs)
    return pairs


def meant(named: Sequence[tuple[str, Tensor]]) -> Named:
    """The pairs, with the sharded parameter for one that FSDP2 has gathered; each only once."""
    parameters = fsdp2.sharded(parameter for _, parameter in named)
    unique: dict[int, tuple[str, Tensor]] = {}
    for (name, _), parameter in zip(named, parameters, strict=True):
        unique.setdefault(id(parameter), (name, parameter))
    return list(unique.values())


def refuse_repeated(named: Named) -> None:
    """Refuse two parameters of one name.

    Raises:
        ConfigurationError: names the first such name.
    """
    counts = Counter(name for name, _ in named)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise ConfigurationError(
            f"two different parameters are called {repeated[0]!r}; give (name, parameter) pairs "
            f"with distinct names, so that statistics and state can be told apart"
        )


def is_list_of_modules(target: Target) -> bool:
    """Whether the target is a list of modules (pipeline stages, model parts)."""
    return isinstance(target, (list, tuple)) and any(isinstance(x, nn.Module) for x in target)


def _pairs(target: Target) -> Named:
    if isinstance(target, nn.Module):
        return list(target.named_parameters())
    if isinstance(target, Mapping):
        return _pairs(list(target.items()))
    if isinstance(target, (set, frozenset)):
        raise ConfigurationError(
            "the target is a set, whose order differs between runs and ranks; give a list"
        )
    if isinstance(target, Tensor):
        return [("0", target)]
    if not isinstance(target, Iterable):
        raise _not_a_target(target)
    used = used_up(target)
    items: list[object] = list(cast(Iterable[object], target))
    if used or is_empty_iterator(target, items):
        raise ConfigurationError(
            f"the given {type(target).__name__} {used or 'gives nothing'}: an optimizer, or an "
            f"earlier call, may have used it up. What it no longer gives would never be clipped; "
            f"give the module, or a list of parameters"
        )
    if items and all(isinstance(item, nn.Module) for item in items):
        return _of_modules(cast(list[nn.Module], items))
    pairs: Named = []
    for position, item in enumerate(items):
        if isinstance(item, Tensor):
            pairs.append((str(position), item))
        elif (
            isinstance(item, tuple)
            and len(item) == 2
            and isinstance(item[0], str)
            and isinstance(item[1], Tensor)
        ):
            pairs.append((item[0], item[1]))
        elif isinstance(item, dict) and "params" in item:
            raise ConfigurationError(
                "expected parameters, got parameter groups of an optimizer; give [p for group in "
                "optimizer.param_groups for p in group['params']]. (A policy that needs the groups "
                "is given them by GradClipper(..., optimizer=optimizer))"
            )
        else:
            raise _not_a_target(item)
    return pairs


def used_up(given: object) -> str | None:
    """The state of a generator that has been used before; None for anything else.

    Call it before the generator is iterated over.
    """
    if not inspect.isgenerator(given):
        return None
    state = inspect.getgeneratorstate(given)
    if state == inspect.GEN_CLOSED:
        return "is used up"
    return "has been begun" if state == inspect.GEN_SUSPENDED else None


def is_empty_iterator(given: object, items: Sequence[object]) -> bool:
    """Whether an iterator other than a generator gave nothing, and that cannot be meant.

    One rank of several may have no parameters (a pipeline stage); then it may be.
    """
    return (
        not items
        and isinstance(given, Iterator)
        and not inspect.isgenerator(given)
        and not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    )


def _of_modules(modules: Sequence[nn.Module]) -> Named:
    """Model parts keep their own names unless those clash; then the part's number goes in front."""
    parts = [
        meant([(without_wrappers(name), p) for name, p in module.named_parameters()])
        for module in modules
    ]
    owners: dict[str, int] = {}
    clash = any(
        owners.setdefault(name, id(parameter)) != id(parameter)
        for part in parts
        for name, parameter in part
    )
    return [
        (f"{number}.{name}" if clash else name, parameter)
        for number, part in enumerate(parts)
        for name, parameter in part
    ]


def _not_a_target(item: object) -> ConfigurationError:
    mend = ""
    if hasattr(item, "param_groups"):
        mend = "; give the model here, and the optimizer to GradClipper(model, policy).attach"
    return ConfigurationError(
        f"expected a module, a list of modules, parameters or (name, parameter) pairs, got "
        f"{type(item).__module__}.{type(item).__qualname__}{mend}"
    )


class Watched:
    """Modules that are looked at again at every step: have parameters come, or been replaced?"""

    def __init__(self, target: Target) -> None:
        self._modules = [target] if isinstance(target, nn.Module) else []
        if is_list_of_modules(target):
            self._modules = list(cast(Sequence[nn.Module], target))
        self._sources = [
            source
            for each in (target, *(getattr(module, "excerpt", None) for module in self._modules))
            if isinstance(each, Excerpt)
            for source in each.sources
        ]
        self._frozen: list[torch.Tensor] = []
        """Newcomers that are not trained: to be asked again whether they are."""
        self._look()

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that the target is or lists; empty where it lists parameters."""
        return self._modules

    @property
    def sources(self) -> list[nn.Module]:
        """The modules that the parameters are in: also of pairs that were taken out of them."""
        found = [each for source in self._sources if (each := source()) is not None]
        return found or self._modules

    def copied(self, memo: dict[int, Any]) -> list[nn.Module]:
        """The copies of all the modules, by the memo of a deep copy; none if one is not in it."""
        copies = [memo[id(module)] for module in self._modules if id(module) in memo]
        return copies if len(copies) == len(self._modules) else []

    def _look(self) -> None:
        modules = [each for module in self._modules for each in module.modules()]
        places: list[dict[str, Any]] = [
            *(m._parameters for m in modules),
            *(m._modules for m in modules),
        ]
        self._places = [place for place in places if place]
        self._empty = [place for place in places if not place]
        self._seen = self._contents()

    def _contents(self) -> list[object]:
        return list(itertools.chain.from_iterable(map(dict.values, self._places)))

    def newcomers(self, known: Container[int]) -> list[str]:
        """Names of the parameters whose ``id`` is not in ``known``; cheap if nothing changed."""
        now = self._contents()
        same = len(now) == len(self._seen) and all(map(operator.is_, now, self._seen))
        if same and not any(self._empty) and not any(map(_trains, self._frozen)):
            return []
        unknown: Named = [
            (without_wrappers(name), parameter)
            for module in self._modules
            for name, parameter in module.named_parameters()
            if id(parameter) not in known
        ]
        # FSDP2 puts other objects into its modules whenever it gathers or shards.
        unknown = [(name, each) for name, each in meant(unknown) if id(each) not in known]
        self._frozen = [parameter for _, parameter in unknown if not parameter.requires_grad]
        found = [name for name, parameter in unknown if parameter.requires_grad]
        if not found:
            self._look()
        return found


_trains = operator.attrgetter("requires_grad")


def refuse_meta(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse parameters without storage, or without a shape.

    Raises:
        ConfigurationError: names the first parameter on the meta device, or of a lazy module.
        UnsupportedGradientError: names the first nested tensor.
    """
    for name, parameter in named:
        if isinstance(parameter, UninitializedParameter):
            raise ConfigurationError(
                f"parameter {name!r} is not initialised: its lazy module (LazyLinear and the like) "
                f"learns its shape from the first forward; run one before clipping"
            )
        if parameter.is_nested:
            raise UnsupportedGradientError(
                f"parameter {name!r} is a nested tensor, whose components differ in shape, so that "
                f"it has no rows and no sharding that distclip could read; make each component a "
                f"parameter of its own"
            )
        if parameter.is_meta:
            raise ConfigurationError(
                f"parameter {name!r} is on the meta device: materialise the model (to_empty, then "
                f"initialise) before clipping"
            )
