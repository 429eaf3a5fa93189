"""The floor: a roofline bound on the time of a step.

A step reads at least the weights that it uses, reads or writes K, V and the Mamba states once, and
does a known number of multiplications. A decode step need not write a state: it may keep its inputs
instead, which later steps replay, as the kernels do for `REPLAYED` tokens. The floor is the longer
of two times: moving these bytes at the rate of a large copy, and doing these operations at the rate
of a large matrix product. Both rates are measured on the device. Activations, launches and anything
that an implementation adds are not part of the floor.

Which experts the tokens of a step choose is not known, so experts count with the expected share
that is read under uniform routing. For one token that is a lower bound: it reads its own experts.
For more tokens it is an expectation: tokens that prefer the same experts read less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from granite_paged.bench.measure import Clock
from granite_paged.bench.workload import Workload
from granite_paged.geometry import CacheGeometry
from granite_paged.layers.mamba import REPLAYED, Kept, MambaSizes, mixers
from granite_paged.report.bench_results import Rates


@dataclass(frozen=True, slots=True)
class Work:
    """Minimum bytes moved and floating-point operations of one step."""

    bytes: float
    flops: float

    def seconds(self, rates: Rates) -> float:
        """Return the shortest time at these rates."""
        return max(self.bytes / rates.bytes_per_second, self.flops / rates.flops_per_second)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a model that determine the floor, from its config and parameters.

    Attributes:
        shared: parameters that every token uses, without the head.
        experts: parameters of all experts in all layers; 0 without experts.
        expert_count, experts_per_token: per layer.
        head: parameters of the output projection to the vocabulary.
        itemsize: bytes per parameter.
        kv_bytes: bytes of K and V per token, over all attention layers.
        attention_width: query heads x head_dim, summed over all attention layers.
        state_bytes: bytes of the Mamba states of one sequence, over all layers.
        kept_bytes: bytes of the inputs of `REPLAYED` tokens of one sequence, over all Mamba layers.
        state_size: elements of the recurrent states of one sequence, over all layers.
    """

    shared: int
    experts: int
    expert_count: int
    experts_per_token: int
    head: int
    itemsize: int
    kv_bytes: int
    attention_width: int
    state_bytes: int
    kept_bytes: int
    state_size: int

    @classmethod
    def of(cls, model: Any) -> ModelSizes:
        """Read the sizes of a `GraniteMoeHybridForCausalLM`."""
        config, dtype = model.config, model.dtype
        geometry = CacheGeometry.from_config(config, page_size=1, dtype=dtype)
        mamba = [MambaSizes.of(mixer) for mixer in mixers(model).values()]
        counts, state_bytes = _parameters(model), sum(sizes.state_bytes(dtype) for sizes in mamba)
        with_inputs = sum(sizes.state_bytes(dtype, Kept.REPLAY) for sizes in mamba)
        return cls(
            **counts,
            expert_count=config.num_local_experts or 0,
            experts_per_token=config.num_experts_per_tok or 0,
            head=config.vocab_size * config.hidden_size,
            itemsize=dtype.itemsize,
            kv_bytes=geometry.bytes_per_token,
            attention_width=len(geometry.attention_layers)
            * geometry.query_heads
            * geometry.head_dim,
            state_bytes=state_bytes,
            kept_bytes=with_inputs - state_bytes,
            state_size=sum(sizes.ssm_elements for sizes in mamba),
        )

    def prefill(self, batch: int, context: int) -> Work:
        """Return the work to prefill `batch` prompts of `context` tokens, with last logits only."""
        tokens = batch * context
        cache = batch * (context * self.kv_bytes + self.state_bytes)
        # causal: half of context**2; two products with two operations per element
        attention = 2 * batch * context**2 * self.attention_width
        return Work(
            bytes=self._expected_weight_bytes(tokens) + cache,
            flops=tokens * self._token_flops() + 2 * batch * self.head + attention,
        )

    def decode(self, batch: int, context: int) -> Work:
        """Return the work to decode one token for each of `batch` sequences of `context` tokens."""
        cache = batch * (context * self.kv_bytes + self._token_state_bytes())
        attention = 4 * batch * context * self.attention_width
        return Work(
            bytes=self._expected_weight_bytes(batch) + cache,
            flops=batch * (self._token_flops() + 2 * self.head) + attention,
        )

    def serve(self, workload: Workload) -> Work:
        """Return the expected work to serve a workload that arrives at once.

        The weights are read once per token of the longest answer, K, V and states at least once,
        and the states once per new token.
        """
        prompt, new = workload.expected_prompt, workload.expected_new
        states = workload.requests * self.state_bytes + new * self._token_state_bytes()
        return Work(
            bytes=workload.new_tokens[1] * self._most_weight_bytes(workload.requests)
            + (prompt + new) * self.kv_bytes
            + states,
            flops=(prompt + new) * self._token_flops() + 2 * new * self.head,
        )

    def _token_state_bytes(self) -> float:
        """Bytes of states and kept inputs that a decode step moves per sequence, on average.

        It reads the state and the inputs since it was stored. Once in `REPLAYED` tokens it stores
        the state, otherwise its inputs.
        """
        inputs = (REPLAYED - 1) / 2 + (REPLAYED - 1) / REPLAYED  # read, and stored
        states = 1 + 1 / REPLAYED
        return states * self.state_bytes + inputs * self.kept_bytes / REPLAYED

    def _expected_weight_bytes(self, tokens: int) -> float:
        """Bytes of the weights that a step of `tokens` reads, if routing is uniform."""
        return self._weight_bytes(1 - (1 - self._chosen_share) ** tokens)

    def _most_weight_bytes(self, tokens: int) -> float:
        """Bytes of the weights that `tokens` read if no two of them share an expert."""
        return self._weight_bytes(min(1.0, tokens * self._chosen_share))

    @property
    def _chosen_share(self) -> float:
        """Share of the experts that one token chooses."""
        return self.experts_per_token / max(1, self.expert_count)

    def _weight_bytes(self, touched: float) -> float:
        """Bytes of the weights with this share of the experts."""
        return self.itemsize * (self.shared + self.head + touched * self.experts)

    def _token_flops(self) -> float:
        used = self.experts * self.experts_per_token / max(1, self.expert_count)
        return 2 * (self.shared + used) + _STATE_FLOPS * self.state_size


_STATE_FLOPS = 5  # per element: decay, outer product and sum; product with C and sum


def _parameters(model: Any) -> dict[str, int]:
    """Count the parameters of layers and experts; the embedding is a lookup, or is the head."""
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    layers = [p for p in model.parameters() if id(p) not in embeddings]
    # experts are stacked, [E, out, in]; the only other 3-D weight is conv1d's, [C, 1, width]
    experts = sum(p.numel() for p in layers if p.dim() == 3 and p.shape[1] > 1)
    return {"shared": sum(p.numel() for p in layers) - experts, "experts": experts}


# -- the device ---------------------------------------------------------------------------------


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Time a large copy and a large matrix product; return the best rates of several tries."""
    gpu = device.type == "cuda"
    count, side = (2**30, 8192) if gpu else (2**24, 384)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    copy = _best_seconds(lambda: target.copy_(source), clock)
    factor = torch.randn(side, side, device=device).to(dtype)
    product = torch.empty_like(factor)
    multiply = _best_seconds(lambda: torch.mm(factor, factor, out=product), clock)
    return Rates(bytes_per_second=2 * count / copy, flops_per_second=2 * side**3 / multiply)


_TRIES, _CALLS = 3, 4


def _best_seconds(call: Callable[[], Any], clock: Clock) -> float:
    """Return the time of a call on the device, of several in a row: hosts differ."""

    def calls() -> None:
        for _ in range(_CALLS):
            call()

    times = [clock.kernel_seconds(calls, None) for _ in range(1 + _TRIES)]  # the first warms up
    return min(times[1:]) / _CALLS
