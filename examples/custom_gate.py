"""A gate of your own: the same tokens as transformers' SDPA, and a bound on the time.

    python examples/custom_gate.py [--limit RATIO]

Exit status 0: both hold. 1: one does not, or the machine was too noisy to tell.
"""

import argparse
import sys

import torch

from granite_paged import Engine, PagedConfig, SamplingParams, load
from granite_paged.bench.cases import Shape
from granite_paged.bench.judge import Gated, judge_ratio, visit_ratio
from granite_paged.bench.session import Session
from granite_paged.bench.visits import visited

PROMPTS = (
    "<bos> <plain> red-fox copper-bell and green-wolf iron-boat while red-fox <ask>",
    "<bos> <plain> red-fox copper-bell and green-wolf iron-boat while green-wolf <ask>",
)
GATED = Gated("context", Shape(batch=1, context=64))
VISITS = 5  # blocks of steps of each mode, which take turns
SEEN = 1.10  # a time this much above the limit must not pass


def same_tokens(loaded, config: PagedConfig) -> bool:
    """Compare greedy answers of the engine with those of transformers' generate()."""
    params = SamplingParams(max_new_tokens=8, stop_tokens=())
    with Engine(loaded.model, config, tokenizer=loaded.tokenizer) as engine:
        answers = engine.generate(list(PROMPTS), params)
    for answer in answers:
        if answer.error is not None:
            sys.exit(f"no answer: {answer.error}")
        prompt = torch.tensor([answer.prompt], device=loaded.model.device)
        expected = loaded.model.generate(prompt, max_new_tokens=8, eos_token_id=None)
        if answer.tokens != expected[0, len(answer.prompt) :].tolist():
            return False
    return True


def main() -> int:
    """Check both claims and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=float, default=1.0, help="paged / default (default: 1)")
    limit = parser.parse_args().limit
    loaded = load()
    config = PagedConfig(page_size=16, max_tokens=1024, max_sequences=8)
    equal = same_tokens(loaded, config)
    print(f"tokens: {'as SDPA' if equal else 'DIFFERENT'}")

    seen = visited(Session(loaded, config), GATED, VISITS)
    ratio = visit_ratio(seen.paged, seen.default)
    verdict = judge_ratio(ratio, base=limit, seen=SEEN)
    print(f"time: {ratio.estimate:.2f} x default ({ratio.low:.2f} to {ratio.high:.2f}), {verdict}")
    return 0 if equal and verdict == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
