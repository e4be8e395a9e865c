"""The options of a parameter group, checked one by one."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from distclip.errors import ConfigurationError
from distclip.layouts import names as naming
from distclip.layouts.detect import detect
from distclip.layouts.names import Named, Target
from distclip.optim.schedule import Schedule
from distclip.policies import checks

DecayMask: TypeAlias = Callable[[str, Tensor], bool] | Sequence[str] | None
"""Which parameters decay: a function of name and parameter, name patterns, or None (see LaProp)."""

_Finite = Annotated[float, checks.Limit("finite and >= 0", finite=True, minimum=0)]

FLAGS = ("nesterov", "maximize", "capturable")


def checked_options(where: str, options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with every value checked and as the type that is stored.

    Raises:
        ConfigurationError: names the option, the value, and what it may be.
    """
    result = dict(options)
    lr = options["lr"]
    if isinstance(lr, Tensor) and (lr.numel() != 1 or not lr.is_floating_point()):
        raise ConfigurationError(
            f"{where}: lr must be a number or a tensor of one floating-point element, got shape "
            f"{list(lr.shape)} of {lr.dtype}"
        )
    if not isinstance(lr, Tensor):
        result["lr"] = checks.checked(where, "lr", lr, _Finite)
    result["betas"] = _betas(where, options["betas"])
    result["eps"] = checks.checked(where, "eps", options["eps"], checks.Positive)
    if (
        torch.tensor(result["eps"], dtype=torch.float32, device="cpu")
        < torch.finfo(torch.float32).tiny
    ):
        raise ConfigurationError(
            f"{where}: eps must be at least 1.2e-38, the smallest normal float32, got "
            f"{options['eps']!r}: below it a zero gradient may give 0 / 0"
        )
    for key in ("weight_decay", "agc"):  # agc=0: no clipping
        result[key] = checks.checked(where, key, options[key], _Finite)
    result["pmin"] = checks.checked(where, "pmin", options["pmin"], checks.Positive)
    for key in ("warmup", "anneal"):
        result[key] = _count(where, key, options[key])
    for key in FLAGS:
        if not isinstance(options[key], bool):
            raise ConfigurationError(f"{where}: {key} must be True or False, got {options[key]!r}")
    if options["foreach"] not in (None, True, False):
        raise ConfigurationError(
            f"{where}: foreach must be True, False or None, got {options['foreach']!r}"
        )
    _check_schedule(where, result)
    if result["capturable"] and result["agc"]:
        raise ConfigurationError(
            f"{where}: capturable=True with agc={result['agc']}: the clipping cannot be captured "
            f"in a graph; set agc=0 and clip before the graph is replayed, with "
            f"GradClipper(model, policies.dreamer_agc({result['agc']})).clip_()"
        )
    return result


def _betas(where: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ConfigurationError(
            f"{where}: betas must be two numbers (momentum, RMS) such as (0.9, 0.999), got "
            f"{value!r}"
        )
    first, second = (
        checks.checked(where, f"betas[{i}]", beta, checks.Fraction) for i, beta in enumerate(value)
    )
    return first, second


def _count(where: str, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(
            f"{where}: {key} must be a whole number of updates >= 0, got {value!r}"
        )
    return value


def _check_schedule(where: str, options: dict[str, Any]) -> None:
    schedule, warmup, anneal = options["schedule"], options["warmup"], options["anneal"]
    known = get_args(Schedule)
    if schedule not in known:
        near = difflib.get_close_matches(str(schedule), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(
            f"{where}: schedule must be one of {', '.join(map(repr, known))}, got "
            f"{schedule!r}{hint}"
        )
    if schedule == "const" and anneal:
        raise ConfigurationError(
            f"{where}: anneal={anneal} has no meaning with schedule='const'; choose "
            f"schedule='linear' or 'cosine', or leave anneal at 0"
        )
    if schedule != "const" and anneal <= warmup:
        raise ConfigurationError(
            f"{where}: schedule={schedule!r} ends at update anneal={anneal}, which must come after "
            f"the warm-up (warmup={warmup}); set anneal to the number of updates of the run"
        )


def groups_of(params: Target | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the user handed over, as parameter groups.

    Raises:
        ConfigurationError: no parameters, or a set of them (whose order changes between runs).
    """
    if isinstance(params, (set, frozenset)):
        raise ConfigurationError("params is a set, whose order changes between runs; give a list")
    items: Any = params
    if not isinstance(params, (nn.Module, Tensor, Mapping)) and isinstance(params, Iterable):
        items = list(params)
        if items and all(isinstance(item, dict) for item in items):
            return cast(list[dict[str, Any]], items)
    if not naming.named_parameters(items):
        raise ConfigurationError("params has no parameters: there is nothing to optimize")
    return [{"params": items}]


def named_in_group(params: Any, taken: Sequence[str]) -> Named:
    """Named parameters of one group; those without a name are numbered through all groups.

    Raises:
        ConfigurationError: a set, or a name that another group has.
    """
    if isinstance(params, (set, frozenset)):
        raise ConfigurationError("params is a set, whose order changes between runs; give a list")
    if not isinstance(params, (nn.Module, Tensor, Mapping)) and isinstance(params, Iterable):
        params = list(params)
    named = naming.named_parameters(params)
    tensors = [params] if isinstance(params, Tensor) else params
    if isinstance(tensors, list) and all(isinstance(item, Tensor) for item in tensors):
        named = [(str(len(taken) + int(name)), parameter) for name, parameter in named]
    repeated = {name for name, _ in named} & set(taken)
    if repeated:
        raise ConfigurationError(
            f"two parameter groups have a parameter called {min(repeated)!r}; give (name, "
            f"parameter) pairs with distinct names"
        )
    return named


def decayed(named: Named, mask: DecayMask) -> list[bool]:
    """Which parameters weight decay acts on.

    Args:
        named: the parameters of one group.
        mask: see :class:`distclip.optim.LaProp`. By default those whose logical (unsharded) shape
            has two dims or more.
    """
    if mask is None:
        # A flat tensor that stands for many parameters decays as a whole if any of them does.
        return [
            any(len(entry.shape) > 1 for entry, _ in detect(name, parameter))
            for name, parameter in named
        ]
    if callable(mask):
        return [bool(mask(name, parameter)) for name, parameter in named]
    return [any(fnmatch.fnmatchcase(name, pattern) for pattern in mask) for name, _ in named]


def check_mask(mask: DecayMask) -> None:
    """Refuse what is no mask; a lone string would be taken for a list of letters."""
    fits = mask is None or callable(mask)
    if not fits and isinstance(mask, Iterable) and not isinstance(mask, (str, bytes)):
        fits = all(isinstance(pattern, str) for pattern in mask)
    if not fits:
        raise ConfigurationError(
            f"decay_mask must be a function (name, parameter) -> bool, a list of name patterns "
            f"such as ['*.weight'], or None, got {mask!r}"
        )
