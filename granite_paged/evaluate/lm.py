r"""This package as a model of EleutherAI's lm-eval, registered there as `granite_paged`.

lm-eval finds models in its registry only, which importing this module adds to. So its command line,
with this model known, is::

    python -m granite_paged.evaluate.lm --model granite_paged --tasks mmlu --num_fewshot 5 \
        --model_args pretrained=ibm-granite/granite-4.0-h-1b

and from Python, `import granite_paged.evaluate.lm` before `lm_eval.simple_evaluate(...)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from granite_paged.errors import InvalidArgument, MissingExtra, TokenizerError, UnknownName
from granite_paged.evaluate.encoding import common_tokens
from granite_paged.evaluate.modes import MODES, make_scorer
from granite_paged.evaluate.scorer import Needs, Request, Score, Scorer, chunked
from granite_paged.geometry import PagedConfig
from granite_paged.hf.patching import paged
from granite_paged.models import load, load_tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError:
    raise MissingExtra("lm-eval", extra="eval") from None

NAME = "granite_paged"

_NEW_TOKENS = 256  # of a generation that asks for no number

Pair = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation: as text, and each as token ids."""


@register_model(NAME)
class GranitePagedLM(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
    """Contexts run once and forked for their continuations, common beginnings run once.

    Args:
        pretrained, random_weights, device, dtype, seed: see `granite_paged.models.load`. A model
            that is loaded already is taken as `pretrained` too, with its tokenizer.
        tokenizer: where the model brings none.
        mode: one of `MODES`.
        batch_size: rows a forward pass.
        page_size, memory_fraction, max_tokens: see `PagedConfig`.
    """

    tokenizer: Any

    def __init__(
        self,
        pretrained: Any = None,
        *,
        random_weights: str | None = None,
        tokenizer: Any = None,
        device: str | None = None,
        dtype: str = "auto",
        mode: str = "paged",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        seed: int = 0,
        **sizes: Any,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise UnknownName("mode", mode, tuple(MODES))
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InvalidArgument(f"batch_size must be a whole number from 1, got {batch_size!r}")
        self._config = PagedConfig(**sizes)
        self._mode, self._batch = mode, int(batch_size)
        if pretrained is None or isinstance(pretrained, str):
            loaded = load(
                pretrained,
                random_weights=random_weights,
                device=device or "auto",
                dtype=dtype,
                seed=seed,
            )
            self.model, self.tokenizer = loaded.model, loaded.tokenizer
        else:
            self.model = pretrained
        if tokenizer is not None:
            self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        if self.tokenizer is None:
            raise TokenizerError("the model has no tokenizer: pass tokenizer=ID_OR_PATH")
        self._device = self.model.device
        self._scorer: Scorer | None = None
        self._needs = Needs(longest=0)

    # -- what lm-eval asks ----------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        known = (self.tokenizer.eos_token_id, self.model.config.eos_token_id)
        return next(int(token) for token in known if token is not None)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, with what the tokenizer adds, unless it is there or `add_special_tokens`
        says otherwise.
        """
        start = self.tokenizer.bos_token
        if add_special_tokens is None and start and string.startswith(start):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **chosen)
        return ids

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each in one piece."""
        texts = [request.args[0] for request in requests]
        start = [self.prefix_token_id]
        rolling = [
            Request(start, [self.tok_encode(text, add_special_tokens=False)]) for text in texts
        ]
        return [scores[0].logprob for scores in self._score(rolling, disable_tqdm)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, in pages, up to the first of the stop texts."""
        with paged(self.model, self._config), torch.inference_mode():
            return [
                self._generate(*request.args) for request in tqdm(requests, disable=disable_tqdm)
            ]

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        by_context: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(place)
        asked = _with_shared(
            (context, [requests[place][2] for place in by_context[context]])
            for context in sorted(by_context)
        )
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for request, scores in zip(asked, self._score(asked, disable_tqdm), strict=True):
            for place, score in zip(by_context[tuple(request.context)], scores, strict=True):
                found[place] = (score.logprob, score.greedy)
                self.cache_hook.add_partial("loglikelihood", requests[place][0], found[place])
        return found

    # -- details --------------------------------------------------------------------------------

    def _score(self, requests: Sequence[Request], disable_tqdm: bool) -> Iterator[list[Score]]:
        if not requests:
            return
        scorer = self._scorer_for(requests)
        with tqdm(total=len(requests), desc="Scoring contexts", disable=disable_tqdm) as bar:
            for chunk in chunked(requests, scorer.batch, request=lambda one: one):
                for answer in scorer.score(chunk):
                    yield answer.scores
                    bar.update(1)

    def _scorer_for(self, requests: Sequence[Request]) -> Scorer:
        """One for all calls, until more is asked of it."""
        needs = self._needs.with_those(Needs.of(requests))
        if self._scorer is not None and needs != self._needs:
            self._scorer.close()
            self._scorer = None
        if self._scorer is None:
            self._needs = needs
            self._scorer = make_scorer(self._mode, self.model, self._config, needs, self._batch)
        return self._scorer

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        ids = torch.tensor([self.tok_encode(context)], device=self.model.device)
        tokens = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.get("max_gen_toks", _NEW_TOKENS),
            do_sample=False,
            pad_token_id=self.eot_token_id,
            **({"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}),
        )
        text: str = self.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        return min((text.split(stop, 1)[0] for stop in stops if stop), key=len, default=text)


def _with_shared(pairs: Iterator[tuple[tuple[int, ...], list[list[int]]]]) -> list[Request]:
    """Requests, their contexts in order, that know what they share with a neighbour."""
    requests = [Request(context, continuations) for context, continuations in pairs]
    contexts = [request.context for request in requests]
    beside = [common_tokens(a, b) for a, b in itertools.pairwise(contexts)]
    shared = map(max, [0, *beside], [*beside, 0])
    return [r._replace(shared=tokens) for r, tokens in zip(requests, shared, strict=True)]


def main() -> None:
    """lm-eval's command line, with this model known."""
    from lm_eval.__main__ import cli_evaluate  # noqa: PLC0415

    cli_evaluate()


if __name__ == "__main__":
    main()
