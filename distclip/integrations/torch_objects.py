"""What a plain torch script has made: its optimizers, gradient scalers and modules.

A step hook is given an optimizer, and ``clip_grad_norm_`` is given parameters. Which names the
parameters have, which optimizer steps them and which scaler has scaled their gradients is found
here.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distclip.engine.attaching import stepped_by
from distclip.errors import ConfigurationError
from distclip.integrations.patches import replace
from distclip.layouts.names import Excerpt, Named, Target, meant, without_wrappers

Made = TypeVar("Made")


class Instances(Generic[Made]):
    """The living objects of a class, in the order in which they were made.

    Attributes:
        forget: no longer look for new ones.
        met: called with each new one.
    """

    def __init__(self, kind: type[Made]) -> None:
        self._known: dict[int, weakref.ref[Made]] = {}
        self.met: list[Callable[[Made], object]] = []
        self.forget = replace(kind, "__init__", self._note)

    def _note(self, original: Callable[..., None], made: Made, *args: Any, **kwargs: Any) -> None:
        original(made, *args, **kwargs)
        self.add(made)

    def add(self, made: Made) -> None:
        """Add one that ``__init__`` has not made, such as a copy."""
        key = id(made)
        if (known := self._known.get(key)) is None or known() is not made:
            self._known.pop(key, None)
            self._known[key] = weakref.ref(made)
            for call in self.met:
                call(made)

    def __iter__(self) -> Iterator[Made]:
        for key, reference in list(self._known.items()):
            made = reference()
            if made is None:
                self._known.pop(key, None)
            else:
                yield made


class TorchObjects:
    """The optimizers and gradient scalers that are made from now on."""

    def __init__(self) -> None:
        self.optimizers: Instances[Optimizer] = Instances(Optimizer)
        self.scalers: Instances[torch.amp.GradScaler] = Instances(torch.amp.GradScaler)
        self._steppers: weakref.WeakKeyDictionary[Optimizer, torch.amp.GradScaler | None]
        self._steppers = weakref.WeakKeyDictionary()
        """The scaler that has stepped an optimizer last; None: its steps are made without one."""
        self._roots: list[weakref.ref[nn.Module]] = []
        """The outermost modules when they were looked for last."""

    def forget(self) -> None:
        """No longer look for new ones."""
        self.optimizers.forget()
        self.scalers.forget()

    def owners(self, parameters: Sequence[Tensor]) -> list[Optimizer]:
        """The optimizers that step any of these, without those that are a part of another.

        A container of optimizers, itself an ``Optimizer``, has the parameters of its parts.
        """
        wanted = set(map(id, parameters))
        found = [(each, set(map(id, stepped_by(each)))) for each in self.optimizers]
        found = [(each, stepped) for each, stepped in found if not wanted.isdisjoint(stepped)]
        return [
            each for each, stepped in found if not any(stepped < other for _, other in found)
        ]  # fmt: skip

    def scale(self, owners: Sequence[Optimizer]) -> tuple[bool, Tensor | None]:
        """Whether a gradient scaler is in use, and what is still in the gradients of ``owners``.

        Returns:
            Whether there is an enabled scaler that has scaled a loss, unless all of ``owners`` are
            known to step without one; and its scale (0-dim float32) where it has not unscaled the
            gradients yet, else None. Before its first step it is not known of an optimizer.

        Raises:
            ConfigurationError: several scalers with different scales, none of which has unscaled.
        """
        active = self._active()
        states = [s._per_optimizer_states.get(id(each)) for s in active for each in owners]
        if not active or any(s and s["stage"].name != "READY" for s in states):
            return bool(active), None
        if all(self._steppers.get(each, active[0]) is None for each in owners):
            return False, None
        known = [s for s in active if any(self._steppers.get(each) is s for each in owners)]
        active = known or active
        scales = {scaler.get_scale() for scaler in active}
        if len(scales) > 1:
            raise ConfigurationError(
                f"{len(active)} gradient scalers with scales {sorted(scales)}, and gradients are "
                f"clipped that none of them has unscaled: call scaler.unscale_(optimizer) before "
                f"clip_grad_norm_, so that it is known whose they are"
            )
        return True, torch.tensor(scales.pop(), device="cpu")

    def note_step(self, optimizer: Optimizer) -> bool:
        """Note who steps an optimizer, just before its step: whether it is a gradient scaler."""
        scalers = [s for s in self._active() if id(optimizer) in s._per_optimizer_states]
        self._steppers[optimizer] = scalers[0] if scalers else None
        return bool(scalers)

    def unscale_like(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Unscale what other optimizers step of these, where a scaler steps ``optimizer`` now.

        It has unscaled the gradients of this one alone, and they are to be clipped together. Those
        that are known to step without a scaler have nothing to be unscaled.
        """
        scaler = self._steppers.get(optimizer)
        if scaler is None:
            return
        for other in self.owners(parameters):
            if other is optimizer or self._steppers.get(other, scaler) is not scaler:
                continue
            state = scaler._per_optimizer_states.get(id(other))
            if state is None or state["stage"].name == "READY":
                scaler.unscale_(other)

    def _active(self) -> list[torch.amp.GradScaler]:
        return [s for s in self.scalers if s.is_enabled() and s._scale is not None]

    def meant(self, parameters: Sequence[Tensor]) -> tuple[Target, list[Optimizer]]:
        """What a :class:`distclip.GradClipper` of just these parameters is to be built of.

        Their names are those in the outermost modules that have them; without a module those that
        the optimizer was given (``param_names``), or ``group0.0`` and so on. The result is a list,
        so that the ranks of a pipeline may hold different parameters.

        Args:
            parameters: sharded ones where FSDP2 has gathered them.

        Returns:
            The modules or pairs, and the optimizers that step any of the parameters.
        """
        owners = self.owners(parameters)
        wanted = {id(parameter): parameter for parameter in parameters}
        roots = self._covering(wanted)
        there = {id(parameter) for _, named in roots for _, parameter in named}
        alone = [
            (name, parameter)
            for name, parameter in _named_by(owners)
            if id(parameter) in wanted and id(parameter) not in there
        ]
        whole = all(id(p) in wanted or not p.requires_grad for _, named in roots for _, p in named)
        if whole and not alone:
            return [module for module, _ in roots], owners
        parts = [
            Excerpt([(name, p) for name, p in named if id(p) in wanted], [module])
            for module, named in roots
        ]
        return [ModulePart(each) for each in (*parts, Excerpt(alone, [])) if each], owners

    def _covering(self, wanted: dict[int, Tensor]) -> list[tuple[nn.Module, Named]]:
        """Outermost modules that have the parameters, each of which adds some; with all they have.

        Looking for modules takes a part of a second: what was found last is looked at first.
        """
        known = [module for reference in self._roots if (module := reference()) is not None]
        chosen = _chosen(known, wanted)
        if wanted.keys() <= {id(parameter) for _, named in chosen for _, parameter in named}:
            return chosen
        found = _outermost()
        self._roots = [weakref.ref(module) for module in found]
        return _chosen(found, wanted)


class ModulePart(nn.Module):
    """Some of the parameters of a module, under their names in it."""

    def __init__(self, excerpt: Excerpt) -> None:
        super().__init__()
        self.excerpt = excerpt

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The given pairs, whatever the arguments."""
        yield from self.excerpt  # type: ignore[misc]


def _chosen(
    modules: Sequence[nn.Module], wanted: dict[int, Tensor]
) -> list[tuple[nn.Module, Named]]:
    """The modules that have wanted parameters, each with those that it has, by name.

    The same on all ranks, which make their objects in another order: by what is in the modules.
    """
    found = []
    for module in modules:
        named = meant([(without_wrappers(name), p) for name, p in module.named_parameters()])
        mine = [name for name, parameter in named if id(parameter) in wanted]
        if mine:
            key = (-len(mine), len(named), type(module).__name__, tuple(mine))
            found.append((key, module, named))
    chosen: list[tuple[nn.Module, Named]] = []
    missing = set(wanted)
    for _, module, named in sorted(found, key=lambda each: each[0]):
        mine_ids = {id(parameter) for _, parameter in named}
        if not missing.isdisjoint(mine_ids):
            missing -= mine_ids
            chosen.append((module, named))
    return chosen


def _outermost() -> list[nn.Module]:
    """The living modules that are in no other module."""
    gc.collect()  # a module that is only still there on some ranks would be taken there
    modules = [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]
    inner = {id(child) for module in modules for child in module.children()}
    return [m for m in modules if id(m) not in inner and not isinstance(m, ModulePart)]


def _named_by(owners: Sequence[Optimizer]) -> Named:
    """The parameters of optimizers, by the names that they were given, or by their positions."""
    named: Named = []
    groups = [group for owner in owners for group in owner.param_groups]
    for number, group in enumerate(groups):
        names = group.get("param_names") or [
            f"group{number}.{position}" for position in range(len(group["params"]))
        ]
        named += [(without_wrappers(n), p) for n, p in zip(names, group["params"], strict=True)]
    return list({id(parameter): (name, parameter) for name, parameter in named}.values())
