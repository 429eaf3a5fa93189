"""Sentences of the documents equal what they describe: records, constants and settings."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import statistics
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from granite_paged import SamplingParams, errors, verify
from granite_paged.batch import answering, output
from granite_paged.batch import lines as batch_lines
from granite_paged.batch import request as batch_request
from granite_paged.batch import run as batch_run
from granite_paged.bench import calibration, judge, session, suites, visits
from granite_paged.bench.cases import CASES, Shape
from granite_paged.bench.serve_results import ServeResult, read_serve, serve_table
from granite_paged.bench.workload import Workload
from granite_paged.checkpoints import TINY_RECALL
from granite_paged.cli import options
from granite_paged.cli.main import cli
from granite_paged.engine import admission, limits, rank
from granite_paged.evaluate import near_ties
from granite_paged.geometry import CacheGeometry, PagedConfig
from granite_paged.layers import tuning
from granite_paged.layers.mamba import EXACT_CHUNK, REPLAYED, Kept, MambaSizes, mixers
from granite_paged.models import GraniteMoeHybridForCausalLM, geometry_config, load
from granite_paged.ray import batch as ray_batch
from granite_paged.ray import workers
from granite_paged.report.bench_results import Result, Row, read_result, record_name, slug
from granite_paged.report.eval_results import Evaluation, read_evaluation
from granite_paged.runner import memory_plan, watch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "granite_paged"
H200, H100 = "nvidia-h200", "nvidia-h100-80gb-hbm3"


@functools.cache
def text_of(page: str) -> str:
    """Return a page without emphasis, each run of white space as one space."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return " ".join(text.replace("**", "").split())


def assert_states(page: str, *sentences: str) -> None:
    text = text_of(page)
    missing = "".join(f"\n    {sentence}" for sentence in sentences if sentence not in text)
    if missing:
        pytest.fail(
            f"the code or a record says what {page} does not. If that is intended, write there:"
            f"{missing}",
            pytrace=False,
        )


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# -- speed and memory, from the records ----------------------------------------------------------


@functools.cache
def record(gpu: str = H200) -> Result:
    return read_result(PACKAGE / "records" / record_name(gpu, "granite-4.0-h-1b", "bfloat16"))


def row(case: str, mode: str, batch: int, context: int) -> Row:
    found = record().find(case, mode, batch, context)
    assert found is not None
    return found


def ms(case: str, mode: str, batch: int, context: int) -> float:
    found = row(case, mode, batch, context).latency_ms
    assert found is not None
    return found.median


def gb(case: str, mode: str, batch: int, context: int) -> str:
    return f"{(row(case, mode, batch, context).peak_bytes or 0) / 1e9:.1f} GB"


def three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratios(top: str, bottom: str, case: str, *, batch: int = 0, context: int = 0) -> list[float]:
    """Return ratios of two numbers of the paged rows of a case."""
    rows = [row for row in record().measured(case) if row.mode == "paged" and not row.variant]
    chosen = [row for row in rows if batch in (0, row.batch) and context in (0, row.context)]
    return [number(row, top) / number(row, bottom) for row in chosen]


def number(row: Row, name: str) -> float:
    return row.latency_ms.median if name == "median" else getattr(row, name)  # type: ignore[union-attr]


def span(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


README_ROWS = [
    ("prefill 1 × 512", "context", 1, 512, False),
    ("prefill 32 × 512", "batch", 32, 512, True),
    ("prefill 1 × 32,768", "context", 1, 32768, True),
    ("decode step 1 × 512", "decode", 1, 512, False),
    ("decode step 128 × 1,024", "decode", 128, 1024, True),
]


@pytest.mark.parametrize(("name", "case", "batch", "context", "memory"), README_ROWS)
def test_the_readme_shows_recorded_times(
    name: str, case: str, batch: int, context: int, memory: bool
) -> None:
    def cell(mode: str) -> str:
        found = record().find(case, mode, batch, context)
        if found is None:
            return "not measured" if case == "decode" else "decode only"
        time = ms(case, mode, batch, context)
        digits = "{:.1f}" if mode == "paged" and 2 <= time < 10 else "{}"
        shown = digits.format(time if digits != "{}" else three_digits(time))
        return f"{shown} ms" + f", {gb(case, mode, batch, context)}" * memory

    cells = " | ".join(cell(mode) for mode in ("default", "static", "paged"))
    assert_states("README.md", f"| {name} | {cells} |")


def test_no_record_had_kernels_of_mamba_ssm() -> None:
    versions = [record(gpu).versions for gpu in (H200, H100)]
    versions += [run.versions for run in evaluations().values()]
    assert not any({"mamba_ssm", "causal_conv1d"} & set(found) for found in versions)


def test_conclusions_about_decode_follow_from_the_record() -> None:
    static, ours = ms("decode", "static", 1, 512), ms("decode", "paged", 1, 512)
    many = ms("decode", "paged", 128, 1024)
    eager = [r for r in record().measured("decode", "default") if r.batch <= 32]
    times = [number(r, "median") for r in eager]
    assert_states(
        "docs/benchmarks.md",
        f"takes {ours:.2f} ms at batch 1 and {many:.1f} ms at batch 128 (context 1,024)",
        f"takes {static:.2f} ms at batch 1, {static / ours:.1f} times as long",
        f"takes {min(times):.0f} to {max(times):.0f} ms at every batch up to 32",
    )
    assert len(record().measured("decode", "static")) == 1
    assert_states("README.md", f"the fair comparison there: {static / ours:.1f} times")


def test_conclusions_about_the_floor_follow_from_the_record() -> None:
    one, many = (ratios("median", "floor_ms", "decode", batch=batch) for batch in (1, 32))
    prefill = ratios("median", "floor_ms", "batch") + ratios(
        "median", "floor_ms", "context", context=512
    )
    assert_states(
        "docs/benchmarks.md",
        f"{span(one, 1)} times the time for decode at batch 1, {span(many, 1)} times at batch 32, "
        f"and {span(prefill, 1)} times for prefill of 512 tokens",
    )


def test_conclusions_about_attention_follow_from_the_record() -> None:
    kernel = [r for r in record().measured("kernel") if r.paged_us and r.sdpa_us]
    even = [number(r, "paged_us") / number(r, "sdpa_us") for r in kernel if not r.variant]
    (ragged,) = (number(r, "paged_us") / number(r, "sdpa_us") for r in kernel if r.variant)
    assert_states(
        "docs/benchmarks.md",
        f"takes {span(even, 2)} times as long as contiguous SDPA in even batches",
        f"and {ragged:.2f} times as long in a ragged batch",
    )


def test_conclusions_about_memory_follow_from_the_record() -> None:
    def pair(batch: int, context: int, case: str) -> str:
        ours, theirs = (gb(case, mode, batch, context) for mode in ("paged", "default"))
        return f"{ours} instead of {theirs}"

    assert_states(
        "docs/benchmarks.md",
        f"at 32 × 512 tokens prefill peaks at {pair(32, 512, 'batch')}",
        f"at one prompt of 32,768 tokens at {pair(1, 32768, 'context')}",
    )


@pytest.mark.parametrize("gpu", [H200, H100])
def test_no_recorded_peak_is_over_one_per_cent_above_default(gpu: str) -> None:
    for ours in record(gpu).measured("decode", "paged") + record(gpu).measured("batch", "paged"):
        theirs = record(gpu).find(ours.case, "default", ours.batch, ours.context)
        if theirs and theirs.peak_bytes and ours.peak_bytes:
            assert ours.peak_bytes <= judge.MEMORY * theirs.peak_bytes, ours


def test_a_short_step_of_batch_1_holds_more_than_default() -> None:
    higher = [
        ours.context
        for ours in record().measured("decode", "paged")
        if (theirs := record().find("decode", "default", ours.batch, ours.context))
        and ours.batch == 1
        and (ours.peak_bytes or 0) > (theirs.peak_bytes or 0)
    ]
    assert_states(
        "docs/limits.md",
        f"At batch 1 and contexts of up to {max(higher):,} tokens a decode step therefore holds "
        "slightly more memory",
    )


def test_speed_was_recorded_on_gpus_and_not_on_an_a100() -> None:
    names = [path.name for path in (PACKAGE / "records").glob("*.json")]
    assert all(name.startswith("nvidia-") for name in names)
    assert not any("a100" in name for name in names)
    assert_states("README.md", "Speed was recorded on GPUs only.")
    assert_states("docs/guides/record.md", "No A100 has been recorded yet.")


def test_limits_state_the_recorded_cold_start_of_one_process() -> None:
    seconds = {r.variant: number(r, "median") / 1e3 for r in record().measured("coldstart")}
    empty, warm = (
        [seconds[f"{event}, {state} cache"] for event in ("first token", "every bucket")]
        for state in ("empty", "warm")
    )
    assert_states(
        "docs/limits.md",
        f"the first token took {empty[0]:.0f} s and all shapes {empty[1]:.0f} s "
        f"({warm[0]:.0f} and {warm[1]:.0f} s with warm caches)",
    )


# -- the engine, from golden/engine --------------------------------------------------------------


def of_engine(gpu: str) -> dict[str, Any]:
    """Return the entries of a GPU in `golden/engine`."""
    path = ROOT / "golden" / "engine" / f"{gpu}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def step_times(times: dict[str, dict[str, float]]) -> str:
    """Return the milliseconds of decode steps as a cell of the benchmark page."""
    engine, runner = (
        ", ".join(f"{each[who]:.2f}" for each in times.values()) for who in ("engine", "runner")
    )
    return f"{engine} ms; {runner} ms"


def test_pages_state_the_record_of_the_engine_on_an_h200() -> None:
    run = of_engine(H200)["engine_figures"]
    median = statistics.median
    burst, mixed = run["burst_seconds"], run["mixed_tokens_per_second"]
    first, *again = burst["not_streamed"]
    assert_states(
        "docs/benchmarks.md",
        f"| {first:.2f} s, {median(again):.2f} s |",
        f"not measured | {median(burst['streamed']):.2f} s |",
        "| {:,.0f}, {:,.0f} |".format(mixed["not_streamed"][0], median(mixed["not_streamed"][1:])),
        f"not measured | {median(mixed['streamed']):,.0f} |",
        "| {:.2f} s, {:.2f} s |".format(*run["shared_seconds"]),
        "| {:.2f} ms, {:.2f} ms |".format(*run["between_tokens_ms"]),
        f"| {step_times(run['decode_step_ms'])} |",
    )
    starts = run["start_seconds"]
    empty, full = f"{starts['empty_caches']:.0f}", f"{median(starts['full_caches']):.0f}"
    assert_states("docs/benchmarks.md", f"| {empty} s, {full} s |")
    assert_states("README.md", f"on an H200 in {empty} s, in {full} s the second time")
    assert_states("docs/limits.md", f"{empty} and {full} s on an H200")
    assert run["late_captures"] == 0
    assert run["rows_at_once"] == 256


def test_pages_state_the_session_on_an_h100() -> None:
    run = of_engine(H100)
    median = statistics.median

    def row(name: str, form: str) -> str:
        times = (median(run[name][when]) for when in ("limit_on_every_step", "now"))
        return " | ".join(form.format(each) for each in times)

    two = run["two_gpus"]
    ratios = [a / b for a, b in zip(two["one_seconds"], two["two_seconds"], strict=True)]
    first, second = run["shared_64x4096_32_seconds"]
    ray_ratio = run["ray"]["two_tokens_per_second"] / run["ray"]["one_tokens_per_second"]
    assert_states(
        "docs/benchmarks.md",
        row("burst_128x1024x130_seconds", "{:.2f} s"),
        row("mixed_512_tokens_per_second", "{:,.0f}"),
        f"{first:.2f} s, {second:.2f} s",
        f"{100 * run['batch_over_generate']:.1f} %",
        f"{ratios[0]:.2f} and {ratios[1]:.2f} times",
        f"{run['ray']['requests']:,} requests on two GPUs against one | not measured | "
        f"{ray_ratio:.2f} times",
        f"| {step_times(run['decode_step_ms'])} |",
    )
    assert_states(
        "docs/limits.md",
        f"answered {two['requests']:,} requests in half the time of one",
        f"{two['equal_to_one_gpu_answering_each_share']:,} answers had the tokens",
        f"and {two['equal_to_one_gpu_answering_all']} those of one that answers all",
    )
    warm = run["warm_up_seconds"]
    empty, filled = f"{warm['empty_caches']:.0f} s", f"{median(warm['warm_caches']):.0f} s"
    assert_states("README.md", f"(on an H100 {empty.removesuffix(' s')} and {filled})")
    assert_states("docs/benchmarks.md", f"| {empty}, {filled} |")
    assert_states("docs/limits.md", f"took {empty} with empty caches and {filled} with warm ones")
    changed = 1 - two["equal_to_one_gpu_answering_all"] / two["requests"]
    assert_states("docs/benchmarks.md", f"other batches alone changed {100 * changed:.0f} %")
    assert_states("docs/limits.md", f"In exact mode all {two['requests']:,} are equal")
    overheads = [each["engine"] / each["runner"] for each in run["decode_step_ms"].values()]
    assert max(overheads) < 1.05


def test_the_guide_states_the_cost_of_exact_mode() -> None:
    run = of_engine(H100)["exact"]
    two = run["two_gpus"]
    assert two["equal_to_one_gpu_answering_all"] == two["requests"]
    faster = two["two_tokens_per_second"] / two["one_tokens_per_second"]
    mixed = run["mixed_512_tokens_per_second"]
    shown = [*run["decode_step_ms"].values(), *list(run["prefill_ms"].values())[:3]]
    config = geometry_config("granite-4.0-h-1b")
    with torch.device("meta"):
        model = GraniteMoeHybridForCausalLM._from_config(config, dtype=torch.bfloat16)
    sizes = [MambaSizes.of(mixer) for mixer in mixers(model).values()]
    states = [
        sum(each.state_bytes(torch.bfloat16, kept) for each in sizes)
        for kept in (Kept.CHUNK, Kept.NOTHING)
    ]
    assert_states(
        "docs/guides/exact.md",
        *(
            f"{times['normal']:.2f} ms | {times['exact']:.2f} ms | "
            f"{times['exact'] / times['normal']:.2f} times"
            for times in shown
        ),
        f"get {mixed['exact']:,} tokens per second instead of {mixed['normal']:,}",
        f"which is {mixed['exact'] / mixed['normal']:.0%}".replace("%", " %"),
        f"answered {two['requests']:,} mixed requests {faster:.2f} times as fast as one",
        f"keeps {(states[0] - states[1]) / 1e6:.1f} MB of recent inputs",
        f"multiples of {EXACT_CHUNK} tokens",
        f"blocks of {exact_constant('exact_attention', 'KEYS')} keys",
        f"more than {exact_constant('exact_linear', 'FEW_ROWS')} rows",
    )


def exact_constant(module: str, name: str) -> int:
    """Return a constant of a module that needs Triton, from its text."""
    path = ROOT / "granite_paged" / "layers" / "triton" / f"{module}.py"
    (line,) = [each for each in path.read_text().splitlines() if each.startswith(f"{name} = ")]
    return int(line.removeprefix(f"{name} = "))


# -- vLLM, from golden/vllm ----------------------------------------------------------------------

MODES_OF_VLLM = ("engine", "vllm_float32", "vllm_default")
README_VLLM = {
    "first token, 1 × 512": "first token, 1 × 512",
    "first token, 1 × 16,384": "first token, 1 × 16,384",
    "decode step 32 × 512": "decode step, 32 × 512",
    "128 × 1,024 with 128 tokens each, per step": "128 × 1,024, 128 tokens each: per step, "
    "prefill overlapping",
    "64 prompts that share 4,096 tokens, second time": "the same again",
}
"""Rows of the README's table, and what each is called in the file."""


def served() -> ServeResult:
    """Return what `bench serve --mode vllm` wrote."""
    return read_serve(ROOT / "golden" / "vllm" / f"serve-vllm-0.25.1.{H200}.json")


def test_pages_show_the_workload_that_both_engines_served() -> None:
    found = served()
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    table = [line for line in serve_table(found).splitlines() if line.startswith("|")]
    assert "\n".join(["", *table, ""]) in page
    load, (ours, *theirs) = found.workload, found.rows
    versions = theirs[0].versions
    assert {row.versions["vllm"] for row in theirs} == {"0.25.1"}
    assert (found.device, found.dtype, ours.settings["max_sequences"]) == (
        "NVIDIA H200", "bfloat16", "256",
    )  # fmt: skip
    assert {row.settings["gpu_memory_utilization"] for row in theirs} == {"0.92"}
    assert {row.tokens_equal for row in theirs} == {0.0}
    assert {row.settings["enable_prefix_caching"] for row in theirs} == {"False"}
    assert found.workload.shared_tokens == 0
    assert_states(
        "docs/benchmarks.md",
        f"{load.requests} requests at once, prompts of {load.prompt_tokens[0]} to "
        f"{load.prompt_tokens[1]} tokens, answers of {load.new_tokens[0]} to {load.new_tokens[1]}",
        f"torch {versions['torch']}, Triton {versions['triton']}, "
        f"transformers {versions['transformers']}",
    )
    rates = [row.tokens_per_second[1] for row in (ours, *theirs) if row.tokens_per_second]
    assert_states(
        "README.md",
        f"| 512 requests at once, output tokens per second | {max(rates[1:]):,.0f} | "
        f"{rates[0]:,.0f} |",
    )


def vllm() -> dict[str, Any]:
    """Return the file of the comparison, each number as it is written there."""
    path = ROOT / "golden" / "vllm" / f"vllm-0.25.1.{H200}.json"
    found: dict[str, Any] = json.loads(path.read_bytes(), parse_int=str, parse_float=str)
    return found


def vllm_cells(row: dict[str, str], *, one_vllm: bool = False) -> dict[str, str]:
    """Return the cells of a row by engine, the best in bold; `one_vllm`: of the better vLLM."""

    def shown(number: str) -> str:
        text = number if "." in number else f"{int(number):,}"
        return f"{text} {row['unit']}".strip()

    def key(engine: str) -> float:
        return float(row[engine]) if row["unit"] else -float(row[engine])  # tokens per second

    theirs = MODES_OF_VLLM[1:]
    engines = ["engine", *([min(theirs, key=key)] if one_vllm else theirs)]
    cells = {engine: shown(row[engine]) for engine in engines}
    best = min(engines, key=key)
    cells[best] = f"**{cells[best]}**"
    if "engine_with" in row:
        cells["engine"] += f" ({shown(row['engine_then'])} with {row['engine_with']})"
    return cells


def test_the_benchmark_page_shows_the_comparison_with_vllm() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = page[page.index("### Prompts, decode") : page.index("## Since that run")]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    cells = [(row["work"], *vllm_cells(row).values()) for row in vllm()["rows"]]
    assert rows == [f"| {' | '.join(row)} |" for row in cells]
    assert vllm()["runs"] == "1"
    compiling = vllm()["compiling_with_empty_caches"]
    first, second = compiling["first two hits of a shared prefix, s"]
    assert_states(
        "docs/benchmarks.md",
        "These figures are those of one run.",
        f"`longest_step={vllm()['settings']['engine']['longest_step']}`, the default of that run",
        f"burst of 128 × 1,024 took {compiling['first burst of 128 × 1,024, s']} s",
        f"the first hits of a shared prefix {first} and {second} s",
    )


def test_the_readme_shows_the_comparison_with_vllm() -> None:
    (section,) = re.findall(r"\*\*vLLM 0.*?(?=\n\nvLLM)", readme(), flags=re.DOTALL)
    named = {row["work"]: row for row in vllm()["rows"]}
    expected = []
    for name, work in README_VLLM.items():
        ours, theirs = vllm_cells(named[work], one_vllm=True).values()
        expected.append(f"| {name} | {theirs} | {ours} |")
    assert section.splitlines()[-len(expected) :] == expected


def test_pages_name_the_conditions_of_the_comparison_with_vllm() -> None:
    found = vllm()
    torch_version = found["versions"]["torch"].rpartition(".0+")[0]
    assert (found["device"], found["dtype"]) == ("NVIDIA H200", "bfloat16")
    assert_states(
        "docs/benchmarks.md",
        f"One NVIDIA H200, torch {torch_version}, Granite-4.0-H-1B's geometry with random bfloat16",
        f"vLLM {found['versions']['vllm']}, which requires this torch.",
        f"up to {found['conditions']['most_sequences']} sequences",
        "medians after warm-up",
    )
    assert_states("README.md", f"vLLM {found['versions']['vllm']}, end to end", "copied by hand")
    assert_states("README.md", f"one NVIDIA H200, torch {torch_version}, Granite-4.0-H-1B's sizes")


# -- evaluation, from golden/results ------------------------------------------------------------


def evaluations() -> dict[str, Evaluation]:
    files = sorted((ROOT / "golden" / "results").glob("*.json"))
    return {path.stem: read_evaluation(path) for path in files}


def test_conclusions_of_the_evaluation_follow_from_the_results() -> None:
    found = [
        task.agreement["paged"] for run in evaluations().values() for task in run.tasks.values()
    ]
    same = [100 * task.same / task.questions for task in found]
    latency = [100 * task.latency_ratio for task in found]
    assert_states(
        "docs/evaluation.md",
        f"for {min(same):.0f} to {max(same):.1f} % of the questions in bfloat16",
        f"Latency per question was {min(latency):.0f} to {max(latency):.0f} % of `default`'s",
    )
    assert all(len(task.differing) == task.near_ties for task in found)
    assert {run.dtype for run in evaluations().values()} == {"bfloat16"}
    assert all(run.random_weights for run in evaluations().values())


def test_conclusions_about_memory_and_prefixes_follow_from_the_results() -> None:
    runs = evaluations()

    def modes(name: str, task: str) -> Any:
        return runs[f"{name}.{H100}"].tasks[task].modes

    batched, alone = modes("mmlu-5shot-batched", "mmlu"), modes("truthfulqa-mc1", "truthfulqa_mc1")
    peaks = [batched[mode].peak_bytes / 1e9 for mode in ("paged", "default")]
    more = (alone["paged"].peak_bytes - alone["default"].peak_bytes) / 1e9
    hits = modes("mmlu-5shot", "mmlu")["paged"].hit_rate
    assert_states(
        "docs/evaluation.md",
        f"({peaks[0]:.1f} GB instead of {peaks[1]:.1f} GB at 5-shot MMLU on the H100)",
        f"TruthfulQA's paged peak is {more:.2f} GB higher",
        f"{hits:.0%} of the context tokens".replace("%", " %"),
    )


def test_only_the_older_run_one_by_one_has_the_higher_peak() -> None:
    def paged_is_higher(gpu: str) -> bool:
        modes = evaluations()[f"mmlu-0shot.{gpu}"].tasks["mmlu"].modes
        return bool(modes["paged"].peak_bytes > modes["default"].peak_bytes)

    assert (paged_is_higher(H200), paged_is_higher(H100)) == (True, False)
    assert_states(
        "docs/evaluation.md", "the H200's 0-shot run, one by one, still has the higher peak"
    )


# -- the embedded checkpoint --------------------------------------------------------------------


def test_the_checkpoint_page_shows_its_record() -> None:
    found = json.loads((TINY_RECALL / "record.json").read_text(encoding="utf-8"))
    recall = {int(length): share for length, share in found["recall"].items()}
    lost = {name: part["affected"] for name, part in found["substituted"].items()}
    assert {share for length, share in recall.items() if length >= 128} == {1.0}
    assert_states(
        "docs/checkpoint.md",
        f"| accuracy at 128 to {max(recall):,} tokens | 1.0 ",
        f"| accuracy at 32 and 64 tokens | {recall[32]:.3f} and {recall[64]:.3f} |",
        f"first attention layer's history replaced | {lost['first attention layer']:.3f} on",
        f"second attention layer's history replaced | {lost['second attention layer']:.3f} on",
        f"with the SSM state replaced | {lost['SSM state']:.1f} on",
        f"with the convolution state replaced | {lost['conv state']:.3f} |",
    )


def test_the_checkpoint_page_states_sizes_and_layers() -> None:
    loaded = load(device="cpu")
    config = loaded.model.config
    assert [layer.mamba is None for layer in loaded.model.model.layers] == [
        False,
        True,
        False,
        True,
    ]
    assert config.num_attention_heads == 3 * config.num_key_value_heads
    parameters = sum(weights.numel() for weights in loaded.model.parameters())
    assert_states(
        "docs/checkpoint.md",
        f"It has {parameters:,} parameters in four layers (Mamba, attention, Mamba, attention)",
        f"its own tokenizer of {len(loaded.tokenizer)} words",
    )


# -- constants ----------------------------------------------------------------------------------


def test_the_glossary_states_the_size_of_a_mamba_state() -> None:
    config = geometry_config("granite-4.0-h-1b")
    with torch.device("meta"):
        model = GraniteMoeHybridForCausalLM._from_config(config, dtype=torch.bfloat16)
    geometry = CacheGeometry.from_config(config, page_size=128, dtype=torch.bfloat16)
    state = memory_plan.row_bytes(model, PagedConfig())
    tokens = round(state / geometry.bytes_per_token, -3)
    assert_states(
        "docs/glossary.md",
        f"it is {state / 1e6:.1f} MB per sequence, "
        f"as much as K and V of about {tokens:,.0f} tokens",
        f"size ({config.mamba_chunk_size} for Granite-4.0)",
    )


def test_the_glossary_states_what_is_kept_to_be_replayed() -> None:
    config = geometry_config("granite-4.0-h-1b")
    with torch.device("meta"):
        model = GraniteMoeHybridForCausalLM._from_config(config, dtype=torch.bfloat16)
    sizes = [MambaSizes.of(mixer) for mixer in mixers(model).values()]
    whole, states = (
        sum(each.state_bytes(torch.bfloat16, kept) for each in sizes)
        for kept in (Kept.REPLAY, Kept.NOTHING)
    )
    assert_states(
        "docs/glossary.md",
        f"at every {REPLAYED}th token only",
        f"at most {(whole - states) / 1e6:.1f} MB per sequence",
    )


def test_documents_state_constants_of_the_gate() -> None:
    words = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    tries, blocks = words[visits.TRIES], words[visits.VISITS]
    assert_states(
        "docs/golden.md",
        f"after {tries} tries",
        f"the median of {blocks} visits of each shape",
        f"includes {calibration.HOSTS:.0%} for hosts".replace("%", " %"),
        f"Less than {1e6 * judge.LEAST_SECONDS:.0f} microseconds",
        f"or {judge.LEAST_BYTES // 2**20} MiB more",
        f"the medians of the last {session.ROUNDS} rounds",
        f"holds {suites.MORE_MEMORY:.1%} more memory".replace("%", " %"),
    )
    assert_states("docs/glossary.md", f"fails after {tries} tries", f"shape {blocks} times")
    assert_states("docs/glossary.md", f"a block of up to {visits.STEPS} steps")
    assert geometry_config("granite-4.0-h-1b").num_local_experts == 0
    assert_states("docs/benchmarks.md", "the model measured here has none.")
    assert_states("docs/guides/gate.md", f"after {tries} tries")
    assert_states("docs/guides/record.md", slug("NVIDIA A100-SXM4-80GB"))


def per_cent(shares: list[float]) -> str:
    """Return the smallest and the largest share in per cent; one number if they are the same."""
    ends = (f"{100 * share:.1f} %" for share in (min(shares), max(shares)))
    return " to ".join(dict.fromkeys(ends))


def test_documents_state_what_the_calibration_of_an_h100_found() -> None:
    found = record(H100).calibration
    assert found is not None
    bounds: dict[str, list[Any]] = {shape.case: [] for shape, _ in suites.bounds_of(found)}
    for shape, bound in suites.bounds_of(found):
        bounds[shape.case].append(bound)
    (engine,) = bounds.pop("serve")
    allowed = per_cent([bound.allowed for part in bounds.values() for bound in part])
    seen = per_cent([bound.sees for part in bounds.values() for bound in part])
    alarms = suites.alarms_of(found)
    (sessions,) = {tuple(map(len, shape.sessions)) for shape in found.shapes if shape.sessions}
    first, second = sessions
    assert calibration.MISSES == 0.01
    assert_states(
        "docs/golden.md",
        f"The record of an H100 holds {alarms.suites} suites, {first} and {second} of two sessions",
        f"allows {allowed} more time (the engine: {per_cent([engine.allowed])})",
        f"a loss of {seen} ({per_cent([engine.sees])})",
        f"the other {alarms.suites - 1}, {alarms.red} of the {alarms.suites} would have been red",
        f"at most {alarms.at_most:.0%} with".replace("%", " %"),
    )


def test_documents_state_what_the_teeth_of_an_h100_found() -> None:
    name = f"{H100}.granite-4.0-h-1b.bfloat16.json"
    found = json.loads((ROOT / "golden" / "teeth" / name).read_text(encoding="utf-8"))
    bites = found["bites"]
    assert {bite["what"] for bite in bites} == {judge.describe(gated) for gated in judge.GATED}
    assert all(bite["green"] == bite["red"] == bite["tries"] for bite in bites)
    often = [bite["tries"] for bite in bites if bite["tries"] > 1]
    (once,) = [bite["what"] for bite in bites if bite["tries"] == 1]
    assert once == "context 1 x 131072"
    (tries,) = set(often)
    assert_states(
        "docs/golden.md",
        f"each of {len(often)} checks was green in {tries} of {tries} suites and red in {tries} of "
        f"{tries}. The peak memory of the prompt of 131,072 tokens was tried once",
    )


def test_documents_state_the_gated_shapes() -> None:
    shapes = {
        case: sorted(
            {
                (gated.shape.batch, gated.shape.context)
                for gated in judge.GATED
                if gated.case == case
            }
        )
        for case in ("batch", "context", "decode")
    }
    assert shapes == {
        "batch": [(8, 512), (32, 512)],
        "context": [(1, 512), (1, 4096), (1, 131072)],
        "decode": [(batch, 512) for batch in (1, 8, 32, 128)],
    }
    assert [gated.shape for gated in judge.GATED if not gated.time] == [Shape(1, 131072)]
    assert_states(
        "docs/golden.md",
        "prefill of 8 and 32 prompts of 512 tokens and of one prompt of 512 and 4,096",
        "a decode step of 1, 8, 32 and 128 sequences",
        "one prompt of 131,072 tokens",
    )


def test_the_glossary_states_how_many_questions_measure_sdpas_error() -> None:
    assert_states("docs/glossary.md", f"on the differing questions and {near_ties.MEASURED} others")


def test_help_states_constants() -> None:
    def shown(command: str) -> str:
        found: Any = cli
        for name in command.split():
            found = found.commands[name]
        parts = [found.help, *(getattr(option, "help", None) or "" for option in found.params)]
        return " ".join(" ".join(parts).split())

    assert f"{verify.DECODE_STEPS} decode steps" in shown("verify")
    rows = f"[default: {memory_plan.DEFAULT_SEQUENCES}; {answering._CPU_ROWS} on a CPU]"
    assert rows in shown("batch")
    steps = ", ".join(map(str, (1, *tuning.ROW_TILES)))
    assert f"matrix products of {steps} sequences" in shown("tune")
    assert {4: "one of four shared prefixes"}[Workload().kinds] in shown("bench serve")
    assert {3: "three tries"}[visits.TRIES] in shown("gate")


def test_help_of_bench_states_the_shapes_of_its_cases() -> None:
    shapes = {name: CASES[name].shapes for name in ("batch", "context", "decode", "serve")}
    batches = {name: sorted({shape.batch for shape in found}) for name, found in shapes.items()}
    contexts = {name: sorted({shape.context for shape in found}) for name, found in shapes.items()}
    assert (contexts["batch"], batches["context"]) == ([512], [1])
    sizes = {
        "batch": f"{batches['batch'][0]} to {batches['batch'][-1]} prompts of 512 tokens",
        "context": f"one prompt of {contexts['context'][0]} to {contexts['context'][-1]} tokens",
        "decode": f"{batches['decode'][0]}-{batches['decode'][-1]} sequences of "
        f"{contexts['decode'][0]}-{contexts['decode'][-1]} tokens",
        "serve": " and ".join(map(str, batches["serve"])) + " seeded requests",
    }
    lines = (cli.commands["bench"].help or "").splitlines()
    for name, size in sizes.items():
        assert [line for line in lines if line.split()[:1] == [name] and size in line], size


def test_help_states_the_defaults_of_a_paged_config() -> None:
    defaults = {option.name: option.default for option in cli.commands["verify"].params}
    ours = PagedConfig()
    assert (defaults["memory_fraction"], defaults["backend"]) == (
        ours.memory_fraction,
        ours.backend,
    )
    (sizes,) = (o.help for o in cli.commands["verify"].params if o.name == "page_size")  # type: ignore[attr-defined]
    assert (
        f"[default: {options._SMALL_PAGE} for the embedded model, else {ours.page_size}]" in sizes
    )


def test_a_docstring_states_what_a_step_of_priority_is_worth() -> None:
    assert f"up to {rank.PRIORITY_WORTH:,} requests" in " ".join(
        (SamplingParams.__doc__ or "").split()
    )


def test_pages_state_constants_of_the_engine() -> None:
    assert_states(
        "docs/guides/scheduling.md",
        f"up to {admission.LOOK_AHEAD} others may pass",
        f"`longest_step` ({limits.LONGEST_STEP:g})",
    )
    assert_states("docs/limits.md", f"{watch.SAMPLES} of each tensor are compared")


def test_constants_of_the_scheduler_follow_from_the_record() -> None:
    batch, chunk = ms("batch", "paged", 16, 512), ms("context", "paged", 1, 2048)
    assert pytest.approx(16 * 512 / batch * 1e3, rel=0.05) == limits.PREFILL_TOKENS_PER_SECOND
    assert limits.STEP_CHUNKS * 2048 == 16 * 512
    assert_states(
        "granite_paged/engine/limits.py",
        f"16 prompts of 512 tokens in {batch:.0f} ms (recorded)",
        f"({batch:.0f} ms instead of {chunk:.0f} ms on an H200)",
    )
    steps = [ms("decode", "paged", rows, 1024 if rows == 128 else 512) for rows in (1, 32, 128)]
    assert_states(
        "granite_paged/runner/shapes.py",
        f"take {ms('context', 'paged', 1, 128):.1f} ms and 2,048 take {chunk:.1f} ms (recorded on",
        f"{steps[0]:.1f} ms with one row, {steps[1]:.1f} ms with 32 rows, {steps[2]:.1f} ms with",
    )


def test_limits_state_those_of_files_of_requests() -> None:
    window, most = f"{batch_lines.WINDOW:,}", batch_run.WINDOW_BYTES >> 20
    assert output._SYNC_SECONDS == 5
    assert_states(
        "docs/limits.md",
        f"A line of more than {batch_lines.LONGEST >> 20} MiB gets an error.",
        f"At most {window} lines, and {most} MiB of them, are in memory",
        f"than the next {batch_lines.WINDOW - 1:,} lines",
        "those of the last five seconds",
    )


def test_the_guide_names_the_gpus_that_the_constants_were_chosen_on() -> None:
    device = json.loads((PACKAGE / "layers" / "tuned.json").read_text(encoding="utf-8"))["device"]
    names = " and an ".join(part.removeprefix("NVIDIA ") for part in device.split(", "))
    assert_states("docs/guides/record.md", f"were chosen on an {names},")


def test_the_readme_says_which_commands_take_a_model_and_write_json() -> None:
    listed = {name: command for name, command in cli.commands.items() if not command.hidden}
    shown = {name: {o.name for o in command.params} for name, command in listed.items()}
    with_model = {name for name, names in shown.items() if "random_weights" in names}
    assert with_model == set(shown) - {"plot", "report"}
    assert {name for name in with_model if "json_file" not in shown[name]} == {"batch"}
    assert_states("README.md", "Those that run a model take", "all but `batch` take `--json FILE`")


def test_the_command_reference_lists_every_exit_status() -> None:
    named = {
        options.OK: "passed",
        options.FAILED: "a check failed",
        options.USAGE: "wrong usage or environment",
        options.INTERRUPTED: "interrupted",
        options.CLOSED_PIPE: "the reader of a pipe is gone",
    }
    text = text_of("docs/reference/commands.md")
    assert all(f"{status} {meaning}" in text for status, meaning in named.items())


# -- settings -----------------------------------------------------------------------------------


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_states_the_lower_bounds_of_versions() -> None:
    settings = project()["project"]
    bounds = dict(
        re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(settings["dependencies"]), re.MULTILINE)
    )
    python = settings["requires-python"].removeprefix(">=")
    rows = dict(
        re.findall(r"^\| (Python|torch|transformers) \| (.*?) or newer ", readme(), re.MULTILINE)
    )
    assert rows == {
        "Python": python,
        "torch": bounds["torch"],
        "transformers": bounds["transformers"].removesuffix(".0"),
    }


def kept_runs() -> list[dict[str, str]]:
    """Return the versions of each kept run of `verify`, all of which passed on a CPU."""
    runs = [json.loads(path.read_bytes()) for path in (ROOT / "golden" / "runs").glob("*.json")]
    assert runs
    assert all(run["passed"] and run["device"] == "cpu" for run in runs)
    assert all(case["passed"] for run in runs for case in run["cases"])
    return [run["versions"] for run in runs]


def listed(versions: set[str], parts: int) -> str:
    """Return versions without builds as a list in words, the oldest first, each with `parts`."""
    numbers = {tuple(map(int, found.partition("+")[0].split(".")[:parts])) for found in versions}
    *first, last = [".".join(map(str, each)) for each in sorted(numbers)]
    return f"{', '.join(first)} and {last}" if first else last


def test_the_readme_lists_the_versions_that_were_run() -> None:
    cpu, gpu = kept_runs(), [record(name).versions for name in (H200, H100)]
    gpu += [run.versions for run in evaluations().values()]

    def found(name: str, runs: list[dict[str, str]], parts: int = 2) -> str:
        return listed({run[name] for run in runs}, parts)

    gpus = sorted(record(name).device.split("NVIDIA ")[1] for name in (H200, H100))
    expected = {
        "Python": found("python", cpu + gpu),
        "torch": f"{found('torch', cpu, 3)} on a CPU; {found('torch', gpu)} on GPUs",
        "transformers": found("transformers", cpu + gpu),
        "GPUs": ", ".join(gpus).replace(" HBM3", ""),
    }
    rows = dict(re.findall(r"^\| (\w+) \| .*? \| (.*?) \|$", readme(), re.MULTILINE))
    assert {name: rows[name].partition("; kernels")[0] for name in expected} == expected


def test_the_oldest_versions_that_are_allowed_were_run() -> None:
    settings = project()["project"]
    bounds = dict(re.findall(r"(torch|transformers)>=([\d.]+)", str(settings["dependencies"])))
    python = settings["requires-python"].removeprefix(">=")
    assert [
        run
        for run in kept_runs()
        if run["python"].startswith(f"{python}.")
        and run["torch"].partition("+")[0] == bounds["torch"]
        and run["transformers"] == bounds["transformers"]
    ]


def test_pages_state_what_the_workflows_do() -> None:
    folder = ROOT / ".github" / "workflows"
    ci, canary = ((folder / f"{name}.yml").read_text(encoding="utf-8") for name in ("ci", "canary"))
    (deep,) = re.findall(r"\n  deep:\n(.*?)\n\n", ci, re.DOTALL)
    (minutes,) = re.findall(r"timeout-minutes: (\d+)", deep)
    assert "property" in deep
    assert_states("CONTRIBUTING.md", f"CI allows it {minutes} minutes")
    (weekday,) = re.findall(r'cron: "\d+ \d+ \* \* (\d)"', canary)
    assert weekday
    assert "torch=nightly" in canary
    assert "gh issue create" in canary
    assert_states(
        "docs/guides/builds.md", "runs it every week on nightly builds and opens an issue"
    )
    (sessions,) = re.findall(r"nox -s (.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)[:1]
    assert sessions == "lint typing docs notebook"
    assert_states("CONTRIBUTING.md", "lint, typing, documentation, notebook and the README's test")
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert 'nox.options.sessions = ["lint", "typing", "tests"]' in noxfile
    assert "reuse_existing_virtualenvs = True" in noxfile


def test_pages_quote_other_projects_as_they_are() -> None:
    """Sentences about torch and transformers that are reasons for what this package does."""
    from torch._inductor.kernel.flex import flex_decoding  # noqa: PLC0415
    from transformers.integrations import hub_kernels  # noqa: PLC0415

    assert "must be power of 2" in inspect.getsource(flex_decoding)
    assert_states(
        "docs/architecture.md", "`enable_gqa` refuses group sizes that are not a power of two"
    )
    if metadata.version("transformers") == record().versions["transformers"]:
        assert "correct but much slower" in inspect.getsource(hub_kernels)
    for page in ("README.md", "docs/benchmarks.md"):
        assert_states(page, 'calls that path "correct but much slower"')


def test_the_guide_lists_the_gpus_that_kernels_are_compiled_for() -> None:
    source = (ROOT / "tests/integration/test_kernels_compile.py").read_text(encoding="utf-8")
    (sizes,) = re.findall(r"^SHARED = \{(.*)\}", source, re.MULTILINE)
    gpus = [f"{int(one) / 10}" for one in re.findall(r"(\d+):", sizes)]
    assert_states("docs/guides/kernel.md", f"capabilities {gpus[0]}, {gpus[1]} and {gpus[2]}")
    assert_states("README.md", f"kernels compiled for {gpus[0]} and {gpus[1]}, not run there")


def test_the_readme_lists_every_extra() -> None:
    listed = re.findall(r"`\[(\w+)\]`", readme())
    assert set(listed) == set(project()["project"]["optional-dependencies"])


def test_the_readme_names_every_example() -> None:
    files = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert not [name for name in files if name not in readme()]


def test_a_wheel_holds_the_checkpoint_and_the_command_line() -> None:
    """All files of the package's folder go into the wheel, tracked ones without exception."""
    settings = project()
    assert settings["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["granite_paged"]}
    assert settings["project"]["scripts"] == {"granite-paged": "granite_paged.cli.main:main"}
    assert (TINY_RECALL / "model.safetensors").is_relative_to(PACKAGE)


def test_the_guide_shows_the_job_of_the_workflow() -> None:
    guide = (ROOT / "docs" / "guides" / "gate.md").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(.*?)```", guide, flags=re.DOTALL)
    lines = {line.strip() for line in workflow.splitlines()}
    assert not [line for line in shown.splitlines() if line.strip() not in lines]


def test_the_session_records_the_model_that_the_guide_names() -> None:
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert (
        'MEASURED_MODEL = ("--random-weights", "granite-4.0-h-1b", "--dtype", "bfloat16")'
        in noxfile
    )
    assert_states(
        "docs/guides/record.md",
        "The session measures `granite-4.0-h-1b` with random weights in bfloat16",
    )


# -- structure ----------------------------------------------------------------------------------


def imports(path: Path) -> set[str]:
    """Return the first part of the name of every module that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_only_the_command_line_imports_click_and_rich() -> None:
    """docs/architecture.md says so."""
    users = [path for path in PACKAGE.rglob("*.py") if {"click", "rich"} & imports(path)]
    folders = {path.relative_to(PACKAGE).parts[0] for path in users}
    assert folders == {"cli"}


@pytest.mark.parametrize(
    "modules",
    [
        "granite_paged.paging.allocator",
        "granite_paged.engine.scheduler, granite_paged.engine.prefix_cache",
        "granite_paged.report.bench_tables, granite_paged.report.eval_report",
    ],
)
def test_modules_without_torch_import_none(modules: str) -> None:
    """docs/architecture.md lists what depends on torch."""
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_paged_never_runs_kernels_of_mamba_ssm() -> None:
    """docs/limits.md says so."""
    used = set().union(*(imports(path) for path in PACKAGE.rglob("*.py")))
    assert not {"mamba_ssm", "causal_conv1d"} & used


def test_the_oracle_imports_nothing_of_the_package() -> None:
    assert "granite_paged" not in imports(ROOT / "tests" / "helpers" / "reference.py")


def test_every_error_is_raised_somewhere() -> None:
    """An error that nothing raises is a promise that nothing keeps."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    families = {base for error in error_types() for base in error.__mro__[1:]}
    unused = [
        e.__name__
        for e in error_types() - families
        if f"{e.__name__}(" not in without_classes(source)
    ]
    assert not unused


def error_types() -> set[type]:
    types = {value for value in vars(errors).values() if isinstance(value, type)}
    return {kind for kind in types if issubclass(kind, errors.GranitePagedError)}


def without_classes(source: str) -> str:
    return re.sub(r"^class .*$", "", source, flags=re.MULTILINE)


def test_the_guide_to_transformers_names_what_exists() -> None:
    guide = (ROOT / "docs" / "guides" / "transformers.md").read_text(encoding="utf-8")
    for name, file in re.findall(r"`(_\w+)` in `([\w/]+\.py)`", guide):
        assert f"def {name}(" in (PACKAGE / file).read_text(encoding="utf-8")


# -- files of prompts ------------------------------------------------------------------------------


def test_the_estimate_for_files_of_prompts_follows_from_the_record() -> None:
    prefill = 32 * 512 / ms("batch", "paged", 32, 512)  # tokens per ms
    decode = 128 / ms("decode", "paged", 128, 512)
    old, new = 300 / prefill, 200 / decode  # ms
    hours = 1e8 * (old + new) / 3.6e6
    minutes = 1e4 * (old + new) / 6e4
    assert_states(
        "docs/guides/batches.md",
        f"runs {1000 * prefill:,.0f} tokens per second: 300 tokens take {old:.2f} ms",
        f"runs {1000 * decode:,.0f} tokens per second: 200 tokens take {new:.2f} ms",
        f"Together {old + new:.2f} ms per prompt: 10⁴ prompts take {minutes:.1f} minutes, "
        f"and 10⁸ take {hours:.0f} GPU-hours, which is {hours / 32:.1f} hours on 32 GPUs",
        f"10⁸ prompts cost {3 * hours:.0f} dollars",
        f"about {minutes:.0f} minutes",
        f"about {hours:.0f} GPU-hours",
    )


def test_the_guide_for_files_of_prompts_names_every_field() -> None:
    named = set(re.findall(r"`(\w+)`", text_of("docs/guides/batches.md")))
    assert set(batch_request.FIELDS) <= named


def test_the_guide_for_files_of_prompts_states_the_limits() -> None:
    assert (batch_lines.WINDOW, workers.LineWorker.most_deaths, ray_batch.CALLS) == (4096, 5, 8)
    assert_states(
        "docs/guides/batches.md",
        "within 4,096 lines",
        "Five lost workers with the same lines end the run",
        "The eight calls at once",
    )
