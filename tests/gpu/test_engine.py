"""The engine on a GPU: graphs and kernels, with a batch that changes at every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from granite_paged import Engine, PagedConfig, SamplingParams
from granite_paged.engine.sampling import gumbel
from granite_paged.models import load
from tests.helpers.tiny_models import FLAVOURS, VOCABULARY, tiny_model
from tests.helpers.tolerance import SDPA_RATIO, relative_error
from tests.helpers.turns import float64_copy

PROMPTS = [
    [3 + (7 * i + 5 * n) % (VOCABULARY - 3) for i in range(length)]
    for n, length in enumerate((21, 16, 1, 40, 33, 8))
]
NEW = 24


def text(count: int, seed: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, 100_000, (count,), generator=draw).tolist()


@torch.inference_mode()
def logprobs(model: Any, context: list[int], continuation: list[int]) -> torch.Tensor:
    ids = torch.tensor([[*context, *continuation]], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(context) - 1 : -1].double()
    wanted = torch.tensor(continuation, device=model.device)
    return logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].cpu()


def test_log_probabilities_are_as_accurate_as_those_of_sdpa(model: Any) -> None:
    stem = text(700, seed=1)
    items = [
        ([*stem[:600], *text(length, seed=length)], [text(24, seed=2), text(40, seed=3)])
        for length in (5, 90, 300)
    ]
    items += [(text(length, seed=length), [text(32, seed=4)]) for length in (1, 40, 900)]
    sizes = PagedConfig(max_tokens=8192, max_sequences=16)
    with Engine(model, sizes, warmup="lazy") as engine:
        for length in (64, 300):
            engine.submit(text(length, seed=5), SamplingParams(max_new_tokens=200))
        for item in items[:2]:  # one after the other: a state is kept where they diverge
            engine.score([item])
        found = engine.score(items)
        assert engine.stats().prefix_hits
    pairs = [(context, each) for context, several in items for each in several]
    ours = torch.tensor([t for scores in found for score in scores for t in score.tokens])
    sdpa = torch.cat([logprobs(model, *pair) for pair in pairs])
    with float64_copy(model) as exact_model:
        exact = torch.cat([logprobs(exact_model, *pair) for pair in pairs])
    assert relative_error(ours, exact) <= SDPA_RATIO * relative_error(sdpa, exact)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_float32_tokens_equal_those_of_transformers(flavour: str, preemption: Any) -> None:
    model = tiny_model(flavour).to("cuda")
    sizes = PagedConfig(page_size=16, max_tokens=160, max_sequences=4, chunk_tokens=32)
    with Engine(model, sizes, preemption=preemption, warmup="lazy") as engine:
        outputs = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.inference_mode():
            ids = torch.tensor([prompt], device="cuda")
            done = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert output.tokens == done[0, len(prompt) :].tolist()


def test_noise_is_the_same_on_every_device() -> None:
    seeds, places = [1, 2, 2**62], [0, 5, 999]
    here = gumbel(seeds, places, torch.zeros(1, 1000))
    there = gumbel(seeds, places, torch.zeros(1, 1000, device="cuda"))
    torch.testing.assert_close(there.cpu(), here, atol=1e-5, rtol=1e-5)


def test_a_seeded_sample_is_independent_of_other_requests() -> None:
    model = tiny_model().to("cuda")
    params = SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=3)
    sizes = PagedConfig(page_size=16, max_tokens=1024, max_sequences=8, chunk_tokens=64)
    with Engine(model, sizes, warmup="lazy") as engine:
        together = [output.tokens for output in engine.generate(PROMPTS, params)]
        alone = [engine.generate(prompt, params)[0].tokens for prompt in PROMPTS]
    assert together == alone


def written(model: Any) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.25)


def written_through_data(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.25)


def moved(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.25


def hooked(model: Any) -> None:
    for layer in model.model.layers:
        layer.shared_mlp.register_forward_hook(lambda module, args, output: -output)


@pytest.mark.filterwarnings("ignore:granite_paged takes a slower path")  # that of a hook
@pytest.mark.parametrize("change", [written, written_through_data, moved, hooked])
def test_captured_steps_follow_a_model_that_changes(change: Any) -> None:
    """Graphs hold addresses, and the Triton model reads weights: neither may outlive a change."""
    model = load(random_weights="granite-4.0-h-350m", device="cuda", dtype="bfloat16").model
    sizes = PagedConfig(max_tokens=4096, max_sequences=4)
    items = [(text(600, seed=1), [text(24, seed=2)])]
    params = SamplingParams(max_new_tokens=8, stop_tokens=())

    def numbers(engine: Engine) -> torch.Tensor:
        (output,) = engine.generate([items[0][0][:40]], params)
        assert output.error is None
        return torch.tensor(engine.score(items)[0][0].tokens)

    with Engine(model, sizes, warmup="lazy") as engine, torch.no_grad():
        assert not engine.runner.fallback
        for _ in range(3):
            before = numbers(engine)
        change(model)
        after = numbers(engine)
        with Engine(model, sizes, warmup="lazy") as another:
            expected = numbers(another)
        assert (after - before).abs().max() > 0.5
        torch.testing.assert_close(after, expected, atol=0.1, rtol=0)
        assert engine.runner.fallback == another.runner.fallback
