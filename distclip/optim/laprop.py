"""LaProp with adaptive clipping, weight decay and a schedule: DreamerV3's chain as an optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from distclip.errors import ConfigurationError, StateError
from distclip.layouts import plain, tensors
from distclip.layouts.names import Target
from distclip.optim import options as opts
from distclip.optim.clipping import Clipping
from distclip.optim.schedule import Schedule, learning_rate
from distclip.optim.update import Four, update_, update_captured_
from distclip.options import OnNonfinite, check_on_nonfinite, refuse_late
from distclip.report import ClipReport

FIRST, SECOND = AVERAGES = ("exp_avg", "exp_avg_sq")


class LaProp(Optimizer):
    """LaProp: gradients are scaled by their RMS first, and momentum is taken of the result.

    ::

        v = b2 v + (1 - b2) g^2
        m = b1 m + (1 - b1) g / (sqrt(v / (1 - b2^t)) + eps)
        p = p - lr(t) (m / (1 - b1^t) + weight_decay p)

    Ziyin et al. 2020 (arXiv 2002.04839), in the form of DreamerV3 (Hafner et al., arXiv
    2301.04104, ``embodied/jax/opt.py``), whose whole chain :func:`distclip.optim.dreamer_v3` is.
    With ``agc``, gradients are clipped in place before each update, by
    ``policies.dreamer_agc(agc, pmin)`` over whole tensors, whatever their sharding: one all-reduce
    a step. Call ``step`` on every rank then, gradients there or not.

    Takes plain parameters and DTensors (FSDP2, HSDP, TP), of mixed dtypes. Moments are float32
    (float64 for float64, complex for complex), sharded as the parameter; bf16 and fp16 parameters
    are updated in float32 and rounded once. A parameter without a gradient is left alone and does
    not count the step. Sparse gradients are refused.

    All arguments up to ``capturable``, and ``decay_mask``, may differ between parameter groups.

    Args:
        params: module, list of modules, parameters, (name, parameter) pairs, or dicts of options
            with such ``"params"``.
        lr: base learning rate, >= 0; a tensor of one element too. torch's LR schedulers change it.
        betas: decay rates of momentum and RMS, >= 0 and < 1.
        eps: added to the root, after bias correction; > 0.
        weight_decay: decoupled, multiplied by lr; >= 0.
        nesterov: ``((1 - b1) u + b1 m) / (1 - b1^t)`` in place of ``m / (1 - b1^t)``.
        agc: largest ratio of gradient norm to weight norm, per tensor; 0 does not clip.
        pmin: floor of the weight norm in that ratio; > 0.
        warmup: updates over which lr rises from 0; the first update is then exactly zero.
        schedule: ``"const"``, ``"linear"`` (to 0.1 lr) or ``"cosine"`` (to 0.1 lr^2), see
            :func:`distclip.optim.schedule.learning_rate`. Counted per group, in steps in which the
            group has a gradient.
        anneal: the update at which ``"linear"`` and ``"cosine"`` end.
        decay_mask: which parameters decay: a function (name, parameter) -> bool, or a list of
            name patterns (``fnmatch``). None: those of two dims or more, so weights and not biases
            or gains. (DreamerV3: names that end in ``/kernel``, so not its embeddings.)
        maximize: ascend.
        foreach: several tensors to a kernel; False: tensor by tensor. The results are the same.
        capturable: keep step counts on the parameters' device and read nothing on the host. Not
            together with ``agc`` or an ``on_nonfinite`` other than ``"pass"``.
        on_nonfinite: as in :class:`distclip.GradClipper`, for all gradients: ``"pass"`` (do not
            look), ``"error"``, ``"skip"`` (nothing at all changes), ``"zero"``.
        process_group: the ranks that hold these parameters together; all ranks by default.

    Raises:
        ConfigurationError: an argument that cannot be meant, by name.
        UnsupportedGradientError: from ``step``, a sparse gradient or one that does not fit its
            parameter; nothing was changed.
        RankMismatchError: from ``step``, with ``agc``: ranks that disagree.
    """

    def __init__(
        self,
        params: Target | Iterable[dict[str, Any]],
        lr: float | Tensor = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        agc: float = 0.0,
        pmin: float = 1e-3,
        warmup: int = 0,
        schedule: Schedule = "const",
        anneal: int = 0,
        decay_mask: opts.DecayMask = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        on_nonfinite: OnNonfinite = "pass",
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_on_nonfinite(on_nonfinite)
        refuse_late(on_nonfinite, "LaProp")
        opts.check_mask(decay_mask)
        self._clipping = Clipping(on_nonfinite, process_group)
        self._decay_mask = decay_mask
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "agc": agc,
            "pmin": pmin,
            "warmup": warmup,
            "schedule": schedule,
            "anneal": anneal,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
        }
        super().__init__(opts.groups_of(params), opts.checked_options("LaProp", defaults))

    @property
    def report(self) -> ClipReport | None:
        """What the clipping of the last step found and did; None where there is none."""
        return self._clipping.report

    def learning_rates(self) -> list[float]:
        """The rate of each group's next update: its lr, warmed up and scheduled."""
        return [float(self._rate(group)) for group in self.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it warms up by itself. Do it on every rank.

        Raises:
            ConfigurationError: an option that cannot be meant; nothing was added.
        """
        group = dict(param_group)
        where = "LaProp" if not self.param_groups else f"LaProp group {len(self.param_groups)}"
        mask = group.pop("decay_mask", self._decay_mask)
        opts.check_mask(mask)
        taken = [name for other in self.param_groups for name in other["param_names"]]
        named = opts.named_in_group(group["params"], taken)
        group = opts.checked_options(where, {**self.defaults, **group})
        if group["capturable"] and self._clipping.on_nonfinite != "pass":
            raise ConfigurationError(
                f"{where}: capturable=True with on_nonfinite={self._clipping.on_nonfinite!r}: "
                f"looking at the gradients cannot be captured in a graph; use on_nonfinite='pass'"
            )
        group["params"] = named
        group.setdefault("updates", 0)
        group.setdefault("decayed", None)
        if group["decayed"] is None and (group["weight_decay"] or mask is not None):
            group["decayed"] = opts.decayed(named, mask)
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip where ``agc`` says so, and make one update.

        Args:
            closure: evaluates the model and returns the loss; called once, with gradients on.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # the clipping takes sparse gradients, the update does not
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter.grad is not None:
                    plain.check_dense(name, parameter.grad)
        if self._clipping.clip_(self.param_groups):
            return loss
        # All gradients are looked at before any parameter changes.
        present = [self._present(group) for group in self.param_groups]
        for group, pairs in zip(self.param_groups, present, strict=True):
            if pairs:
                self._update(group, pairs)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave. Moments keep their precision whatever the parameters'.

        Raises:
            StateError: the state of another optimizer.
            ValueError: other groups, as torch has it.
        """
        final: list[dict[str, Any]] = []

        def keep(_: Optimizer, loaded: dict[str, Any]) -> None:
            _check_state(loaded)
            final.append(loaded)

        hook = self.register_load_state_dict_pre_hook(keep)  # the last: it sees what is loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        saved = itertools.chain.from_iterable(g["params"] for g in final[0]["param_groups"])
        mine = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
        for key, parameter in zip(saved, mine, strict=True):
            # torch has cast the moments to the parameter's dtype, which may be a lower one.
            for name in AVERAGES if key in final[0]["state"] else ():
                value = final[0]["state"][key][name]
                state = self.state[parameter]
                if state[name].dtype != _moment_dtype(parameter):
                    state[name] = value.to(state[name].device, _moment_dtype(parameter), copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("_clipping", "_decay_mask")}
        return {**super().__getstate__(), **own}

    def _present(self, group: dict[str, Any]) -> list[tuple[int, Tensor]]:
        """``(position in the group, local gradient)`` of the parameters that have a gradient."""
        pairs = []
        for number, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            gradient = tensors.gradient_here(group["param_names"][number], parameter)
            if gradient is not None:
                pairs.append((number, gradient))
        return pairs

    def _rate(self, group: dict[str, Any]) -> float | Tensor:
        return learning_rate(
            group["lr"], group["updates"], group["warmup"], group["schedule"], group["anneal"]
        )

    def _state_of(self, parameter: Tensor, capturable: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            where = parameter.device if capturable else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=where)
            for name in AVERAGES:
                state[name] = torch.zeros_like(
                    parameter, dtype=_moment_dtype(parameter), memory_format=torch.preserve_format
                )
        return state

    def _update(self, group: dict[str, Any], pairs: list[tuple[int, Tensor]]) -> None:
        capturable = group["capturable"]
        parameters = [group["params"][number] for number, _ in pairs]
        states = [self._state_of(parameter, capturable) for parameter in parameters]
        if capturable and not isinstance(group["updates"], Tensor):
            device = parameters[0].device
            group["updates"] = torch.tensor(float(group["updates"]), device=device)
        rate = self._rate(group)
        group["updates"] += 1
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, _ONE.to(steps[0].device), alpha=1.0)
        parts: list[Four] = [
            (_local(parameter), _local(gradient), _local(state[FIRST]), _local(state[SECOND]))
            for parameter, (_, gradient), state in zip(parameters, pairs, states, strict=True)
        ]
        if group["weight_decay"] and group["decayed"] is None:  # it was 0 when the group was made
            named = list(zip(group["param_names"], group["params"], strict=True))
            group["decayed"] = opts.decayed(named, None)
        decays = [bool(group["weight_decay"]) and group["decayed"][n] for n, _ in pairs]
        if capturable:
            update_captured_(group, rate, parts, steps, decays)
        else:
            update_(group, float(rate), parts, [step.item() for step in steps], decays)
        sharded = [parameter for parameter in parameters if tensors.is_sharded(parameter)]
        if sharded:  # autograd does not see what becomes of their local tensors
            increment_version(sharded)


_ONE = torch.tensor(1.0, device="cpu")


def _local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, complex numbers as pairs."""
    local = tensors.values_here(tensor)
    local = local.resolve_conj().resolve_neg()  # itself, but for gradients that autograd left so
    return torch.view_as_real(local) if local.is_complex() else local


def _moment_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _check_state(loaded: dict[str, Any]) -> None:
    """Adam's moments have the same names and mean something else."""
    for number, group in enumerate(loaded["param_groups"]):
        missing = sorted({"agc", "pmin", "updates", "decayed"} - set(group))
        if missing:
            raise StateError(
                f"this is not the state of a LaProp: its parameter group {number} has no "
                f"{', '.join(map(repr, missing))}; start LaProp with fresh moments instead"
            )
