"""The lm-eval model answers what lm-eval's `HFLM` answers, request by request."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from granite_paged import is_patched
from granite_paged.checkpoints import TINY_RECALL
from granite_paged.errors import InvalidArgument, UnknownName
from tests.helpers.memory_errors import MEMORY_ERRORS
from tests.helpers.tiny_models import tiny_model

pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed: `nox -s eval_parity` installs it and runs these"
)
pytest.importorskip("accelerate", reason="lm-eval's HFLM needs accelerate")

CLOSE = 1e-4
LENGTH = 32  # max_length of both models, which long texts pass
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
WORDS = "red-fox copper-bell and green-wolf iron-boat while"
TEXT = "Paging keeps the answers. The capital of France is Paris, a town in the north. "


class Checkpoint(NamedTuple):
    """A model's folder, and a text that its tokenizer knows."""

    folder: str
    text: str


@pytest.fixture(scope="module", params=["embedded", "bytes"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The embedded checkpoint, or a tiny model with a byte-level BPE tokenizer."""
    if request.param == "embedded":
        return Checkpoint(str(TINY_RECALL), WORDS)
    return Checkpoint(str(byte_level(tmp_path_factory.mktemp("bytes"))), TEXT.strip())


def byte_level(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    special = {"pad_token": "<|pad|>", "bos_token": "<|start|>", "eos_token": "<|end|>"}
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokens.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


def ours(checkpoint: Checkpoint, **options: Any) -> Any:
    from granite_paged.evaluate.lm import GranitePagedLM  # noqa: PLC0415

    options = {"page_size": 16, "max_length": LENGTH, "device": "cpu", **options}
    return GranitePagedLM(checkpoint.folder, **options)


def theirs(checkpoint: Checkpoint, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    # HFLM's logits_cache misreads a request whose context ends inside another's continuation
    options = {"max_length": LENGTH, "device": "cpu", "logits_cache": False, **options}
    return HFLM(pretrained=checkpoint.folder, **options)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Any:
    return ours(checkpoint)


@pytest.fixture(scope="module")
def hflm(checkpoint: Checkpoint) -> Any:
    return theirs(checkpoint)


def ask(model: Any, kind: str, *arguments: tuple[Any, ...]) -> Any:
    from lm_eval.api.instance import Instance  # noqa: PLC0415

    torch.manual_seed(0)
    requests = [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]
    return getattr(model, kind)(requests, disable_tqdm=True)


def assert_same_scores(model: Any, hflm: Any, *pairs: tuple[str, str]) -> None:
    found, expected = (ask(one, "loglikelihood", *pairs) for one in (model, hflm))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=CLOSE)


def assert_same_texts(model: Any, hflm: Any, *arguments: tuple[str, dict[str, Any]]) -> list[str]:
    found = ask(model, "generate_until", *arguments)
    assert found == ask(hflm, "generate_until", *arguments)
    assert any(found)
    return list(found)


# -- log-likelihoods ----------------------------------------------------------------------------


def pairs_of(text: str) -> list[tuple[str, str]]:
    first, second, *_, last = text.split()
    pairs = [(f"{first} {second}", f" {last}"), (f"{first} {second} ", last)]
    return [*pairs, (first, f" {second} {last}"), ("", first), ("", text)]


@pytest.mark.parametrize("batch", [1, 3, "auto", "auto:2"])
def test_scores_in_any_order_and_batch_equal_those_of_hflm(
    batch: int | str, checkpoint: Checkpoint, hflm: Any
) -> None:
    pairs = pairs_of(checkpoint.text)
    random.Random(0).shuffle(pairs)
    assert_same_scores(ours(checkpoint, batch_size=batch), hflm, *pairs)


def test_a_long_context_is_cut_from_the_left_as_by_hflm(
    checkpoint: Checkpoint, model: Any, hflm: Any
) -> None:
    long = " ".join([checkpoint.text] * 20)
    last = f" {checkpoint.text.split()[0]}"
    assert_same_scores(model, hflm, (long, last), (checkpoint.text, last), (long, last * 3))


def test_an_empty_continuation_scores_zero_beside_others(
    checkpoint: Checkpoint, model: Any, hflm: Any
) -> None:
    """`HFLM` ends the run with an AssertionError instead."""
    pair = (checkpoint.text, f" {checkpoint.text.split()[0]}")
    empty, scored, neither = ask(model, "loglikelihood", (pair[0], ""), pair, ("", ""))
    assert empty == neither == (0.0, True)
    assert scored[0] == pytest.approx(ask(hflm, "loglikelihood", pair)[0][0], abs=CLOSE)


def test_a_continuation_longer_than_max_length_ends_no_run(
    checkpoint: Checkpoint, model: Any, hflm: Any
) -> None:
    """`HFLM` ends the run with an AssertionError instead."""
    first, *_ = checkpoint.text.split()
    long = ask(model, "loglikelihood", (first, f" {checkpoint.text}" * 20), (first, f" {first}"))
    assert long[0][0] < long[1][0]
    assert long[1][0] == pytest.approx(ask(hflm, "loglikelihood", (first, f" {first}"))[0][0])


@pytest.mark.parametrize("mode", ["paged", "default"])
def test_requests_beyond_the_pool_score_as_hflm(mode: str, checkpoint: Checkpoint) -> None:
    small = ours(checkpoint, mode=mode, max_tokens=48, max_length=4096)
    whole = theirs(checkpoint, max_length=4096)
    long = " ".join([checkpoint.text] * 12)
    assert_same_scores(small, whole, (long, f" {checkpoint.text}"), *pairs_of(checkpoint.text))
    options = {"until": [], "max_gen_toks": 4}
    assert_same_texts(small, whole, (long, options), (checkpoint.text, options))
    assert not is_patched(small.model)


def test_a_batch_beyond_the_pool_is_halved(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    small = ours(checkpoint, batch_size=3, max_tokens=32)
    generate = type(small)._model_generate

    def counted(self: Any, context: Any, attention_mask: Any, **options: Any) -> Any:
        rows.append(len(context))
        return generate(self, context, attention_mask, **options)

    monkeypatch.setattr(type(small), "_model_generate", counted)
    options = {"max_gen_toks": 4}
    asked = [(text, options) for text in (checkpoint.text, "and", "while")]
    assert_same_texts(small, theirs(checkpoint, batch_size=3), *asked)
    assert rows[:2] == [3, 2]


def test_a_batch_beyond_the_devices_memory_is_halved(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    whole = ours(checkpoint, batch_size=2)
    generate = HFLM._model_generate

    def refuse(self: Any, context: Any, attention_mask: Any, **options: Any) -> Any:
        if len(context) > 1:
            raise MEMORY_ERRORS["cublas"]
        return generate(self, context, attention_mask=attention_mask, **options)

    monkeypatch.setattr(HFLM, "_model_generate", refuse)
    asked = [(text, {"max_gen_toks": 4}) for text in (checkpoint.text, "and")]
    assert_same_texts(whole, theirs(checkpoint, batch_size=1), *asked)


def test_rolling_windows_and_empty_documents_equal_those_of_hflm(
    checkpoint: Checkpoint, model: Any, hflm: Any
) -> None:
    long = " ".join([checkpoint.text] * 9)
    texts = [("",), (checkpoint.text,), (long,), (checkpoint.text.split()[0],)]
    found, expected = (ask(one, "loglikelihood_rolling", *texts) for one in (model, hflm))
    assert found == pytest.approx(expected, abs=1e-3)  # sums over hundreds of tokens
    assert found[0] == 0


@pytest.mark.parametrize("add", [True, False, None])
def test_add_bos_token_equals_that_of_hflm(add: bool | None, checkpoint: Checkpoint) -> None:
    both = [make(checkpoint, add_bos_token=add) for make in (ours, theirs)]
    tokens = [one.tok_encode(checkpoint.text) for one in both]
    assert tokens[0] == tokens[1]
    assert_same_scores(*both, *pairs_of(checkpoint.text))
    assert_same_texts(*both, (checkpoint.text, {"max_gen_toks": 3}))


def test_prefix_token_id_equals_that_of_hflm(checkpoint: Checkpoint) -> None:
    both = [make(checkpoint, prefix_token_id=5) for make in (ours, theirs)]
    assert_same_scores(*both, ("", checkpoint.text), (checkpoint.text, " and"))


# -- generations --------------------------------------------------------------------------------

GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "max_gen_toks": 6},
    "temperature": {"do_sample": True, "temperature": 5.0, "max_gen_toks": 6},
    "temperature alone": {"temperature": 2.0, "max_gen_toks": 6},
    "top k": {"do_sample": True, "temperature": 1.5, "top_k": 3, "max_gen_toks": 6},
    "top p": {"do_sample": True, "temperature": 1.5, "top_p": 0.7, "max_gen_toks": 6},
    "repetition penalty": {"repetition_penalty": 3.0, "max_gen_toks": 6},
    "beams": {"num_beams": 3, "max_gen_toks": 6},
    "max_new_tokens": {"max_new_tokens": 3},
    "max_tokens": {"max_tokens": 3},
    "max_completion_tokens": {"max_completion_tokens": 3},
    "first of the limits": {"max_new_tokens": 2, "max_tokens": 5},
    "max_length": {"max_length": 29, "max_gen_toks": 9},
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_generation_options_equal_those_of_hflm(
    name: str, checkpoint: Checkpoint, model: Any, hflm: Any
) -> None:
    start = " ".join(checkpoint.text.split()[:3])
    assert_same_texts(model, hflm, *((text, GENERATIONS[name]) for text in (start, "and")))


@pytest.mark.parametrize("form", [list, str], ids=["list", "text"])
def test_stop_texts_equal_those_of_hflm(
    form: type, checkpoint: Checkpoint, model: Any, hflm: Any
) -> None:
    (whole,) = ask(hflm, "generate_until", (checkpoint.text, {"max_gen_toks": 6}))
    inside = whole[len(whole) // 2 :][:3]
    until = [inside, "never"] if form is list else inside
    asked = (checkpoint.text, {"max_gen_toks": 6, "until": until})
    assert assert_same_texts(model, hflm, asked) == [whole.split(inside)[0]]


def test_until_may_be_none_or_a_tuple(checkpoint: Checkpoint, model: Any) -> None:
    """`HFLM` ends the run with an error of its tokenizer instead."""
    limit = {"max_gen_toks": 3}
    same = [{}, {"until": None}, {"until": ()}, {"until": ("never",)}]
    texts = {ask(model, "generate_until", (checkpoint.text, limit | one))[0] for one in same}
    assert len(texts) == 1


def test_a_long_prompt_is_cut_from_the_left_as_by_hflm(
    checkpoint: Checkpoint, model: Any, hflm: Any
) -> None:
    long = " ".join([checkpoint.text] * 9)
    assert_same_texts(model, hflm, (long, {"max_gen_toks": 5}), ("and", {"max_gen_toks": 5}))


@pytest.mark.parametrize("batch", [3, "auto"])
def test_batched_generations_equal_those_of_hflm(batch: int | str, checkpoint: Checkpoint) -> None:
    words = checkpoint.text.split()
    both = [ours(checkpoint, batch_size=batch), theirs(checkpoint, batch_size=3)]
    limits = [{"max_gen_toks": 5}, {"max_gen_toks": 3}]
    asked = [(" ".join(words[: 1 + i % 4]), limits[i % 2]) for i in range(6)]
    assert_same_texts(*both, *asked)


@pytest.mark.parametrize("batch", [1, 2])
def test_an_empty_prompt_starts_at_the_prefix_token(batch: int, checkpoint: Checkpoint) -> None:
    """`HFLM` ends the run with a RuntimeError instead."""
    model = ours(checkpoint, batch_size=batch)
    options = {"max_gen_toks": 4}
    asked = [(text, options) for text in ("", checkpoint.text, model.tokenizer.bos_token)]
    empty, _, start = ask(model, "generate_until", *asked)
    assert empty == start


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_gen_toks": LENGTH}, "max_gen_toks must be from 1 to 31, got 32"),
        ({"max_tokens": 0}, "max_gen_toks must be from 1 to 31, got 0"),
        ({"max_gen_toks": 3, "temp": 1.0}, "unknown generation option 'temp'"),
        ({"max_gen_toks": 3, "until": [4]}, "until must be text or a list of texts"),
    ],
)
def test_an_option_is_refused_before_anything_runs(
    options: dict[str, Any], reason: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "_model_generate", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(InvalidArgument, match=reason):
        ask(model, "generate_until", ("and", {"max_gen_toks": 3}), ("and", options))


# -- chat templates -----------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "red-fox"},
    {"role": "assistant", "content": "green"},
]


@pytest.mark.parametrize("add", [True, False])
def test_chats_equal_those_of_hflm(add: bool, model: Any, hflm: Any) -> None:
    for one in (model, hflm):
        one.tokenizer.chat_template = TEMPLATE
    found, expected = (
        one.apply_chat_template(CHAT, add_generation_prompt=add) for one in (model, hflm)
    )
    assert found == expected
    assert "be brief" in found
    assert model.chat_template(chat_template=True) == hflm.chat_template(chat_template=True)
    assert model.tokenizer_name == hflm.tokenizer_name


def test_a_template_without_system_messages_drops_them_as_hflm(model: Any, hflm: Any) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    for one in (model, hflm):
        one.tokenizer.chat_template = strict + TEMPLATE
    found = model.apply_chat_template(CHAT)
    assert found == hflm.apply_chat_template(CHAT)
    assert "be brief" not in found


def test_arguments_of_chats_equal_those_of_hflm(checkpoint: Checkpoint) -> None:
    options = {"chat_template_args": {"mood": "calm"}, "enable_thinking": False}
    both = [make(checkpoint, **options) for make in (ours, theirs)]
    for one in both:
        one.tokenizer.chat_template = TEMPLATE + "{{ mood }} {{ enable_thinking }}"
    assert both[0].apply_chat_template(CHAT) == both[1].apply_chat_template(CHAT)


def test_text_up_to_the_end_of_thinking_is_dropped_as_by_hflm(
    checkpoint: Checkpoint, hflm: Any
) -> None:
    options = {"max_gen_toks": 6}
    (whole,) = ask(hflm, "generate_until", (checkpoint.text, options))
    end = whole[len(whole) // 3 :][:3]
    both = [make(checkpoint, think_end_token=end) for make in (ours, theirs)]
    assert assert_same_texts(*both, (checkpoint.text, options)) != [whole]


# -- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"peft": "adapter"}, InvalidArgument, "does not support peft='adapter'"),
        ({"parallelize": True}, InvalidArgument, "does not support parallelize=True"),
        ({"trust_remote_code": True}, InvalidArgument, "trust_remote_code=True"),
        ({"softmax_dtype": "float16"}, InvalidArgument, "softmax_dtype='float16'"),
        ({"revision": "v1"}, InvalidArgument, "revision 'v1' is one of a hub id"),
        ({"pagesize": 16}, UnknownName, "unknown model argument 'pagesize': use one of"),
        ({"mode": "fast"}, UnknownName, "unknown mode 'fast'"),
        ({"batch_size": "many"}, InvalidArgument, "batch_size must be auto or a whole number"),
        ({"batch_size": 0}, InvalidArgument, "batch_size must be auto or a whole number from 1"),
    ],
)
def test_an_argument_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], reason: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(error, match=reason):
        ours(checkpoint, **options)


def arguments_of_the_page() -> tuple[set[str], set[str]]:
    """Return the arguments of a model that docs/evaluation.md lists as taken, and as refused."""
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = dict(
        re.findall(r"^\| (model|several devices|batches|texts) \| (.*) \|$", page, re.MULTILINE)
    )
    cells = [row.split("|") for row in rows.values()]
    assert len(cells) == 4
    taken, refused = (
        re.findall(r"`(\w+)[`=]", " ".join(side)) for side in zip(*cells, strict=True)
    )
    return set(taken) - {"auto", "accelerate"}, set(refused) - {"pretrained"}


def test_the_page_lists_what_is_taken_and_what_is_refused() -> None:
    from granite_paged.evaluate import lm  # noqa: PLC0415

    taken, refused = arguments_of_the_page()
    assert len(refused) >= 15
    assert taken <= lm._TAKEN | set(inspect.signature(lm.GranitePagedLM).parameters)
    for name in refused:
        with pytest.raises(InvalidArgument, match=f"does not support {name}='x'"):
            lm._check_arguments({name: "x"})


def test_arguments_that_change_nothing_are_taken(checkpoint: Checkpoint) -> None:
    model = ours(
        checkpoint,
        revision="main",
        trust_remote_code=False,
        parallelize=False,
        dtype=torch.float32,
        softmax_dtype="float32",
        logits_cache=True,
        truncation=False,
    )
    assert model.max_length == LENGTH
    assert model.model.dtype == torch.float32


def test_max_length_is_by_default_that_of_hflm(checkpoint: Checkpoint) -> None:
    lengths: list[Callable[..., Any]] = [ours, theirs]
    found, expected = (make(checkpoint, max_length=None).max_length for make in lengths)
    assert found == expected


def test_a_loaded_model_under_accelerate_launch_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from granite_paged.evaluate.lm import GranitePagedLM  # noqa: PLC0415

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidArgument, match="does not run under accelerate launch"):
        GranitePagedLM(tiny_model())
