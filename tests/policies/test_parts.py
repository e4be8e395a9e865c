"""Parts of a model in words: what they hold, what cannot be read, and what is reported."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from distclip import ConfigurationError, GradClipper, from_config, policies
from distclip.config import load
from distclip.policies import ParameterInfo
from distclip.policies.parts import part

PARAMETERS = {
    info.name: info
    for info in (
        ParameterInfo("embed_tokens.weight", (11, 4)),
        ParameterInfo("wte.weight", (11, 4)),
        ParameterInfo("tokens.weight", (11, 4), module=("FSDPEmbedding", "Embedding")),
        ParameterInfo("embed_out.weight", (11, 4), module=("Linear",)),
        ParameterInfo("layers.0.q_norm.weight", (4,)),
        ParameterInfo("layers.0.ln_1.bias", (4,)),
        ParameterInfo("layers.0.scale.weight", (4,), module=("LlamaRMSNorm",)),
        ParameterInfo("layers.0.attn.in_proj_bias", (12,)),
        ParameterInfo("layers.0.fc.weight", (4, 4), 0, ("Muon",), (("clip", "False"),)),
        ParameterInfo("layers.0.fc.lora_A.default.weight", (2, 4), 1, ("AdamW", "Adam")),
        ParameterInfo("layers.1.mlp.experts.w1", (3, 4, 4)),
        ParameterInfo("layers.1.mlp.experts.2.w1.weight", (4, 4)),
        ParameterInfo("layers.1.mlp.shared_experts.w1.weight", (4, 4)),
        ParameterInfo("layers.1.own@1", (4, 4)),
        ParameterInfo("temperature", ()),
    )
}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("kind=embedding", "embed_tokens.weight wte.weight tokens.weight"),
        ("kind=norm", "layers.0.q_norm.weight layers.0.ln_1.bias layers.0.scale.weight"),
        ("kind=bias", "layers.0.ln_1.bias layers.0.attn.in_proj_bias"),
        ("kind=bias, not kind=norm", "layers.0.attn.in_proj_bias"),
        ("kind=lora", "layers.0.fc.lora_A.default.weight"),
        ("kind=vector, not kind=norm|bias", "temperature"),
        (
            "kind=expert",
            "layers.1.mlp.experts.w1 layers.1.mlp.experts.2.w1.weight layers.1.own@1",
        ),
        ("optimizer=Muon", "layers.0.fc.weight"),
        ("optimizer=Adam", "layers.0.fc.lora_A.default.weight"),
        ("group.clip=false", "layers.0.fc.weight"),
        ("name=wte.*|temperature", "wte.weight temperature"),
        ("name=wte.* or optimizer=*Muon*, kind=matrix", "wte.weight layers.0.fc.weight"),
        ("kind=matrix, name=layers.1.*, not kind=expert", "layers.1.mlp.shared_experts.w1.weight"),
        ("optimizer=Lion", ""),
        ("group.lr=0.1", ""),
    ],
)
def test_what_a_part_holds(text: str, names: str) -> None:
    held = {name for name, info in PARAMETERS.items() if part(text).holds(info)}
    assert held == set(names.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind=matrx", "no kind 'matrx'; the kinds are matrix, vector"),
        ("bias", "'bias' is no condition key=value"),
        ("kind=", "no condition key=value"),
        ("optimzer=Muon", "no key 'optimzer'; the keys are name, kind, optimizer, group.KEY"),
        ("group.=1", r"no key 'group\.'"),
        (3, "a part of a model is a text"),
    ],
)
def test_what_cannot_be_read(text: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        policies.by_part({text: None})


class Little(nn.Module):
    """An embedding, a matrix, a norm and a bias, with gradients of known size."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(4, 2)
        self.fc = nn.Linear(2, 2)
        self.last = nn.LayerNorm(2)
        for number, parameter in enumerate(self.parameters()):
            parameter.grad = torch.full_like(parameter, float(number + 1))

    def norm(self, *names: str) -> float:
        chosen = [dict(self.named_parameters())[name].grad for name in names]
        return math.sqrt(sum(g.double().square().sum().item() for g in chosen if g is not None))


def test_a_part_has_its_own_norm_and_the_report_has_all() -> None:
    model = Little()
    everything = model.norm(*dict(model.named_parameters()))
    embedding, vectors = model.norm("tokens.weight"), ("fc.bias", "last.weight", "last.bias")
    others = model.norm(*vectors)
    policy = policies.by_part(
        {"kind=embedding": None, "kind=matrix": policies.value(0.5)}, policies.global_norm(1.0)
    )
    report = GradClipper(model, policy).clip_()
    assert report.total_norm.item() == pytest.approx(everything)
    assert report.part_norms == {
        "kind=embedding": pytest.approx(embedding),
        "kind=matrix": pytest.approx(4.0),
        "default": pytest.approx(others),
    }
    assert report.to_dict()["parts"] == report.part_norms
    assert model.norm("tokens.weight") == pytest.approx(embedding)
    assert model.norm("fc.weight") == pytest.approx(1.0)
    assert model.norm(*vectors) == pytest.approx(1.0)
    assert GradClipper(Little(), policies.global_norm(1.0)).clip_().part_norms == {}


def test_keys_of_parameter_groups() -> None:
    model = Little()
    groups = [
        {"params": [model.tokens.weight], "clip": False},
        {"params": [model.fc.weight], "clip_policy": "agc"},
        {"params": [model.fc.bias, *model.last.parameters()]},
    ]
    policy = policies.by_part(
        {"group.clip=False": None, "group.clip_policy=agc": policies.agc(0.01)},
        policies.global_norm(1.0),
    )
    clipper = GradClipper(model, policy)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(ConfigurationError, match=r"by_part tells parameters apart by the optimi"):
        clipper.clip_()
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())  # type: ignore
    handle = clipper.attach(torch.optim.SGD(groups, lr=0.0))
    report = clipper.clip_()
    assert list(report.part_norms) == ["group.clip=False", "group.clip_policy=agc", "default"]
    assert report.parameter_coefficients["tokens.weight"] == 1.0
    assert report.parameter_coefficients["fc.weight"] < 0.1
    assert model.norm("fc.bias", "last.weight", "last.bias") == pytest.approx(1.0)
    handle.remove()


def test_memory_begins_anew_where_a_part_has_other_parameters() -> None:
    model = Little()
    first = torch.optim.Adam([model.fc.weight])
    second = torch.optim.SGD([p for p in model.parameters() if p is not model.fc.weight], lr=0.1)
    clipper = GradClipper(model, policies.by_part({"optimizer=Adam": policies.adagc()}))
    clipper.attach(first, second).remove()
    clipper.clip_()
    assert clipper.state_dict()["states"]["[optimizer=Adam]"]["by_parameter"]["gamma"].keys() == {  # type: ignore[index]
        "fc.weight"
    }
    clipper.attach(torch.optim.Adam(model.parameters()))
    clipper.clip_()
    gamma = clipper.state_dict()["states"]["[optimizer=Adam]"]["by_parameter"]["gamma"]  # type: ignore[index]
    assert gamma.keys() == {"tokens.weight", "fc.weight", "fc.bias", "last.weight", "last.bias"}


def test_in_a_configuration() -> None:
    text = {
        "policy": {"name": "global_norm", "max_norm": 1.0},
        "by_part": {"kind=embedding": None, "kind=norm|bias": {"name": "value", "clip_value": 0.1}},
    }
    assert load(text).policy == policies.by_part(
        {"kind=embedding": None, "kind=norm|bias": policies.value(0.1)}, policies.global_norm(1.0)
    )
    model = Little()
    from_config(text, model).clip_()
    assert model.norm("fc.weight") == pytest.approx(1.0)
    assert load({"policy": {"name": "muon_aware", "max_norm": 1.0}}).policy == policies.muon_aware(
        1.0
    )
    with pytest.raises(ConfigurationError, match=r"by_part.*no kind 'norms'"):
        load({"by_part": {"kind=norms": None}})
    with pytest.raises(ConfigurationError, match="given beside by_part"):
        load({"by_part": {"kind=norm": None}, "by_name": {"a": None}})


def test_a_part_that_holds_nothing_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    GradClipper(Little(), policies.by_part({"kind=lora": None, "kind=norm": None}))
    assert "no parameter matches 'kind=lora'," in caplog.text
    caplog.clear()
    model = Little()
    clipper = GradClipper(model, policies.muon_aware(1.0))
    assert not caplog.text  # nobody knows yet
    clipper.attach(torch.optim.AdamW(model.parameters()))
    assert "no parameter matches 'group.use_muon=True or" in caplog.text
