"""`load`: what it returns and refuses, and the published geometries."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import GraniteMoeHybridForCausalLM
from transformers.utils import logging

from granite_paged import hub, models
from granite_paged.checkpoints import TINY_RECALL
from granite_paged.errors import (
    CheckpointError,
    DeviceError,
    GranitePagedError,
    InvalidArgument,
    UnknownName,
    UnsupportedModel,
)
from granite_paged.models import GEOMETRIES, geometry_config, load
from tests.helpers.memory_errors import MEMORY_ERRORS
from tests.helpers.sharded_checkpoint import END, STOP, TEMPLATE
from tests.helpers.tiny_models import prompts, tiny_model

WEIGHTS, CONFIG = "model.safetensors", "config.json"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    """Silence transformers' reports of broken checkpoints."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint, for a test to break."""
    return Path(shutil.copytree(TINY_RECALL, tmp_path / "checkpoint"))


def response_error(status: int) -> HfHubHTTPError:
    """Return an error that the hub answered with."""
    return HfHubHTTPError(
        "no", response=SimpleNamespace(status_code=status, headers={}, request=None)
    )


def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(prompts((19,))[0], use_cache=False).logits
    return out


# -- loading ------------------------------------------------------------------------------------


def test_the_embedded_checkpoint_is_the_default() -> None:
    loaded = load(device="cpu")
    assert loaded.name == models.EMBEDDED == "tiny-recall"
    assert loaded.tokenizer is not None
    assert loaded.model.device == torch.device("cpu")


def test_models_are_frozen_and_in_eval_mode() -> None:
    model = load(device="cpu").model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_saved_model_loads_with_the_same_logits(tmp_path: Path) -> None:
    model = tiny_model("experts").requires_grad_(False)
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), device="cpu")
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.tokenizer is None
    assert loaded.name == str(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_auto_is_that_of_the_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model().to(dtype).save_pretrained(tmp_path)
    assert load(str(tmp_path), device="cpu").model.dtype == dtype


@pytest.mark.parametrize("dtype", list(models.DTYPES))
def test_another_dtype_can_be_chosen(dtype: str) -> None:
    assert load(device="cpu", dtype=dtype).model.dtype == models.DTYPES[dtype]


def edit_config(checkpoint: Path, **changes: Any) -> None:
    config = json.loads((checkpoint / CONFIG).read_text())
    (checkpoint / CONFIG).write_text(json.dumps(config | changes))


def test_old_names_of_layer_types_are_accepted(checkpoint: Path) -> None:
    edit_config(checkpoint, layer_types=["mamba", "attention"] * 2)
    assert torch.equal(
        logits(load(str(checkpoint), device="cpu").model), logits(load(device="cpu").model)
    )


def test_code_in_a_checkpoint_is_never_run(checkpoint: Path) -> None:
    (checkpoint / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(checkpoint, auto_map=names)
    assert isinstance(load(str(checkpoint), device="cpu").model, GraniteMoeHybridForCausalLM)


# -- errors -------------------------------------------------------------------------------------


def without(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def holding(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda checkpoint: (checkpoint / name).write_bytes(content)


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda checkpoint: edit_config(checkpoint, **changes)


def truncated(checkpoint: Path) -> None:
    whole = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def pickled(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / WEIGHTS), checkpoint / "pytorch_model.bin")
    (checkpoint / WEIGHTS).unlink()


def weighing(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / WEIGHTS)
        change(tensors)
        save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})

    return rewrite


BROKEN: dict[str, tuple[Callable[[Path], Any], type[GranitePagedError], str]] = {
    "folder without config": (without(CONFIG), CheckpointError, "no config.json"),
    "corrupt config": (holding(CONFIG, b"{ not json"), CheckpointError, "not a valid JSON"),
    "config that is a list": (holding(CONFIG, b"[]"), CheckpointError, "cannot read the config"),
    "another architecture": (configured(model_type="gpt2"), UnsupportedModel, "'gpt2'"),
    "an unheard-of architecture": (configured(model_type="foo"), CheckpointError, "`foo`"),
    "a size of words": (configured(hidden_size="wide"), CheckpointError, "expected int, got str"),
    "layers that are not listed": (
        configured(layer_types=["mamba"]),
        CheckpointError,
        "num_hidden_layers",
    ),
    "an unknown kind of layer": (
        configured(layer_types=["mamba", "gate", "mamba", "attention"]),
        CheckpointError,
        "layer_types",
    ),
    "an unknown dtype": (configured(dtype="floaty"), CheckpointError, "floaty"),
    "weights truncated": (truncated, CheckpointError, "cannot load"),
    "weights empty": (holding(WEIGHTS, b""), CheckpointError, "header too small"),
    "weights that are no safetensors": (
        holding(WEIGHTS, b"\xff" * 100),
        CheckpointError,
        "header too large",
    ),
    "no weights": (without(WEIGHTS), CheckpointError, "no file named model.safetensors"),
    "pickled weights only": (pickled, CheckpointError, "pickled weights .* refused"),
    "a missing weight": (
        weighing(lambda tensors: tensors.pop(K_PROJ)),
        CheckpointError,
        f"1 missing weights, for example {K_PROJ}",
    ),
    "a weight too many": (
        weighing(lambda tensors: tensors.update(stranger=torch.zeros(2))),
        CheckpointError,
        "1 unexpected weights, for example stranger",
    ),
    "a weight of another shape": (
        weighing(lambda tensors: tensors.update({K_PROJ: torch.zeros(3, 3)})),
        CheckpointError,
        f"1 mismatched weights, for example {K_PROJ}",
    ),
    "more layers than weights": (
        configured(num_hidden_layers=6, layer_types=["mamba", "attention"] * 3),
        CheckpointError,
        "20 missing weights",
    ),
    "corrupt tokenizer": (holding("tokenizer.json", b"{"), CheckpointError, "no tokenizer in"),
    "empty tokenizer": (holding("tokenizer.json", b"{}"), CheckpointError, "no tokenizer in"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(checkpoint: Path, broken: str) -> None:
    spoil, kind, match = BROKEN[broken]
    spoil(checkpoint)
    with pytest.raises(kind, match=match) as caught:
        load(str(checkpoint), device="cpu")
    assert "\n" not in str(caught.value)
    assert kind is UnsupportedModel or str(checkpoint) in str(caught.value)


BROKEN_GENERATION = {
    "corrupt": "{",
    "a list": "[]",
    "null among end of text": '{"eos_token_id": [null, 5]}',
    "text as end of text": '{"eos_token_id": "5"}',
    "negative temperature": '{"do_sample": true, "temperature": -1.0}',
    "top_p above 1": '{"do_sample": true, "top_p": 1.5}',
    "text as a limit": '{"max_new_tokens": "20"}',
}


@pytest.mark.parametrize("broken", BROKEN_GENERATION)
def test_a_broken_generation_config_is_refused_by_file_name(checkpoint: Path, broken: str) -> None:
    (checkpoint / "generation_config.json").write_text(BROKEN_GENERATION[broken])
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be used: ") as info:
        load(str(checkpoint), device="cpu")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["missing", "./missing", "/missing/folder", "a/b/c"])
def test_a_missing_folder_is_refused_without_asking_the_hub(name: str) -> None:
    message = f"no checkpoint at {name}: the folder does not exist"
    with pytest.raises(CheckpointError, match=message):
        load(name, device="cpu")


def test_a_file_is_refused_as_a_checkpoint(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        load(str(checkpoint / CONFIG), device="cpu")


# -- the hub ------------------------------------------------------------------------------------


def test_a_silent_hub_is_one_line_of_advice_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint accepts connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint=address))
        started = time.monotonic()
        with pytest.raises(
            CheckpointError, match=r"hub does not answer, .*: pass a folder, or run "
        ):
            load("some/model", device="cpu", revision="v1")
        assert time.monotonic() - started < 5


def test_hf_hub_offline_is_one_line_of_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        load("some/model", device="cpu", revision="v1")
    assert str(caught.value) == (
        "cannot load some/model: HF_HUB_OFFLINE is set, and the hub's cache lacks it: "
        "pass a folder, or run hf download some/model --revision v1 with a network"
    )


@pytest.mark.parametrize(
    ("error", "silent"),
    [
        (ConnectionError("refused"), "the hub does not answer"),
        (response_error(503), "the hub does not answer"),
        (response_error(404), ""),
        (response_error(401), ""),
        (ValueError("not a name"), ""),
        (None, ""),
    ],
)
def test_an_error_of_the_hub_is_an_answer(
    error: Exception | None, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal must reach the user in its own words; a broken hub counts as silent."""

    def repo_info(*args: Any, **options: Any) -> None:
        if error:
            raise error

    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(repo_info=repo_info))
    assert hub.why_silent("some/model") == silent


@pytest.fixture
def asked(sharded_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Answer for the hub with a folder, and record the options of every call that reads it."""
    calls: list[dict[str, Any]] = []

    def answering(read: Callable[..., Any]) -> Callable[..., Any]:
        def from_folder(name: str, *args: Any, **options: Any) -> Any:
            if name != "some/model":  # a reader calls another one with what it has found
                return read(name, *args, **options)
            known = ("revision", "token", "local_files_only")
            calls.append({key: options.pop(key) for key in known if key in options})
            return read(str(sharded_checkpoint), *args, **options)

        return from_folder

    for reader in (models.AutoConfig, models.AutoTokenizer, GraniteMoeHybridForCausalLM):
        monkeypatch.setattr(reader, "from_pretrained", answering(reader.from_pretrained))
    monkeypatch.setattr(models, "cached_file", answering(models.cached_file))
    monkeypatch.setattr(hub, "why_silent", lambda *args, **options: "")
    return calls


def test_revision_and_token_reach_every_call_of_transformers(asked: list[dict[str, Any]]) -> None:
    """Config, generation config, weights (with the generation config again) and tokenizer."""
    loaded = load("some/model", device="cpu", revision="v1", token="secret")
    assert asked == [{"revision": "v1", "token": "secret"}] * 4
    assert loaded.tokenizer.chat_template
    assert loaded.model.generation_config.max_new_tokens == 20


def test_a_silent_hub_is_left_alone_where_its_cache_has_the_model(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "why_silent", lambda *args, **options: "the hub does not answer")
    monkeypatch.setattr(hub, "is_cached", lambda *args: True)
    load("some/model", device="cpu")
    assert asked == [{"local_files_only": True}] * 4


def test_the_cache_is_that_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    assert not hub.is_cached("some/model", CONFIG)
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / CONFIG).touch()
    assert hub.is_cached("some/model", CONFIG)
    assert not hub.is_cached("some/model", CONFIG, "v1")
    assert not hub.is_cached("no name", CONFIG)


def test_a_revision_of_a_folder_is_refused(checkpoint: Path) -> None:
    for model in (str(checkpoint), None):
        with pytest.raises(InvalidArgument, match="revision 'v1' is one of a hub id"):
            load(model, device="cpu", revision="v1")


# -- a published checkpoint ---------------------------------------------------------------------


def test_a_sharded_checkpoint_loads_whole(sharded_checkpoint: Path) -> None:
    """Shards, a byte-level tokenizer, a template and a generation config, with a torch dtype."""
    assert len(list(sharded_checkpoint.glob("model-*.safetensors"))) >= 2
    loaded = load(str(sharded_checkpoint), device="cpu", dtype=torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.generation_config.eos_token_id == [END, STOP]
    assert loaded.tokenizer.decode(loaded.tokenizer("naïve 🦊").input_ids[1:]) == "naïve 🦊"
    assert loaded.tokenizer.chat_template == TEMPLATE
    exact = load(str(sharded_checkpoint), device="cpu", dtype="float32")
    expected = GraniteMoeHybridForCausalLM.from_pretrained(sharded_checkpoint, dtype=torch.float32)
    for name, weight in expected.state_dict().items():
        assert torch.equal(exact.model.state_dict()[name], weight), name


@pytest.mark.parametrize("dtype", list(models.DTYPES.values()))
def test_a_torch_dtype_is_taken(dtype: torch.dtype) -> None:
    assert load(device="cpu", dtype=dtype).model.dtype == dtype


@pytest.mark.parametrize("dtype", ["float8", "torch.float32", "half", "", torch.int8])
def test_an_unknown_dtype_error_lists_the_known_ones(dtype: Any) -> None:
    with pytest.raises(UnknownName, match=r"use one of auto, float64, float32, bfloat16, float16$"):
        load(dtype=dtype, device="cpu")


@pytest.mark.parametrize("device", ["tpu", "banana", "cpu:7", "mps", "meta", "cuda:x", ""])
def test_an_unknown_device_error_lists_the_known_ones(device: str) -> None:
    with pytest.raises(DeviceError, match=f"'{device}'.*use auto, cpu, cuda or cuda:N$"):
        load(device=device)


def test_a_missing_gpu_error_says_how_many_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="cuda:9 does not exist: this machine has 2 CUDA devices"):
        load(device="cuda:9")


def test_without_a_gpu_auto_is_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.resolve_device("auto") == torch.device("cpu")
    with pytest.raises(DeviceError, match="cuda does not exist: this machine has 0"):
        models.resolve_device("cuda")


@pytest.mark.parametrize("refused", ["_from_config", "to"])
def test_a_model_beyond_the_devices_memory_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, small: str, refused: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise MEMORY_ERRORS["driver"]

    monkeypatch.setattr(GraniteMoeHybridForCausalLM, refused, refuse)
    with pytest.raises(DeviceError, match=f"^{small}.* does not fit into the memory of cpu$"):
        load(random_weights=small, device="cpu")


def test_an_unknown_geometry_error_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="unknown geometry 'granite-5'") as caught:
        load(random_weights="granite-5", device="cpu")
    assert all(name in str(caught.value) for name in GEOMETRIES)


def test_a_model_and_random_weights_exclude_each_other() -> None:
    with pytest.raises(InvalidArgument, match="exclude each other"):
        load(str(TINY_RECALL), random_weights="granite-4.0-h-1b", device="cpu")


# -- published geometries -----------------------------------------------------------------------

EVERY_TENTH = (5, 15, 25, 35)
PUBLISHED: dict[str, tuple[float, int, tuple[int, ...]]] = {  # parameters, layers, attention
    "granite-4.0-h-350m": (340e6, 32, (10, 13, 17, 27)),
    "granite-4.0-h-1b": (1_461_538_368, 40, EVERY_TENTH),
    "granite-4.0-h-micro": (3.2e9, 40, EVERY_TENTH),
    "granite-4.0-h-tiny": (7e9, 40, EVERY_TENTH),
    "granite-4.0-h-small": (32e9, 40, EVERY_TENTH),
    "granite-4.0-350m": (350e6, 28, tuple(range(28))),
    "granite-4.0-1b": (1.6e9, 40, tuple(range(40))),
    "granite-4.0-micro": (3.4e9, 40, tuple(range(40))),
}


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return GraniteMoeHybridForCausalLM(geometry_config(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_geometry_has_the_published_size_and_layers(name: str) -> None:
    parameters, layers, attention = PUBLISHED[name]
    model = on_meta(name)
    kinds = [hasattr(layer, "self_attn") and layer.self_attn is not None
             for layer in model.model.layers]  # fmt: skip
    assert model.num_parameters() == pytest.approx(parameters, rel=0.03)
    assert len(kinds) == layers
    assert tuple(i for i, is_attention in enumerate(kinds) if is_attention) == attention


# longest context, residual multiplier, rotary base, logits scaling
PUBLISHED_VALUES = {
    "granite-4.0-h-350m": (32768, 0.246, 1e4, 3),
    "granite-4.0-h-1b": (131072, 0.22, 1e4, 6),
    "granite-4.0-h-micro": (131072, 0.22, 1e4, 8),
    "granite-4.0-h-tiny": (131072, 0.22, 1e4, 6),
    "granite-4.0-h-small": (131072, 0.22, 1e4, 16),
    "granite-4.0-350m": (32768, 0.263, 1e7, 4),
    "granite-4.0-1b": (131072, 0.22, 1e7, 8),
    "granite-4.0-micro": (131072, 0.22, 1e7, 10),
}


@pytest.mark.parametrize("name", PUBLISHED_VALUES)
def test_a_geometry_has_the_published_constants(name: str) -> None:
    config = geometry_config(name)
    assert PUBLISHED_VALUES[name] == (
        config.max_position_embeddings,
        config.residual_multiplier,
        config.rope_parameters["rope_theta"],
        config.logits_scaling,
    )
    assert config.rms_norm_eps == 1e-5
    assert config.initializer_range == 0.1
    assert config.embedding_multiplier == 12


def test_granite_h_1b_has_the_published_number_of_parameters() -> None:
    assert on_meta("granite-4.0-h-1b").num_parameters() == 1_461_538_368


def test_the_geometry_of_the_study_is_as_reported() -> None:
    config = geometry_config("study-24l")
    assert config.num_hidden_layers == 24
    assert config.num_attention_heads == 16
    assert config.position_embedding_type == "rope"
    assert on_meta("study-24l").num_parameters() > 1e9


def test_every_geometry_has_published_sizes() -> None:
    assert set(GEOMETRIES) == {*PUBLISHED, "study-24l"}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_only_dense_and_study_geometries_are_rotary(name: str) -> None:
    config = geometry_config(name)
    rotary = config.position_embedding_type == "rope"
    assert rotary == ("-h-" not in name)


@pytest.mark.parametrize(
    ("name", "experts"), [("granite-4.0-h-tiny", 64), ("granite-4.0-h-small", 72)]
)
def test_mixtures_have_their_published_experts(name: str, experts: int) -> None:
    assert geometry_config(name).num_local_experts == experts


# -- random weights -----------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a geometry that is drawn in milliseconds."""
    sizes = models._hybrid(64, (4, 2), 4, 64, layers=2, attention=(1,), mamba_d_state=8)
    monkeypatch.setitem(GEOMETRIES, "small", sizes)
    return "small"


def weights(name: str, **options: Any) -> list[torch.Tensor]:
    return list(load(random_weights=name, device="cpu", **options).model.parameters())


def test_one_seed_draws_the_same_weights(small: str) -> None:
    first, again = weights(small, seed=3), weights(small, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_another_seed_draws_other_weights(small: str) -> None:
    first, other = weights(small, seed=3), weights(small, seed=4)
    drawn = [(a, b) for a, b in zip(first, other, strict=True) if a.ndim == 2]
    assert drawn
    assert not any(torch.equal(a, b) for a, b in drawn)


def test_random_weights_are_named_and_have_no_tokenizer(small: str) -> None:
    loaded = load(random_weights=small, device="cpu", seed=5)
    assert loaded.name == "small (random weights, seed 5)"
    assert loaded.tokenizer is None
    assert not loaded.model.training


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_random_weights_on_the_cpu_default_to_float32(
    small: str, dtype: str, expected: str
) -> None:
    model = load(random_weights=small, device="cpu", dtype=dtype).model
    assert model.dtype == models.DTYPES[expected]
