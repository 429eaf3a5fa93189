"""An engine on a model whose modules were changed: adapters, hooks, replaced and quantised ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from granite_paged import Engine, PagedConfig, SamplingParams, paged
from granite_paged.errors import UnsupportedModel
from granite_paged.layers.backend import triton_refusal
from granite_paged.layers.modules import changed_part
from granite_paged.runner.memory_plan import weight_bytes
from tests.helpers.tiny_models import tiny_model

SIZES = PagedConfig(page_size=16, max_tokens=64, max_sequences=2, chunk_tokens=32)
PROMPT = list(range(5, 17))
NEW = 6


class Scaled(nn.Module):
    """A linear layer in a wrapper that shows its weight, as adapters do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return -3 * self.base(x)


class Opaque(Tensor):
    """A weight without storage, as quantised ones are."""

    def untyped_storage(self) -> Any:
        raise RuntimeError("invalid python storage")


def expected(model: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    done = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
    )
    return done[0, len(PROMPT) :].tolist()


def answered(model: Any) -> list[int]:
    with Engine(model, SIZES) as engine:
        [output] = engine.generate([PROMPT], SamplingParams(max_new_tokens=NEW, stop_tokens=()))
    assert output.error is None
    return output.tokens


def wrap_projections(model: Any) -> None:
    for layer in model.model.layers:
        if layer.mamba is not None:
            layer.mamba.in_proj = Scaled(layer.mamba.in_proj)
        else:
            layer.self_attn.v_proj = Scaled(layer.self_attn.v_proj)


def hook_mlps(model: Any) -> None:
    for layer in model.model.layers:
        layer.shared_mlp.register_forward_hook(lambda module, args, output: -output)


def replace_forwards(model: Any) -> None:
    for layer in model.model.layers:
        linear = layer.shared_mlp.input_linear
        linear.forward = lambda x, right=linear.forward: -2 * right(x)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "wrapped projections": (wrap_projections, "mamba.in_proj is a Scaled"),
    "hooks": (hook_mlps, "shared_mlp has a hook"),
    "instance forwards": (replace_forwards, "input_linear has a forward of its own"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_parts_are_called_as_modules(change: str) -> None:
    apply, reason = CHANGES[change]
    model = tiny_model()
    before = expected(model)
    apply(model)
    assert expected(model) != before
    assert answered(model) == expected(model)
    assert reason in triton_refusal(model, "auto")


def test_peft_adapters_are_called_as_modules() -> None:
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    model = tiny_model()
    before = expected(model)
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["in_proj", "q_proj", "v_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config).eval()
    with pytest.raises(UnsupportedModel, match="get_base_model"):
        Engine(adapted, SIZES)
    adapted = adapted.get_base_model()
    assert expected(adapted) != before
    assert answered(adapted) == expected(adapted)
    assert "in_proj is a Linear" in triton_refusal(adapted, "auto")


def quantise_with_torchao(model: Any) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="the weights are torchao's")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def quantise_with_bitsandbytes(model: Any) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the layers are bitsandbytes'")
    linears = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear]
    for name, linear in linears:
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        quantised = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        quantised.load_state_dict(linear.state_dict())
        model.set_submodule(name, quantised.to("cpu"))  # moving it quantises


def logprobs_of(model: Any, tokens: list[int]) -> Tensor:
    """Return the log-probability of each token after the first, by transformers."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.mark.parametrize("quantise", [quantise_with_torchao, quantise_with_bitsandbytes])
def test_quantised_weights_are_called_as_modules(quantise: Callable[[Any], None]) -> None:
    model = tiny_model()
    plain = logprobs_of(model, PROMPT)
    quantise(model)
    expected_logprobs, tokens = logprobs_of(model, PROMPT), expected(model)
    assert (expected_logprobs - plain).abs().max() > 1e-4
    assert "input_linear" in changed_part(model)
    assert answered(model) == tokens
    with Engine(model, SIZES) as engine:
        ((score,),) = engine.score([(PROMPT[:1], [PROMPT[1:]])])
    torch.testing.assert_close(torch.tensor(score.tokens), expected_logprobs, atol=2e-5, rtol=2e-5)
    with paged(model, SIZES):
        assert expected(model) == tokens


def test_an_unchanged_model_has_no_changed_part() -> None:
    assert changed_part(tiny_model()) == ""
    assert changed_part(tiny_model("experts")) == ""


@pytest.mark.parametrize(
    "frame", ["model.layers.0", "model.layers.0.mamba", "model.layers.1.self_attn"]
)
def test_a_hook_that_would_not_run_is_refused_by_name(frame: str) -> None:
    model = tiny_model()
    model.get_submodule(frame).register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModel, match=f"{frame}, which has a hook"):
        Engine(model, SIZES)


def test_another_class_and_offloaded_weights_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="Sequential"):
        Engine(nn.Sequential(), SIZES)
    with pytest.raises(UnsupportedModel, match="meta"):
        Engine(tiny_model().to("meta"), SIZES)


def test_weights_without_storage_are_counted_and_are_a_changed_part() -> None:
    model = tiny_model()
    before = weight_bytes(model)
    linear = model.model.layers[0].shared_mlp.input_linear
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Opaque), requires_grad=False)
    assert weight_bytes(model) == before
    assert "holds a" in changed_part(model)
