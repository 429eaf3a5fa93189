"""Which parts of a model are not transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from granite_paged.errors import UnsupportedModel
from granite_paged.layers.modules import changed_part, check_model, check_supported, is_own
from granite_paged.layers.one_token import TokenByToken
from tests.helpers.tiny_models import shortest_model

FRAMES = [
    "model.layers.0",
    "model.layers.0.mamba",
    "model.layers.0.mamba.conv1d",
    "model.layers.1.self_attn",
]
PARTS = ["model.embed_tokens", "model.layers.1.self_attn.q_proj", "model.norm", "lm_head"]


class OtherWeight(nn.Parameter):
    """A weight of another class."""


class OtherLinear(nn.Linear):
    """A layer of another class."""


@pytest.fixture
def model() -> Any:
    return shortest_model()


def hook(module: Any) -> None:
    module.register_forward_hook(lambda *_: None)


def pre_hook(module: Any) -> None:
    module.register_forward_pre_hook(lambda *_: None)


def own_forward(module: Any) -> None:
    module.forward = module.forward


CHANGES: dict[str, Callable[[Any], None]] = {
    "has a hook": hook,
    "has a forward of its own": own_forward,
}


def test_an_unchanged_model_is_supported_and_has_no_changed_part(model: Any) -> None:
    check_supported(model)
    check_model(model)
    assert changed_part(model) == ""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("frame", FRAMES)
def test_a_changed_frame_is_refused_by_name(model: Any, frame: str, change: str) -> None:
    CHANGES[change](model.get_submodule(frame))
    assert changed_part(model) == "", "it is no part that is called as a module"
    with pytest.raises(UnsupportedModel, match=f"{frame}, which {change},"):
        check_model(model)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", PARTS)
def test_a_changed_part_is_named_and_may_run(model: Any, part: str, change: str) -> None:
    CHANGES[change](model.get_submodule(part))
    check_model(model)
    assert changed_part(model) == f"{part} {change}"


def test_a_hook_before_a_part_counts(model: Any) -> None:
    pre_hook(model.lm_head)
    assert changed_part(model) == "lm_head has a hook"


def test_the_model_and_its_decoder_are_no_parts(model: Any) -> None:
    """Patches hook them."""
    for module in (model, model.model):
        hook(module)
    assert changed_part(model) == ""


def test_a_forward_by_tokens_is_no_change(model: Any) -> None:
    """Exact mode puts it there."""
    model.lm_head.forward = TokenByToken(model.lm_head.forward)
    assert changed_part(model) == ""


def test_a_module_of_another_class_is_named(model: Any) -> None:
    model.lm_head = OtherLinear(48, 97, bias=False)
    assert changed_part(model) == "lm_head is a OtherLinear"
    assert is_own(nn.Linear(1, 1))
    assert not is_own(model.lm_head)


def test_a_parametrized_module_is_named(model: Any) -> None:
    parametrize.register_parametrization(model.lm_head, "weight", nn.Identity())
    assert changed_part(model) == "lm_head is parametrized"


def test_a_weight_of_another_class_is_named_by_the_module_that_holds_it(model: Any) -> None:
    linear = model.model.layers[0].shared_mlp.input_linear
    linear.weight = OtherWeight(linear.weight.detach())
    linear.weight.__class__ = OtherWeight
    expected = "model.layers.0.shared_mlp.input_linear holds a OtherWeight"
    assert changed_part(model) == expected
    check_model(model)


def test_another_model_and_weights_without_numbers_are_refused(model: Any) -> None:
    with pytest.raises(UnsupportedModel, match="Sequential"):
        check_supported(nn.Sequential())
    with pytest.raises(UnsupportedModel, match="a model on meta"):
        check_supported(model.to("meta"))


def test_a_model_on_two_devices_is_refused(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.empty(97, 48, device="meta"))
    with pytest.raises(UnsupportedModel, match="a model on cpu, meta instead of one device"):
        check_supported(model)


def test_weights_on_two_gpus_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class On:
        def __init__(self, device: str) -> None:
            self.device = device

    monkeypatch.setattr(model, "parameters", lambda: [On("cuda:0"), On("cuda:1")])
    with pytest.raises(UnsupportedModel, match="cuda:0, cuda:1"):
        check_supported(model)
    monkeypatch.setattr(model, "parameters", lambda: [On("cuda:0"), On("cuda:0")])
    check_supported(model)
