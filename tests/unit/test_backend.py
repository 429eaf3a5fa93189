"""Which implementation runs, and the reasons against the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from granite_paged.errors import CannotBeExact, GeometryError
from granite_paged.layers import backend
from granite_paged.layers.backend import (
    attention_backend,
    check_compilable,
    check_exact,
    exact_refusal,
    kernel_refusal,
    triton_refusal,
    warn_if_slow,
)
from tests.helpers.tiny_models import shortest_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A machine with a GPU, a C compiler and Triton, which a test can change."""
    machine = SimpleNamespace(capability=(9, 0), gpu=True, compilers=["cc"], triton=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine.capability)
    monkeypatch.setattr("shutil.which", lambda name: name if name in machine.compilers else None)
    found = {True: "triton", False: None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found[machine.triton])
    monkeypatch.delenv("CC", raising=False)
    for known in (backend._cannot_compile, backend._warn_once):
        known.cache_clear()
    yield machine
    for known in (backend._cannot_compile, backend._warn_once):
        known.cache_clear()


def small_model(**options: Any) -> Any:
    return shortest_model(**options)


# -- attention ------------------------------------------------------------------------------------


def test_attention_is_compiled_on_a_gpu_that_has_a_kernel_for_it() -> None:
    assert attention_backend("auto", GPU, HALF, 16) == "compiled"
    assert attention_backend("auto", GPU, torch.float32, 64) == "compiled"
    assert attention_backend("auto", GPU, HALF, 15) == "eager"
    assert attention_backend("auto", GPU, torch.float64, 64) == "eager"
    assert attention_backend("auto", CPU, HALF, 64) == "eager"


def test_a_backend_that_is_asked_for_is_not_questioned() -> None:
    assert attention_backend("compiled", CPU, torch.float64, 1) == "compiled"
    assert attention_backend("eager", GPU, HALF, 64) == "eager"


def test_small_sizes_are_refused_before_they_are_compiled() -> None:
    check_compilable(CPU, HALF, page_size=16, head_dim=8)
    check_compilable(GPU, HALF, page_size=16, head_dim=16)
    for device in (CPU, GPU):
        with pytest.raises(GeometryError, match=r"page_size 15 is too small .* at least 16"):
            check_compilable(device, HALF, page_size=15, head_dim=16)
    with pytest.raises(GeometryError, match="head_dim 15 is too small"):
        check_compilable(GPU, HALF, page_size=16, head_dim=15)
    with pytest.raises(GeometryError, match="float64"):
        check_compilable(GPU, torch.float64, page_size=16, head_dim=16)


# -- kernels --------------------------------------------------------------------------------------


def test_kernels_run_in_half_precision_on_a_gpu() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert kernel_refusal("auto", GPU, dtype) == ""
    assert kernel_refusal("compiled", GPU, HALF, activation="swish") == ""
    assert "'eager' was asked for" in kernel_refusal("eager", GPU, HALF)
    assert "activation gelu" in kernel_refusal("auto", GPU, HALF, activation="gelu")
    assert "device cpu" in kernel_refusal("auto", CPU, HALF)
    refusal = kernel_refusal("auto", GPU, torch.float32)
    assert refusal == "float32 is computed in full precision"


@pytest.mark.parametrize(
    ("capability", "attention", "refusal"),
    [
        ((6, 1), "eager", "compute capability 6.1 is older than 7.0"),
        ((7, 0), "compiled", "compute capability 7.0 is older than 8.0"),
        ((7, 5), "compiled", "compute capability 7.5 is older than 8.0"),
        ((8, 0), "compiled", ""),
        ((10, 0), "compiled", ""),
    ],
)
def test_an_old_gpu_has_no_kernels_and_the_oldest_no_compiler(
    machine: SimpleNamespace, capability: tuple[int, int], attention: str, refusal: str
) -> None:
    machine.capability = capability
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert attention_backend("auto", GPU, HALF, 64) == attention
    assert kernel_refusal("auto", GPU, HALF) == refusal


def test_a_machine_without_a_gpu_is_asked_for_no_capability(machine: SimpleNamespace) -> None:
    """Plans for a GPU are tested without one."""
    machine.gpu, machine.capability = False, (1, 0)
    assert kernel_refusal("auto", GPU, HALF) == ""


def test_compiling_needs_triton_and_any_c_compiler(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for compiler in ("cc", "gcc", "clang"):
        machine.compilers = [compiler]
        backend._cannot_compile.cache_clear()
        assert kernel_refusal("auto", GPU, HALF) == ""
    machine.compilers = ["mine"]
    backend._cannot_compile.cache_clear()
    assert "needs a C compiler" in kernel_refusal("auto", GPU, HALF)
    monkeypatch.setenv("CC", "mine")
    backend._cannot_compile.cache_clear()
    assert kernel_refusal("auto", GPU, HALF) == ""
    machine.triton = False
    backend._cannot_compile.cache_clear()
    assert kernel_refusal("auto", GPU, HALF) == "Triton is not installed"


def test_the_first_use_of_a_slower_path_warns_the_caller(machine: SimpleNamespace) -> None:
    """The warning names the line that made the cache or the engine."""
    machine.triton = False

    def make() -> str:
        return attention_backend("auto", GPU, HALF, 64)

    def use() -> str:
        return make()

    with pytest.warns(UserWarning, match="slower path: Triton is not installed") as warned:
        assert [use(), use()] == ["eager", "eager"]
    assert [each.lineno for each in warned] == [use.__code__.co_firstlineno + 1]


@pytest.mark.parametrize(
    ("refusal", "device", "dtype", "warns"),
    [
        ("a reason", GPU, HALF, True),
        ("a reason", GPU, torch.float16, True),
        ("", GPU, HALF, False),
        ("a reason", CPU, HALF, False),
        ("a reason", GPU, torch.float32, False),
    ],
)
def test_only_half_precision_on_a_gpu_is_expected_to_be_fast(
    refusal: str, device: torch.device, dtype: torch.dtype, warns: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_slow(refusal, device, dtype)
    assert len(caught) == warns


# -- models ---------------------------------------------------------------------------------------


class OnGpu:
    """A model that says it is on a GPU in half precision."""

    device, dtype = GPU, HALF

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def test_a_plain_model_on_a_gpu_has_kernels() -> None:
    assert triton_refusal(OnGpu(small_model()), "auto") == ""
    assert "eager" in triton_refusal(OnGpu(small_model()), "eager")
    assert "gelu" in triton_refusal(OnGpu(small_model(hidden_act="gelu")), "auto")


@pytest.mark.parametrize("option", ["attention_bias", "mamba_proj_bias"])
def test_projections_with_a_bias_have_no_kernel(option: str) -> None:
    assert "with a bias" in triton_refusal(OnGpu(small_model(**{option: True})), "auto")


def test_a_changed_model_has_no_kernels_and_is_not_exact() -> None:
    model = small_model()
    model.lm_head.register_forward_hook(lambda *_: None)
    assert triton_refusal(OnGpu(model), "auto").startswith("lm_head has a hook")
    assert exact_refusal(model, "auto").startswith("lm_head has a hook")


def test_a_model_on_the_cpu_is_exact_unless_attention_is_compiled() -> None:
    model = small_model()
    for name in ("auto", "eager"):
        assert exact_refusal(model, name) == ""
    assert "sums blocks of tokens" in exact_refusal(model, "compiled")
    check_exact(model, "auto")
    with pytest.raises(CannotBeExact, match="sums blocks"):
        check_exact(model, "compiled")


@pytest.mark.parametrize("limit", [(0.001, float("inf")), (0.0, 1.0), (-1.0, float("inf"))])
def test_a_model_with_a_time_step_limit_is_not_exact(limit: tuple[float, float]) -> None:
    model = small_model()
    model.model.layers[0].mamba.time_step_limit = limit
    assert "time_step_limit" in exact_refusal(model, "auto")


def test_experts_are_exact_on_the_cpu_only() -> None:
    model = shortest_model("experts")
    assert exact_refusal(model, "auto") == ""
    assert "experts" in exact_refusal(OnGpu(model), "auto")
    assert exact_refusal(OnGpu(small_model()), "compiled") == ""
    assert "bias" in exact_refusal(OnGpu(small_model(mamba_proj_bias=True)), "auto")
