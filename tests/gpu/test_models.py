"""Live models on the GPU: the laws of `verify`, generate(), and no recompilation once warm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from granite_paged import PagedCache, PagedConfig, paged, verify
from granite_paged.errors import NonFinite
from granite_paged.hf.compat import with_cache
from granite_paged.models import LoadedModel, load
from tests.helpers import faults
from tests.helpers.tiny_models import FLAVOURS, prompts, tiny_model
from tests.helpers.tolerance import LOGITS_FLOAT32, RECALL, SDPA_RATIO, relative_error
from tests.helpers.turns import float64_copy, large_turn

PAGES = PagedConfig(page_size=16)


@pytest.fixture(scope="module")
def one_b() -> LoadedModel:
    return load(random_weights="granite-4.0-h-1b", device="cuda", dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_embedded_model_passes_every_law(dtype: str) -> None:
    report = verify.verify(load(device="cuda", dtype=dtype), config=PAGES)
    assert report.passed, report
    assert report.recall is not None
    assert report.recall.paged == report.recall.default >= RECALL


def test_granite_4_h_1b_in_bfloat16_is_as_accurate_as_sdpa(one_b: LoadedModel) -> None:
    with large_turn():
        report = verify.verify(one_b, context=1024)
    ratios = {case.name: case.error_ratio for case in report.cases}
    assert all(ratio is not None and ratio <= SDPA_RATIO for ratio in ratios.values()), ratios


def test_a_prompt_of_32768_tokens_is_as_accurate_as_sdpa(one_b: LoadedModel) -> None:
    model = one_b.model
    ids = torch.randint(0, model.config.vocab_size, (1, 32768 + 4), device="cuda")
    steps = [*ids[:, :32768].split(2048, dim=1), *ids[:, 32768:].split(1, dim=1)]

    def last(model: Any, cache: Any, most: int = 2048) -> torch.Tensor:
        """Return logits of the last eight steps, computed in parts of at most `most` tokens."""
        found = []
        with torch.inference_mode():
            for step in steps:
                for part in step.split(most, dim=1):
                    logits = model(part, **with_cache(cache), logits_to_keep=64).logits
                found.append(logits.double().flatten(0, 1))
        return torch.cat(found[-8:])

    default = last(model, DynamicCache(config=model.config))
    with paged(model):
        ours = last(model, PagedCache.for_model(model))
    with float64_copy(model) as exact_model:
        # shorter steps: the scores of 2,048 tokens would take 6 GB, several times
        exact = last(exact_model, DynamicCache(config=model.config), most=256)
    assert relative_error(ours, exact) <= SDPA_RATIO * relative_error(default, exact)


@pytest.mark.parametrize("flavour", list(FLAVOURS))
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_generate_gives_the_tokens_of_sdpa(flavour: str, way: str) -> None:
    model = tiny_model(flavour, hidden_size=96, mamba_d_head=32).cuda()  # heads of 16
    ids, mask = (tensor.cuda() for tensor in prompts())
    options = {"max_new_tokens": 40, "num_beams": 3 if way == "beams" else 1, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, **options)
    with paged(model, PAGES):
        actual = model.generate(ids, attention_mask=mask, **options)
    assert actual.tolist() == expected.tolist()


def test_nothing_recompiles_over_200_decode_steps() -> None:
    model = load(device="cuda", dtype="bfloat16").model
    ids, mask = (tensor.cuda() for tensor in prompts())
    with paged(model, PAGES), torch.inference_mode():
        cache = PagedCache.for_model(model, PAGES)
        cache.reserve([300] * 3)
        logits = model(ids, attention_mask=mask, **with_cache(cache)).logits
        for step in range(208):
            warm = step >= 8
            with torch._dynamo.config.patch(error_on_recompile=warm):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                token = logits[:, -1:].argmax(dim=-1)
                logits = model(token, attention_mask=mask, **with_cache(cache)).logits
        cache.check_valid()
    assert cache.allocator.length(cache.sequences[0]) == 21 + 208


@pytest.mark.parametrize("fault", faults.SEEN_BY_VERIFY)
def test_the_compiled_kernel_shows_an_injected_fault(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "DECODE_STEPS", 8)
    monkeypatch.setattr(verify, "RECALL_CONTEXTS", (128,))
    with faults.SEEN_BY_VERIFY[fault]():
        report = verify.verify(load(device="cuda"), config=PAGES, context=64, reference=False)
    worst = max(case.relative_diff for case in report.cases)
    assert worst > 10 * LOGITS_FLOAT32


def test_nan_of_one_owner_does_not_reach_the_next() -> None:
    model = load(device="cuda").model
    ids = prompts((37, 21))[0].cuda()
    with paged(model, PAGES), torch.inference_mode():
        clean = model(ids[:1], **with_cache(PagedCache.for_model(model, PAGES))).logits
        cache = PagedCache.for_model(model, PAGES)
        cache.reserve([64])
        nan = torch.full((1, 64, model.config.hidden_size), torch.nan, device="cuda")
        with pytest.raises(NonFinite):
            model(inputs_embeds=nan.to(model.dtype), **with_cache(cache))
        cache.reset()
        assert torch.equal(model(ids[:1], **with_cache(cache)).logits, clean)
