"""Prompts in every form that callers use: each is converted, or refused by type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from granite_paged.engine.prompts import (
    Chat,
    PromptEncoder,
    as_prompts,
    context_and_continuations,
    conversations,
    matched,
    samples_of,
    scoring_items,
)
from granite_paged.engine.request import SamplingParams
from granite_paged.errors import InvalidRequest, InvalidSampling, PromptError, TokenizerError

VOCABULARY = 97
CHAT = [{"role": "user", "content": "4 5"}]


class Numbers:
    """A tokenizer whose texts are token ids; 1 starts a text, and 2 starts an answer."""

    chat_template = "given"

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [int(part) for part in text.split()]}

    def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
        assert options == {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        return [*self(messages[0]["content"], add_special_tokens=True)["input_ids"], 2]


def encode(prompt: Any, tokenizer: Any = None, what: str = "prompt") -> tuple[int, ...]:
    return PromptEncoder(tokenizer or Numbers(), VOCABULARY).encode(prompt, what)


def encoded(ids: Any, mask: Any = None) -> BatchEncoding:
    return BatchEncoding({"input_ids": ids} | ({} if mask is None else {"attention_mask": mask}))


ONE: dict[str, tuple[Any, tuple[int, ...]]] = {
    "text": ("4 5", (1, 4, 5)),
    "list": ([4, 5], (4, 5)),
    "tuple": ((4, 5), (4, 5)),
    "range": (range(4, 6), (4, 5)),
    "numpy array": (np.array([4, 5]), (4, 5)),
    "numpy numbers": ([np.int64(4), np.int32(5)], (4, 5)),
    "tensor": (torch.tensor([4, 5]), (4, 5)),
    "tensor elements": (list(torch.tensor([4, 5])), (4, 5)),
    "tensor of one row": (torch.tensor([[4, 5]]), (4, 5)),
    "encoding": (encoded([4, 5]), (4, 5)),
    "encoding of one row": (encoded(torch.tensor([[4, 5]])), (4, 5)),
    "dictionary": ({"input_ids": [4, 5]}, (4, 5)),
    "chat": (CHAT, (1, 4, 5, 2)),
}


@pytest.mark.parametrize("kind", ONE)
def test_one_prompt_becomes_plain_token_ids(kind: str) -> None:
    prompt, expected = ONE[kind]
    assert encode(prompt) == expected
    assert [encode(one) for one in as_prompts(prompt)] == [expected]
    assert all(type(token) is int for token in encode(prompt))


def test_a_continuation_has_no_special_tokens() -> None:
    assert encode("4 5", what="continuation") == (4, 5)


SEVERAL: dict[str, Any] = {
    "lists": [[4, 5], [6]],
    "texts and ids": ["4 5", [6]],
    "arrays": [np.array([4, 5]), torch.tensor([6])],
    "padded encoding": encoded(torch.tensor([[4, 5], [0, 6]]), torch.tensor([[1, 1], [0, 1]])),
    "encodings": [encoded([4, 5]), encoded([6])],
    "generator": (prompt for prompt in ([4, 5], [6])),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_prompts_stay_separate(kind: str) -> None:
    listed = [encode(one) for one in as_prompts(SEVERAL[kind])]
    assert [tokens[tokens[0] == 1 :] for tokens in listed] == [(4, 5), (6,)]


def test_rows_of_a_matrix_are_prompts() -> None:
    for matrix in (np.array([[4, 5], [6, 7]]), torch.tensor([[4, 5], [6, 7]])):
        assert [encode(one) for one in as_prompts(matrix)] == [(4, 5), (6, 7)]
    assert [encode(one) for one in as_prompts([CHAT, CHAT])] == [(1, 4, 5, 2)] * 2
    assert as_prompts([]) == []


def test_the_first_entry_says_whether_a_list_is_one_prompt() -> None:
    assert as_prompts(["4 5", 6]) == ["4 5", 6]
    assert as_prompts([4, "5 6"]) == [[4, "5 6"]]


WRONG: dict[str, Any] = {
    "None": None,
    "number": 5,
    "bytes": b"45",
    "set": {4, 5},
    "words": ["a", "b"],
    "a word": ["4"],
    "nested": [[4], [5]],
    "floats": [1.5, 2.5],
    "nan": [float("nan"), 3],
    "bools": [True, False],
    "numpy bools": np.array([True]),
    "float tensor": torch.tensor([4.0]),
    "huge": [2**70],
    "negative": [-1],
    "empty": [],
    "scalar": torch.tensor(4),
    "three dimensions": torch.zeros(1, 1, 2, dtype=torch.int64),
    "dictionary without ids": {"attention_mask": [1]},
    "two rows": encoded([[4], [5]]),
    "empty encoding": encoded([]),
    "encoding of a number": {"input_ids": 5},
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_prompts_are_refused_by_type(kind: str) -> None:
    with pytest.raises(PromptError, match=r"prompt|token"):
        encode(WRONG[kind])


def test_a_chat_needs_a_template() -> None:
    tokenizer = Numbers()
    tokenizer.chat_template = ""
    with pytest.raises(PromptError, match="chat template"):
        encode(CHAT, tokenizer)
    for prompt in (CHAT, "4 5"):
        with pytest.raises(TokenizerError, match="tokenizer"):
            PromptEncoder(None, VOCABULARY).encode(prompt)


def test_a_chat_passes_arguments_to_the_template() -> None:
    class Tools(Numbers):
        def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
            assert options.pop("tools") == ["clock"]
            assert options.pop("add_generation_prompt") is False
            return super().apply_chat_template(messages, add_generation_prompt=True, **options)

    chat = Chat(tuple(CHAT), {"tools": ["clock"], "add_generation_prompt": False})
    assert encode(chat, Tools()) == (1, 4, 5, 2)


def test_a_tokenizer_that_raises_refuses_the_prompt() -> None:
    class Broken(Numbers):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            raise LookupError("no such word")

    with pytest.raises(PromptError, match=r"cannot encode the prompt: LookupError"):
        encode("4", Broken())
    with pytest.raises(PromptError, match=r"the chat template refuses the prompt: LookupError"):
        encode(CHAT, Broken())


def test_messages_are_one_conversation_or_several() -> None:
    assert conversations(CHAT) == conversations(tuple(CHAT)) == [CHAT]
    assert conversations([CHAT, [*CHAT, *CHAT]]) == [CHAT, [*CHAT, *CHAT]]


@pytest.mark.parametrize("wrong", ["hi", [], [[]], [{"content": "x"}], [CHAT, "hi"], None, {}])
def test_messages_of_another_form_are_refused(wrong: Any) -> None:
    with pytest.raises(PromptError, match="messages must be a list of"):
        conversations(wrong)


@pytest.mark.parametrize("params", [{"n": 2}, [SamplingParams(), "greedy"], 5])
def test_params_of_the_wrong_type_are_refused(params: Any) -> None:
    with pytest.raises(InvalidSampling, match="SamplingParams"):
        matched(params, 2)


def test_params_are_given_once_or_for_each_prompt() -> None:
    one = SamplingParams(n=3)
    assert matched(one, 2) == [one, one]
    assert matched(None, 2) == [None, None]
    assert matched([one, None], 2) == [one, None]
    with pytest.raises(InvalidSampling, match="1 params for 2 prompts"):
        matched([one], 2)


def test_a_prompt_without_params_has_one_answer() -> None:
    assert samples_of(None) == 1
    assert samples_of(SamplingParams(n=3)) == 3


# -- items to score -----------------------------------------------------------------------------

A_SET = pytest.param({"a", "b"}, id="a set")  # its repr changes from process to process


def test_items_to_score_are_listed_from_any_iterable() -> None:
    pairs = [("4", ["5"]), ("6", ["7"])]
    assert scoring_items(pairs) == scoring_items(iter(pairs)) == pairs


@pytest.mark.parametrize("wrong", ["ab", b"ab", {"a": 1}, A_SET, 5, None], ids=repr)
def test_items_of_another_form_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="items must be a list of"):
        scoring_items(wrong)


@pytest.mark.parametrize("item", [("4", ["5"]), ["4", ["5"]]], ids=repr)
def test_an_item_is_a_context_and_its_continuations(item: Any) -> None:
    assert context_and_continuations(item) == ("4", ["5"])


@pytest.mark.parametrize("wrong", ["ab", b"ab", A_SET, ("4",), ("4", [], []), 5], ids=repr)
def test_an_item_of_another_form_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match="an item must be a pair"):
        context_and_continuations(wrong)
