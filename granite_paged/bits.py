"""Digests of what a model computes in exact mode: golden data without tolerances.

A few fixed requests run by themselves. What each layer stores for them is hashed with SHA-256, and
so are their logits::

    attention layer   K and V of every token, in order
    Mamba layer       its states after the last token
    logits            after the prompt, and after each token that is then fed

What a layer stores depends on the layers before it and on its own input, so the first layer whose
digest differs tells where bits part. Two reports are comparable for the same model and dtype.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from granite_paged import files
from granite_paged.device import dtype_name
from granite_paged.digests import weights_digest
from granite_paged.environment import bits_place
from granite_paged.errors import BitsFileError, InvalidArgument
from granite_paged.geometry import PagedConfig
from granite_paged.models import LoadedModel
from granite_paged.paging.allocator import PageAllocator
from granite_paged.runner.runner import Chunk, Runner
from granite_paged.typed_json import read_json

REQUESTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "short": (7, ()),
    "chunked": (100, (33, 64, 71)),
    "long": (300, ()),
}
"""Prompts: number of tokens, and where they are cut."""

FED = 4
"""Tokens that are decoded after each prompt. They are drawn as the prompt is, not from logits."""

LOGITS = "logits"

_ROW = 1
_TOKENS = 1024  # of the pool: more than a request needs


@dataclass(frozen=True, slots=True)
class BitsReport:
    """Digests of one model in one place.

    Attributes:
        model: its name.
        weights: digest of its weights.
        dtype: of the weights.
        place: device and versions, see `bits_place`.
        requests: request -> layer, or "logits" -> digest.
    """

    model: str
    weights: str
    dtype: str
    place: dict[str, str]
    requests: dict[str, dict[str, str]]

    def same_model(self, other: BitsReport) -> bool:
        """Return whether both are of the same weights in the same dtype."""
        return (self.weights, self.dtype) == (other.weights, other.dtype)

    def moved(self, other: BitsReport) -> list[str]:
        """Return what differs in the places, such as "torch 2.14.1 and 2.15.0"."""
        names = sorted(self.place | other.place)
        pairs = [(name, self.place.get(name), other.place.get(name)) for name in names]
        return [f"{name} {one} and {two}" for name, one, two in pairs if one != two]

    def described(self, other: BitsReport) -> list[str]:
        """Return lines that say what moved between the places, and where bits differ first."""
        moved, differing = self.moved(other), self.differences(other)
        where = f"other places: {', '.join(moved)}" if moved else "the same place"
        verdicts = dict.fromkeys(self.requests, "the same bits")
        for request, layer in differing.items():
            first = "the logits" if layer == LOGITS else f"layer {layer}"
            verdicts[request] = f"differs first in {first}"
        return [where, *(f"{request}: {verdict}" for request, verdict in verdicts.items())]

    def differences(self, other: BitsReport) -> dict[str, str]:
        """Return the first layer, or "logits", that differs in each request; {} if none does."""
        return {
            request: layer
            for request, digests in self.requests.items()
            for layer in _first_difference(digests, other.requests.get(request, {}))
        }


@dataclass(frozen=True, slots=True)
class _BitsFile:
    reports: list[BitsReport]


def digest_of(*tensors: Tensor) -> str:
    """Return the SHA-256 of the bits of tensors, in their order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        whole = tensor.detach().cpu().contiguous()
        digest.update(whole.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def bits_report(loaded: LoadedModel, config: PagedConfig | None = None) -> BitsReport:
    """Run the fixed requests in exact mode, each by itself.

    Raises:
        CannotBeExact: if the model or device cannot run in exact mode.
    """
    model, config = loaded.model, config or PagedConfig()
    exact = replace(config, exact=True, max_tokens=_TOKENS, max_sequences=1)
    runner = Runner.for_model(model, exact)
    allocator = PageAllocator(runner.pages, config.page_size)
    requests = {
        name: _digests(runner, allocator, _drawn(name, count, runner.vocabulary), cuts)
        for name, (count, cuts) in REQUESTS.items()
    }
    runner.close()
    return BitsReport(
        model=loaded.name,
        weights=weights_digest(model),
        dtype=dtype_name(model.dtype),
        place=bits_place(model.device),
        requests=requests,
    )


def read_reports(path: str | Path) -> list[BitsReport]:
    """Read what `write_report` wrote. Raises BitsFileError."""
    reports: list[BitsReport] = read_json(_BitsFile, path, BitsFileError).reports
    if not reports:
        raise BitsFileError(str(path), "reports", "holds no report")
    return reports


def write_report(path: str | Path, report: BitsReport) -> None:
    """Add a report to a file, in place of the one for the same model, dtype and place.

    Raises:
        BitsFileError: if the file exists and is no such file.
        CannotWrite: if it cannot be written.
    """
    earlier = read_reports(path) if Path(path).exists() else []
    kept = [one for one in earlier if not (one.same_model(report) and one.place == report.place)]
    files.write_json(path, asdict(_BitsFile([*kept, report])))


def newest_pairs(
    first: Sequence[BitsReport], second: Sequence[BitsReport]
) -> list[tuple[BitsReport, BitsReport]]:
    """Pair the newest reports of each model and dtype.

    Raises:
        InvalidArgument: if no model and dtype is in both.
    """
    pairs = []
    for report in {(one.weights, one.dtype): one for one in first}.values():
        others = [one for one in second if one.same_model(report)]
        pairs += [(report, others[-1])] if others else []
    if not pairs:
        raise InvalidArgument("the two files have no model in common: record the same in both")
    return pairs


# -- details ------------------------------------------------------------------------------------


def _drawn(name: str, count: int, vocabulary: int) -> list[int]:
    chance = random.Random(name)
    return [chance.randrange(vocabulary) for _ in range(count + FED)]


def _digests(
    runner: Runner, allocator: PageAllocator, tokens: Sequence[int], cuts: Sequence[int]
) -> dict[str, str]:
    """Run one request in the runner's only row. Return digests of each layer and of the logits."""
    runner.clear_rows([_ROW])
    sequence, prompt = allocator.open(), len(tokens) - FED
    logits = []
    for start, end in zip((0, *cuts), (*cuts, prompt), strict=True):
        runner.write_pages(allocator.append({sequence: end - start}), {sequence: _ROW})
        after = runner.prefill([Chunk(_ROW, start, tokens[start:end])])
    logits.append(after.clone())
    for position in range(prompt, len(tokens)):
        runner.write_pages(allocator.append({sequence: 1}), {sequence: _ROW})
        runner.tokens[_ROW] = tokens[position]
        logits.append(runner.decode([_ROW], [position]).clone())
    found = dict(_by_layer(runner, len(tokens)))
    runner.forget_pages(allocator.release(sequence))
    return {**found, LOGITS: digest_of(*logits)}


def _by_layer(runner: Runner, tokens: int) -> Iterator[tuple[str, str]]:
    geometry, store = runner.geometry, runner.storage.pages
    row, at = (each.to(runner.device) for each in (torch.tensor([_ROW]), torch.arange(tokens)))
    slots = store.table.slots(at[None], geometry.page_size, row)[0]
    states = runner.save_row(_ROW)
    for layer in sorted((*geometry.attention_layers, *geometry.mamba_layers)):
        if layer in geometry.attention_layers:
            pool = store.pools[layer]
            parts = [each[0].index_select(1, slots) for each in (pool.keys, pool.values)]
            yield f"{layer} attention", digest_of(*parts)
        else:
            place = geometry.mamba_layers.index(layer)
            conv, ssm, *inputs = (part[place] for part in states.parts)
            filled = (part[: tokens % len(part)] for part in inputs)  # later slots are of no token
            yield f"{layer} mamba", digest_of(conv, ssm, *filled)


def _first_difference(one: dict[str, str], two: dict[str, str]) -> list[str]:
    return [layer for layer in one if one[layer] != two.get(layer)][:1]
