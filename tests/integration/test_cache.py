"""A `PagedCache` on live models: what holds after every step, and what may never leak."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from granite_paged import PagedCache, PagedConfig, paged
from granite_paged.errors import CacheReleased, InvalidRequest, NonFinite, OutOfPages
from granite_paged.hf import cache, patching
from granite_paged.hf.compat import with_cache
from tests.helpers import faults
from tests.helpers.tiny_models import EOS, PAD, VOCABULARY, prompts, tiny_model
from tests.helpers.tolerance import assert_same_logits

PAGE = 4
PAGES = PagedConfig(page_size=PAGE)
LENGTHS = (21, 16, 8)  # the second ends with its page, the others inside one
NEXT = torch.tensor([[7], [30], [51]])


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    """A tiny model, patched for the whole file."""
    hybrid = tiny_model().requires_grad_(False)
    with paged(hybrid, PAGES):
        yield hybrid


@pytest.fixture(scope="module")
def sdpa() -> Any:
    """The same weights, unpatched."""
    return tiny_model().requires_grad_(False)


def run(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the logits of the next tokens, [B, S, V]. The mask covers all columns so far."""
    positions = None
    if mask is not None:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = model(ids, attention_mask=mask, position_ids=positions, **with_cache(cache))
    logits: Tensor = out.logits
    return logits


def fresh(model: Any, **options: Any) -> PagedCache:
    return PagedCache.for_model(model, PagedConfig(**{"page_size": PAGE, **options}))


def filled(model: Any, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> PagedCache:
    """Return a cache after a left-padded prefill."""
    own = fresh(model, **options)
    run(model, own, *prompts(lengths))
    return own


def more(mask: Tensor, columns: int = 1) -> Tensor:
    return torch.nn.functional.pad(mask, (0, columns), value=1)


def test_layers_show_what_those_of_dynamic_cache_show(model: Any, sdpa: Any) -> None:
    own, plain = fresh(model), DynamicCache(config=sdpa.config)
    assert own.layers[1].keys is None
    assert own.get_conv_state(0) is None
    ids, mask = prompts(LENGTHS)
    for _ in range(3):
        run(model, own, ids, mask)
        run(sdpa, plain, ids, mask)
        for layer in own.geometry.attention_layers:
            token = mask.bool()[:, None, :, None]
            for name in ("keys", "values"):
                actual = getattr(own.layers[layer], name)
                assert_same_logits(actual, getattr(plain.layers[layer], name).where(token, 0))
        for layer in own.geometry.mamba_layers:
            ours, theirs = own.layers[layer], plain.layers[layer]
            assert_same_logits(own.get_conv_state(layer), theirs.conv_states[0])
            assert_same_logits(ours.recurrent_states[0], theirs.recurrent_states[0])
        for each in (own, plain):
            each.reorder_cache(torch.tensor([2, 0, 1]))
        ids, mask = NEXT, more(mask[[2, 0, 1]])
    own.reset()
    assert own.layers[1].values is None
    assert own.get_conv_state(0) is None


def pool_bytes(own: PagedCache) -> int:
    return sum(pool.nbytes for pool in own.store.pools.values())


def slots_of(own: PagedCache, row: int) -> Tensor:
    """Return the slots of a row's tokens, in order. They are the same in every pool."""
    sequence = own.sequences[row]
    pages = torch.tensor(own.allocator.pages_of(sequence))
    slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()
    return slots[: own.allocator.length(sequence)]


# -- agreement ----------------------------------------------------------------------------------


def interrupted(model: Any, own: PagedCache) -> None:
    with broken_layer(model, RuntimeError), pytest.raises(RuntimeError):
        run(model, own, NEXT)


KINDS: dict[str, Callable[[Any, PagedCache], Any]] = {
    "a left-padded prefill": lambda model, own: None,
    "a decode step": lambda model, own: run(model, own, NEXT),
    "a chunk": lambda model, own: run(model, own, prompts((9, 9, 9))[0]),
    "a chunk with padding": lambda model, own: run(
        model, own, prompts((9, 3, 5))[0], torch.cat([prompts()[1], prompts((9, 3, 5))[1]], dim=1)
    ),
    "a reordering": lambda model, own: own.reorder_cache(torch.tensor([2, 0, 0])),
    "a repetition": lambda model, own: own.batch_repeat_interleave(3),
    "a selection": lambda model, own: own.batch_select_indices(torch.tensor([2])),
    "growth": lambda model, own: own.reserve([100, 100, 100]),
    "a reset": lambda model, own: own.reset(),
    "a failed step": interrupted,
}


@pytest.mark.parametrize("name", ["keys", "values"])
def test_writing_to_the_keys_of_a_layer_changes_no_page(model: Any, name: str) -> None:
    own, plain = filled(model), filled(model)
    layer = own.layers[own.geometry.attention_layers[0]]
    with pytest.raises(AttributeError):
        setattr(layer, name, torch.zeros(1))
    getattr(layer, name).zero_()
    layer.offload()  # moves nothing
    layer.prefetch()
    mask = more(prompts(LENGTHS)[1])
    assert torch.equal(run(model, own, NEXT, mask), run(model, plain, NEXT, mask))


@pytest.mark.parametrize("layers", [4, 12])
def test_checks_for_nan_wait_for_the_device_twice_per_step(
    layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a tensor's numbers on the host is what waits on a GPU."""
    kinds = ["mamba", "attention"] * (layers // 2)
    deep = tiny_model(num_hidden_layers=layers, layer_types=kinds).requires_grad_(False)
    reads = 0

    def counting(read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor) -> Any:
            nonlocal reads
            reads += 1
            return read(tensor)

        return counted

    counts = []
    with paged(deep, PAGES):
        for check in (False, True):
            own = filled(deep, check_finite=check)
            with monkeypatch.context() as patched:
                for name in ("tolist", "item", "__bool__", "__int__", "cpu"):
                    patched.setattr(Tensor, name, counting(getattr(Tensor, name)))
                reads = 0
                run(deep, own, NEXT)
            counts.append(reads)
    assert counts[1] - counts[0] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_allocator_table_and_pools_agree_after_every_kind_of_step(model: Any, kind: str) -> None:
    own = filled(model)
    KINDS[kind](model, own)
    own.check_valid()
    if own.is_initialized:  # they must still agree after a step that writes into shared pages
        run(model, own, NEXT[:1].expand(own.batch_size, 1))
        own.check_valid()


def test_no_kind_of_step_leaks_a_page(model: Any) -> None:
    own = filled(model)
    for kind in ("a reordering", "a decode step", "a repetition", "a selection"):
        KINDS[kind](model, own)
    own.reset()
    own.check_valid()
    assert own.allocator.held == 0
    assert own.batch_size == -1


# -- following the batch ------------------------------------------------------------------------

SELECTIONS: dict[str, tuple[str, Any, list[int]]] = {
    "one beam wins": ("reorder_cache", torch.tensor([1, 1, 1]), [1, 1, 1]),
    "beams cross": ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
    "a permutation": ("reorder_cache", torch.tensor([1, 2, 0]), [1, 2, 0]),
    "nothing changes": ("reorder_cache", torch.tensor([0, 1, 2]), [0, 1, 2]),
    "repeated": ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    "by index": ("batch_select_indices", torch.tensor([2, 0]), [2, 0]),
    "by bool": ("batch_select_indices", torch.tensor([False, True, True]), [1, 2]),
}


@pytest.mark.parametrize("flavour", ["hybrid", "dense"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_rows_are_selected_as_by_dynamic_cache(flavour: str, selection: str) -> None:
    model = tiny_model(flavour).requires_grad_(False)
    ids, mask = prompts(LENGTHS)
    method, argument, rows = SELECTIONS[selection]

    def talk(own: Any) -> Tensor:
        run(model, own, ids, mask)
        if isinstance(own, DynamicCache) and flavour == "hybrid":
            own.reorder_cache(torch.tensor(rows))  # its Mamba layers support only this
        else:
            getattr(own, method)(argument)
        kept, steps = mask[rows], []
        for columns in (1, 6, 1):
            kept = more(kept, columns)
            tokens = torch.arange(3, 3 + len(rows) * columns).view(len(rows), columns)
            steps.append(run(model, own, tokens, kept))
        return torch.cat(steps, dim=1)

    expected = talk(DynamicCache(config=model.config))
    with paged(model, PAGES):
        own = fresh(model)
        actual = talk(own)
    assert_same_logits(actual, expected)
    own.check_valid()


@pytest.mark.parametrize(
    ("method", "argument"),
    [
        ("reorder_cache", torch.tensor([0, 3, 1])),
        ("batch_select_indices", torch.tensor([-1, 0])),
        ("batch_select_indices", torch.tensor([], dtype=torch.long)),
        ("batch_select_indices", torch.tensor([False, False, False])),
        ("batch_select_indices", torch.tensor([True, False, False, True])),
        ("batch_select_indices", torch.tensor([True])),
        ("batch_repeat_interleave", 0),
    ],
)
def test_selecting_missing_rows_is_refused(model: Any, method: str, argument: Any) -> None:
    own, untouched = filled(model), filled(model)
    with pytest.raises(InvalidRequest, match="row") as refused:
        getattr(own, method)(argument)
    assert "\n" not in str(refused.value)
    own.check_valid()
    assert torch.equal(run(model, own, NEXT), run(model, untouched, NEXT))


def test_a_fork_shares_every_page_until_it_is_written(model: Any) -> None:
    own = filled(model, (10,))
    before = own.allocator.held
    own.reorder_cache(torch.tensor([0, 0, 0]))
    tables = [own.allocator.pages_of(sequence) for sequence in own.sequences]
    assert tables[0] == tables[1] == tables[2]
    assert own.allocator.held == before


def test_a_fork_copies_only_the_page_that_it_writes(model: Any) -> None:
    own = filled(model, (10,))
    slots = slots_of(own, 0)
    stored = {i: pool.values[:, :, slots].clone() for i, pool in own.store.pools.items()}
    own.reorder_cache(torch.tensor([0, 0]))
    run(model, own, NEXT[:2])
    first, second = (own.allocator.pages_of(sequence) for sequence in own.sequences)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    for layer, pool in own.store.pools.items():
        mine, other = (pool.values[:, :, slots_of(own, row)] for row in (0, 1))
        assert torch.equal(mine[:, :, :10], stored[layer]), f"layer {layer}: the parent changed"
        assert torch.equal(other[:, :, :10], stored[layer]), f"layer {layer}: the copy differs"
        assert not torch.equal(mine[:, :, 10], other[:, :, 10])


def test_a_fork_at_the_end_of_a_page_copies_nothing(model: Any) -> None:
    own = filled(model, (2 * PAGE,))
    own.reorder_cache(torch.tensor([0, 0]))
    run(model, own, NEXT[:2])
    assert own.allocator.held == 2 + 2, "two full pages are shared, and each row has one more"


def test_branches_of_a_fork_are_independent(model: Any) -> None:
    own = filled(model, (10,))
    own.reorder_cache(torch.tensor([0, 0, 0]))
    together = torch.cat([run(model, own, NEXT), run(model, own, NEXT.flip(0))], dim=1)
    alone = [filled(model, (10,)) for _ in NEXT]
    expected = [
        torch.cat([run(model, c, first[None]), run(model, c, then[None])], dim=1)
        for c, first, then in zip(alone, NEXT, NEXT.flip(0), strict=True)
    ]
    assert_same_logits(together, torch.cat(expected))


# -- counting -----------------------------------------------------------------------------------


def test_get_seq_length_counts_columns_under_left_padding(model: Any) -> None:
    own = filled(model)
    assert own.get_seq_length() == max(LENGTHS)
    run(model, own, NEXT)
    assert own.get_seq_length() == own.layers[1].get_seq_length() == max(LENGTHS) + 1
    held = [own.allocator.length(sequence) for sequence in own.sequences]
    assert held == [n + 1 for n in LENGTHS], "pages hold tokens, not columns"


def test_pool_bytes_are_the_bytes_of_their_pages(model: Any) -> None:
    own = filled(model)
    pages = sum(own.geometry.pages_for(n) for n in LENGTHS)
    per_token = 2 * 2 * 2 * 8 * 4  # K and V, two layers, two KV heads of 8 float32
    assert own.allocator.held == pages
    assert pool_bytes(own) == own.allocator.pages * PAGE * per_token


def test_every_row_wastes_less_than_a_page(model: Any) -> None:
    lengths = (33, 1, 17, 4, 29, 8, 5, 40)
    own = filled(model, lengths)
    wasted = own.allocator.held * PAGE - own.allocator.tokens
    assert own.allocator.tokens == sum(lengths)
    assert wasted == sum(-n % PAGE for n in lengths)


def test_pages_of_one_token_waste_nothing(model: Any) -> None:
    own = filled(model, page_size=1)
    assert own.allocator.held == own.allocator.tokens == sum(LENGTHS)
    assert_same_logits(run(model, own, NEXT), run(model, filled(model), NEXT))


# -- growing ------------------------------------------------------------------------------------


def greedy(model: Any, own: Any, steps: int) -> tuple[list[int], list[int]]:
    """Return the greedy tokens of one row, and the size of the pool at each step."""
    ids, tokens, sizes = prompts((5,))[0], [], []
    for _ in range(steps):
        ids = run(model, own, ids)[:, -1:].argmax(dim=-1)
        tokens.append(ids.item())
        sizes.append(own.allocator.pages if isinstance(own, PagedCache) else 0)
    return tokens, sizes


def test_growing_the_pool_changes_no_token(model: Any, sdpa: Any) -> None:
    own = fresh(model)
    tokens, sizes = greedy(model, own, 60)
    assert tokens == greedy(sdpa, DynamicCache(config=sdpa.config), 60)[0]
    assert len(set(sizes)) >= 4, f"the pool hardly grew: {sizes}"
    assert sizes == sorted(sizes)
    own.check_valid()


def test_growing_the_pool_keeps_pages_and_contents(model: Any) -> None:
    own = filled(model)
    tables = [own.allocator.pages_of(sequence) for sequence in own.sequences]
    slots = torch.cat([slots_of(own, row) for row in range(3)])
    stored = [p.keys[:, :, slots].clone() for p in own.store.pools.values()]
    size = own.allocator.pages
    own.reserve([200, 200, 200])
    assert own.allocator.pages > size
    assert [own.allocator.pages_of(sequence) for sequence in own.sequences] == tables
    after = [p.keys[:, :, slots] for p in own.store.pools.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, stored, strict=True))


def test_reserved_memory_is_not_reallocated(model: Any) -> None:
    own = fresh(model)
    own.reserve([30, 30, 30])
    where = [pool.keys.data_ptr() for pool in own.store.pools.values()]
    run(model, own, *prompts(LENGTHS))
    for _ in range(9):
        run(model, own, NEXT)
    assert [pool.keys.data_ptr() for pool in own.store.pools.values()] == where
    assert own.allocator.pages == 1 + 3 * own.geometry.pages_for(30)


def until_full(model: Any, own: PagedCache) -> OutOfPages:
    with pytest.raises(OutOfPages) as refused:
        greedy(model, own, 200)
    return refused.value


def test_a_pool_never_grows_past_max_tokens(model: Any) -> None:
    own = fresh(model, max_tokens=60)
    refusal = until_full(model, own)
    assert own.allocator.tokens == 60
    assert own.allocator.pages == 1 + 60 // PAGE
    assert (refusal.needed, refusal.free) == (1, 0)
    assert "max_tokens" in str(refusal)


def test_a_pool_never_grows_past_its_fraction_of_memory(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = 20 * fresh(model).geometry.bytes_per_page
    monkeypatch.setattr(cache, "available_bytes", lambda device: memory)
    own = fresh(model, memory_fraction=0.5)
    own.reserve([10_000])
    assert pool_bytes(own) == memory / 2
    refusal = until_full(model, own)
    assert pool_bytes(own) == memory / 2
    assert own.allocator.tokens == 9 * PAGE, "every page but the null page must be used"
    assert "memory_fraction" in str(refusal)


# -- starting over ------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(30,), (3, 19, 8, 11, 25)])
def test_a_reset_cache_takes_a_batch_of_another_size(model: Any, lengths: tuple[int, ...]) -> None:
    own = filled(model)
    run(model, own, NEXT)
    own.reset()
    ids, mask = prompts(lengths, seed=4)
    new = fresh(model)
    for tokens in (ids, ids[:, :1]):
        assert_same_logits(run(model, own, tokens, mask), run(model, new, tokens, mask))
        mask = more(mask)
    own.check_valid()
    assert own.get_seq_length() == ids.shape[1] + 1


def test_a_copied_cache_is_independent(model: Any) -> None:
    own = filled(model)
    twin = copy.deepcopy(own)
    actual = run(model, own, NEXT), run(model, twin, NEXT.flip(0))
    expected = run(model, filled(model), NEXT), run(model, filled(model), NEXT.flip(0))
    assert torch.equal(torch.stack(actual), torch.stack(expected))
    own.reset()
    twin.check_valid()
    assert twin.allocator.tokens == sum(LENGTHS) + 3


@contextlib.contextmanager
def broken_layer(model: Any, error: type[BaseException]) -> Iterator[None]:
    """Make the third layer raise, after the first attention layer has stored the step's K and V."""

    def fail(*args: Any) -> None:
        raise error("broken on purpose")

    hook = model.model.layers[2].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["prefill", "decode"])
def test_a_failed_step_releases_everything(model: Any, error: type[BaseException], at: str) -> None:
    own = fresh(model) if at == "prefill" else filled(model)
    step = prompts(LENGTHS) if at == "prefill" else (NEXT, more(prompts(LENGTHS)[1]))
    with broken_layer(model, error), pytest.raises(error):
        run(model, own, *step)
    with pytest.raises(CacheReleased, match=r"reset\(\)"):
        run(model, own, *step)
    own.check_valid()
    assert own.allocator.held == own.get_seq_length() == 0
    assert sum(own.layers[layer].nbytes for layer in own.geometry.mamba_layers) == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_released_cache_is_refused_until_reset(model: Any, error: type[BaseException]) -> None:
    own = filled(model)
    with broken_layer(model, error), pytest.raises(error):
        run(model, own, NEXT)
    with pytest.raises(CacheReleased):
        own.reorder_cache(torch.tensor([0, 0, 0]))
    with pytest.raises(CacheReleased):
        model.generate(prompts((9,))[0], **with_cache(own), max_new_tokens=2)
    own.reset()
    ids, mask = prompts(LENGTHS)
    assert_same_logits(run(model, own, ids, mask), run(model, fresh(model), ids, mask))


# -- what may never leak ------------------------------------------------------------------------


def poison(own: PagedCache, value: float) -> None:
    for pool in own.store.pools.values():
        pool.keys.fill_(value)
        pool.values.fill_(value)


def three_steps(model: Any, own: PagedCache) -> Tensor:
    """Return the logits of a padded prefill, a chunk and a decode step, without padding."""
    ids, mask = prompts(LENGTHS)
    kept = [run(model, own, ids, mask)[mask.bool()]]
    for columns in (6, 1):
        mask = more(mask, columns)
        kept.append(run(model, own, ids[:, -columns:], mask).flatten(0, 1))
    return torch.cat(kept)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_initial_pool_contents_change_no_output(model: Any, value: float) -> None:
    own, clean = fresh(model, max_tokens=100), fresh(model, max_tokens=100)
    poison(own, value)
    assert torch.equal(three_steps(model, own), three_steps(model, clean))


def handed_on(model: Any, value: float) -> tuple[PagedCache, Tensor]:
    """Return a cache whose pages held `value` before the current batch, and its logits."""
    own = filled(model, (40, 40), max_tokens=80)
    before = {page for sequence in own.sequences for page in own.allocator.pages_of(sequence)}
    poison(own, value)
    own.reset()
    logits = run(model, own, *prompts((22, 9, 13), seed=2))
    after = {page for sequence in own.sequences for page in own.allocator.pages_of(sequence)}
    assert after <= before, "no page has changed its owner, so nothing is tested"
    return own, logits[:, -1]


@pytest.mark.parametrize("value", [torch.nan, 1e30])
def test_contents_of_released_pages_change_no_output(model: Any, value: float) -> None:
    _, logits = handed_on(model, value)
    expected = run(model, fresh(model), *prompts((22, 9, 13), seed=2))[:, -1]
    assert_same_logits(logits, expected)


def test_huge_values_of_one_batch_do_not_reach_the_next(model: Any) -> None:
    own = fresh(model, max_tokens=100)
    attention = model.model.layers[1].self_attn
    hooks = [
        projection.register_forward_hook(lambda module, args, out: out * 1e30)
        for projection in (attention.k_proj, attention.v_proj)
    ]
    run(model, own, *prompts((40, 40)))
    for hook in hooks:
        hook.remove()
    assert own.store.pools[1].values.abs().max() > 1e28
    own.reset()
    assert_same_logits(three_steps(model, own), three_steps(model, fresh(model)))


def test_compiled_output_ignores_nan_of_an_earlier_owner_which_a_pool_would_pass_on() -> None:
    """The second half is a mutation test: a stored NaN makes the next layer's K and V NaN.

    Both are one test, with heads of 16 and steps of 12 columns, so that it compiles one kernel.
    """
    model = tiny_model(num_attention_heads=3, num_key_value_heads=1).requires_grad_(False)
    config = PagedConfig(page_size=16, max_tokens=32, backend="compiled")
    ids, mask = prompts((11, 12))
    expected = run(model, DynamicCache(config=model.config), ids[:1], mask[:1])

    def after_nan() -> Tensor:
        """Refuse a sequence of NaN, then return the logits of the next owner of its page."""
        own = PagedCache.for_model(model, config)
        with pytest.raises(NonFinite):
            model(inputs_embeds=torch.full((1, 12, 48), torch.nan), **with_cache(own))
        own.reset()
        return run(model, own, ids[:1], mask[:1])

    with paged(model, config):
        assert_same_logits(after_nan()[:, 1:], expected[:, 1:])
        with faults.stored_nan(), pytest.raises(NonFinite, match="attention layer 3"):
            after_nan()


def first_row_of(model: Any, others: tuple[tuple[int, ...], int]) -> Tensor:
    """Return the logits of one prompt and three more tokens, run as the first row of a batch."""
    mine = prompts((12,), seed=9)[0]
    lengths, seed = others
    width = max(12, *lengths, 0)
    ids, mask = torch.full((1 + len(lengths), width), PAD), torch.zeros(1 + len(lengths), width)
    ids[0, -12:], mask[0, -12:] = mine, 1
    for row, length in enumerate(lengths, start=1):
        ids[row, -length:] = prompts((length,), seed=seed + row)[0]
        mask[row, -length:] = 1
    own, mask = fresh(model), mask.long()
    kept = [run(model, own, ids, mask)[0, -12:]]
    for token in (7, 30, 51):
        mask = more(mask)
        step = torch.arange(token, token + len(ids))[:, None] % VOCABULARY
        kept.append(run(model, own, step, mask)[0])
    return torch.cat(kept)


@pytest.mark.parametrize("others", [((5,), 1), ((40, 3), 2), ((12, 12, 12, 12), 3), ((1,), 4)])
def test_rows_do_not_affect_each_other(model: Any, others: tuple[tuple[int, ...], int]) -> None:
    assert_same_logits(first_row_of(model, others), first_row_of(model, ((), 0)))


def test_permuting_the_batch_permutes_the_outputs(model: Any) -> None:
    ids, mask = prompts((21, 16, 8, 13, 21), seed=6)
    order = torch.tensor([3, 0, 4, 2, 1])
    straight, permuted = fresh(model), fresh(model)
    for columns in (21, 1, 1):
        expected = run(model, straight, ids[:, :columns], mask)
        actual = run(model, permuted, ids[order, :columns], mask[order])
        token = mask[order, -columns:].bool()
        assert_same_logits(actual[token], expected[order][token])
        mask = more(mask)


@pytest.mark.parametrize("filler", [EOS, VOCABULARY - 1])
def test_masked_ids_change_no_output(model: Any, filler: int) -> None:
    ids, mask = prompts(LENGTHS)
    first, second = fresh(model), fresh(model)
    expected = run(model, first, ids, mask)[mask.bool()]
    actual = run(model, second, ids.where(mask.bool(), filler), mask)[mask.bool()]
    assert_same_logits(actual, expected)
    assert_same_logits(run(model, second, NEXT, more(mask)), run(model, first, NEXT, more(mask)))


HIDDEN = {
    "one token": [(0, 22)],
    "a whole page of one row": [(0, 8), (0, 9), (0, 10), (0, 11)],
    "the first token of a padded row": [(2, 13)],
    "tokens of several rows": [(0, 3), (1, 5), (1, 21), (2, 20), (2, 23)],
}


@pytest.mark.parametrize("flavour", ["hybrid", "rotary"])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_tokens_hidden_by_a_later_mask_match_sdpa(flavour: str, hidden: str) -> None:
    model = tiny_model(flavour).requires_grad_(False)
    ids, mask = prompts(LENGTHS)

    def talk(own: Any) -> Tensor:
        shown = mask
        run(model, own, ids, shown)
        for _ in range(3):
            shown = more(shown)
            run(model, own, NEXT, shown)
        for row, column in HIDDEN[hidden]:
            shown[row, column] = 0
        kept = []
        for tokens in (ids[:, -5:], NEXT, NEXT):
            shown = more(shown, tokens.shape[1])
            kept.append(run(model, own, tokens, shown))
        return torch.cat(kept, dim=1)

    expected = talk(DynamicCache(config=model.config))
    with paged(model, PAGES):
        assert_same_logits(talk(fresh(model)), expected)


INSIDE = {
    "between tokens": "1111001",
    "many columns": "1111111111000000000000000000001111",
    "after left padding": "0011010011",
    "twice, over several chunks": "11" + "01" * 20 + "1",
}


@pytest.mark.parametrize(
    ("flavour", "triton"),
    [("hybrid", False), ("rotary", False), ("hybrid", True)],  # no kernel rotates
    ids=["hybrid-eager", "rotary-eager", "hybrid-triton"],
)
@pytest.mark.parametrize("inside", INSIDE)
def test_padding_inside_the_first_step_matches_sdpa(
    monkeypatch: pytest.MonkeyPatch, inside: str, flavour: str, triton: bool
) -> None:
    """transformers #47086: such padding is zero in Mamba layers, and the state decays over it."""
    if triton and torch.cuda.is_available():
        pytest.skip("Triton is not interpreted here")
    model = tiny_model(flavour).requires_grad_(False)
    padded = torch.tensor([[int(column) for column in INSIDE[inside]]])
    shown = torch.cat([torch.ones_like(padded), padded])
    ids = torch.arange(3, 3 + shown.numel()).view(shown.shape) % (VOCABULARY - 3) + 3

    def talk(own: Any) -> Tensor:
        logits = run(model, own, ids, shown)[shown.bool()]
        return torch.cat([logits, run(model, own, NEXT[:2], more(shown))[:, 0]])

    expected = talk(DynamicCache(config=model.config))
    if triton:
        monkeypatch.setattr(patching, "kernel_refusal", lambda *args, **kwargs: "")
    with paged(model, PAGES):
        assert_same_logits(talk(fresh(model)), expected)


def _halved(norm: Any) -> None:
    norm.register_forward_hook(lambda module, arguments, out: 0.5 * out)


def _replaced(norm: Any) -> None:
    norm.__class__ = type("Own", (type(norm),), {"forward": lambda self, x, gate: 0.5 * (x + gate)})


@pytest.mark.parametrize("change", [_halved, _replaced])
def test_a_changed_norm_of_a_mamba_layer_is_called_also_where_kernels_run(
    monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton is not interpreted here")
    model = tiny_model("hybrid").requires_grad_(False)
    change(model.model.layers[0].mamba.norm)
    ids = torch.arange(3, 23)[None]
    expected = run(model, DynamicCache(config=model.config), ids)
    monkeypatch.setattr(patching, "kernel_refusal", lambda *args, **kwargs: "")
    with paged(model, PAGES):
        assert_same_logits(run(model, fresh(model), ids), expected)


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_loss_is_not_taken_for_the_logits(as_dict: bool) -> None:
    """Labels that are all ignored make it NaN, in transformers as well."""
    model = tiny_model("hybrid").requires_grad_(False)
    ids = torch.arange(3, 12)[None]
    with paged(model, PAGES):
        cache = with_cache(fresh(model))
        out = model(ids, labels=torch.full_like(ids, -100), return_dict=as_dict, **cache)
        loss, logits = out[0], out[1]
    assert loss.isnan()
    assert logits.isfinite().all()
