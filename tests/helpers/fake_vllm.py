"""A package `vllm` for another process: the part of its interface that `bench serve` uses."""

from __future__ import annotations

from pathlib import Path

VERSION = "0.25.1"

_SOURCE = f'''
import json, os, sys
from types import SimpleNamespace as Object

__version__ = "{VERSION}"
FAULT = os.environ.get("FAKE_VLLM_FAULT", "")


class SamplingParams:
    def __init__(self, **params):
        self.params = params


class LLM:
    def __init__(self, **settings):
        print("INFO vLLM starts")
        if FAULT == "start at defaults" and "mamba_ssm_cache_dtype" not in settings:
            print("(EngineCore pid=7) ERROR [core.py:1231] ValueError: no kernel for this card")
            raise RuntimeError("the engine failed to start, see above")
        files = sorted(os.listdir(settings["model"]))
        self.log(settings=settings, files=files, safe_path=sys.flags.safe_path)
        cache = Object(mamba_ssm_cache_dtype=settings.get("mamba_ssm_cache_dtype", "auto"))
        self.llm_engine = Object(vllm_config=Object(cache_config=cache))

    def generate(self, prompts, params, use_tqdm=True):
        self.log(prompts=prompts, params=[one.params for one in params])
        counts = [one.params["max_tokens"] - (FAULT == "short") for one in params]
        times = Object(first_token_latency=0.5, first_token_ts=10.0, last_token_ts=11.0)
        metrics = None if FAULT == "no statistics" else times
        print("INFO vLLM is done")
        return [Object(outputs=[Object(token_ids=[7] * n)], metrics=metrics) for n in counts]

    def log(self, **what):
        with open(os.environ["FAKE_VLLM_LOG"], "a") as file:
            file.write(json.dumps(what) + "\\n")
'''


def write_fake_vllm(folder: Path) -> None:
    """Write the package into a folder, which `PYTHONPATH` of the other process shall name.

    It appends what it was called with to the file in `FAKE_VLLM_LOG`, one JSON object per line.
    `FAKE_VLLM_FAULT` chooses what goes wrong: "start at defaults", "short" (one token too few) or
    "no statistics".
    """
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text(_SOURCE, encoding="utf-8")
