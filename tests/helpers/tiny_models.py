"""Small models with every feature of the family: random weights, built in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from granite_paged.hf.compat import CACHE

VOCABULARY = 97
PAD, BOS, EOS = 0, 1, 2

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "attention", "mamba", "attention"],
    "num_attention_heads": 6,
    "num_key_value_heads": 2,  # G = 3, as in granite-4.0-h-1b
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "intermediate_size": 32,
    "shared_intermediate_size": 64,
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
    "attention_multiplier": 1.0,
    "initializer_range": 0.144,  # 1 / sqrt(hidden): projections keep the scale of activations
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": True,
}

FLAVOURS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "rotary": {"position_embedding_type": "rope"},
    "experts": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "dense": {"layer_types": ["attention"] * 4, "position_embedding_type": "rope"},
}


def tiny_model(flavour: str = "hybrid", seed: int = 0, **sizes: Any) -> GraniteMoeHybridForCausalLM:
    """Build a float32 `GraniteMoeHybridForCausalLM` in eval mode."""
    torch.manual_seed(seed)
    config = GraniteMoeHybridConfig(**{**SIZES, **FLAVOURS[flavour], **sizes})
    return GraniteMoeHybridForCausalLM(config).eval()


def shortest_model(flavour: str = "hybrid", **sizes: Any) -> GraniteMoeHybridForCausalLM:
    """Build a model with one layer of each kind."""
    layers = {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}
    return tiny_model(flavour, **{**layers, **sizes})


def prompts(
    lengths: tuple[int, ...] = (21, 16, 8), seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded token ids [B, S] and their attention mask [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(EOS + 1, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    return ids.where(mask, PAD), mask.long()


def cache_of(output: Any) -> Any:
    """Return the cache in the output of a model or `generate()`, under any release's name."""
    return getattr(output, CACHE)
