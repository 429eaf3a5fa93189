r"""Register this package as the model `granite_paged` of EleutherAI's lm-eval.

lm-eval finds models only in its registry, and importing this module adds the model to it. To run
lm-eval's command line with the model registered::

    python -m granite_paged.evaluate.lm --model granite_paged --tasks mmlu --num_fewshot 5 \
        --model_args pretrained=ibm-granite/granite-4.0-h-1b

From Python, `import granite_paged.evaluate.lm` before you call `lm_eval.simple_evaluate(...)`.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from granite_paged.device import one_memory_error
from granite_paged.errors import (
    GranitePagedError,
    InvalidArgument,
    MissingExtra,
    TokenizerError,
    UnknownName,
)
from granite_paged.evaluate.encoding import common_tokens
from granite_paged.evaluate.modes import make_scorer
from granite_paged.evaluate.scorer import Answer, Needs, Scorer, ScoreRequest, chunked
from granite_paged.evaluate.scorer_default import DefaultScorer
from granite_paged.geometry import PagedConfig
from granite_paged.hf.patching import paged
from granite_paged.models import load, load_tokenizer
from granite_paged.names import MODES

try:
    from accelerate import Accelerator, InitProcessGroupKwargs
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError:
    raise MissingExtra("lm-eval", extra="eval") from None

NAME = "granite_paged"

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names for the limit of new tokens; of several, the first counts."""

_SIZES = frozenset(field.name for field in dataclasses.fields(PagedConfig))
_TAKEN = frozenset(  # arguments that HFLM itself handles
    {"max_length", "truncation", "add_bos_token", "prefix_token_id", "logits_cache"}
    | {"think_end_token", "enable_thinking", "chat_template_args"}
)
_HFLM = {name: one.default for name, one in inspect.signature(HFLM.__init__).parameters.items()}
_ALWAYS = {"softmax_dtype": "float32"}  # what holds without being asked for

_MAIN = "main"  # the revision of a hub id without another one
_AUTO_ROWS = 64  # rows of batch_size=auto, as HFLM's max_batch_size
_PATIENCE = timedelta(weeks=52)  # of ranks whose share is done, as HFLM's
_NO_TOKENS = (0.0, True)  # score of a continuation without tokens

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation: as text, which windows of a document lack, and each as token ids."""

log = logging.getLogger(__name__)


@register_model(NAME)
class GranitePagedLM(HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """lm-eval's `HFLM`, except that it runs each context once, and each shared prefix once.

    A request that the pool cannot hold runs without pages, so that it never ends the run.

    Args:
        pretrained, random_weights, device, dtype, seed, revision: see `granite_paged.models.load`;
            `pretrained` may also be a loaded model, which needs `tokenizer`.
        tokenizer: a tokenizer, or where to load it from, if the model has none.
        mode: a name in `granite_paged.names.MODES`; only `paged` generates with pages.
        batch_size: rows per forward pass, or `auto`: up to `max_batch_size`.
        options: sizes of `PagedConfig`, and what docs/evaluation.md lists of `HFLM`'s arguments.

    Raises:
        InvalidArgument: if an argument is unknown, not valid or not supported.
        TokenizerError: if there is no tokenizer.
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        random_weights: str | None = None,
        tokenizer: Any = None,
        device: str | None = None,
        dtype: Any = "auto",
        mode: str = "paged",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        seed: int = 0,
        revision: str = _MAIN,
        **options: Any,
    ) -> None:
        if mode not in MODES:
            raise UnknownName("mode", mode, tuple(MODES))
        self._mode, self._rows = mode, _rows(batch_size, max_batch_size)
        self._paged = PagedConfig(**{name: options.pop(name) for name in _SIZES & {*options}})
        _check_arguments(options)
        ranks = _ranks(pretrained, device)
        model, name = pretrained, getattr(pretrained, "name_or_path", pretrained)
        if pretrained is None or isinstance(pretrained, str):
            loaded = load(
                pretrained,
                random_weights=random_weights,
                device=str(ranks.device) if ranks else device or "auto",
                dtype=str(dtype or "auto").removeprefix("torch."),
                seed=seed,
                revision=None if revision == _MAIN else revision,
            )
            model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
        elif revision != _MAIN:
            raise InvalidArgument(f"revision {revision!r} of a model that is loaded: leave it out")
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        if tokenizer is None:
            raise TokenizerError("the model has no tokenizer: pass tokenizer=ID_OR_PATH")
        if options.get("add_bos_token") is not None:
            tokenizer.add_bos_token = options["add_bos_token"]
        taken = {key: options[key] for key in _TAKEN & {*options}}
        super().__init__(
            model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, **taken
        )
        self.pretrained = name
        if ranks:  # `HFLM` leaves them to the caller who passes a model
            self.accelerator, self._world_size = ranks, ranks.num_processes
            self._rank = ranks.process_index
        self._scorer: Scorer | None = None
        self._needs = Needs(longest=0)

    # -- lm-eval's interface --------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text: the tokenizer's, or else the model's."""
        known = (self.tokenizer.eos_token_id, self.model.config.eos_token_id)
        return next(int(token) for token in known if token is not None)

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context."""
        token = super().prefix_token_id
        return self.eot_token_id if token is None else int(token)

    def tok_batch_encode(self, strings: list[str], **options: Any) -> tuple[Tensor, Tensor]:
        """Return token ids and mask [rows, longest]; an empty text becomes `prefix_token_id`."""
        ids, mask = super().tok_batch_encode(strings, **options)
        if not ids.shape[1]:
            ids = mask = torch.zeros(len(strings), 1, dtype=torch.long)
        empty = mask.sum(dim=1) == 0
        last = torch.arange(ids.shape[1]) == ids.shape[1] - 1
        filled = empty[:, None] & last
        return ids.masked_fill(filled, self.prefix_token_id), mask.masked_fill(filled, 1)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding writes it."""
        scored = [
            bool(context or self.tok_encode(continuation, add_special_tokens=False))
            for context, continuation in (request.args for request in requests)
        ]
        asked = list(itertools.compress(requests, scored))
        found = iter(super().loglikelihood(asked, disable_tqdm=disable_tqdm))
        return [next(found) if has_tokens else _NO_TOKENS for has_tokens in scored]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return each document's log-likelihood, in disjoint windows of `max_length` tokens."""
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._loglikelihood_tokens([*itertools.chain(*windows)], disable_tqdm))
        sums = [sum((next(scores)[0] for _ in each), 0.0) for each in windows]
        for request, found in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found)
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return continuations up to the first stop text.

        Raises:
            InvalidArgument: before anything is generated, if an option is not valid.
        """
        checked = [
            SimpleNamespace(args=(context, self._checked(options)))
            for context, options in (request.args for request in requests)
        ]
        texts: list[str] = super().generate_until(checked, disable_tqdm=disable_tqdm)
        return texts

    # -- what HFLM calls ------------------------------------------------------------------------

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        return self._rows

    def _model_generate(self, context: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Return tokens [rows, longest]; halve a batch that does not fit, down to one row."""
        generate = super()._model_generate
        pages = paged(self.model, self._paged) if self._mode == "paged" else nullcontext()
        try:
            with pages, one_memory_error():
                return generate(context, attention_mask=attention_mask, **options)
        except (GranitePagedError, torch.OutOfMemoryError) as refusal:
            if len(context) == 1:
                log.warning("a request is generated without pages: %s", refusal)
                return generate(context, attention_mask=attention_mask, **options)
        halves = zip(context.tensor_split(2), attention_mask.tensor_split(2), strict=True)
        rows = [row for half in halves for row in self._model_generate(*half, **options)]
        return pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        by_context: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            if continuation:
                by_context.setdefault(self._fitting(context, continuation), []).append(place)
        asked = [
            ScoreRequest(context, [requests[place][2] for place in by_context[context]])
            for context in sorted(by_context)
        ]
        found = [_NO_TOKENS] * len(requests)
        for request, answer in zip(asked, self._score(asked, disable_tqdm), strict=True):
            scores = zip(answer.logprobs, answer.greedy, strict=True)
            for place, score in zip(by_context[tuple(request.context)], scores, strict=True):
                found[place] = score
                if (texts := requests[place][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, score)
        return found

    # -- details --------------------------------------------------------------------------------

    def _windows(self, text: str) -> list[Pair]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in windows]

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """Return the end of a context that fits with its continuation; at least one token."""
        kept = max(1, self.max_length + 1 - len(continuation))
        if len(context) > kept:
            log.warning("a context of %d tokens is cut to its last %d", len(context), kept)
        return tuple(context[-kept:]) or (self.prefix_token_id,)

    def _score(self, requests: Sequence[ScoreRequest], disable_tqdm: bool) -> Iterator[Answer]:
        if not requests:
            return
        scorer = self._scorer_for(requests)
        with tqdm(total=len(requests), desc="Scoring contexts", disable=disable_tqdm) as bar:
            for chunk in chunked(requests, scorer.batch, request=lambda one: one):
                for answer in self._answers(scorer, chunk):
                    yield answer
                    bar.update(1)

    def _answers(self, scorer: Scorer, chunk: list[ScoreRequest]) -> list[Answer]:
        """Score a chunk; if it is refused, score each request alone, and at last without pages."""
        try:
            return scorer.score(chunk)
        except GranitePagedError as refusal:
            if len(chunk) > 1:
                return [answer for one in chunk for answer in self._answers(scorer, [one])]
            log.warning("a request is scored without pages: %s", refusal)
            return DefaultScorer(self.model).score(chunk)

    def _scorer_for(self, requests: Sequence[ScoreRequest]) -> Scorer:
        """Return one scorer for all calls; make a larger one if the requests need it."""
        needs = self._needs.combined(Needs.of(requests, _shared(requests)))
        if self._scorer is not None and needs != self._needs:
            self._scorer.close()
            self._scorer = None
        if self._scorer is None:
            self._needs = needs
            self._scorer = make_scorer(self._mode, self.model, self._paged, needs, self._rows)
        return self._scorer

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options of a generation, with `until` as a list. Raises InvalidArgument."""
        if unknown := {*options} - {"until", *LIMITS, *GenerationConfig().to_dict()}:
            raise InvalidArgument(f"unknown generation option {min(unknown)!r}")
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        if not all(isinstance(stop, str) for stop in until):
            raise InvalidArgument(f"until must be text or a list of texts, got {until!r}")
        given = (options[name] for name in LIMITS if options.get(name) is not None)
        new = int(next(given, self.max_gen_toks))
        if not 0 < new < self.max_length:
            raise InvalidArgument(
                f"max_gen_toks must be from 1 to {self.max_length - 1}, got {new}: "
                "max_length counts the new tokens too"
            )
        return {**options, "until": until}


def _ranks(pretrained: Any, device: str | None) -> Accelerator | None:
    """Join the processes of `accelerate launch`, each with its share of the requests."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    if not (pretrained is None or isinstance(pretrained, str)):
        raise InvalidArgument(
            "a loaded model does not run under accelerate launch: "
            "pass pretrained=ID_OR_PATH, which each process loads"
        )
    patience = InitProcessGroupKwargs(timeout=_PATIENCE)
    return Accelerator(cpu=device == "cpu", kwargs_handlers=[patience])


def _rows(batch_size: int | str, largest: int | None) -> int:
    if str(batch_size).partition(":")[0] == "auto":
        return largest or _AUTO_ROWS
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise InvalidArgument(
            f"batch_size must be auto or a whole number from 1, got {batch_size!r}"
        )
    return int(batch_size)


def _check_arguments(options: dict[str, Any]) -> None:
    """Raise InvalidArgument for arguments that `HFLM` does not have, or only `HFLM` supports."""
    for name, value in options.items():
        if name not in _HFLM:
            raise UnknownName("model argument", name, sorted(_TAKEN | _SIZES))
        if name not in _TAKEN and value not in (None, _HFLM[name], _ALWAYS.get(name)):
            raise InvalidArgument(f"{NAME} does not support {name}={value!r}: leave it out")


def _shared(requests: Sequence[ScoreRequest]) -> int:
    """Return the length of the longest prefix that two neighbouring contexts share."""
    neighbours = itertools.pairwise(request.context for request in requests)
    return max(itertools.starmap(common_tokens, neighbours), default=0)


def main() -> None:
    """Run lm-eval's command line with this model registered."""
    from lm_eval.__main__ import cli_evaluate  # noqa: PLC0415

    cli_evaluate()


if __name__ == "__main__":
    main()
