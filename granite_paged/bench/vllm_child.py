"""Serve workloads with vLLM, in a process of an environment that has it.

`python vllm_child.py REQUEST.json RESULT.json`: imports nothing of granite_paged, so that it runs
where only vLLM is installed. `vllm_serving.py` writes the request and reads the result.

The request: {"engine": arguments of vllm.LLM, "rounds": [[{"prompt": ids, "new_tokens": n}]]}.
The result: {"start_seconds", "device_bytes" | null, "versions", "settings", "rounds": [
    {"seconds", "requests": [{"tokens", "first_token_s" | null, "request_s" | null}]}]}.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from typing import Any

_PACKAGES = ("vllm", "torch", "triton", "transformers", "flashinfer-python")

_RESOLVED = {
    "model_config": ("dtype", "max_model_len"),
    "cache_config": (
        "cache_dtype",
        "mamba_cache_dtype",
        "mamba_ssm_cache_dtype",
        "mamba_cache_mode",
        "enable_prefix_caching",
        "block_size",
        "gpu_memory_utilization",
    ),
    "scheduler_config": ("max_num_seqs", "max_num_batched_tokens"),
}
"""What vLLM decided, by the part of its configuration that says it; releases differ in them."""


def main(request_file: str, result_file: str) -> None:
    """Serve every round of the request, and write the result."""
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    vllm: Any = importlib.import_module("vllm")
    started = time.perf_counter()
    engine = vllm.LLM(**request["engine"])
    ready = time.perf_counter() - started
    rounds = [_serve(vllm, engine, requests) for requests in request["rounds"]]
    result = {
        "start_seconds": ready,
        "device_bytes": _device_bytes(),
        "versions": _versions(),
        "settings": _settings(engine, request["engine"]),
        "rounds": rounds,
    }
    with open(result_file, "w", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def _serve(vllm: Any, engine: Any, requests: list[dict[str, Any]]) -> dict[str, Any]:
    prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
    params = [
        vllm.SamplingParams(
            temperature=0.0,
            max_tokens=request["new_tokens"],
            ignore_eos=True,
            detokenize=False,
        )
        for request in requests
    ]
    started = time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "requests": [_request(output) for output in outputs]}


def _request(output: Any) -> dict[str, Any]:
    """Return a request's tokens and its times in seconds, which vLLM keeps in its statistics."""
    tokens = list(output.outputs[0].token_ids)
    first = getattr(output.metrics, "first_token_latency", None)
    if not first:
        return {"tokens": tokens, "first_token_s": None, "request_s": None}
    decoding = output.metrics.last_token_ts - output.metrics.first_token_ts
    return {"tokens": tokens, "first_token_s": first, "request_s": first + decoding}


def _device_bytes() -> int | None:
    """Return the device memory in use, of all processes: vLLM's engine runs in another one."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    module = sys.modules["vllm"]
    found.setdefault("vllm", str(getattr(module, "__version__", "unknown")))
    return found


def _settings(engine: Any, given: dict[str, Any]) -> dict[str, str]:
    """Return what vLLM was called with, what it decided, and its environment variables."""
    settings = {name: str(value) for name, value in given.items() if name != "model"}
    config = getattr(getattr(engine, "llm_engine", None), "vllm_config", None)
    for part, names in _RESOLVED.items():
        for name in names:
            value = getattr(getattr(config, part, None), name, None)
            if value is not None:
                settings[name] = str(value)
    variables = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
    return settings | variables


if __name__ == "__main__":  # vLLM's own processes import this file again
    main(*sys.argv[1:])
