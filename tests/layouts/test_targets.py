"""What may be given as a target, and what the parameters are called then."""

import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

import distclip
from distclip import GradClipper, policies
from distclip.layouts.names import named_parameters, without_wrappers


def parts() -> list[nn.Parameter]:
    made = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    for each in made:
        each.grad = torch.full_like(each, 3.0)
    return made


def model() -> nn.Module:
    built = nn.Linear(2, 3)
    for parameter in built.parameters():
        parameter.grad = torch.ones_like(parameter)
    return built


FORMS: dict[str, Callable[[], Any]] = {
    "list": parts,
    "tuple": lambda: tuple(parts()),
    "generator": lambda: (each for each in parts()),
    "ParameterList": lambda: nn.ParameterList(parts()),
    "ParameterDict": lambda: nn.ParameterDict({"a": parts()[0], "b": parts()[1]}),
    "dict": lambda: dict(zip("ab", parts(), strict=True)),
    "OrderedDict": lambda: OrderedDict(zip("ab", parts(), strict=True)),
    "values": lambda: dict(zip("ab", parts(), strict=True)).values(),
    "items": lambda: dict(zip("ab", parts(), strict=True)).items(),
    "mapping proxy": lambda: types.MappingProxyType(dict(zip("ab", parts(), strict=True))),
    "one parameter": lambda: parts()[1],
    "parameters()": lambda: model().parameters(),
    "named_parameters()": lambda: model().named_parameters(),
    "none at all": list,
}
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "clip_grad_norm_": lambda target: distclip.clip_grad_norm_(target, 1.0),
    "clip_grad_value_": lambda target: distclip.clip_grad_value_(target, 1.0),
    "clip_grad_agc_": distclip.clip_grad_agc_,
    "GradClipper": lambda target: GradClipper(target, policies.global_norm(1.0)).clip_(),
}


def tensors(form: Any) -> list[Tensor]:
    """Everything in it, found without the library."""
    if isinstance(form, Tensor):
        return [form]
    if isinstance(form, nn.Module):
        return list(form.parameters())
    if hasattr(form, "values"):
        form = form.values()
    return [each[1] if isinstance(each, tuple) else each for each in form]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_form_of_parameters_is_clipped(form: str, function: str) -> None:
    target = FORMS[form]()
    if hasattr(target, "gi_frame"):  # to look at what it has given
        members = tensors(target)
        target = (each for each in members)
    else:
        members = tensors(target)
    FUNCTIONS[function](target)
    if members:
        total = torch.cat([each.grad.flatten() for each in members]).norm()  # type: ignore[union-attr]
        assert total.item() <= (3.0 if "value" in function else 1.00001)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("function", [*FUNCTIONS, "grad_norms"])
def test_what_is_no_target_is_refused_with_a_mend_of_that_function(function: str) -> None:
    act = FUNCTIONS.get(function, distclip.grad_norms)
    optimizer = torch.optim.SGD(parts(), lr=0.1)
    for target, words in (
        (optimizer.param_groups, r"\[p for group in optimizer.param_groups for p in group"),
        (optimizer, "got torch.optim.sgd.SGD"),
        (None, "got builtins.NoneType"),
        (["a"], "got builtins.str"),
        ([parts()], "got builtins.list"),
    ):
        with pytest.raises(distclip.ConfigurationError, match=words):
            act(target)
    lazy = nn.LazyLinear(3)
    with pytest.raises(distclip.ConfigurationError, match=r"lazy module .* run one before"):
        act(lazy.parameters() if function in FUNCTIONS else lazy)
    for layout in (torch.strided, torch.jagged):
        ragged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)
        with pytest.raises(distclip.UnsupportedGradientError, match="is a nested tensor"):
            act([("w", nn.Parameter(ragged))])


def test_the_mend_for_parameter_groups_works() -> None:
    optimizer = torch.optim.SGD([{"params": parts()}, {"params": parts()}], lr=0.1)
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    for function in FUNCTIONS.values():
        function(listed)


@pytest.mark.ranks(1, 2)
def test_a_set_has_no_order_that_ranks_could_share() -> None:
    with pytest.raises(distclip.ConfigurationError, match="set, whose order"):
        GradClipper(set(parts()), policies.measure())
    if dist.get_world_size() == 1:
        assert distclip.clip_grad_norm_(set(parts()), 1.0) > 1.0
    else:
        with pytest.raises(distclip.ConfigurationError, match="set, whose order"):
            distclip.clip_grad_norm_(set(parts()), 1.0)


@pytest.mark.ranks(2)
def test_a_lazy_parameter_of_one_rank_is_an_error_on_all() -> None:
    layer: Any = nn.LazyLinear(3) if dist.get_rank() else nn.Linear(2, 3)
    with pytest.raises(distclip.DistclipError, match=r"lazy module|rank 1 cannot"):
        GradClipper(layer, policies.measure())


def test_an_optimizer_that_only_stands_for_layerwise_ones() -> None:
    """That of transformers; tests/integrations/test_accelerate_attaching.py has the real one."""

    class LayerWiseDummyOptimizer(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([torch.randn(1, 1)], {"lr": 0.1})

    clipper = GradClipper(parts(), policies.measure())
    with pytest.raises(distclip.UnsupportedGradientError, match="updated during backward"):
        clipper.attach(LayerWiseDummyOptimizer())


# ---- names --------------------------------------------------------------------------------------


class Forwarding(nn.Module):
    """As Fabric's wrapper: the strategy's module, and the user's own once more."""

    def __init__(self, forward_module: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self._forward_module = forward_module
        self._original_module = original


class Held(nn.Module):
    def __init__(self, name: str, held: nn.Module) -> None:
        super().__init__()
        self.add_module(name, held)


def inner() -> nn.Sequential:
    out = Held("module", nn.Linear(3, 3, bias=False))
    return nn.Sequential(OrderedDict(fc=nn.Linear(2, 3), out=out))


NAMES = ["fc.weight", "fc.bias", "out.module.weight"]


def peft(built: nn.Module) -> nn.Module:
    return Held("base_model", Held("model", built))


@pytest.mark.ranks(1)
def test_wrappers_are_no_part_of_a_name() -> None:
    parallel = nn.parallel.DistributedDataParallel
    wrapped: dict[str, Callable[[nn.Module], nn.Module]] = {
        "nothing": lambda built: built,
        "Fabric": lambda built: Forwarding(built, built),
        "Fabric, DDP": lambda built: Forwarding(parallel(built), built),
        "Fabric, compiled": lambda built: Forwarding(torch.compile(built), built),  # type: ignore[arg-type]
        "compiled DDP": lambda built: torch.compile(parallel(built)),  # type: ignore[return-value]
        "DDP, compiled": lambda built: parallel(torch.compile(built)),  # type: ignore[arg-type]
        "average": AveragedModel,
        "average of DDP": lambda built: AveragedModel(parallel(built)),
        "PEFT": peft,
        "DDP, PEFT": lambda built: parallel(peft(built)),
        "DataParallel": nn.DataParallel,
    }
    for name, wrap in wrapped.items():
        found = [each for each, _ in named_parameters(wrap(inner()))]
        assert found == NAMES, name


def test_parametrised_weights_are_called_weights() -> None:
    built = inner()
    parametrizations.orthogonal(built.fc)
    parametrizations.weight_norm(built.out.module)  # type: ignore[union-attr, arg-type]
    assert sorted(name for name, _ in named_parameters(built)) == [
        "fc.bias",
        "fc.weight",
        "out.module.weight.original0",
        "out.module.weight.original1",
    ]
    lone = nn.Linear(2, 2, bias=False)
    parametrize.register_parametrization(lone, "weight", nn.Identity())
    assert [name for name, _ in named_parameters(lone)] == ["weight"]


@pytest.mark.parametrize(
    "name",
    [
        "module",
        "encoder.module.weight",
        "base_model.weight",
        "encoder.base_model.model.weight",
        "model.base_model.weight",
        "original",
        "base_model.model",
        "parametrizations.weight",
    ],
)
def test_what_may_be_the_users_own_stays(name: str) -> None:
    assert without_wrappers(name) == name
