"""Models and inputs of the golden logits: the same to the bit on every machine and version.

transformers' random initialisation may change between releases, so weights are made here, under
the names that published checkpoints use, which cannot change. They are integers times a scale:
torch's normal distribution differs by a rounding between processors, its integers do not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from granite_paged import PagedCache, PagedConfig, paged
from granite_paged.checkpoints import TINY_RECALL
from granite_paged.hf.compat import with_cache
from tests.helpers.golden_extension import Measured, fingerprint
from tests.helpers.tiny_models import EOS, FLAVOURS, PAD, SIZES

PAGE_SIZE = 8  # prompts of a few pages, the last one partly filled
KEPT = 4  # last positions whose logits are kept: they attend to all others
DECODED = 8
CHUNK = 16  # a multiple of mamba_chunk_size: others change float32 logits in SDPA itself


# -- models -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GoldenModel:
    """A live model, and the origin of its weights.

    Attributes:
        model: float32, in eval mode, attending by SDPA.
        origin: seed and fingerprint for the golden file.
    """

    model: Any
    origin: Mapping[str, str]


def load(settings: Mapping[str, Any], weights: Mapping[str, Tensor], seed: str) -> GoldenModel:
    """Build a model from the values of its config and the tensors of its checkpoint.

    Args:
        seed: the seed of the weights, for the golden file.
    """
    model, report = GraniteMoeHybridForCausalLM.from_pretrained(
        None,
        config=GraniteMoeHybridConfig(**settings),
        state_dict=dict(weights),
        dtype=torch.float32,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    amiss = {what: names for what, names in report.items() if names}
    assert not amiss, f"the checkpoint does not fit the model: {amiss}"
    sha256 = fingerprint(weights, **settings)
    return GoldenModel(model.eval(), {"seed": seed, "weights_sha256": sha256})


def _tiny(flavour: str, seed: int = 0) -> GoldenModel:
    settings = {**SIZES, **FLAVOURS[flavour]}
    return load(settings, tiny_weights(GraniteMoeHybridConfig(**settings), seed), str(seed))


def _embedded() -> GoldenModel:
    config, _ = GraniteMoeHybridConfig.get_config_dict(str(TINY_RECALL))
    settings = {n: v for n, v in config.items() if n not in _PROVENANCE and not n.startswith("_")}
    return load(settings, load_file(TINY_RECALL / "model.safetensors"), "trained")


_PROVENANCE = ("architectures", "dtype", "model_type", "transformers_version")

MODELS: dict[str, Callable[[], GoldenModel]] = {
    **{flavour: functools.partial(_tiny, flavour) for flavour in FLAVOURS},
    "tiny-recall": _embedded,
}
"""Makers of the models, by name. Every case of the golden logits runs on each."""


@functools.cache
def golden_model(name: str) -> GoldenModel:
    """Return one of `MODELS`, built once."""
    return MODELS[name]()


def tiny_weights(config: Any, seed: int) -> dict[str, Tensor]:
    """Draw every tensor of a checkpoint, in order of name, from one stream of random integers."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _fill(name, shape, generator) for name, shape in sorted(_tensors(config).items())}


def _fill(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    kind = name.rsplit(".", maxsplit=1)[-1]
    steps = torch.arange(shape[0], dtype=torch.float32)
    if "norm" in name:
        return torch.ones(shape)
    if kind == "A_log":  # each head forgets faster than the one before
        return steps / 4
    if kind == "dt_bias":
        return steps / 4 - 1
    if kind == "D":
        return 1 - steps / 8
    # uniform with variance 1 / fan_in: activations keep their scale, attention is far from uniform
    limit = math.sqrt(3 / math.prod(shape[1:])) if len(shape) < 3 else math.sqrt(3 / shape[-1])
    integers = torch.randint(-(2**15), 2**15, shape, generator=generator)
    return (integers.double() / 2**15 * limit).float()


def _tensors(config: Any) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer, kind in enumerate(config.layers_block_type):
        mamba = kind in ("mamba", "linear_attention")
        parts = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            **_feed_forward(config),
            **(_mamba(config) if mamba else _attention(config)),
        }
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return tensors


def _feed_forward(config: Any) -> dict[str, tuple[int, ...]]:
    hidden, shared = config.hidden_size, config.shared_intermediate_size
    expert, experts = config.intermediate_size, config.num_local_experts
    tensors: dict[str, tuple[int, ...]] = {
        "shared_mlp.input_linear.weight": (2 * shared, hidden),
        "shared_mlp.output_linear.weight": (hidden, shared),
    }
    if experts:
        tensors |= {
            "block_sparse_moe.router.layer.weight": (experts, hidden),
            "block_sparse_moe.input_linear.weight": (experts, 2 * expert, hidden),
            "block_sparse_moe.output_linear.weight": (experts, hidden, expert),
        }
    return tensors


def _attention(config: Any) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    head_dim = hidden // config.num_attention_heads
    kv = config.num_key_value_heads * head_dim
    return {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
    }


def _mamba(config: Any) -> dict[str, tuple[int, ...]]:
    hidden, heads = config.hidden_size, config.mamba_n_heads
    inner = heads * config.mamba_d_head
    convolved = inner + 2 * config.mamba_n_groups * config.mamba_d_state
    return {
        "mamba.A_log": (heads,),
        "mamba.D": (heads,),
        "mamba.dt_bias": (heads,),
        "mamba.conv1d.weight": (convolved, 1, config.mamba_d_conv),
        "mamba.conv1d.bias": (convolved,),
        "mamba.in_proj.weight": (inner + convolved + heads, hidden),
        "mamba.norm.weight": (inner,),
        "mamba.out_proj.weight": (hidden, inner),
    }


# -- work ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Left-padded ids [B, S] and their mask [B, S]."""

    ids: Tensor
    mask: Tensor


Work = Callable[[Any, Any, Tokens], dict[str, Tensor]]
"""(model, empty cache, tokens) -> logits by name."""


def tokens(model: Any, lengths: tuple[int, ...], seed: int) -> Tokens:
    """Draw rows of random token ids of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    shape = (len(lengths), width)
    ids = torch.randint(EOS + 1, model.config.vocab_size, shape, generator=generator)
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    return Tokens(ids.where(mask, PAD), mask.long())


def prefill(model: Any, cache: Any, tokens: Tokens) -> dict[str, Tensor]:
    """Run all tokens in one forward pass."""
    return {"prefill": _forward(model, cache, tokens, slice(None), KEPT)}


def chunks_then_decode(model: Any, cache: Any, tokens: Tokens) -> dict[str, Tensor]:
    """Prefill all but the last `DECODED` tokens in chunks, then feed those one by one."""
    prompt = tokens.ids.shape[1] - DECODED
    chunks = [
        _forward(model, cache, tokens, slice(start, min(start + CHUNK, prompt)), 1)
        for start in range(0, prompt, CHUNK)
    ]
    steps = [
        _forward(model, cache, tokens, slice(at, at + 1), 1)
        for at in range(prompt, prompt + DECODED)
    ]
    return {"chunks": torch.cat(chunks, dim=1), "decode": torch.cat(steps, dim=1)}


def _forward(model: Any, cache: Any, tokens: Tokens, columns: slice, keep: int) -> Tensor:
    logits: Tensor = model(
        tokens.ids[:, columns],
        attention_mask=tokens.mask[:, : columns.stop],
        **with_cache(cache),
        logits_to_keep=keep,
    ).logits
    return logits


@torch.inference_mode()
def three_way(golden: GoldenModel, work: Work, tokens: Tokens) -> Measured:
    """Do the same work by transformers' SDPA and by paged attention."""
    model, config = golden.model, PagedConfig(page_size=PAGE_SIZE)
    sdpa = work(model, DynamicCache(config=model.config), tokens)
    with paged(model, config):
        ours = work(model, PagedCache.for_model(model, config), tokens)
    origin = {
        **golden.origin,
        "dtype": str(model.dtype).removeprefix("torch."),
        "ids_sha256": fingerprint({"ids": tokens.ids, "mask": tokens.mask}),
    }
    return Measured(sdpa, ours, origin)
