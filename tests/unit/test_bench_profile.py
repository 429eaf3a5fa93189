"""Profiles classify kernels by the module that launched them, or else by their names."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.autograd import DeviceType

from granite_paged.bench import profiler
from granite_paged.bench.cases import Shape
from granite_paged.bench.measure import Clock
from granite_paged.bench.modes import Default
from granite_paged.bench.profiler import (
    KERNEL_RULES,
    KernelCost,
    Profile,
    _memory_history,
    kernel_costs,
    kernel_kind,
    layer_ranges,
    module_kind,
    profile_step,
)
from granite_paged.errors import DeviceError
from granite_paged.layers import triton
from tests.helpers.tiny_models import FLAVOURS, tiny_model

NAMES = {
    "_write_pages": "attention",
    "triton_per_fused_amax_exp_flex_attention_mul_sum_view_1": "attention",
    "_step": "mamba",
    "_pass_on": "mamba",
    "_few_rows": "matmul",
    "_silu_mul": "mlp",
    "_rms_norm": "norm",
    "_prenorm": "norm",
    "_embed": "head",
    "_write_argmax": "head",
    "triton_tem_fused_flex_attention_0": "attention",
    "triton_tem_fused_paged_attention_flex_decoding_1": "attention",
    "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
    "aten::_softmax": "attention",
    "aten::_log_softmax": "head",
    "_chunk_scan_fwd_kernel": "mamba",
    "_chunk_state_fwd_kernel": "mamba",
    "_selective_scan_update_kernel": "mamba",
    "triton_red_fused_add_exp_mul_softplus_sum_3": "mamba",
    "triton_poi_fused_exp_mul_7": "mamba",
    "void conv_depthwise2d_forward_kernel": "mamba",
    "triton_poi_fused_convolution_silu_2": "mamba",
    "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0": "norm",
    "triton_poi_fused_mul_silu_split_4": "mlp",
    "triton_poi_fused_embedding_mul_0": "head",
    "triton_red_fused_argmax_1": "head",
    "nvjet_tst_128x64_64x9_2x1_v_bz_TNN": "matmul",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matmul",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>": "matmul",
    "aten::addmm": "matmul",
    "aten::mm": "matmul",
    "aten::_grouped_mm": "mlp",
    "triton_poi_fused_moe_experts_3": "mlp",
    "triton_poi_fused_convert_element_type_expand_2": "other",
    "aten::copy_": "other",
    "Memset (Device)": "other",
    "triton_poi_fused_add_mul_1": "other",
    "void at::native::elementwise_kernel<128, 2>": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_classified_by_its_name(name: str) -> None:
    assert kernel_kind(name) == NAMES[name]


def test_every_kernel_of_ours_is_classified() -> None:
    sources = Path(triton.__file__).parent.glob("*.py")
    launched = {
        name
        for source in sources
        for name in re.findall(r"^ *(_\w+)\[", source.read_text(), re.MULTILINE)
    }
    assert {"_step", "_write_pages", "_rms_norm"} <= launched
    assert [name for name in launched if kernel_kind(name) == "other"] == []


@pytest.mark.parametrize("place", range(len(KERNEL_RULES)))
def test_every_rule_is_needed(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    others = KERNEL_RULES[:place] + KERNEL_RULES[place + 1 :]
    monkeypatch.setattr(profiler, "KERNEL_RULES", others)
    assert {name: kernel_kind(name) for name in NAMES} != NAMES


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_parameter_belongs_to_a_classified_module(flavour: str) -> None:
    model = tiny_model(flavour)
    kinds = {name: module_kind(name) for name, _ in model.named_modules()}
    homeless = [
        name
        for name, _ in model.named_parameters()
        if not any(kinds[name.rsplit(".", depth)[0]] for depth in range(1, name.count(".") + 1))
    ]
    assert homeless == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.mamba", "mamba"),
        ("model.layers.1.self_attn", "attention"),
        ("model.layers.1.shared_mlp", "mlp"),
        ("model.layers.1.block_sparse_moe", "mlp"),
        ("model.layers.1.input_layernorm", "norm"),
        ("model.norm", "norm"),
        ("lm_head", "head"),
        ("model.layers.1", None),
        ("model.layers", None),
    ],
)
def test_a_module_is_classified_by_its_name(name: str, kind: str | None) -> None:
    assert module_kind(name) == kind


def event(name: str, *kernels: tuple[str, float], inside: Any = None, own: float = 0) -> Any:
    """Make an event of the host, with the kernels that it launched."""
    launched = [SimpleNamespace(name=kernel, duration=time) for kernel, time in kernels]
    return SimpleNamespace(
        name=name,
        kernels=launched,
        cpu_parent=inside,
        self_cpu_time_total=own,
        device_type=DeviceType.CPU,
        is_user_annotation=name.startswith("layer kind: "),
    )


def on_device(name: str, microseconds: float) -> Any:
    """Make an event of the device."""
    made = event(name)
    made.device_type = DeviceType.CUDA
    made.time_range = SimpleNamespace(elapsed_us=lambda: microseconds)
    return made


def test_a_kernel_belongs_to_the_innermost_module_that_launched_it() -> None:
    mamba = event("layer kind: mamba")
    norm = event("layer kind: norm", ("layer kind: norm", 50.0), inside=mamba)
    events = [
        mamba,
        norm,
        event("aten::mm", ("gemm", 10.0), inside=mamba),
        event("aten::mul", ("mul", 4.0), inside=norm),
        on_device("gemm", 10.0),
        on_device("mul", 4.0),
        on_device("layer kind: norm", 50.0),
    ]
    assert kernel_costs(events, steps=2, gpu=True) == [
        KernelCost("mamba", "gemm", 1, 5.0),
        KernelCost("norm", "mul", 1, 2.0),
    ]


def test_a_kernel_without_an_operator_is_classified_by_name() -> None:
    mlp = event("layer kind: mlp")
    events = [
        event("aten::mm", ("gemm", 10.0), inside=mlp),
        on_device("gemm", 10.0),
        on_device("gemm", 3.0),
        on_device("triton_red_fused_rsqrt", 1.0),
    ]
    assert kernel_costs(events, steps=1, gpu=True) == [
        KernelCost("mlp", "gemm", 1, 10.0),
        KernelCost("matmul", "gemm", 1, 3.0),
        KernelCost("norm", "triton_red_fused_rsqrt", 1, 1.0),
    ]


def test_on_a_cpu_operations_cost_their_self_time() -> None:
    mlp = event("layer kind: mlp", own=99)
    events = [mlp, event("aten::mm", inside=mlp, own=6), event("aten::mm", inside=mlp, own=2)]
    assert kernel_costs(events, steps=2, gpu=False) == [KernelCost("mlp", "aten::mm", 1, 4.0)]


def test_kinds_are_sorted_by_total_time() -> None:
    kernels = [
        KernelCost("mlp", "a", 1, 3),
        KernelCost("norm", "b", 1, 5),
        KernelCost("mlp", "c", 1, 4),
    ]
    assert Profile("trace", None, kernels).by_kind() == [("mlp", 7), ("norm", 5)]


def profiled(folder: Path, flavour: str = "hybrid", **how: Any) -> Profile:
    model = tiny_model(flavour)
    prepared = Default(model, 0).prepare("decode", Shape(1, 20))
    return profile_step(prepared, model, Clock(torch.device("cpu")), folder, "decode", **how)


def test_a_profile_writes_a_trace_with_every_kind_of_layer(tmp_path: Path) -> None:
    found = profiled(tmp_path / "new")
    trace = json.loads(Path(found.trace).read_text())
    names = {entry.get("name") for entry in trace["traceEvents"]}
    assert "layer kind: mamba" in names
    kinds = {kind for kind, _ in found.by_kind()}
    assert {"mamba", "attention", "mlp", "norm", "head"} <= kinds
    times = [kernel.microseconds for kernel in found.kernels]
    assert times == sorted(times, reverse=True)


def test_profiling_leaves_no_hooks() -> None:
    model = tiny_model()
    with layer_ranges(model):
        assert any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("failing", [False, True])
def test_a_memory_snapshot_is_written_after_the_steps(failing: bool, tmp_path: Path) -> None:
    """docs/golden.md names `profile --memory`. What torch records needs a GPU."""
    snapshot = tmp_path / "decode.memory.pickle"
    memory = mock.Mock()
    ended = contextlib.suppress(RuntimeError)
    with mock.patch.object(torch.cuda, "memory", memory), ended, _memory_history(snapshot):
        memory.step()
        if failing:
            raise RuntimeError
    dump = [] if failing else [mock.call._dump_snapshot(str(snapshot))]
    on, off = (mock.call._record_memory_history(**how) for how in ({}, {"enabled": None}))
    assert memory.mock_calls == [on, mock.call.step(), *dump, off]


def test_a_memory_snapshot_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="leave --memory out"):
        profiled(tmp_path, memory=True)
