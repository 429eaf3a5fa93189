"""Cached prefixes: who may share them, and what happens to them when weights change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from granite_paged import Engine, PagedConfig, SamplingParams, paged
from granite_paged.errors import UnsupportedModel
from tests.helpers.engine_harness import EngineHarness, expected_tokens
from tests.helpers.simulated_runner import HashOracle
from tests.helpers.tiny_models import tiny_model

PROMPT = list(range(3, 43))
ASKED = SamplingParams(max_new_tokens=3, stop_tokens=())

# -- namespaces ---------------------------------------------------------------------------------


def ask(engine: Engine, namespace: str) -> list[int]:
    params = SamplingParams(max_new_tokens=3, stop_tokens=(), namespace=namespace)
    (output,) = engine.generate([PROMPT], params)
    return output.tokens


def score(engine: Engine, namespace: str) -> float:
    return engine.score([(PROMPT, [[4, 5]])], namespace=namespace)[0][0].logprob


def search(engine: Engine, namespace: str) -> list[int]:
    params = SamplingParams(max_new_tokens=3, stop_tokens=(), namespace=namespace)
    return engine.search([PROMPT], params, beams=2)[0][0].tokens


@pytest.mark.parametrize("work", [ask, score, search])
def test_prompts_share_prefixes_within_their_namespace_only(
    work: Callable[[Engine, str], Any],
) -> None:
    harness = EngineHarness(HashOracle(), pages=200)
    engine = harness.engine
    hits: list[int] = []
    answers: list[Any] = []
    for namespace in ("a", "a", "a", "b", "b", "b", "", "", ""):
        before = engine.stats().tokens_hit
        answers.append(work(engine, namespace))
        hits.append(engine.stats().tokens_hit - before)
        engine.check_valid()
    assert hits[0::3] == [0, 0, 0], "the first prompt of a namespace finds nothing"
    assert min(hits[2::3]) > 0
    assert all(answer == answers[0] for answer in answers)
    harness.drain()


def test_samples_and_preempted_requests_keep_their_namespace() -> None:
    harness = EngineHarness(HashOracle(), pages=24, rows=4)
    for number in range(12):
        params = SamplingParams(
            max_new_tokens=12,
            stop_tokens=(),
            temperature=0.7,
            n=2,
            namespace=("a", "b")[number % 2],
        )
        harness.submit(PROMPT[: 20 + number], params)
    while harness.step():
        prefix = harness.engine.inspect().prefix
        starts = {node.tokens[0] for node in prefix._root.children.values()}
        assert starts <= {"a", "b"}
    assert harness.engine.stats().preempted
    harness.drain()


def test_a_namespace_changes_no_answer() -> None:
    harness = EngineHarness(HashOracle(), pages=200)
    assert ask(harness.engine, "a") == expected_tokens(HashOracle(), PROMPT, ASKED)


# -- weights that change under a live engine ----------------------------------------------------

SIZES = PagedConfig(page_size=8, max_tokens=320, max_sequences=2, chunk_tokens=32)
LONG = [5 + number % 80 for number in range(70)]


def other_weights(model: Any) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    noise = {
        name: torch.randn(w.shape, generator=draw).mul_(0.2)
        for name, w in model.state_dict().items()
    }
    return {name: weight + noise[name] for name, weight in model.state_dict().items()}


def copy_state(model: Any) -> None:
    model.load_state_dict(other_weights(model))


def assign_state(model: Any) -> None:
    model.load_state_dict(other_weights(model), assign=True)
    model.tie_weights()


def write_through_data(model: Any) -> None:
    for name, weight in other_weights(model).items():
        model.get_parameter(name).data.copy_(weight)


def replace_data(model: Any) -> None:
    weights = other_weights(model)
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]


def replace_head(model: Any) -> None:
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    head.weight = torch.nn.Parameter(-3 * model.lm_head.weight.detach())
    model.lm_head = head


def hook_parts(model: Any) -> None:
    for layer in model.model.layers:
        layer.shared_mlp.register_forward_hook(lambda module, args, output: -output)


CHANGES = [copy_state, assign_state, write_through_data, replace_data, replace_head, hook_parts]


def answer(engine: Engine, prompt: list[int] = LONG) -> list[int]:
    (output,) = engine.generate([prompt], SamplingParams(max_new_tokens=8, stop_tokens=()))
    assert output.error is None
    return output.tokens


def fresh_answer(model: Any, prompt: list[int] = LONG) -> list[int]:
    with Engine(model, SIZES) as engine:
        return answer(engine, prompt)


def warmed(model: Any) -> Engine:
    """Return an engine with a cached prefix of `LONG`."""
    engine = Engine(model, SIZES)
    for _ in range(3):
        answer(engine)
    assert engine.stats().tokens_hit
    return engine


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed_by_the_next_request(change: Callable[[Any], None]) -> None:
    model = tiny_model()
    before = fresh_answer(model)
    with warmed(model) as engine, torch.no_grad():
        change(model)
        assert answer(engine) == fresh_answer(model) != before
        answer(engine)
        hits = engine.stats().tokens_hit
        answer(engine)
        assert engine.stats().tokens_hit > hits, "prefixes of the new weights are kept again"


def test_unchanged_weights_keep_their_prefixes() -> None:
    with warmed(tiny_model()) as engine:
        hits = engine.stats().tokens_hit
        answer(engine)
        assert engine.stats().tokens_hit > hits


def merge(adapted: Any) -> None:
    adapted.merge_adapter()


def unload(adapted: Any) -> None:
    adapted.merge_and_unload()


def disable(adapted: Any) -> None:
    adapted.base_model.disable_adapter_layers()


def switch(adapted: Any) -> None:
    adapted.set_adapter("second")


@pytest.mark.parametrize("change", [merge, unload, disable, switch])
def test_changed_adapters_are_noticed_by_the_next_request(change: Callable[[Any], None]) -> None:
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["in_proj", "q_proj", "v_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(tiny_model(), config)
    adapted.add_adapter("second", config)
    model = adapted.eval().get_base_model()
    scored = [(LONG, [[5, 6, 7]])]
    with warmed(model) as engine, torch.no_grad():
        change(adapted)
        (found,), (expected,) = engine.score(scored)[0], Engine(model, SIZES).score(scored)[0]
        assert found.tokens == pytest.approx(expected.tokens, abs=1e-5)
        assert answer(engine) == fresh_answer(model)


def test_weights_that_change_while_a_prompt_runs_leave_no_prefix() -> None:
    model = tiny_model()
    with Engine(model, SIZES) as engine, torch.no_grad():
        for prompt in (LONG, LONG[:60]):  # so that the next one keeps a state
            answer(engine, prompt)
        engine.forget_prefixes()
        running = engine.submit(LONG, SamplingParams(max_new_tokens=2, stop_tokens=()))
        engine.step()
        copy_state(model)
        later = engine.submit([3, 4], SamplingParams(max_new_tokens=2, stop_tokens=()))
        while engine.step():
            pass
        assert running.finished
        assert later.finished
        for _ in range(3):
            assert answer(engine) == fresh_answer(model)


def test_prefixes_can_be_forgotten_while_a_prompt_runs() -> None:
    model = tiny_model()
    with Engine(model, SIZES) as engine:
        engine.submit(LONG, SamplingParams(max_new_tokens=2, stop_tokens=()))
        engine.step()
        engine.forget_prefixes()
        while engine.step():
            pass
        assert engine.stats().pages_cached == 0


def test_an_engine_answers_while_its_model_is_patched() -> None:
    model = tiny_model()
    expected = fresh_answer(model)
    with warmed(model) as engine:
        with paged(model, SIZES):
            assert answer(engine) == expected
        assert answer(engine) == expected


def test_a_hook_that_would_not_run_ends_requests_by_name() -> None:
    model = tiny_model()
    with warmed(model) as engine:
        handle = model.model.layers[0].register_forward_hook(lambda *_: None)
        (output,) = engine.generate([LONG], SamplingParams(max_new_tokens=2))
        assert isinstance(output.error, UnsupportedModel)
        assert "model.layers.0, which has a hook" in str(output.error)
        handle.remove()
        assert answer(engine) == fresh_answer(model)


def test_a_model_that_became_another_dtype_is_refused_by_name() -> None:
    model = tiny_model()
    with warmed(model) as engine:
        model.to(torch.float64)
        for _ in range(2):
            (output,) = engine.generate([LONG], SamplingParams(max_new_tokens=2))
            assert isinstance(output.error, UnsupportedModel)
            assert "float64" in str(output.error)
        model.to(torch.float32)
        assert answer(engine) == fresh_answer(model)
