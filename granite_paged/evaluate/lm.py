r"""Register this package as the model `granite_paged` of EleutherAI's lm-eval.

lm-eval finds models only in its registry, and importing this module adds the model to it. To run
lm-eval's command line with the model registered::

    python -m granite_paged.evaluate.lm --model granite_paged --tasks mmlu --num_fewshot 5 \
        --model_args pretrained=ibm-granite/granite-4.0-h-1b

From Python, `import granite_paged.evaluate.lm` before you call `lm_eval.simple_evaluate(...)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from granite_paged.errors import InvalidArgument, MissingExtra, TokenizerError, UnknownName
from granite_paged.evaluate.encoding import common_tokens
from granite_paged.evaluate.modes import make_scorer
from granite_paged.evaluate.scorer import Answer, Needs, Scorer, ScoreRequest, chunked
from granite_paged.geometry import PagedConfig
from granite_paged.hf.patching import paged
from granite_paged.models import load, load_tokenizer
from granite_paged.names import MODES

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError:
    raise MissingExtra("lm-eval", extra="eval") from None

NAME = "granite_paged"

_NEW_TOKENS = 256  # limit for a generation that sets none

Pair = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation: as text, and each as token ids."""


@register_model(NAME)
class GranitePagedLM(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
    """An lm-eval model that runs each context once, and each shared prefix once.

    Args:
        pretrained, random_weights, device, dtype, seed: see `granite_paged.models.load`;
            `pretrained` may also be a loaded model, which needs `tokenizer`.
        tokenizer: a tokenizer, or where to load it from, if the model has none.
        mode: a name in `granite_paged.names.MODES`.
        batch_size: rows per forward pass.
        page_size, memory_fraction, max_tokens: see `PagedConfig`.

    Raises:
        InvalidArgument: if `mode` or `batch_size` is not valid.
        TokenizerError: if there is no tokenizer.
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

    # -- lm-eval's interface --------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        known = (self.tokenizer.eos_token_id, self.model.config.eos_token_id)
        return next(int(token) for token in known if token is not None)

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval caches results."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return token ids.

        Without `add_special_tokens`, the tokenizer adds its special tokens unless `string` starts
        with one.
        """
        start = self.tokenizer.bos_token
        if add_special_tokens is None and start and string.startswith(start):
            add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **chosen)
        return ids

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, computed in one piece."""
        texts = [request.args[0] for request in requests]
        start = [self.prefix_token_id]
        rolling = [
            ScoreRequest(start, [self.tok_encode(text, add_special_tokens=False)]) for text in texts
        ]
        return [answer.logprobs[0] for answer in self._score(rolling, disable_tqdm)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations up to the first stop text, generated with paged attention."""
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
        asked = [
            ScoreRequest(context, [requests[place][2] for place in by_context[context]])
            for context in sorted(by_context)
        ]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for request, answer in zip(asked, self._score(asked, disable_tqdm), strict=True):
            scores = zip(answer.logprobs, answer.greedy, strict=True)
            for place, score in zip(by_context[tuple(request.context)], scores, strict=True):
                found[place] = score
                self.cache_hook.add_partial("loglikelihood", requests[place][0], found[place])
        return found

    # -- details --------------------------------------------------------------------------------

    def _score(self, requests: Sequence[ScoreRequest], disable_tqdm: bool) -> Iterator[Answer]:
        if not requests:
            return
        scorer = self._scorer_for(requests)
        with tqdm(total=len(requests), desc="Scoring contexts", disable=disable_tqdm) as bar:
            for chunk in chunked(requests, scorer.batch, request=lambda one: one):
                for answer in scorer.score(chunk):
                    yield answer
                    bar.update(1)

    def _scorer_for(self, requests: Sequence[ScoreRequest]) -> Scorer:
        """Return one scorer for all calls; make a larger one if the requests need it."""
        needs = self._needs.combined(Needs.of(requests, _shared(requests)))
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
