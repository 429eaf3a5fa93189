"""One Mamba-2 layer, as transformers builds it, for tests of operators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import GraniteMoeHybridConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridMambaLayer,
)


def mamba_layer(
    seed: int = 0, **sizes: Any
) -> tuple[GraniteMoeHybridMambaLayer, GraniteMoeHybridConfig]:
    """Build a small Mamba-2 layer of transformers with random weights. Return it and its config."""
    config = GraniteMoeHybridConfig(
        **{
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "layer_types": ["mamba"],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "mamba_n_heads": 4,
            "mamba_d_head": 12,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
            "mamba_chunk_size": 8,
            "mamba_expand": 2,
            "initializer_range": 0.2,
            **sizes,
        }
    )
    torch.manual_seed(seed)
    mixer = GraniteMoeHybridMambaLayer(config, 0).eval()
    with torch.no_grad():
        for weight in (mixer.in_proj.weight, mixer.out_proj.weight):
            weight.normal_(std=0.2)
        mixer.dt_bias.normal_()
        mixer.A_log.normal_()
        mixer.D.normal_()
        mixer.norm.weight.normal_()
    return mixer, config


def mixer_sizes(heads: int, head_dim: int, state_size: int, groups: int, width: int) -> Any:
    """Return what `MambaSizes.of` reads of a Mamba layer that has no weights."""
    return SimpleNamespace(
        num_heads=heads,
        head_dim=head_dim,
        ssm_state_size=state_size,
        n_groups=groups,
        conv_kernel_size=width,
        chunk_size=128,
        time_step_limit=(0.0, 1.0),
    )
