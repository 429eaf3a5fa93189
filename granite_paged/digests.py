"""Digests of a model: weights, config and tokenizer, so that a change under a name is noticed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

_SAMPLE = 4096  # elements of a tensor whose bytes are hashed
_CHUNK = 1 << 24  # elements that are summed at once; bounds the memory


def sha256(plain: Any) -> str:
    """Return the first 16 digits of the SHA-256 of plain data, as JSON."""
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(model: Any) -> str:
    """Hash every tensor's name, dtype and shape, the sum of its bits, and evenly spaced elements.

    The sum is over each element's bits as an integer, on the model's own device: it covers all
    elements, so that any single change is noticed. The sample notices elements that changed places.
    """
    return sha256([[name, *tensor_digest(t)] for name, t in sorted(model.state_dict().items())])


def tensor_digest(tensor: torch.Tensor) -> list[Any]:
    """Return a tensor's dtype, its shape, the sum of its bits, and evenly spaced elements."""
    flat = tensor.detach().flatten()
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = flat.view(widths[flat.element_size()])
    total = sum(int(part.sum(dtype=torch.int64)) for part in torch.split(bits, _CHUNK))
    sample = bits[:: max(1, len(bits) // _SAMPLE)].tolist()
    return [str(tensor.dtype), list(tensor.shape), total, sample]


def config_digest(config: Any) -> str:
    """Hash a model's config, but not where it was loaded from and by which version."""
    plain = config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        plain.pop(name, None)
    return sha256(plain)


def tokenizer_digest(tokenizer: Any | None) -> str:
    """Hash a tokenizer's vocabulary, rules and special tokens; "none" without a tokenizer."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for changed_by_calls in ("padding", "truncation"):
        rules.pop(changed_by_calls, None)
    return sha256([rules, tokenizer.get_vocab(), tokenizer.special_tokens_map])
