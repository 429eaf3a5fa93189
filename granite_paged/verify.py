"""Run the same inputs through SDPA and through pages, and judge the difference.

Each case is a script of moves (feed tokens, fork rows). It is played three times: by transformers
(`default`: SDPA and a DynamicCache), by the patched model (`paged`), and by a float64 copy of the
model as the reference. `tolerances.py` says which differences pass.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from granite_paged import tolerances
from granite_paged.checkpoints.recall import recall_accuracy, recall_batch, usual_pairs
from granite_paged.device import device_name, dtype_name, one_memory_error
from granite_paged.environment import versions
from granite_paged.errors import BrokenInvariant, DeviceError, InvalidArgument
from granite_paged.geometry import CacheGeometry, PagedConfig
from granite_paged.hf.cache import PagedCache
from granite_paged.hf.compat import with_cache
from granite_paged.hf.patching import paged
from granite_paged.models import EMBEDDED, LoadedModel
from granite_paged.paging.allocator import PageAllocator
from granite_paged.progress import Progress, silent

DECODE_STEPS = 64
RECALL_CONTEXTS = (128, 1024, 4096)
RAGGED_SEQUENCES, RAGGED_LONGEST = 256, 4096

_MOST_LOGITS = 2**26  # kept per feed; in float64 these are 0.5 GB


@dataclass(frozen=True)
class Feed:
    """Append tokens to every row.

    Attributes:
        input_ids: token ids [B, S].
        attention_mask: 1 for tokens and 0 for padding, [B, columns so far + S]; None: no padding.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None


@dataclass(frozen=True)
class Fork:
    """Replace row i by a copy of row `rows[i]`."""

    rows: tuple[int, ...]


Move = Feed | Fork


@dataclass(frozen=True)
class CaseResult:
    """Result of one script.

    Attributes:
        max_abs_diff: largest difference between a logit of `default` and of `paged`.
        relative_diff: `max_abs_diff` divided by the largest absolute logit of `default`.
        error_default, error_paged: relative RMS error against float64; None without a reference.
        error_ratio: `error_paged / error_default`.
        tokens_equal: whether both modes choose the same token at every position.
        flipped: number of positions where they choose different tokens.
        near_ties: flipped positions where the two best logits of `default` differ by no more
            than twice `max_abs_diff`.
        law: the tolerance that applies, in words.
        invariant: the broken invariant of allocator, page tables and pools, or `holds`.
    """

    name: str
    max_abs_diff: float
    relative_diff: float
    error_default: float | None
    error_paged: float | None
    error_ratio: float | None
    tokens_equal: bool
    flipped: int
    near_ties: int
    law: str
    invariant: str
    passed: bool


@dataclass(frozen=True)
class RecallResult:
    """Accuracy on associative recall, the worst of all context lengths, and agreement.

    Attributes:
        default, paged: share of right answers, 0 to 1.
        answers_equal: whether both modes give the same answer to every question.
    """

    default: float
    paged: float
    answers_equal: bool
    questions: int
    passed: bool


@dataclass(frozen=True)
class KVMemory:
    """Bytes of K and V for sequences of random lengths: padded into one batch, and in pages.

    `waste_fraction` is the share of bytes in held pages that store no token.
    """

    sequences: int
    tokens: int
    bytes_contiguous: int
    bytes_paged: int
    waste_fraction: float
    passed: bool


@dataclass(frozen=True)
class VerifyReport:
    """Result of `granite-paged verify`."""

    passed: bool
    model: str
    device: str
    dtype: str
    page_size: int
    cases: list[CaseResult]
    recall: RecallResult | None
    kv: KVMemory
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain types."""
        return asdict(self)


def verify(
    loaded: LoadedModel,
    *,
    config: PagedConfig | None = None,
    context: int = 384,
    seed: int = 0,
    reference: bool = True,
    progress: Progress = silent,
) -> VerifyReport:
    """Compare paged attention with transformers' default on every case.

    Args:
        loaded: the model to verify.
        config: page size and pool sizes of the paged side.
        context: length of the longest prompt in tokens, at least 16.
        seed: seed of the prompts.
        reference: whether to also play each case in float64, which takes 8 bytes per parameter.
        progress: called with (stage, stages done, stages) at the start of each stage.

    Raises:
        DeviceError: if the float64 copy does not fit into memory.
        InvalidArgument: if `context` is too short.
    """
    if context < 16:
        raise InvalidArgument(f"context must be at least 16 tokens, got {context}")
    config = config or PagedConfig()
    model = loaded.model
    players = _Players(model, config, float64_copy(model) if reference else None)
    recall, scripts = None, _scripts(players, context, seed)
    stages = [*scripts, *(["recall"] if loaded.name == EMBEDDED else []), "memory"]

    def begin(name: str) -> None:
        progress(name, stages.index(name), len(stages))

    with torch.inference_mode():
        cases = []
        for name, moves in scripts.items():
            begin(name)
            cases.append(players.judge(name, moves()))
        if "recall" in stages:
            begin("recall")
            recall = players.recall(seed)
        begin("memory")
        kv = kv_memory(players.geometry, seed)
    return VerifyReport(
        passed=all(case.passed for case in cases) and kv.passed and (not recall or recall.passed),
        model=loaded.name,
        device=device_name(model.device),
        dtype=dtype_name(model.dtype),
        page_size=config.page_size,
        cases=cases,
        recall=recall,
        kv=kv,
        versions=versions(),
    )


def kv_memory(geometry: CacheGeometry, seed: int) -> KVMemory:
    """Count the bytes of K and V for `RAGGED_SEQUENCES` sequences: padded, and in pages."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, RAGGED_LONGEST) for _ in range(RAGGED_SEQUENCES)]
    pages = 1 + sum(geometry.pages_for(length) for length in lengths)
    allocator = PageAllocator(pages, geometry.page_size)
    for length in lengths:
        allocator.append({allocator.open(): length})
    held_tokens = allocator.held * geometry.page_size
    waste = 1 - allocator.tokens / held_tokens
    return KVMemory(
        sequences=len(lengths),
        tokens=allocator.tokens,
        bytes_contiguous=len(lengths) * max(lengths) * geometry.bytes_per_token,
        bytes_paged=allocator.held * geometry.bytes_per_page,
        waste_fraction=waste,
        passed=waste <= tolerances.WASTE,
    )


# -- scripts ------------------------------------------------------------------------------------


def _scripts(players: _Players, context: int, seed: int) -> dict[str, Callable[[], list[Move]]]:
    ids = players.tokens(4, context, seed)
    chunk, steps = _chunk(players, context), DECODE_STEPS // 4
    return {
        "prefill": lambda: [Feed(ids[:2])],
        "chunked prefill": lambda: [Feed(part) for part in torch.split(ids[:2], chunk, dim=1)],
        "decode": lambda: [Feed(ids[:2]), *players.greedy(ids[:2], DECODE_STEPS)],
        "ragged batch": lambda: _ragged(ids, players.tokens(4, steps, seed + 1)),
        "fork and continue": lambda: _fork(ids[:1], players.tokens(3, steps, seed + 2)),
    }


def _chunk(players: _Players, context: int) -> int:
    """Return about a third of the context.

    With Mamba layers it is a multiple of their chunk, because only then is splitting the scan
    exact.
    """
    unit = players.model.config.mamba_chunk_size if players.geometry.mamba_layers else 1
    return int(max(1, context // 3 // unit) * unit)


def _ragged(ids: Tensor, then: Tensor) -> list[Move]:
    """Feed four left-padded rows: whole, two thirds, a third, and three tokens; then decode."""
    width = ids.shape[1]
    lengths = torch.tensor([width, 2 * width // 3, width // 3, 3], device=ids.device)
    columns = torch.arange(width, device=ids.device)
    mask = (columns >= width - lengths[:, None]).long()
    moves: list[Move] = [Feed(ids * mask, mask)]
    for token in torch.split(then, 1, dim=1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        moves.append(Feed(token, mask))
    return moves


def _fork(ids: Tensor, then: Tensor) -> list[Move]:
    """Fork one prompt, which ends inside a page, into three rows; feed a chunk, then tokens."""
    half = then.shape[1] // 2
    steps = [Feed(token) for token in torch.split(then[:, half:], 1, dim=1)]
    return [Feed(ids[:, :-1]), Fork((0, 0, 0)), Feed(then[:, :half]), *steps]


# -- playing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Players:
    """The model, how it is paged, and its float64 copy if a reference is wanted."""

    model: Any
    config: PagedConfig
    exact: Any | None

    @property
    def geometry(self) -> CacheGeometry:
        return CacheGeometry.from_config(
            self.model.config, page_size=self.config.page_size, dtype=self.model.dtype
        )

    def tokens(self, rows: int, columns: int, seed: int) -> Tensor:
        """Draw random token ids [rows, columns] on the model's device."""
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.model.config.vocab_size, (rows, columns), generator=draw)
        return ids.to(self.model.device)

    def greedy(self, ids: Tensor, steps: int) -> list[Move]:
        """Return the tokens that `default` generates, as moves that every mode can play."""
        cache = DynamicCache(config=self.model.config)
        moves: list[Move] = []
        for _ in range(steps):
            logits = self.model(ids, **with_cache(cache), logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(dim=-1)
            moves.append(Feed(ids))
        return moves

    def play_default(self, moves: list[Move]) -> Tensor:
        return play(self.model, moves, DynamicCache(config=self.model.config))

    def play_paged(self, moves: list[Move]) -> tuple[Tensor, str]:
        """Return the logits, and the invariant of the cache that is then broken, or ""."""
        with paged(self.model, self.config):
            cache = PagedCache.for_model(self.model, self.config)
            cache.reserve(_tokens_of_each_row(moves))
            logits = play(self.model, moves, cache)
        try:
            cache.check_valid()
        except BrokenInvariant as broken:
            return logits, str(broken)
        return logits, ""

    def judge(self, name: str, moves: list[Move]) -> CaseResult:
        """Play a script in every mode and apply the tolerance for the model's dtype."""
        default, (ours, broken) = self.play_default(moves), self.play_paged(moves)
        errors: tuple[float, float] | None = None
        if self.exact is not None:
            exact = play(self.exact, moves, DynamicCache(config=self.exact.config))
            errors = (
                tolerances.relative_error(default, exact),
                tolerances.relative_error(ours, exact),
            )
        return _result(name, default, ours, errors, bound=self._bound(), broken=broken)

    def _bound(self) -> float | None:
        attention_only = not self.geometry.mamba_layers
        layers = self.model.config.num_hidden_layers
        return tolerances.logit_bound(
            self.model.dtype, attention_only=attention_only, layers=layers
        )

    def recall(self, seed: int) -> RecallResult:
        """Feed facts first and then questions about them, so that the facts come from pages."""
        default: list[float] = []
        ours: list[float] = []
        equal, questions = True, 0
        for context in RECALL_CONTEXTS:
            rows = max(1, 2048 // context)
            batch = recall_batch(
                context=context, pairs=usual_pairs(context), batch=rows, seed=seed + context
            )
            ids = batch.input_ids.to(self.model.device)
            moves: list[Move] = [Feed(part) for part in torch.split(ids, context // 2, dim=1)]
            answers = [
                torch.cat(_by_feed(logits.argmax(dim=-1), moves), dim=1).cpu()
                for logits in (self.play_default(moves), self.play_paged(moves)[0])
            ]
            default.append(recall_accuracy(answers[0], batch))
            ours.append(recall_accuracy(answers[1], batch))
            equal &= bool((answers[0] == answers[1])[batch.scored].all())
            questions += int(batch.scored.sum())
        worst_default, worst_paged = min(default), min(ours)
        return RecallResult(
            default=worst_default,
            paged=worst_paged,
            answers_equal=equal,
            questions=questions,
            passed=equal
            and default == ours
            and min(worst_default, worst_paged) >= tolerances.RECALL,
        )


def play(model: Any, moves: list[Move], cache: Any) -> Tensor:
    """Play a script and return the logits of its tokens, without padding: [n, vocabulary].

    Of feeds that would keep more than `_MOST_LOGITS` numbers, only the last columns count.
    """
    kept = []
    for move in moves:
        if isinstance(move, Fork):
            cache.reorder_cache(torch.tensor(move.rows, device=model.device))
            continue
        rows, columns = move.input_ids.shape
        keep = max(1, min(columns, _MOST_LOGITS // (rows * model.config.vocab_size)))
        logits = model(
            move.input_ids,
            attention_mask=move.attention_mask,
            position_ids=_position_ids(move),
            **with_cache(cache),
            logits_to_keep=keep,
        ).logits
        kept.append(logits[_is_token(move)[:, -keep:]])
    return torch.cat(kept)


def _tokens_of_each_row(moves: list[Move]) -> list[int]:
    """Return the final length of each row, for which pools and kernels are prepared once."""
    feeds = [move.input_ids.shape for move in moves if isinstance(move, Feed)]
    return [sum(columns for _, columns in feeds)] * max(rows for rows, _ in feeds)


def _position_ids(move: Feed) -> Tensor | None:
    """Return positions [B, S] as `generate()` does for padded batches; None without padding."""
    if move.attention_mask is None:
        return None
    positions = (move.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return positions[:, -move.input_ids.shape[1] :]


def _is_token(move: Feed) -> Tensor:
    if move.attention_mask is None:
        return torch.ones_like(move.input_ids, dtype=torch.bool)
    return move.attention_mask[:, -move.input_ids.shape[1] :].bool()


def _by_feed(flat: Tensor, moves: list[Move]) -> list[Tensor]:
    """Undo the flattening of `play` for scripts without padding: one [B, S] per feed."""
    shapes = [move.input_ids.shape for move in moves if isinstance(move, Feed)]
    parts = torch.split(flat, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


# -- judging ------------------------------------------------------------------------------------


def _result(
    name: str,
    default: Tensor,
    ours: Tensor,
    errors: tuple[float, float] | None,
    *,
    bound: float | None,
    broken: str,
) -> CaseResult:
    difference = float((ours.double() - default.double()).abs().max())
    relative = difference / float(default.abs().max())
    flipped = ours.argmax(dim=-1) != default.argmax(dim=-1)
    best = default[flipped].double().topk(2, dim=-1).values
    near_ties = int((best[:, 0] - best[:, 1] <= 2 * difference).sum())
    ratio = errors[1] / errors[0] if errors and errors[0] else None
    within = bound is None or (relative <= bound and near_ties == int(flipped.sum()))
    if bound is None and ratio is not None:
        within = ratio <= tolerances.SDPA_RATIO
    return CaseResult(
        name=name,
        max_abs_diff=difference,
        relative_diff=relative,
        error_default=errors[0] if errors else None,
        error_paged=errors[1] if errors else None,
        error_ratio=ratio,
        tokens_equal=not bool(flipped.any()),
        flipped=int(flipped.sum()),
        near_ties=near_ties,
        law=_law(bound, ratio),
        invariant=broken or "holds",
        passed=within and not broken and not math.isnan(difference),
    )


def _law(bound: float | None, ratio: float | None) -> str:
    if bound is not None:
        return f"largest difference <= {bound:g} x the largest logit"
    if ratio is not None:
        return f"paged error <= {tolerances.SDPA_RATIO:g} x SDPA error"
    return "none, because half precision is judged by its error against float64"


def float64_copy(model: Any) -> Any:
    """Return a float64 copy of the model. Raises DeviceError if it does not fit into memory."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        with one_memory_error():
            exact = copy.deepcopy(model).double()
    except torch.OutOfMemoryError:
        raise DeviceError(
            f"the float64 reference needs {8 * parameters / 1e9:.1f} GB, which is more than is "
            "free; pass --no-reference"
        ) from None
    exact.set_experts_implementation("eager")  # the grouped kernel does not support float64
    return exact
