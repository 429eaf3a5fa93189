"""Load a model: a checkpoint, published sizes with random weights, or the embedded model.

Weights come from safetensors only, and code inside a checkpoint is never run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from granite_paged.checkpoints import TINY_RECALL
from granite_paged.device import one_memory_error, resolve_device
from granite_paged.engine.defaults import end_of_text
from granite_paged.engine.request import SamplingParams
from granite_paged.errors import (
    CheckpointError,
    DeviceError,
    InvalidArgument,
    InvalidSampling,
    UnknownName,
    UnsupportedModel,
)
from granite_paged.geometry import MODEL_TYPE
from granite_paged.hub import looks_like_a_folder, reading_options

_UNREADABLE_CONFIG = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,  # a dtype unknown to torch
    StrictDataclassError,  # contradictory sizes
)

EMBEDDED = "tiny-recall"
"""Name of the embedded checkpoint."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on its device, without gradients, and its tokenizer if it has one."""

    name: str
    model: Any
    tokenizer: Any | None


def load(
    model: str | None = None,
    *,
    random_weights: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
    revision: str | None = None,
    token: str | bool | None = None,
) -> LoadedModel:
    """Load one model, its tokenizer and its generation config.

    A hub id needs the hub, or a download in its cache; which of both is known within seconds.

    Args:
        model: checkpoint folder or hub id; by default the embedded `tiny_recall`.
        random_weights: a name in `GEOMETRIES` instead: its sizes with weights drawn from `seed`.
        device: `auto` (CUDA if available), `cpu`, `cuda` or `cuda:N`.
        dtype: a torch dtype, a name in `DTYPES`, or `auto`: the checkpoint's own; for random
            weights bfloat16 on CUDA and float32 elsewhere.
        seed: seed of the random weights.
        revision: branch, tag or commit of a hub id.
        token: access token of the hub. None: the one in HF_TOKEN or of `hf auth login`.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or corrupt.
        UnsupportedModel: the checkpoint has another architecture.
        DeviceError: the device is unknown, absent or too small.
        InvalidArgument: a name is unknown, both a model and random weights were given, or a
            revision of something that is not a hub id.
    """
    where = resolve_device(device)
    wanted = _torch_dtype(dtype)
    if revision is not None and (model is None or Path(model).is_dir()):
        raise InvalidArgument(f"revision {revision!r} is one of a hub id, and no hub id was given")
    if random_weights is None:
        loaded = _from_checkpoint(model, wanted, revision, token)
    elif model is None:
        default = torch.bfloat16 if where.type == "cuda" else torch.float32
        loaded = _from_geometry(random_weights, wanted or default, where, seed)
    else:
        raise InvalidArgument("a model and random weights exclude each other")
    loaded.model.eval().requires_grad_(False)
    with _fitting(loaded.name, where):
        loaded.model.to(where)
    return loaded


@contextlib.contextmanager
def _fitting(name: str, device: torch.device) -> Iterator[None]:
    """Raise DeviceError for a model that runs out of memory on its way to the device."""
    try:
        with one_memory_error():
            yield
    except torch.OutOfMemoryError:
        raise DeviceError(f"{name} does not fit into the memory of {device}") from None


def _torch_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """Return the dtype, None for `auto`. Raises UnknownName."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise UnknownName("dtype", str(dtype), ["auto", *DTYPES])
    return DTYPES[str(dtype)]


def load_tokenizer(
    path: str, *, revision: str | None = None, token: str | bool | None = None
) -> Any:
    """Load a tokenizer from a folder, a `tokenizers` file or the hub. Raises CheckpointError."""
    if Path(path).is_file():
        return _tokenizer_of_file(path)
    return _tokenizer(path, reading_options(path, TOKENIZER_CONFIG_FILE, revision, token))


def _tokenizer(path: str, options: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"no tokenizer in {path}: {_first_line(error)}") from None


def _tokenizer_of_file(path: str) -> Any:
    try:
        return PreTrainedTokenizerFast(tokenizer_file=path)
    except Exception as error:  # tokenizers raises no narrower type
        raise CheckpointError(f"no tokenizer in {path}: {_first_line(error)}") from None


# -- checkpoints --------------------------------------------------------------------------------


def _from_checkpoint(
    model: str | None, dtype: torch.dtype | None, revision: str | None, token: str | bool | None
) -> LoadedModel:
    path = str(TINY_RECALL) if model is None else model
    if model is not None and looks_like_a_folder(model) and not Path(model).is_dir():
        raise CheckpointError(f"no checkpoint at {model}: the folder does not exist")
    where = reading_options(path, CONFIG_NAME, revision, token)
    config = _read_config(path, where)
    _check_generation_config(path, where)
    try:
        loaded, report = GraniteMoeHybridForCausalLM.from_pretrained(
            path,
            dtype=dtype or config.dtype or torch.float32,
            ignore_mismatched_sizes=True,  # _check_complete refuses them by name
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **where,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        pickled = any(Path(path).glob("*.bin"))
        advice = "; pickled weights (.bin) are refused: convert them to safetensors" * pickled
        raise CheckpointError(f"cannot load {path}: {_first_line(error)}{advice}") from None
    _check_complete(path, report)
    has_tokenizer = not Path(path).is_dir() or (Path(path) / "tokenizer.json").exists()
    tokenizer = _tokenizer(path, where) if has_tokenizer else None
    return LoadedModel(EMBEDDED if model is None else model, loaded, tokenizer)


def _read_config(path: str, options: dict[str, Any]) -> Any:
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise CheckpointError(f"{path} is no checkpoint: it holds no config.json")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
    except _UNREADABLE_CONFIG as error:
        raise CheckpointError(f"cannot read the config of {path}: {_first_line(error)}") from None
    if config.model_type != MODEL_TYPE:
        raise UnsupportedModel(f"model type {config.model_type!r}")
    return config


def _check_generation_config(path: str, options: dict[str, Any]) -> None:
    """Refuse a generation config that transformers would drop silently, or fail on later."""
    found = cached_file(
        path,
        GENERATION_CONFIG_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **options,
    )
    if found is None:
        return
    file = Path(found)
    try:
        config = GenerationConfig.from_dict(json.loads(file.read_text(encoding="utf-8")))
        end_of_text(config)
        SamplingParams.from_generation_config(config)
    except (OSError, ValueError, TypeError, AttributeError, InvalidSampling) as error:
        raise CheckpointError(f"{file} cannot be used: {_first_line(error)}") from None


def _check_complete(path: str, report: dict[str, Any]) -> None:
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = report.get(problem) or ()  # a mismatched key comes with its two shapes
        names = sorted(key if isinstance(key, str) else key[0] for key in keys)
        if names:
            what = problem.replace("_keys", "")
            raise CheckpointError(f"{path}: {len(names)} {what} weights, for example {names[0]}")


def _first_line(error: Exception) -> str:
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    whole = f"{first} {more[0].strip()}" if more and first.endswith(":") else first
    return whole.removesuffix(".")


# -- published geometries -----------------------------------------------------------------------


def _from_geometry(name: str, dtype: torch.dtype, device: torch.device, seed: int) -> LoadedModel:
    if name not in GEOMETRIES:
        raise UnknownName("geometry", name, tuple(GEOMETRIES))
    torch.manual_seed(seed)
    with _fitting(name, device), device:
        model = GraniteMoeHybridForCausalLM._from_config(geometry_config(name), dtype=dtype)
    return LoadedModel(f"{name} (random weights, seed {seed})", model, None)


def geometry_config(name: str) -> GraniteMoeHybridConfig:
    """Return the transformers config of a name in `GEOMETRIES`."""
    sizes = dict(GEOMETRIES[name])
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    attention = sizes.pop("attention_layers")
    layers = sizes["num_hidden_layers"]
    sizes["layer_types"] = [
        "attention" if attention is None or layer in attention else "mamba"
        for layer in range(layers)
    ]
    return GraniteMoeHybridConfig(
        vocab_size=100352,
        tie_word_embeddings=True,
        pad_token_id=100256,
        bos_token_id=100257,
        eos_token_id=100257,
        embedding_multiplier=12,
        attention_multiplier=heads / hidden,
        logits_scaling=hidden / 256,
        rms_norm_eps=1e-5,
        initializer_range=0.1,
        **{**_COMMON, **_NO_EXPERTS, **_MAMBA, **sizes},
    )


_COMMON = {"max_position_embeddings": 131072, "residual_multiplier": 0.22}
_SMALLEST = {"max_position_embeddings": 32768}  # what both models of 350 M parameters differ in
_NO_EXPERTS = {"num_local_experts": 0, "num_experts_per_tok": 0}
_MAMBA = {
    "mamba_n_groups": 1,
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 256,
}
_EVERY_TENTH = (5, 15, 25, 35)


def _hybrid(
    hidden: int,
    heads: tuple[int, int],
    mamba_heads: int,
    shared: int,
    *,
    layers: int = 40,
    attention: tuple[int, ...] = _EVERY_TENTH,
    **more: Any,
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "attention_layers": attention,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "mamba_n_heads": mamba_heads,
        "shared_intermediate_size": shared,
        **more,
    }


def _experts(count: int, top: int, size: int) -> dict[str, Any]:
    return {"num_local_experts": count, "num_experts_per_tok": top, "intermediate_size": size}


def _dense(
    layers: int, hidden: int, heads: tuple[int, int], shared: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "attention_layers": None,  # all of them
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "shared_intermediate_size": shared,
        "position_embedding_type": "rope",
        "rope_theta": 1e7,
        **more,
    }


GEOMETRIES: dict[str, dict[str, Any]] = {
    "granite-4.0-h-350m": _hybrid(
        768,
        (12, 4),
        48,
        2048,
        layers=32,
        attention=(10, 13, 17, 27),
        residual_multiplier=0.246,
        **_SMALLEST,
    ),
    "granite-4.0-h-1b": _hybrid(1536, (12, 4), 48, 4096),
    "granite-4.0-h-micro": _hybrid(2048, (32, 8), 64, 8192),
    "granite-4.0-h-tiny": _hybrid(1536, (12, 4), 48, 1024, **_experts(64, 6, 512)),
    "granite-4.0-h-small": _hybrid(4096, (32, 8), 128, 1536, **_experts(72, 10, 768)),
    "granite-4.0-350m": _dense(28, 1024, (16, 4), 2048, residual_multiplier=0.263, **_SMALLEST),
    "granite-4.0-1b": _dense(40, 2048, (16, 4), 4096),
    "granite-4.0-micro": _dense(40, 2560, (40, 8), 8192),
    "study-24l": _hybrid(
        2048,
        (16, 4),
        64,
        4096,
        layers=24,
        attention=(5, 11, 17, 23),
        position_embedding_type="rope",
    ),
}
"""Published configurations of the Granite-4.0 family (`config.json` of ibm-granite's checkpoints).
Two values follow a rule that fits the published ones: attention_multiplier = 1 / head_dim and
logits_scaling = hidden / 256 (not confirmed for h-small, where it gives 16). `study-24l` has the
sizes that the original study reports (24 layers, 16 heads, rotary) and the proportions of h-1b."""
