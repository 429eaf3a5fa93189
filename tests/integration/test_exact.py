"""Exact mode: a request has the same bits whatever else runs."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from granite_paged import Engine, PagedConfig, SamplingParams
from granite_paged.checkpoints import TINY_RECALL
from granite_paged.errors import CannotBeExact
from granite_paged.layers.logprobs import by_row, log_probabilities
from tests.helpers.driver import Driver
from tests.helpers.tiny_models import FLAVOURS, VOCABULARY, tiny_model
from tests.helpers.tolerance import assert_same_logits
from tools import exact_cost

CONFIG = PagedConfig(page_size=16, max_tokens=1024, max_sequences=8, chunk_tokens=32, exact=True)
PARAMS = SamplingParams(max_new_tokens=8, stop_tokens=(), logprobs=2, temperature=0.9, top_p=0.9)


def tokens(count: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=draw).tolist()


PROMPTS = [tokens(n, n) for n in (45, 3, 17, 32, 1, 20)]


def answers(model: Any, prompts: list[list[int]], config: PagedConfig = CONFIG) -> list[Any]:
    with Engine(model, config=config) as engine:
        outputs = engine.generate(prompts, PARAMS)
    for output in outputs:
        assert output.error is None
    return [(output.tokens, output.logprobs) for output in outputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_answers_in_company_equal_answers_alone_to_the_bit(
    flavour: str, dtype: torch.dtype
) -> None:
    layers = ["attention" if flavour == "dense" else "mamba", "attention"]
    model = tiny_model(flavour, num_hidden_layers=2, layer_types=layers).to(dtype)
    if flavour == "experts" and dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped kernel does not support float64
    alone = [answers(model, [prompt])[0] for prompt in PROMPTS]
    assert answers(model, PROMPTS) == alone
    assert answers(model, PROMPTS[::-1]) == alone[::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_in_company_differ_in_some_bit_without_exact_mode(dtype: torch.dtype) -> None:
    model, config = tiny_model().to(dtype), replace(CONFIG, exact=False)
    alone = [answers(model, [prompt], config)[0] for prompt in PROMPTS]
    assert answers(model, PROMPTS, config) != alone


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_logits_are_those_of_sdpa(flavour: str) -> None:
    model, prompt = tiny_model(flavour), tokens(45)
    driver = Driver(model, CONFIG)
    driver.open(3)
    found = [driver.prefill({3: prompt[:20]}), driver.prefill({3: prompt[20:40]})]
    found += [driver.decode({3: token}).clone() for token in prompt[40:]]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt]), use_cache=False).logits[0]
    assert_same_logits(torch.cat(found), logits[[19, 39, *range(40, 45)]])


# -- one row at a time --------------------------------------------------------------------------


def test_rows_are_passed_one_by_one_in_exact_mode_only() -> None:
    rows, seen = torch.randn(3, 5), []

    def doubled(part: Tensor) -> Tensor:
        seen.append(part)
        return 2 * part

    assert torch.equal(by_row(doubled, rows, exact=True), 2 * rows)
    assert [tuple(part.shape) for part in seen] == [(1, 5)] * 3
    assert all(part.untyped_storage().nbytes() == 20 for part in seen), "each in memory of its own"
    seen.clear()
    assert torch.equal(by_row(doubled, rows, exact=False), 2 * rows)
    assert seen[0] is rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_log_probabilities_are_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 7).to(dtype)
    expected = logits.float().log_softmax(-1)
    for exact in (True, False):
        assert torch.equal(log_probabilities(logits, exact=exact), expected)


# -- what is refused ----------------------------------------------------------------------------


def hooked(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *args: None)


def adapted(model: Any) -> None:
    class Adapter(torch.nn.Linear):
        pass

    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapter(attention.q_proj.in_features, attention.q_proj.out_features)


def quantised(model: Any) -> None:
    class Quantised(torch.nn.Parameter):
        pass

    layer = model.model.layers[0].shared_mlp.input_linear
    layer.weight = Quantised(layer.weight.data)


CHANGES = {"has a hook": hooked, "is a Adapter": adapted, "holds a Quantised": quantised}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_refused_by_name(change: str) -> None:
    model = tiny_model()
    CHANGES[change](model)
    with pytest.raises(CannotBeExact, match=change):
        Engine(model, config=CONFIG)


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_changes_under_an_engine_is_refused_by_name(change: str) -> None:
    model = tiny_model()
    with Engine(model, config=CONFIG) as engine:
        engine.generate(PROMPTS[1], PARAMS)
        CHANGES[change](model)
        (output,) = engine.generate(PROMPTS[1], PARAMS)
    assert isinstance(output.error, CannotBeExact)
    assert change in str(output.error)


def test_weights_may_change_under_an_engine() -> None:
    model = tiny_model()
    with Engine(model, config=CONFIG) as engine:
        engine.generate(PROMPTS[1], PARAMS)
        model.load_state_dict(tiny_model(seed=1).state_dict(), assign=True)
        (output,) = engine.generate(PROMPTS[1], PARAMS)
    assert (output.tokens, output.logprobs) == answers(tiny_model(seed=1), [PROMPTS[1]])[0]


@pytest.mark.parametrize(
    ("config", "sizes", "reason"),
    [
        ({"backend": "compiled"}, {}, "backend 'compiled'"),
        ({}, {"time_step_limit": (0.0, 0.1)}, "time_step_limit"),
        ({}, {"time_step_limit": (0.01, float("inf"))}, "time_step_limit"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(
    config: dict[str, Any], sizes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CannotBeExact, match=reason):
        Engine(tiny_model(**sizes), config=replace(CONFIG, **config))


def test_the_cost_is_measured_beside_normal_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--device cpu --dtype float32 --turns 1 --most 16 --requests 2 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["exact_cost", "--model", str(TINY_RECALL), *options.split()])

    exact_cost.main()

    decode, mixed, written = capsys.readouterr().out.splitlines()[-3:]
    number = r" +[\d.]+ ms"
    assert re.fullmatch(rf"decode 1 x 512 +normal{number} +exact{number} +[\d.]+ times", decode)
    assert re.fullmatch(r"2 mixed requests +normal \d+ +exact \d+ tokens per second +\d+%", mixed)
    assert written == f"written: {tmp_path / 'cpu.json'}"
    found = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))["exact_cost"]
    assert found["settings"] == {"turns": 1, "most": 16, "requests": 2}
    assert list(found["decode_ms"]) == ["1 x 512"]
    for each in (found["decode_ms"]["1 x 512"], found["mixed_tokens_per_second"]):
        assert list(each) == ["normal", "exact"]
        assert min(each.values()) > 0
