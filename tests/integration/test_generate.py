"""Plain `generate()` on a patched float32 model gives the tokens of SDPA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from granite_paged import PagedCache, PagedConfig, paged
from granite_paged.hf.compat import with_cache
from tests.helpers.tiny_models import EOS, FLAVOURS, PAD, cache_of, prompts, tiny_model
from tests.helpers.tolerance import LOGITS_FLOAT32

PAGES = PagedConfig(page_size=4)  # small, so that every case crosses many pages

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.3},
    "beams": {"num_beams": 4, "do_sample": False},
    "beam-sample": {"num_beams": 3, "do_sample": True},
    "several returned": {"num_return_sequences": 3, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 8, "do_sample": False},
    "stops early": {"do_sample": True, "min_new_tokens": 0, "temperature": 5.0},
}


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, **ways: Any) -> Any:
    torch.manual_seed(1)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "return_dict_in_generate": True} | ways
    return model.generate(ids, attention_mask=mask, **options)


@pytest.fixture(scope="module", params=list(FLAVOURS))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.mark.parametrize("way", list(WAYS))
def test_generate_on_a_padded_batch_gives_the_tokens_of_sdpa(model: Any, way: str) -> None:
    ids, mask = prompts()
    expected = generate(model, ids, mask, **WAYS[way])
    with paged(model, PAGES):
        actual = generate(model, ids, mask, **WAYS[way])
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert isinstance(cache_of(actual), PagedCache)
    cache_of(actual).check_valid()


def test_logits_of_every_step_agree_with_sdpa(model: Any) -> None:
    ids, mask = prompts()
    expected = generate(model, ids, mask, output_logits=True, do_sample=False)
    with paged(model, PAGES):
        actual = generate(model, ids, mask, output_logits=True, do_sample=False)
    sdpa, ours = torch.stack(expected.logits), torch.stack(actual.logits)
    assert (ours - sdpa).abs().max() <= LOGITS_FLOAT32 * sdpa.abs().max()


def test_an_unpadded_single_prompt_needs_no_mask(model: Any) -> None:
    ids = prompts((19,))[0]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    with paged(model, PAGES):
        actual = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert actual.tolist() == expected.tolist()


def test_generate_accepts_embeddings(model: Any) -> None:
    ids, mask = prompts()
    embeddings = model.get_input_embeddings()(ids)

    def run() -> list[list[int]]:
        out = model.generate(
            inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=12, do_sample=False
        )
        return out.tolist()

    expected = run()
    with paged(model, PAGES):
        assert run() == expected


def test_a_cache_can_be_continued_over_several_turns(model: Any) -> None:
    first, second = prompts((21, 16, 8))[0][:, -8:], prompts((7, 7, 7), seed=5)[0]

    def talk() -> list[list[int]]:
        turn = model.generate(
            first, max_new_tokens=6, do_sample=False, return_dict_in_generate=True
        )
        for more in (second, second.flip(0)):
            ids = torch.cat([turn.sequences, more], dim=1)
            turn = model.generate(
                ids,
                **with_cache(cache_of(turn)),
                max_new_tokens=6,
                do_sample=False,
                return_dict_in_generate=True,
            )
        return turn.sequences.tolist()

    expected = talk()
    with paged(model, PAGES):
        assert talk() == expected


def continued(model: Any, turn: Any, ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """Return the tokens of the next turn, run on the last turn's cache."""
    last = model.generate(
        ids,
        attention_mask=mask,
        **with_cache(cache_of(turn)),
        max_new_tokens=6,
        do_sample=False,
    )
    return last.tolist()


def test_padding_inside_a_prompt_matches_sdpa(model: Any) -> None:
    ids, mask = prompts()
    mask[0, 4:6] = mask[1, 9:15] = mask[2, 19] = 0
    expected = generate(model, ids, mask, do_sample=False)
    with paged(model, PAGES):
        actual = generate(model, ids, mask, do_sample=False)
    assert actual.sequences.tolist() == expected.sequences.tolist()


def test_padding_inside_a_later_turn_matches_sdpa(model: Any) -> None:
    ids, mask = prompts()
    more, more_mask = prompts((9, 4, 6), seed=7)
    full = torch.cat([mask, torch.ones(3, 6, dtype=torch.long), more_mask], dim=1)

    def talk() -> list[list[int]]:
        turn = generate(model, ids, mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        longer = torch.cat([turn.sequences, more], dim=1)
        return continued(model, turn, longer, full)

    expected = talk()
    with paged(model, PAGES):
        assert talk() == expected


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.pieces.append([])


def test_a_streamer_receives_every_token() -> None:
    model, ids = tiny_model(), prompts((11,))[0]
    expected, actual = Recorder(), Recorder()
    model.generate(ids, max_new_tokens=5, do_sample=False, streamer=expected)
    with paged(model, PAGES):
        model.generate(ids, max_new_tokens=5, do_sample=False, streamer=actual)
    assert actual.pieces == expected.pieces
    assert len(actual.pieces) > 2
    assert issubclass(TextStreamer, BaseStreamer)


FINISHING: dict[str, Any] = {  # rows reach EOS at different steps and are padded from then on
    "do_sample": True,
    "min_new_tokens": 0,
    "max_new_tokens": 25,
    "sequence_bias": {(EOS,): 2.5},
}


def test_finished_rows_are_fed_padding_as_under_sdpa() -> None:
    model = tiny_model()
    ids, mask = prompts()
    expected = generate(model, ids, mask, **FINISHING)
    with paged(model, PAGES):
        actual = generate(model, ids, mask, **FINISHING)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert (expected.sequences[:, ids.shape[1] :] == PAD).any(), "no row finished early"


def test_a_later_turn_may_hide_padding_of_finished_rows(model: Any) -> None:
    ids, mask = prompts()
    more = prompts((5, 5, 5), seed=3)[0]

    def talk() -> list[list[int]]:
        turn = generate(model, ids, mask, **FINISHING)
        longer = torch.cat([turn.sequences, more], dim=1)
        shown = (longer != PAD).long()
        assert not shown[:, ids.shape[1] :].all(), "no token is hidden, so nothing is tested"
        return continued(model, turn, longer, shown)

    expected = talk()
    with paged(model, PAGES):
        assert talk() == expected


def test_beams_share_the_pages_of_their_prompt() -> None:
    model, ids = tiny_model(), prompts((40,))[0]
    with paged(model, PAGES):
        cache = cache_of(
            model.generate(
                ids, num_beams=4, max_new_tokens=8, do_sample=False, return_dict_in_generate=True
            )
        )
    alone = cache.geometry.pages_for(47)
    assert cache.allocator.held < 2 * alone, "four beams hold less than two sequences would"


def test_assisted_generation_stays_refused() -> None:
    model, helper = tiny_model(), tiny_model(seed=1)
    ids = prompts((9,))[0]
    with paged(model, PAGES), pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=helper, max_new_tokens=4)


def test_a_cache_chosen_by_the_user_is_used() -> None:
    model, ids = tiny_model(), prompts((9,))[0]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    with paged(model, PAGES):
        out = model.generate(
            ids,
            max_new_tokens=4,
            do_sample=False,
            cache_implementation="static",
            return_dict_in_generate=True,
        )
        uncached = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert not isinstance(cache_of(out), PagedCache)
    assert out.sequences.tolist() == uncached.tolist() == expected


def test_page_size_changes_no_token() -> None:
    model = tiny_model()
    ids, mask = prompts()
    answers = []
    for page_size in (1, 2, 16, 128):
        with paged(model, PagedConfig(page_size=page_size)):
            answers.append(generate(model, ids, mask, do_sample=False).sequences.tolist())
    assert all(answer == answers[0] for answer in answers)


def test_compiled_kernels_give_the_same_tokens() -> None:
    model = tiny_model()
    ids, mask = prompts()
    options = {"do_sample": False, "max_new_tokens": 14, "min_new_tokens": 14}
    expected = generate(model, ids, mask, **options)
    with paged(model, PagedConfig(page_size=16, backend="compiled")):
        actual = generate(model, ids, mask, **options)
        with torch._dynamo.config.patch(error_on_recompile=True):
            again = generate(model, ids[:, 1:], mask[:, 1:], **options)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert again.sequences.shape == (3, 20 + 14)
