"""A checkpoint as its authors meant it: generation config, all stop tokens, chat template."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from granite_paged import Engine, EngineGroup, PagedConfig, SamplingParams, load
from granite_paged.errors import PromptError, TokenizerError
from granite_paged.models import LoadedModel
from tests.helpers.sharded_checkpoint import BOS, END, STOP

SIZES = PagedConfig(page_size=16, max_tokens=2048, max_sequences=8)
USER = [{"role": "user", "content": "the lazy dog – 🦊"}]
SHOUT = [{"role": "system", "content": "shout"}, {"role": "user", "content": "fox"}]


@pytest.fixture
def loaded(sharded_checkpoint: Path) -> LoadedModel:
    return load(str(sharded_checkpoint))


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    with Engine(loaded.model, SIZES, tokenizer=loaded.tokenizer) as made:
        yield made


def test_the_checkpoint_has_several_shards(sharded_checkpoint: Path) -> None:
    assert len(list(sharded_checkpoint.glob("model-*-of-*.safetensors"))) > 1


def test_requests_without_params_follow_the_generation_config(engine: Engine) -> None:
    expected = SamplingParams(
        max_new_tokens=20, temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.05
    )
    assert engine.default_params == expected
    (answer,), (same,) = engine.generate("the fox"), engine.generate("the fox", expected)
    assert answer.tokens == same.tokens
    (greedy,) = engine.generate("the fox", SamplingParams(max_new_tokens=20))
    assert greedy.tokens != answer.tokens, "explicit params must stand alone"


def test_greedy_defaults_give_the_tokens_of_transformers(loaded: LoadedModel) -> None:
    loaded.model.generation_config.update(
        do_sample=False, temperature=None, top_p=None, repetition_penalty=0.3, max_new_tokens=12
    )
    ids = loaded.tokenizer("the quick fox", return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = loaded.model.generate(ids)[0, ids.shape[1] :].tolist()
    with Engine(loaded.model, SIZES, tokenizer=loaded.tokenizer) as engine:
        (answer,) = engine.generate("the quick fox")
        plain = engine.generate("the quick fox", SamplingParams(max_new_tokens=12))[0]
    assert answer.tokens == expected
    assert plain.tokens != expected, "the penalty, which is below 1, must change this answer"


def test_an_answer_ends_at_each_end_of_text_token(loaded: LoadedModel) -> None:
    with Engine(loaded.model, SIZES) as engine:
        request = engine.submit([BOS, 9], SamplingParams(max_new_tokens=1))
    assert request.stop_tokens == {END, STOP}


def test_max_length_includes_the_prompt(loaded: LoadedModel) -> None:
    loaded.model.generation_config.update(max_new_tokens=None, max_length=12, eos_token_id=[])
    with Engine(loaded.model, SIZES) as engine:
        assert engine.default_params.max_new_tokens == 12, "counted without a prompt"
        short, long = engine.generate([[BOS, 9, 8], [BOS] * 12])
    assert len(short.tokens) == 9
    assert "max_length" in str(long.error)


def test_an_ignored_field_of_the_config_is_named_in_a_warning(loaded: LoadedModel) -> None:
    loaded.model.generation_config.update(no_repeat_ngram_size=3)
    with Engine(loaded.model, SIZES) as engine:
        with pytest.warns(UserWarning, match="ignores no_repeat_ngram_size"):
            engine.generate([BOS, 9])
        engine.generate([BOS, 9], replace(SamplingParams(), max_new_tokens=1))  # no warning


def test_every_engine_of_a_group_follows_the_generation_config(engine: Engine) -> None:
    group = EngineGroup([engine])
    (answer,) = group.generate("the fox")
    assert answer.tokens == engine.generate("the fox")[0].tokens


# -- chats --------------------------------------------------------------------------------------


def test_a_chat_is_the_template_with_each_special_token_once(
    engine: Engine, loaded: LoadedModel
) -> None:
    (answer,) = engine.chat(USER)
    text = loaded.tokenizer.apply_chat_template(USER, add_generation_prompt=True, tokenize=False)
    expected = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(answer.prompt) == expected
    assert expected.count(BOS) == 1
    assert loaded.tokenizer.decode(expected).endswith("<|role|>assistant<|end_role|>")


def test_several_chats_are_answered_in_order(engine: Engine) -> None:
    together = engine.chat([USER, SHOUT], SamplingParams(max_new_tokens=4))
    alone = [engine.chat(each, SamplingParams(max_new_tokens=4))[0] for each in (USER, SHOUT)]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert together[0].prompt != together[1].prompt


def test_arguments_reach_the_template(engine: Engine) -> None:
    (without,) = engine.chat(USER, SamplingParams(max_new_tokens=1), add_generation_prompt=False)
    (with_prompt,) = engine.chat(USER, SamplingParams(max_new_tokens=1))
    assert len(without.prompt) < len(with_prompt.prompt)


def test_a_template_that_raises_ends_its_own_request(engine: Engine) -> None:
    engine.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    sound, refused = engine.chat([USER, SHOUT], SamplingParams(max_new_tokens=2))
    assert (sound.error, len(sound.tokens)) == (None, 2)
    assert isinstance(refused.error, PromptError)
    assert "the chat template refuses the prompt" in str(refused.error)
    assert "no system" in str(refused.error)


def test_a_chat_without_a_template_is_refused(engine: Engine, loaded: LoadedModel) -> None:
    engine.tokenizer.chat_template = None
    with pytest.raises(PromptError, match="has no chat template"):
        engine.chat(USER)
    with (
        Engine(loaded.model, SIZES) as bare,
        pytest.raises(TokenizerError, match="needs a tokenizer"),
    ):
        bare.chat(USER)


@pytest.mark.parametrize("wrong", ["hi", [{"text": "x"}], []])
def test_messages_of_another_form_are_refused_at_once(engine: Engine, wrong: Any) -> None:
    with pytest.raises(PromptError, match="messages must be a list"):
        engine.chat(wrong)
